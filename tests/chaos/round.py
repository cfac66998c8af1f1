"""One round: starts broker and members, lets happen what the plan says, ends everything and looks what is left."""

import glob
import heapq
import itertools
import os
import shutil
import signal
import time

import decks
import harness
import members
import plan as planning
import smalldisk
from events import Events


class Broker(harness.Broker):
    """A broker whose directory is the round's."""

    def __init__(self, directory, env):
        super().__init__(env={**env, "TURNSTILE_LOG": "info,turnstile::broker::waits=debug"})
        self.dir = directory
        self.socket, self.logfile, self.record = (os.path.join(directory, n) for n in ("s", "broker.log", "unused"))

    def descriptors(self):
        """What it has open, without the numbers that differ each time."""
        found = []
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                found.append(os.readlink(f"/proc/{self.pid}/fd/{fd}").split(":[")[0])
            except OSError:
                pass
        return sorted(found)


    def descriptors_in_full(self):
        """For people."""
        found = []
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                with open(f"/proc/{self.pid}/fdinfo/{fd}") as f:
                    who = [line.strip() for line in f if line.startswith("Pid:")]
                found.append(" ".join([fd, os.readlink(f"/proc/{self.pid}/fd/{fd}"), *who]))
            except OSError:
                pass
        return found


class Round(Events):
    def __init__(self, plan, directory):
        self.plan, self.dir = plan, directory
        self.logs, self.decks, self.data = (os.path.join(directory, n) for n in ("logs", "decks", "data"))
        for d in (self.logs, self.decks, self.data):
            os.mkdir(d)
        self.programs, self.missing = members.programs()
        self.time_namespace = True
        self.faults, self.events, self.skips = [], [], []
        self.stops = []  # (slot index, since, until)
        self.away = []  # [since, until]: the broker does not answer, or not well
        self.full = []  # [since, until]: the small disk
        self.counts = {"kills": 0, "stops": 0, "restarts": 0, "brokers": 0}
        self.agenda, self.order = [], itertools.count()
        self.held = set()  # slots that nobody starts now
        self.env = {"TURNSTILE_WAIT": f"{planning.LIMIT * 1000:.0f}ms", "TURNSTILE_FALLBACK": "refuse", "TURNSTILE_SOCKET":
                    os.path.join(directory, "s")}
        if "TURNSTILE_PLANTED" in os.environ:
            self.env["TURNSTILE_PLANTED"] = os.environ["TURNSTILE_PLANTED"]
        self.broker = Broker(directory, self.env)
        self.disk = None
        self.current, self.generations, self.ended = {}, {}, []

    # --- what the plan's names mean here ---------------------------------------------------------------------

    def path(self, name):
        where = self.disk.path if name == "small" and self.disk else self.data
        return os.path.join(where, name + ".db")

    def placed(self, deck):
        """The deck with paths instead of databases' names."""
        attached = deck.attached and self.path(deck.attached)
        opening = [line.replace(f"'{deck.attached}'", f"'{attached}'") for line in deck.opening]
        return deck._replace(main=self.path(deck.main), attached=attached, opening=opening)

    # --- the run ---------------------------------------------------------------------------------------------

    def run(self):
        """Everything up to the end of the last process. What was wrong is in `faults`."""
        if "small" in self.plan.databases:
            self.disk = smalldisk.SmallDisk(self.dir)
        for name, mode in self.plan.databases.items():
            harness.plain(self.path(name), f"PRAGMA journal_mode={mode};" + decks.SCHEMA)
        self.broker.start()
        self.baseline = self.broker.descriptors()
        self.started = time.monotonic()
        for i in range(len(self.plan.slots)):
            self.start(i)
        for event in self.plan.events:
            self.at(self.started + event.at, self.happen, event)
        self.loop(self.started + self.plan.seconds)
        self.settle()
        self.finish()

    def at(self, when, what, *arguments):
        heapq.heappush(self.agenda, (when, next(self.order), what, arguments))

    def soon(self, seconds, what, *arguments):
        self.at(time.monotonic() + seconds, what, *arguments)

    def loop(self, until):
        looked = 0.0
        while time.monotonic() < until and not self.faults:
            now = time.monotonic()
            while self.agenda and self.agenda[0][0] <= now:
                _, _, what, arguments = heapq.heappop(self.agenda)
                what(*arguments)
            self.reap()
            if now > looked + 1:
                looked = now
                self.look_for_the_stuck()
            time.sleep(0.01)

    def say(self, text):
        self.events.append(f"{time.monotonic() - self.started:8.3f}  {text}")

    def fault(self, text):
        self.faults.append(text)
        self.say(f"FAULT {text}")

    # --- members ---------------------------------------------------------------------------------------------

    def start(self, index):
        slot = self.plan.slots[index]
        if index in self.held or index in self.current or slot.kind not in self.programs:
            return
        generation = self.generations[index] = self.generations.get(index, -1) + 1
        self.current[index] = members.Process(slot, index, generation, self)
        self.counts["restarts"] += generation > 0

    def reap(self):
        for index, p in list(self.current.items()):
            status = p.process.poll()
            if status is None:
                continue
            del self.current[index]
            self.ended.append(p)
            p.leave()
            self.resumed(index, p)
            if not p.killed and status:
                self.fault(f"{p.slot.name} ({p.worker}) ended by itself: {harness.ending(status)}: {p.said()[-800:]}")
            self.soon(getattr(p, "back", 0), self.start, index)
        members.reap_orphans({p.process.pid for p in self.current.values()} | {self.broker.process and self.broker.pid})

    def resumed(self, index, p):
        if p.stopped is not None:
            self.stops.append((index, p.stopped, time.monotonic()))
            p.stopped = None

    def go_on(self, index, p):
        if p.stopped is not None:
            p.go_on()
            self.resumed(index, p)

    def go_on_all(self):
        for index, p in self.current.items():
            self.go_on(index, p)

    def look_for_the_stuck(self):
        now = time.monotonic()
        for index, p in self.current.items():
            try:
                silent = now - (os.stat(p.log).st_mtime - time.time() + now)
            except OSError:
                silent = now - p.started
            # A work is a few statements, each with a wait of its own; the longest in silence is an opening.
            if p.stopped is None and silent > 4 * planning.LIMIT + planning.PATIENCE and not self.stopped_lately(index, now - silent):
                self.fault(f"{p.slot.name} ({p.worker}, pid {p.member()}) has done nothing for {silent:.0f} s\n"
                           + self.status())
                return

    def stopped_lately(self, index, since):
        return any(i == index and until > since for i, _, until in self.stops)

    def status(self):
        try:
            return harness.run([harness.bin(), "status"], env=self.broker.env, timeout=10, check=False).stdout
        except AssertionError as e:
            return str(e)

    # --- the end ---------------------------------------------------------------------------------------------

    def settle(self):
        """Nothing happens any more: everybody gets something done."""
        self.agenda = [a for a in self.agenda if a[2] not in (self.happen,)]
        heapq.heapify(self.agenda)
        while self.agenda and not self.faults:
            self.loop(time.monotonic() + 0.05)
        self.go_on_all()
        for index in range(len(self.plan.slots)):
            self.start(index)
        since = time.monotonic()
        self.say("quiet from here on")
        while not self.faults:
            waiting = [p for p in self.current.values() if p.slot.how != "plain" and p.progress() < since]
            if not waiting:
                break
            if time.monotonic() > since + 4 * planning.LIMIT + planning.PATIENCE:
                names = ", ".join(f"{p.slot.name} ({p.worker})" for p in waiting)
                self.fault(f"nothing disturbs them, and they get nothing done: {names}\n{self.status()}")
            self.loop(time.monotonic() + 0.1)
        self.settled = time.monotonic() - since

    def finish(self):
        self.held = set(range(len(self.plan.slots)))
        for p in self.current.values():
            p.leave()
        limit = time.monotonic() + 4 * planning.LIMIT + planning.PATIENCE
        while self.current and time.monotonic() < limit and not self.faults:
            self.reap()
            time.sleep(0.01)
        for p in self.current.values():
            if not self.faults:
                self.fault(f"{p.slot.name} ({p.worker}, pid {p.member()}) does not end\n{self.status()}")
            p.end()
        if not self.faults:
            self.nothing_is_left()
        if self.broker.alive():
            try:
                self.broker.stop()
            except AssertionError as e:
                self.fault(str(e))
        elif self.broker.process is not None:
            self.fault(f"the broker has ended by itself: {harness.ending(self.broker.process.returncode)}")
        if any("panicked at" in line for line in self.broker.log().splitlines()):
            self.fault("the broker has logged a panic")
        if not self.faults:
            self.no_process_is_left()

    def nothing_is_left(self):
        """Of those who have ended: no seat, no descriptor in the broker, no lock, no children."""
        try:
            harness.wait_until(lambda: not [c for c in self.others()], 30, "the children of members to end")
            harness.wait_until(lambda: not self.broker.status()["databases"], planning.PATIENCE, "the broker to let go of all")
            harness.wait_until(lambda: not self.more_descriptors(), planning.PATIENCE, "the broker's descriptors")
            for name in self.plan.databases:
                harness.plain(self.path(name), "BEGIN IMMEDIATE; ROLLBACK", retry=2)
        except AssertionError as e:
            self.fault(f"{e}: {self.more_descriptors()} of {self.broker.descriptors_in_full()} "
                       f"{self.broker.status()['databases']}")

    def others(self):
        """Processes that are neither the broker nor its children."""
        members.reap_orphans({self.broker.pid})
        mine = set(members.descendants(os.getpid()))
        return mine - {self.broker.pid, *members.descendants(self.broker.pid), *members.keepers()}

    def more_descriptors(self):
        """What the broker has open beyond what it had at its start, and what it has of its children."""
        left = self.broker.descriptors()
        for d in self.baseline:
            if d in left:
                left.remove(d)
        for _ in members.keepers():
            for d in ("socket", "anon_inode:[pidfd]", "anon_inode"):
                if d in left:
                    left.remove(d)
        # Who closes files for it ends when it has had nothing to do for 10 s.
        for pid in members.descendants(self.broker.pid):
            if members.name(pid) == "turnstile-recv" and "socket" in left:
                left.remove("socket")
        return left

    def no_process_is_left(self):
        try:
            harness.wait_until(lambda: not (members.reap_orphans(set()), members.children(os.getpid()))[1], planning.PATIENCE,
                               "the last process to end")
        except AssertionError as e:
            self.fault(f"{e}: {members.children(os.getpid())}")
        if os.path.exists(self.broker.socket):
            self.fault("the broker's socket is still there")

    def clean(self, keep):
        with open(os.path.join(self.dir, "events"), "w") as f:
            f.writelines(e + "\n" for e in self.events)
        for p in [*self.current.values()]:
            p.end()
        if self.broker.process is not None and self.broker.process.poll() is None:
            self.broker.process.kill()
            self.broker.process.wait(10)
        for pid in members.descendants(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        members.reap_orphans(set())
        if self.disk is not None and not self.disk.why_not:
            if keep:
                for path in glob.glob(os.path.join(self.disk.path, "small.db*")):
                    shutil.copy(path, self.data)
            if not self.disk.unmount() and not keep:
                return "somebody still uses the small disk"
        if not keep:
            shutil.rmtree(self.dir, ignore_errors=True)
        return None
