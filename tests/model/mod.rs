//! What the model checks share: scenarios of a few seats on words of their own, and the two checkers that run them
//! ([`explore`], and loom).

#![allow(dead_code)]

pub mod actor;
mod asleep;
mod engine;
mod explore;
pub mod world;

pub use actor::*;
pub use engine::{choose, mix, post, sleep, wait_for_post, wake};
use explore::{Plan, explore};
use std::cell::Cell;
use std::panic::RefUnwindSafe;
use std::rc::Rc;
use turnstile::lock::queue::{Lane, Queue};
use turnstile::lock::{Ask, Release, SeatId, Verdict};
use turnstile::planted::fails_without;
use turnstile::segment::atomic::{Relaxed, SeqCst};
use turnstile::segment::layout::PROBATION_OVER;
pub use world::{SEATS, World};

/// What a thread does.
type Body = Rc<dyn Fn(&Actor)>;

/// What the seats do, and what must hold.
#[derive(Clone)]
pub struct Scenario {
    seats: Vec<(SeatId, Body)>,
    setup: Rc<dyn Fn(&World)>,
    always: Rc<dyn Fn(&World)>,
    finally: Rc<dyn Fn(&World)>,
    scripts: Rc<Vec<(SeatId, Vec<Step>)>>,
    mortal: u8,
    servers: u8,
    preemptions: Option<usize>,
}

/// The same under loom.
pub fn check_under_loom(rules: &[&str], scenario: impl Fn() -> Scenario + RefUnwindSafe) {
    if !cfg!(feature = "planted") || rules.is_empty() {
        scenario().under_loom();
    } else {
        rules.iter().for_each(|rule| fails_without(rule, || scenario().under_loom()));
    }
}

/// Loom wants what it could send to other threads, and has none.
struct Unsync<T>(T);

impl<T> Unsync<T> {
    fn get(&self) -> &T {
        &self.0
    }
}

// SAFETY: loom runs a model on the thread that asked for it.
unsafe impl<T> Send for Unsync<T> {}
// SAFETY: likewise.
unsafe impl<T> Sync for Unsync<T> {}

/// What a client on the socket lane does.
#[derive(Clone)]
pub enum Step {
    Ask(Ask),
    Release(Release),
    Inside,
    InsideReader,
}

/// Answers in [`World::mail`]; below that, the step that is asked for.
const GRANTED: u32 = 1000;
const REFUSED: u32 = 1001;

/// Explores it; in a build with planted bugs also without each of these rules, where it must fail.
pub fn check(rules: &[&str], scenario: impl Fn() -> Scenario + RefUnwindSafe) {
    if !cfg!(feature = "planted") || rules.is_empty() {
        scenario().explore();
    } else {
        rules.iter().for_each(|rule| fails_without(rule, || scenario().explore()));
    }
}

impl Scenario {
    /// Nobody is on probation, and at the end everything is free.
    pub fn new() -> Scenario {
        Scenario {
            seats: Vec::new(),
            setup: Rc::new(|w| w.words.file.0.probation.store(PROBATION_OVER, Relaxed)),
            always: Rc::new(|_| ()),
            finally: Rc::new(World::is_quiet),
            scripts: Rc::default(),
            mortal: 0,
            servers: 0,
            preemptions: None,
        }
    }

    pub fn setup(mut self, setup: impl Fn(&World) + 'static) -> Scenario {
        let before = self.setup;
        self.setup = Rc::new(move |w| {
            before(w);
            setup(w)
        });
        self
    }

    /// No more than so many times does a thread that could go on give way to another; and so many more as
    /// `MODEL_PREEMPTIONS` says.
    pub fn preemptions(mut self, most: usize) -> Scenario {
        let more = std::env::var("MODEL_PREEMPTIONS").ok().and_then(|n| n.parse::<usize>().ok());
        self.preemptions = Some(most + more.unwrap_or(0));
        self
    }

    /// Every seat's commits wait for a sync outside the turn.
    pub fn hurry(self) -> Scenario {
        self.streaks().setup(|w| w.hurry.set(true))
    }

    pub fn streaks(self) -> Scenario {
        self.setup(|w| w.streaks.set(true))
    }

    /// A thread that is seat `id`.
    pub fn seat(mut self, id: SeatId, body: impl Fn(&Actor) + 'static) -> Scenario {
        self.seats.push((id, Rc::new(body)));
        self
    }

    /// A seat that may stop for ever anywhere. One of those that may does, or none.
    pub fn mortal(mut self, id: SeatId, body: impl Fn(&Actor) + 'static) -> Scenario {
        self.mortal |= 1 << self.seats.len();
        self.seat(id, body)
    }

    /// A seat on the socket lane, a client that does these steps until one is refused.
    pub fn socket(mut self, id: SeatId, steps: Vec<Step>) -> Scenario {
        Rc::make_mut(&mut self.scripts).push((id, steps.clone()));
        self.seat(id, move |a| {
            let mail = &a.world.mail[id as usize - 1];
            for (i, step) in steps.iter().enumerate() {
                match step {
                    Step::Inside => {
                        a.world.enter(id);
                        a.world.leave(id);
                    }
                    Step::InsideReader => {
                        a.world.enter_reader(id);
                        a.world.leave_reader(id);
                    }
                    Step::Ask(_) | Step::Release(_) => {
                        mail.store(i as u32 + 1, SeqCst);
                        post(BROKER);
                        wait_for_post(id as usize);
                        if mail.load(SeqCst) == REFUSED {
                            return;
                        }
                    }
                }
            }
        })
    }

