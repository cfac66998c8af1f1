//! Explores every run of a few threads over shared words: every interleaving of their accesses, every answer of
//! [`choose`](super::engine::choose), and, where asked for, every point at which one of them can die.
//!
//! An access to a shared word is indivisible and all accesses are SeqCst, so a run is a sequence of accesses. Threads
//! are coroutines that stop before each access; the explorer says who goes on, depth first, from the beginning for
//! every run. Two things keep the number of runs small, without leaving anything out:
//!
//! * A state that was there before is not explored again. A thread's future depends on what it has read so far, so
//!   a state is: the words, and for each thread everything that it has read (64 bits of hash).
//! * Only accesses to words that several threads use and one of them writes are scheduled. Which those are is found
//!   out on the way; when there is a new one, everything begins anew.

use super::engine::{ENGINE, Engine, Stop, WordUse, mix};
use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::cell::RefCell;
use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use turnstile::segment::checked::set_watch;

/// Accesses of one run after which it is taken for one that does not end.
const LONGEST_RUN: usize = 4000;
/// The choice that a thread dies.
const DIES: u8 = 15;

/// One run to be explored.
pub struct Plan {
    pub threads: Vec<Box<dyn FnOnce()>>,
    /// Where the shared words are: address and size in bytes.
    pub memory: (usize, usize),
    /// Threads of which one may die (a bit each), and what then begins: the broker's clean-up.
    pub mortal: u8,
    pub reaper: Option<Box<dyn FnOnce(usize)>>,
    /// A thread (bit) that waits for messages for ever and may do so when all others have ended.
    pub servers: u8,
    /// What more than words and histories the future depends on.
    pub ghost: Box<dyn Fn() -> u64>,
    /// Holds after each access.
    pub always: Box<dyn Fn()>,
    /// Holds when all have ended.
    pub finally: Box<dyn FnOnce()>,
    pub describe: Box<dyn Fn(usize) -> String>,
}

#[derive(Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {}
    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

#[derive(Default)]
struct Explorer {
    visited: HashSet<u64, BuildHasherDefault<Identity>>,
    /// The decisions of the present run: what was chosen, and what is still to be tried in its place.
    trail: Vec<(u8, Vec<u8>)>,
    runs: u64,
    preemptions: Option<usize>,
}

struct Thread {
    coroutine: Option<Coroutine<u8, Stop, (), DefaultStack>>,
    yielder: Option<*const Yielder<u8, Stop>>,
    stop: Stop,
}

impl Drop for Thread {
    fn drop(&mut self) {
        if let Some(mut coroutine) = self.coroutine.take() {
            coroutine.force_unwind();
            STACKS.with_borrow_mut(|stacks| stacks.push(coroutine.into_stack()));
        }
    }
}

thread_local! {
    /// Stacks to be used again: making one is a system call.
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// Runs what `plan` makes, in every way there is; with a bound, in every way with at most so many preemptions.
pub fn explore(preemptions: Option<usize>, plan: impl Fn() -> Plan) {
    let engine: &'static Engine = ENGINE.with(|e| *e);
    set_watch(Some(engine));
    engine.uses.borrow_mut().clear();
    let mut explorer = Explorer { preemptions, ..Explorer::default() };
    let begun = std::time::Instant::now();
    let verbose = std::env::var_os("MODEL_VERBOSE").is_some();
    loop {
        engine.found.set(false);
        explorer.run(engine, plan());
        explorer.runs += 1;
        if engine.found.get() {
            explorer.visited.clear();
            explorer.trail.clear();
            continue;
        }
        if verbose && explorer.runs.is_multiple_of(1 << 20) {
            eprintln!("{} states, {} runs, {:?}", explorer.visited.len(), explorer.runs, begun.elapsed());
        }
        while explorer.trail.pop_if(|(_, others)| others.is_empty()).is_some() {}
        let Some((choice, others)) = explorer.trail.last_mut() else { break };
        *choice = others.pop().unwrap();
    }
    set_watch(None);
    if verbose {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        let (states, runs) = (explorer.visited.len(), explorer.runs);
        eprintln!("{name}: {states} states, {runs} runs, {:.1} s", begun.elapsed().as_secs_f64());
    }
}

/// How far a run has come.
struct Run {
    threads: Vec<Option<Thread>>,
    decisions: usize,
    dead: u8,
    /// Who went on last, and how often somebody did in place of one that could have.
    last: usize,
    preemptions: usize,
}

impl Run {
    /// Who could go on, and with which answer: a thread's number, shifted, and the answer.
    fn runnable(&self, engine: &Engine) -> Vec<u8> {
        let mut options = Vec::new();
        for (i, thread) in self.threads.iter().enumerate() {
            let i = (i as u8) << 4;
            match thread.as_ref().map(|t| t.stop) {
                Some(Stop::Sleep(id)) if engine.asleep.get() >> id & 1 != 0 => {}
                Some(Stop::Signal(id)) if engine.signals.get() >> id & 1 == 0 => {}
                Some(Stop::Choice(n)) => options.extend((0..n).map(|k| i | k)),
                Some(_) => options.push(i),
                None => {}
            }
        }
        options
    }

    fn alive(&self) -> impl Iterator<Item = usize> + '_ {
        self.threads.iter().enumerate().filter(|(_, t)| t.is_some()).map(|(i, _)| i)
    }

    fn go_on(&mut self, engine: &'static Engine, plan: &mut Plan, choice: u8) {
        let (i, answer) = ((choice >> 4) as usize, choice & 0xf);
        if answer == DIES {
            self.dead |= 1 << i;
            self.threads[i] = None;
            engine.log.borrow_mut().push((i, usize::MAX, 0, 0));
            let reaper = plan.reaper.take().unwrap();
            let body = Box::new(move || reaper(i));
            self.threads.push(begin(engine, plan, self.threads.len(), body));
        } else if let Some(thread) = self.threads[i].take() {
            self.last = i;
            self.threads[i] = resume(engine, plan, i, thread, answer);
        }
    }
}

