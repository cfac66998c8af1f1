"""One round, drawn from the seed: which databases and members there are, and what happens to them when."""

import collections
import random

import decks

# `how`: load, run (under `turnstile run`) or plain. `clock`: seconds that its monotonic clock is ahead, "jumps" or None.
# `steady` never closes by itself.
Slot = collections.namedtuple("Slot", "name kind how deck env clock steady")
Event = collections.namedtuple("Event", "at what slot more")

LIMIT = 3.0  # seconds that a wait may last (TURNSTILE_WAIT)
PATIENCE = 8.0  # seconds, beyond the limits of waits, for whatever has to come to an end on a busy machine
GRACE = 2.0  # seconds after the broker's death in which nobody else dies
WHAT = ("kill", "stop", "leave", "empty", "checkpointer", "broker", "descriptors", "disk", "plain", "fork", "exec",
        "exhaust", "clock")

# Name, journal mode at the start, share of the members, name of what they attach.
DATABASES = (("wal", "wal", 7, None), ("first", "wal", 3, "second"), ("second", "wal", 2, "first"),
             ("del", "delete", 5, None), ("left", "delete", 2, "right"), ("right", "truncate", 2, "left"),
             ("switch", "wal", 4, None), ("small", "wal", 2, None), ("mixed", "wal", 3, None))
KINDS = ("c", "c", "python", "rust", "c", "python-run", "rust", "python", "c", "shell")


class Plan:
    def __init__(self, seed, n, seconds, members, without=(), small=True, only=None, broker=None, works=None, hurry=1.0):
        self.rng = rng = random.Random(f"{seed}/{n}")
        self.seconds = seconds
        self.on = [w for w in WHAT if w not in without]
        # What happens to the broker: by turns, so that a short run has something of each.
        self.broker = broker or (("none", "kill", "both", "term")[n % 4] if "broker" in self.on else "none")
        self.databases = {}
        for name, mode, _, attached in DATABASES:
            if (small or name != "small") and (only is None or name in only):
                if name in ("small", "mixed"):
                    mode = rng.choice(("wal", "delete"))
                self.databases[name] = mode
        self.works, self.hurry = works, hurry
        self.slots = self._slots(members)
        self.events = sorted(self._events(), key=lambda e: e.at)

    def _slots(self, members):
        rng, slots = self.rng, []
        places = [d for d in DATABASES if d[0] in self.databases]
        shares = [p for p in places for _ in range(p[2])]
        for i in range(members):
            place = shares[i * len(shares) // members] if members < len(shares) else shares[i % len(shares)]
            name, _, _, attached = place
            plain = name == "mixed" and i % 2 and "plain" in self.on
            kind = rng.choice(("c", "python")) if plain else rng.choice(KINDS)
            weights = {w: 0 for w in ("fork", "exhaust") if w not in self.on or plain or kind == "shell"}
            # Who leaves without a word beside a dead broker is cleared away by nobody.
            if "exec" not in self.on or plain or kind == "shell" or self.broker != "none":
                weights["exec_"] = 0
            steady = not plain and rng.random() < 0.4
            if steady:
                weights.update(reopen=0, exec_=0, exhaust=0)
            if name == "switch":
                weights["journal"] = 3
            if name == "small":
                weights["bulk"] = 25
            if name in ("wal", "first", "second"):
                weights["vacuum"] = 0.1
            if kind == "rust":
                weights["back"] = 3
            caches = (2000,) if name == "small" and kind != "rust" else (5, 10, 100, 2000)
            manners = [m for m in decks.MANNERS if m != "own-exit" or self.broker == "none"]
            deck = decks.draw(rng, name, attached, weights, manners, only=self.works, never=[w for w in weights if not weights[w]], caches=caches)
            how = "plain" if plain else "run" if kind in ("python-run", "shell") else "load"
            env = {"TURNSTILE_BEGIN": rng.choice(("learn", "learn", "learn", "immediate", "deferred"))}
            clock = None
            if "clock" in self.on and kind in ("c", "rust") and not plain:
                clock = rng.choice((None, None, None, "jumps", 1_000_000))
            slots.append(Slot(f"{i:02}-{name}-{kind}" + ("-plain" if plain else ""), kind, how, deck, env, clock, steady))
        return slots

    def _events(self):
        rng, events = self.rng, []

        def at(what, every, slots=None, **more):
            """Events of one kind, one in `every` seconds on average."""
            every /= self.hurry
            t = rng.uniform(0.3, 0.3 + every)
            while what in self.on and t < self.seconds - 0.3:
                slot = rng.choice(slots) if slots else None
                events.append(Event(t, what, slot, {k: v() for k, v in more.items()}))
                t += rng.expovariate(1 / every)

        numbers = range(len(self.slots))
        plain = [i for i in numbers if self.slots[i].how == "plain"]
        at("kill", 0.35, numbers, back=lambda: rng.choice((0, 0.05, 0.5)))
        at("stop", 0.7, numbers, long=lambda: rng.choice((0.02, 0.1, 0.3, 1, 1.5, LIMIT + 1)))
        at("leave", 0.8, numbers, back=lambda: rng.choice((0, 0, 0.3)))
        at("empty", 5, None, database=lambda: rng.choice(list(self.databases)), back=lambda: rng.uniform(0.3, 1))
        at("checkpointer", 6)
        at("descriptors", 9, long=lambda: rng.uniform(0.1, 0.6))
        if "small" in self.databases:
            at("disk", 5, long=lambda: rng.uniform(0.3, 1.5))
        if plain:
            at("plain", 2, plain, back=lambda: rng.uniform(0.1, 2))
        if self.broker == "none":
            return events
        begin = self.seconds * rng.uniform(0.35, 0.55)
        down = rng.uniform(0.1, 1.5)
        # Who died before the broker has been cleared away; who was stopped goes on.
        quiet = [e for e in events if e.at + e.more.get("long", 0) < begin - 1 or e.at > begin + GRACE + down + 1]
        quiet.append(Event(begin, "broker", None, {"how": self.broker, "down": down}))
        return quiet
