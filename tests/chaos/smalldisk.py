"""A small filesystem of its own, in a file, to be filled. Needs root."""

import os
import subprocess
import time

SIZE = 96 << 20
LEFT = 300_000  # bytes that a full disk has left


class SmallDisk:
    """`why_not` says why there is none here, else it is mounted at `path`."""

    def __init__(self, directory):
        self.path = os.path.join(directory, "small")
        self.why_not = None
        os.mkdir(self.path)
        image = os.path.join(directory, "small.image")
        if os.geteuid():
            self.why_not = "only root can mount a small filesystem"
            return
        with open(image, "wb") as f:
            f.truncate(SIZE)
        for command in (["mkfs.ext4", "-q", "-m", "0", image], ["mount", "-o", "loop", image, self.path]):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            except OSError as e:
                self.why_not = f"{command[0]}: {e}"
                return
            if done.returncode:
                self.why_not = f"{command[0]}: {done.stderr.strip()}"
                return

    def fill(self):
        stat = os.statvfs(self.path)
        n = stat.f_bavail * stat.f_frsize - LEFT
        if n > 0:
            fd = os.open(os.path.join(self.path, "filler"), os.O_WRONLY | os.O_CREAT)
            try:
                os.posix_fallocate(fd, 0, n)
            except OSError:
                pass  # somebody was faster: it is full all the same
            finally:
                os.close(fd)

    def empty(self):
        try:
            os.unlink(os.path.join(self.path, "filler"))
        except FileNotFoundError:
            pass

    def unmount(self):
        """True if nobody uses it any more."""
        if self.why_not:
            return True
        for _ in range(40):
            if subprocess.run(["umount", self.path], capture_output=True, timeout=60).returncode == 0:
                return True
            time.sleep(0.05)
        subprocess.run(["umount", "-l", self.path], capture_output=True, timeout=60)
        return False
