"""Feeds the sqlite3 shell, started under `turnstile run`, with a deck, and writes down what it acknowledges. The shell is
the member that is killed and stopped; this process is not.

    shell.py DECK LOG ID SEQ OFFSET -- COMMAND...        COMMAND: what starts the shell, without the database
"""

import os
import re
import subprocess
import sys
import time

from worker import CERTAIN, Member, now, told_to_end

ERROR = re.compile(r"(?:Runtime error|Parse error|Error)(?: near line \d+)?: (.*?)(?: \((\d+)\))?$")
FULL, BUSY, CANTOPEN = 13, 5, 14


class Gone(Exception):
    """The shell has been killed."""


class Shell(Member):
    def __init__(self, command, *arguments):
        super().__init__(*arguments)
        self.command = command
        self.process = None

    def start(self):
        self.process = subprocess.Popen([*self.command, "-batch", "-noheader", self.database], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.left, self.count = b"", 0

    def ask(self, sql):
        """The lines of the answer."""
        self.count += 1
        mark = f"\x1e{self.count}\n".encode()
        try:
            self.process.stdin.write(sql.encode() + (b"\n" if sql[0] == "." else b";\n") + b".print " + mark)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Gone() from None
        while mark not in self.left:
            part = os.read(self.process.stdout.fileno(), 65536)
            if not part:
                raise Gone()
            self.left += part
        text, _, self.left = self.left.partition(mark)
        return text.decode(errors="replace").splitlines()

    def say(self, what, sql):
        """(result code, message) of one statement."""
        for name, value in ((":w", self.worker), (":s", self.seq), (":r", self.read)):
            sql = sql.replace(name, str(value))
        lines = self.ask(sql)
        for line in lines:
            found = ERROR.match(line)
            if found:
                return int(found.group(2) or 1), found.group(1)
        if what == "R" and lines:
            self.read = int(lines[0])
        if what == "E" and lines and lines[0] != "0":
            self.note(f"v {now():.6f} {self.seq} seen {lines[0]!r}: {sql}")
        return 0, ""

    def open(self, entry):
        while not told_to_end():
            since = now()
            self.start()
            try:
                error, message = 0, ""
                for _, sql in self.initial:
                    error, message = self.say("S", sql)
                    if error:
                        break
                row = "" if error else "".join(self.ask("PRAGMA turnstile_status"))
            except Gone:
                # It ends by itself where it cannot open the database.
                if self.process.wait(30) != 1:
                    raise
                message = self.left.decode(errors="replace")
                error = BUSY if "is locked" in message else CANTOPEN
            if not error:
                mode = re.search(r'"mode": ?"(\w+)"', row)
                self.note(f"o {since:.6f} {now():.6f} {mode.group(1) if mode else 'none'}")
                return True
            self.note(f"e {since:.6f} {now():.6f} {self.seq} {entry} -1 {error} {message}")
            self.close()
            time.sleep(0.1)
        return False

    def close(self):
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # the shell has ended before
        self.process.stdout.close()
        if self.process.wait(30) < 0:
            raise Gone()

    def play(self, entry):
        self.seq += 1
        failed, asked = 0, False
        for step, (what, text) in enumerate(self.entries[entry]):
            if what == "P":
                time.sleep(int(text) / 1000)
                continue
            if what == "O":
                self.close()
                if not self.open(entry):
                    return False
                continue
            since = now()
            if what == "C":
                self.note(f"b {since:.6f} {self.seq} {entry}")
                asked = True
            failed, message = self.say(what, text)
            if failed:
                self.note(f"e {since:.6f} {now():.6f} {self.seq} {entry} {step} {failed} {message}")
                if what == "C":
                    self.note(f"{'n' if failed & 255 in CERTAIN else 'u'} {now():.6f} {self.seq} {failed}")
                break
            if what == "C":
                self.note(f"a {now():.6f} {self.seq}")
            if now() - since > 0.5:
                self.note(f"s {since:.6f} {now():.6f} {self.seq} {entry} {step}")
        if failed:
            self.ask("ROLLBACK")
            if failed & 255 not in (BUSY, FULL):
                self.close()
                return self.open(entry)
        elif not asked:
            self.note(f"r {now():.6f} {self.seq} {entry}")
        return True


def main():
    cut = sys.argv.index("--")
    deck, log, worker, seq, offset = sys.argv[1:cut]
    shell = Shell(sys.argv[cut + 1:], deck, log, worker, seq)
    try:
        opened = shell.open(-1)
        entry = int(offset) % len(shell.entries)
        while opened and not told_to_end():
            opened = shell.play(entry)
            entry = (entry + 1) % len(shell.entries)
        if opened:
            shell.close()
    except Gone:
        shell.process.wait(30)
        sys.exit(7)
    shell.note(f"q {now():.6f}")


if __name__ == "__main__":
    main()