    /// The broker, for the seats on the socket lane. It sleeps until there is a message.
    pub fn broker(mut self) -> Scenario {
        self.servers |= 1 << self.seats.len();
        let scripts = Rc::clone(&self.scripts);
        self.seat(BROKER as SeatId, move |a| {
            let mut queue = Queue::default();
            let answer = |id: SeatId, verdict: Verdict| {
                let answer = if is_granted(verdict) { GRANTED } else { REFUSED };
                a.world.mail[id as usize - 1].store(answer, SeqCst);
                post(id as usize);
            };
            loop {
                let mut lane = Lane { queue: &mut queue, table: a.table(), parking: &a.futex };
                for (id, script) in scripts.iter() {
                    let mail = &a.world.mail[*id as usize - 1];
                    let Some(step) = script.get((mail.load(SeqCst) as usize).wrapping_sub(1)) else {
                        continue;
                    };
                    mail.store(0, SeqCst);
                    match step {
                        Step::Ask(ask) => {
                            if let Some(verdict) = lane.submit(*id, *ask, (0, 0)) {
                                answer(*id, verdict);
                            }
                        }
                        Step::Release(release) => {
                            lane.release(*id, *release);
                            answer(*id, Verdict::Granted { turn: false, probation: false });
                        }
                        Step::Inside | Step::InsideReader => {}
                    }
                }
                lane.settle().into_iter().for_each(|(id, verdict)| answer(id, verdict));
                wait_for_post(BROKER);
            }
        })
    }

    /// Holds after every access.
    pub fn always(mut self, check: impl Fn(&World) + 'static) -> Scenario {
        self.always = Rc::new(check);
        self
    }

    /// Holds at the end, besides everything being free.
    pub fn finally(mut self, check: impl Fn(&World) + 'static) -> Scenario {
        self.finally = Rc::new(move |w| {
            check(w);
            w.is_quiet()
        });
        self
    }

    fn world(&self) -> Rc<World> {
        let world = Rc::new(World::default());
        (0..SEATS).for_each(|s| world.table().members.set(s as SeatId + 1));
        (self.setup)(&world);
        world
    }

    /// The same under loom, which knows neither choices nor deaths. `always` is not looked at.
    pub fn under_loom(&self) {
        let scenario = self.clone();
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = scenario.preemptions;
        builder.max_branches = 10_000;
        let runs = Rc::new(Cell::new(0u64));
        let begun = std::time::Instant::now();
        let told = Rc::clone(&runs);
        let scenario = Unsync(scenario);
        let counted = Unsync(runs);
        builder.check(move || {
            let (scenario, runs) = (scenario.get(), counted.get());
            runs.set(runs.get() + 1);
            let beds = (0..=SEATS).map(|_| Default::default()).collect();
            let world = Rc::new(World { beds, ..World::default() });
            (scenario.setup)(&world);
            let threads: Vec<_> = scenario
                .seats
                .iter()
                .cloned()
                .map(|(id, body)| {
                    let actor = Actor::new(&world, id);
                    loom::thread::spawn(move || body(&actor))
                })
                .collect();
            threads.into_iter().for_each(|t| t.join().unwrap());
            (scenario.finally)(&world);
        });
        if std::env::var_os("MODEL_VERBOSE").is_some() {
            eprintln!("loom: {} runs, {:.1} s", told.get(), begun.elapsed().as_secs_f64());
        }
    }

    /// Explores every run.
    pub fn explore(&self) {
        explore(self.preemptions, || {
            let world = self.world();
            let mut threads: Vec<Box<dyn FnOnce()>> = Vec::new();
            for (id, body) in self.seats.iter().cloned() {
                let actor = Actor::new(&world, id);
                threads.push(Box::new(move || body(&actor)));
            }
            let ids: Vec<_> = self.seats.iter().map(|(id, _)| *id).collect();
            let (w1, w2, w3, w4, w5) = (
                Rc::clone(&world),
                Rc::clone(&world),
                Rc::clone(&world),
                Rc::clone(&world),
                Rc::clone(&world),
            );
            let (always, finally) = (Rc::clone(&self.always), Rc::clone(&self.finally));
            Plan {
                threads,
                memory: (Rc::as_ptr(&world) as usize, size_of::<World>()),
                mortal: self.mortal,
                reaper: Some(Box::new(move |thread| reap(&w1, ids[thread]))),
                servers: self.servers,
                ghost: Box::new(move || {
                    mix(u64::from(w2.standing.get()) << 8 | u64::from(w2.had.get()), w2.disk.state())
                }),
                always: Box::new(move || always(&w3)),
                finally: Box::new(move || finally(&w4)),
                describe: Box::new(move |offset| w5.describe(offset)),
            }
        });
    }
}

/// The broker's clean-up after a seat that is dead.
fn reap(world: &Rc<World>, dead: SeatId) {
    if world.inside.get() == dead {
        world.inside.set(0);
    }
    world.leave_reader(dead);
    let futex = Futex::new(world, BROKER as SeatId, false);
    Lane { queue: &mut Queue::default(), table: world.table(), parking: &futex }.remove(dead);
}
