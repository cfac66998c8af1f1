"""What happens to members and broker, by the names that plan.py gives it."""

import os
import resource
import signal
import subprocess
import time

import harness
import members
import plan as planning

FOREVER = float("inf")


class Events:
    """Of a round, which has the rest."""

    def happen(self, event):
        index = event.slot
        p = self.current.get(index)
        if index is not None and p is None:
            return
        getattr(self, "do_" + event.what)(event, index, p)

    def do_kill(self, event, index, p):
        p.back = event.more["back"]
        self.say(f"kill {p.slot.name} ({p.worker}, pid {p.member()})")
        self.counts["kills"] += 1
        p.kill()

    def do_stop(self, event, index, p):
        if p.stopped is None and p.send(signal.SIGSTOP):
            p.stopped = time.monotonic()
            self.counts["stops"] += 1
            self.say(f"stop {p.slot.name} ({p.worker}) for {event.more['long']} s")
            self.soon(event.more["long"], lambda: self.current.get(index) is p and self.go_on(index, p))

    def do_leave(self, event, index, p):
        p.back = event.more["back"]
        self.say(f"leave {p.slot.name} ({p.worker})")
        p.leave()

    do_plain = do_leave

    def do_empty(self, event, *_):
        """All members of a database leave: its last close, and plain clients get in."""
        self.say(f"all leave {event.more['database']}")
        for index, p in self.current.items():
            if event.more["database"] in (p.slot.deck.main, p.slot.deck.attached):
                self.go_on(index, p)
                p.back = event.more["back"]
                p.leave()

    def do_checkpointer(self, *_):
        for pid in members.children(self.broker.pid) if self.broker.alive() else ():
            self.say(f"kill the broker's {members.name(pid)} ({pid})")
            self.counts["kills"] += 1
            os.kill(pid, signal.SIGKILL)

    def do_descriptors(self, event, *_):
        """The broker may open no more descriptors than it has."""
        if not self.broker.alive() or self.away and self.away[-1][1] == FOREVER:
            return
        pid = self.broker.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), before[1]))
        window = [time.monotonic(), FOREVER]
        self.away.append(window)
        self.say(f"the broker gets no descriptors for {event.more['long']:.1f} s")

        def enough():
            window[1] = time.monotonic()
            try:
                resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
            except ProcessLookupError:
                pass
        self.soon(event.more["long"], enough)

    def do_disk(self, event, *_):
        if self.disk.why_not:
            return
        window = [time.monotonic(), FOREVER]
        self.full.append(window)
        self.disk.fill()
        self.say(f"the small disk is full for {event.more['long']:.1f} s")

        def enough():
            self.disk.empty()
            window[1] = time.monotonic()
        self.soon(event.more["long"], enough)

    # --- the broker's death ----------------------------------------------------------------------------------

    def do_broker(self, event, *_):
        how, down = event.more["how"], event.more["down"]
        self.go_on_all()
        self.gone = time.monotonic()
        self.away.append([self.gone, FOREVER])
        self.counts["brokers"] += 1
        self.counts["kills"] += how != "term"
        if how == "kill":
            self.say("kill the broker")
            self.broker.kill()
            self.soon(planning.GRACE, self.members_went_on)
            self.soon(planning.GRACE + down, self.broker_back)
            return
        if how == "both":
            self.say("kill the broker and all members")
            self.held = set(range(len(self.plan.slots)))
            for p in self.current.values():
                p.kill()
            self.broker.kill()
            self.counts["kills"] += len(self.current)
        else:
            self.say("end the broker by SIGTERM")
            self.broker.process.send_signal(signal.SIGTERM)
            try:
                self.broker.process.wait(5 + planning.PATIENCE)
            except subprocess.TimeoutExpired:
                self.fault("the broker does not end")
            self.broker.process, ended = None, self.broker.process
            if ended.returncode:
                self.fault(f"the broker ended with {harness.ending(ended.returncode)}")
        self.soon(down, self.broker_back)

    def members_went_on(self):
        """The broker is dead: whoever is in goes on. But nobody finds those who wait in a circle, and in guest mode the
        turns are the broker's."""
        for p in self.current.values():
            if p.slot.steady and not p.slot.deck.attached and p.slot.deck.main != "mixed" and not p.leaving and p.started < self.gone - 3 and p.progress() < self.gone + 0.05:
                with open(p.log, errors="replace") as f:
                    last = f.read().splitlines()[-5:]
                self.fault(f"{p.slot.name} ({p.worker}) did not go on without the broker: {last}")

    def broker_back(self):
        self.broker.start()
        self.say("a new broker")
        self.held = set()
        self.away[-1][1] = time.monotonic()
        self.at(time.monotonic() + planning.PATIENCE, self.newcomers_got_in, time.monotonic())
        for index in range(len(self.plan.slots)):
            self.soon(0.1, self.start, index)

    def newcomers_got_in(self, since):
        """Of the members: the gate keeps a plain client out for as long as one of them is in."""
        for p in self.current.values():
            if p.slot.how != "plain" and p.started < since and p.progress() < since and p.stopped is None:
                self.fault(f"{p.slot.name} ({p.worker}) is not in again {planning.PATIENCE:g} s after the broker's return")