impl Explorer {
    fn run(&mut self, engine: &'static Engine, mut plan: Plan) {
        engine.begin(plan.memory);
        let mut run = Run { threads: Vec::new(), decisions: 0, dead: 0, last: usize::MAX, preemptions: 0 };
        for (i, body) in std::mem::take(&mut plan.threads).into_iter().enumerate() {
            run.threads.push(begin(engine, &plan, i, body));
        }
        for _ in 0..LONGEST_RUN {
            let mut options = run.runnable(engine);
            if options.is_empty() {
                if run.alive().any(|i| plan.servers >> i & 1 == 0) {
                    fail(engine, &plan, "everybody sleeps");
                }
                let finally = std::mem::replace(&mut plan.finally, Box::new(|| ()));
                return checked(engine, &plan, finally);
            }
            let goes_on = |option: &u8| (*option >> 4) as usize == run.last;
            let preempts = options.iter().any(goes_on);
            if preempts && self.preemptions.is_some_and(|most| run.preemptions >= most) {
                options.retain(goes_on);
            }
            if plan.reaper.is_some() {
                let mortal = run.alive().filter(|i| plan.mortal >> i & 1 != 0);
                options.extend(mortal.map(|i| (i as u8) << 4 | DIES));
            }
            let Some(choice) = self.choose(engine, &plan, &mut run, options) else { return };
            let other = choice & 0xf != DIES && (choice >> 4) as usize != run.last;
            run.preemptions += usize::from(preempts && other);
            run.go_on(engine, &mut plan, choice);
            checked(engine, &plan, &plan.always);
        }
        fail(engine, &plan, "this run does not end");
    }

    /// What the trail says, else the first of the options. `None`: from here on all is known.
    fn choose(&mut self, engine: &Engine, plan: &Plan, run: &mut Run, mut options: Vec<u8>) -> Option<u8> {
        // Once a word has turned out to be shared the trail leads elsewhere; this run is only there to find more.
        if options.len() == 1 || engine.found.get() {
            return options.pop();
        }
        run.decisions += 1;
        if let Some((choice, _)) = self.trail.get(run.decisions - 1) {
            return Some(*choice);
        }
        let bound = self.preemptions.map_or(0, |_| (run.last as u64) << 8 | run.preemptions as u64);
        let rest = [run.dead.into(), (plan.ghost)(), bound];
        if !self.visited.insert(rest.into_iter().fold(engine.state(), mix)) {
            return None;
        }
        let choice = options.pop()?;
        self.trail.push((choice, options));
        Some(choice)
    }
}

/// A thread at its first access. What it does before is its own, so nobody need come in between.
fn begin(engine: &'static Engine, plan: &Plan, i: usize, body: Box<dyn FnOnce()>) -> Option<Thread> {
    let stack = STACKS.with_borrow_mut(Vec::pop).unwrap_or_else(|| DefaultStack::new(64 << 10).unwrap());
    let mut coroutine = Coroutine::with_stack(stack, move |yielder: &Yielder<u8, Stop>, _| {
        engine.yielder.set(Some(yielder));
        yielder.suspend(Stop::Access);
        body();
    });
    let _ = coroutine.resume(0);
    let thread = Thread { coroutine: Some(coroutine), yielder: engine.yielder.take(), stop: Stop::Access };
    resume(engine, plan, i, thread, 0)
}

fn resume(engine: &Engine, plan: &Plan, i: usize, mut thread: Thread, choice: u8) -> Option<Thread> {
    let coroutine = thread.coroutine.as_mut()?;
    engine.running.set(Some(i));
    engine.yielder.set(thread.yielder);
    let stopped = catch_unwind(AssertUnwindSafe(|| coroutine.resume(choice)));
    engine.learn(1);
    engine.running.set(None);
    engine.yielder.set(None);
    match stopped {
        Ok(CoroutineResult::Yield(stop)) => {
            thread.stop = stop;
            Some(thread)
        }
        Ok(CoroutineResult::Return(())) => None,
        Err(panic) => {
            tell(engine, plan);
            resume_unwind(panic)
        }
    }
}

fn checked(engine: &Engine, plan: &Plan, check: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(check)) {
        tell(engine, plan);
        resume_unwind(panic);
    }
}

fn fail(engine: &Engine, plan: &Plan, why: &str) -> ! {
    tell(engine, plan);
    panic!("{why}");
}

/// What has happened in this run.
fn tell(engine: &Engine, plan: &Plan) {
    let log = engine.log.borrow();
    let shared = |i: usize| engine.uses.borrow().get(i).is_none_or(WordUse::is_shared);
    for (thread, index, old, new) in log.iter().skip(log.len().saturating_sub(400)) {
        let word = (plan.describe)(*index * 4);
        match (*index, old == new) {
            (usize::MAX, _) => eprintln!("{thread}: dies"),
            (i, _) if !shared(i) => {}
            (_, true) => eprintln!("{thread}: {word} is {old:#x}"),
            (_, false) => eprintln!("{thread}: {word} {old:#x} -> {new:#x}"),
        }
    }
}
