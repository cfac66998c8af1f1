"""`turnstile run`: existing programs, unchanged, with turnstile under their SQLite.

Which programs it reaches and which it refuses or names; that the wrapped command cannot be told from the bare one
by its exit status, its signals, its output or its descriptors.
"""

import contextlib
import glob
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile

import harness
from clients import python_without_extensions
from harness import Broker, PYTHON, SHELL, Skip, create, plain, plain_env, run, wait_until

# Connects as an application does that has never heard of turnstile, and shows who answers.
STATUS = """
import sqlite3, sys
row = sqlite3.connect(sys.argv[1], timeout=0).execute("PRAGMA turnstile_status").fetchone()
print(row[0] if row else "null")
"""

# One row a commit, without patience: any competitor that got in the way is "database is locked".
WRITER = """
import sqlite3, sys
path, name, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
db = sqlite3.connect(path, timeout=0, isolation_level=None)
for i in range(rows):
    db.execute("INSERT INTO rows VALUES(?, ?)", (name, i))
"""

# The library a plugin uses: its own version of SQLite, and whether turnstile answers there.
PROBE_C = r"""
#include <stdio.h>
typedef struct sqlite3 sqlite3; typedef struct sqlite3_stmt sqlite3_stmt;
int sqlite3_open(const char *, sqlite3 **); int sqlite3_close(sqlite3 *); const char *sqlite3_libversion(void);
int sqlite3_prepare_v2(sqlite3 *, const char *, int, sqlite3_stmt **, const char **);
int sqlite3_step(sqlite3_stmt *); int sqlite3_finalize(sqlite3_stmt *);
int probe(const char *path){
  sqlite3 *db; sqlite3_stmt *stmt;
  if( sqlite3_open(path, &db) ) return 1;
  if( sqlite3_prepare_v2(db, "PRAGMA turnstile_status", -1, &stmt, 0) ) return 2;
  printf("%s %s\n", sqlite3_libversion(), sqlite3_step(stmt)==100 ? "turnstile" : "plain");
  fflush(stdout);
  return sqlite3_finalize(stmt) || sqlite3_close(db);
}
"""
MAIN_C = "int probe(const char *); int main(int c, char **v){ return probe(v[1]); }\n"

# Locks without the C library, as a SQLite that makes its own system calls: nothing can be interposed.
RAW_C = r"""
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>
static long raw(int fd, int command, va_list args){ return syscall(SYS_fcntl, fd, command, va_arg(args, void *)); }
#define FCNTL(name) __attribute__((visibility("hidden"))) int name(int fd, int command, ...){ \
  va_list args; va_start(args, command); long rc = raw(fd, command, args); va_end(args); return (int)rc; }
FCNTL(fcntl)
FCNTL(fcntl64)
"""

# Loads each plugin RTLD_LOCAL, and calls it from four threads at once.
LOADER_C = r"""
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
static const char *path; static int (*probe)(const char *);
static void *call(void *x){ return probe(path) ? (void *)1 : x; }
int main(int c, char **v){
  path = v[1];
  for(int i=2; i<c; i++){
    void *plugin = dlopen(v[i], RTLD_NOW); pthread_t t[4];
    if( !plugin ){ fputs(dlerror(), stderr); return 1; }
    probe = (int (*)(const char *))dlsym(plugin, "probe");
    for(int k=0; k<4; k++) pthread_create(&t[k], 0, call, 0);
    for(int k=0; k<4; k++){ void *failed; pthread_join(t[k], &failed); if( failed ) return 2; }
  }
  return 0;
}
"""


def wrapped(*command, options=()):
    return [harness.bin(), "run", *options, "--", *command]


def env_of(broker=None):
    env = dict(broker.env) if broker else plain_env()
    for name in ("LD_PRELOAD", "TURNSTILE_RUN", "TURNSTILE_RUN_REPORT", "TURNSTILE_LIB", "TURNSTILE_BIN"):
        env.pop(name, None)
    return env


def gated(text):
    return (json.loads(text) or {}).get("mode") == "gated"


@contextlib.contextmanager
def directory():
    with tempfile.TemporaryDirectory(prefix="ts-") as path:
        yield path


def executable(directory, name, text, mode=0o755):
    path = os.path.join(directory, name)
    with open(path, "w") as f:
        f.write(text)
    os.chmod(path, mode)
    return path


def build(directory, name, sources, *options):
    """Compiles C; a test that needs it is skipped without a compiler."""
    if not shutil.which("gcc"):
        raise Skip("no gcc")
    files = [executable(directory, f"{name}{i}.c", text, 0o644) for i, text in enumerate(sources)]
    path = os.path.join(directory, name)
    run(["gcc", "-O1", "-fPIC", "-o", path, *files, *options], timeout=100)
    return path


def system_sqlite():
    found = glob.glob("/usr/lib/*/libsqlite3.so.0")
    if not found:
        raise Skip("no shared libsqlite3")
    return found[0]


def bundled_sqlite(directory):
    """A SQLite to link in: the one that the build made for the program, or the crate's source compiled."""
    made = glob.glob(os.path.join(harness.target(), "build", "libsqlite3-sys-*", "out", "libsqlite3.a"))
    if made:
        return max(made, key=os.path.getmtime)
    home = os.environ.get("CARGO_HOME", os.path.expanduser("~/.cargo"))
    source = glob.glob(os.path.join(home, "registry", "src", "*", "libsqlite3-sys-*", "sqlite3", "sqlite3.c"))
    if not source:
        raise Skip("no sqlite3.c to link in")
    path = os.path.join(directory, "sqlite3.o")
    run(["gcc", "-O0", "-fPIC", "-c", "-o", path, source[0]], timeout=100)
    return path


# --- what is reached ------------------------------------------------------------------------------------------

def four_writers(command):
    """Runs `command(name, rows)` four times at once, and finds all their rows."""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        writers = [subprocess.Popen(command(db, f"w{i}", 200), env=env_of(broker), stdin=subprocess.DEVNULL,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for i in range(4)]
        try:
            for p in writers:
                output, _ = p.communicate(timeout=60)
                assert p.returncode == 0 and not output, f"{harness.ending(p.returncode)}\n{output}"
        finally:
            for p in writers:
                p.kill()
                p.wait(10)
        assert plain(db, "SELECT count(*), count(DISTINCT worker || seq) FROM rows", retry=10) == [["800", "800"]]


def test_python_writers_never_see_busy():
    """Python loads its libsqlite3 RTLD_LOCAL, where RTLD_NEXT does not look."""
    four_writers(lambda db, name, rows: wrapped(PYTHON, "-c", WRITER, db, name, str(rows)))


def test_children_of_a_wrapped_shell_are_reached():
    four_writers(lambda db, name, rows: wrapped(
        "/bin/sh", "-c", '"$1" -c "$2" "$3" "$4" "$5" & wait $!', "sh", PYTHON, WRITER, db, name, str(rows)))


def test_children_that_python_starts_by_vfork_are_reached():
    parent = """
import subprocess, sqlite3, sys
held = sqlite3.connect(sys.argv[2], timeout=0)  # the parent has a session of its own meanwhile
held.execute("SELECT count(*) FROM rows").fetchone()
sys.exit(subprocess.run([sys.executable, "-c", *sys.argv[1:]]).returncode)
"""
    four_writers(lambda db, name, rows: wrapped(PYTHON, "-c", parent, WRITER, db, name, str(rows)))


@harness.fails_without("names-at-open")
def test_a_shared_cache_is_opened_while_its_schema_is_changed():
    """Whatever is prepared on a connection that is just opening fails then, and SQLite would fail the open with it."""
    script = """
import sqlite3, sys
def opened():
    return sqlite3.connect(f"file:{sys.argv[1]}?cache=shared", uri=True, isolation_level=None)
one = opened()
one.execute("BEGIN")
one.execute("CREATE TABLE more(x)")
two = opened()
one.execute("COMMIT")
two.execute("INSERT INTO more VALUES(1)")
"""
    with Broker() as broker:
        db = create(broker.path("app.db"))
        run(wrapped(PYTHON, "-c", script, db), env=env_of(broker))
        assert plain(db, "SELECT count(*) FROM more", retry=2) == [["1"]]


def test_a_plain_connection_is_brokered():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        done = run(wrapped(PYTHON, "-c", STATUS, db), env=env_of(broker))
        assert gated(done.stdout), done
        assert done.stderr == "", done.stderr
        bare = run([PYTHON, "-c", STATUS, db], env=env_of(broker))
        assert bare.stdout == "null\n", "the proof is none: a bare connection answers too"


def test_a_preload_by_hand_does_the_same():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        done = run([PYTHON, "-c", STATUS, db], env={**env_of(broker), "LD_PRELOAD": harness.lib()})
        assert gated(done.stdout), done


def test_a_python_that_cannot_load_extensions_is_reached():
    python = python_without_extensions()
    if python is None:
        raise Skip("every python3 here can load extensions")
    with Broker() as broker:
        db = create(broker.path("app.db"))
        done = run(wrapped(python, "-c", STATUS, db), env=env_of(broker))
        assert gated(done.stdout), done


def test_the_sqlite3_shell_is_reached():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        done = run(wrapped(SHELL, db, "PRAGMA turnstile_status"), env=env_of(broker))
        assert gated(done.stdout), done


def test_open16_is_reached():
    with directory() as d, Broker() as broker:
        db = create(broker.path("app.db"))
        probe = PROBE_C.replace("int sqlite3_open(const char *, sqlite3 **)",
                                "int sqlite3_open16(const void *, sqlite3 **)")
        probe = probe.replace("if( sqlite3_open(path, &db) )",
                              "unsigned short wide[999] = {0}; for(int i=0; path[i]; i++) wide[i] = path[i];"
                              "if( sqlite3_open16(wide, &db) )")
        program = build(d, "program", [probe, MAIN_C], system_sqlite())
        assert run(wrapped(program, db), env=env_of(broker)).stdout.split()[1] == "turnstile"


def test_two_sqlite_libraries_in_one_process_are_both_reached():
    """Each call goes on to its caller's own library, from four threads at their first open."""
    with directory() as d, Broker() as broker:
        db = create(broker.path("app.db"))
        system = build(d, "system.so", [PROBE_C], "-shared", system_sqlite())
        bundled = build(d, "bundled.so", [PROBE_C], "-shared", bundled_sqlite(d), "-lm")
        loader = build(d, "loader", [LOADER_C], "-pthread")
        bare = run([loader, db, system, bundled], env=env_of()).stdout.split()
        versions, answers = bare[::2], bare[1::2]
        assert len(set(versions)) == 2 and set(answers) == {"plain"}, bare
        done = run(wrapped(loader, db, system, bundled, options=["-v"]), env=env_of(broker))
        seen = done.stdout.split()
        assert seen[::2] == versions and set(seen[1::2]) == {"turnstile"}, done
        assert done.stderr.count("its SQLite is") == 2, done.stderr


def test_a_program_that_has_sqlite_lends_it_to_its_plugins():
    """The program's library comes first in a plugin's lookups. The interposer must follow: sqlite3_open() and
    sqlite3_close() of two libraries on one connection are a crash."""
    with directory() as d, Broker() as broker:
        db = create(broker.path("app.db"))
        own = build(d, "own.so", [PROBE_C], "-shared", bundled_sqlite(d), "-lm")
        loader = build(d, "loader", [LOADER_C], "-pthread", "-Wl,--no-as-needed", system_sqlite())
        bare = run([loader, db, own], env=env_of()).stdout
        done = run(wrapped(loader, db, own), env=env_of(broker))
        assert done.stdout == bare.replace("plain", "turnstile"), (bare, done)


def test_an_interposer_that_finds_no_sqlite_says_cantopen():
    """ctypes asks the linker for any sqlite3_open, and gets the interposer, with no SQLite behind it."""
    code = """
import ctypes
db = ctypes.c_void_p(1)
open = ctypes.CDLL(None).sqlite3_open
print(open(b":memory:", ctypes.byref(db)), db.value)
"""
    done = run(wrapped(PYTHON, "-c", code), env=env_of())
    assert done.stdout == "14 None\n", done
    assert "cannot be found" in done.stderr, done.stderr


# --- what is not, and is named ----------------------------------------------------------------------------------

def test_sqlite_linked_into_a_program_is_named():
    with directory() as d:
        program = build(d, "hidden", [PROBE_C, MAIN_C, RAW_C], bundled_sqlite(d), "-lm", "-pthread")
        done = run(wrapped(program, os.path.join(d, "app.db")), env=env_of())
        assert done.stdout.endswith("plain\n"), done
        assert done.stderr.count("has SQLite linked in") == 1 and program in done.stderr, done.stderr
        assert os.path.realpath(harness.lib()) in done.stderr, "it does not say what to load instead"


def test_sqlite_linked_into_a_module_is_named():
    """Found at the end of the program that loaded it, also by a name that was relative then."""
    with directory() as d:
        build(d, "module.so", [PROBE_C, RAW_C], "-shared", bundled_sqlite(d), "-lm", "-Wl,-Bsymbolic")
        loader = build(d, "loader", [LOADER_C], "-pthread")
        done = run(wrapped(loader, os.path.join(d, "app.db"), "./module.so"), env=env_of(), cwd=d)
        assert "plain" in done.stdout, done
        assert f"{d}/module.so has SQLite linked in" in done.stderr, done.stderr


def test_sqlite_loaded_by_a_long_running_program_is_named_while_it_runs():
    with directory() as d:
        module = build(d, "module.so", [PROBE_C, RAW_C], "-shared", bundled_sqlite(d), "-lm", "-Wl,-Bsymbolic")
        code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); sys.stdin.read()"
        with subprocess.Popen(wrapped(PYTHON, "-c", code, module), env=env_of(), stdin=subprocess.PIPE,
                              stderr=subprocess.PIPE) as p:
            assert select.select([p.stderr], [], [], 20)[0], "nothing said within 20 s"
            assert f"{module} has SQLite linked in".encode() in p.stderr.readline()
            assert p.poll() is None
            p.stdin.close()
            assert p.wait(20) == 0


def test_a_program_without_sqlite_is_not_mentioned():
    done = run(wrapped("/bin/sh", "-c", "ls / | grep -c . >/dev/null; echo out; echo err >&2"), env=env_of())
    assert (done.stdout, done.stderr) == ("out\n", "err\n"), done


def test_a_static_program_is_refused_unless_anyway():
    with directory() as d:
        static = build(d, "static", ['#include <stdio.h>\nint main(void){ puts("started"); return 5; }'], "-static")
        script = executable(d, "script", f"#!{static}\n")
        for command in (static, script):
            done = run(wrapped(command), env=env_of(), check=False)
            assert done.returncode == 125 and done.stdout == "", done
            assert "statically linked" in done.stderr and static in done.stderr, done.stderr
        done = run(wrapped(static, options=["--anyway"]), env=env_of(), check=False)
        assert (done.returncode, done.stdout, done.stderr) == (5, "started\n", ""), done


def test_a_static_go_program_is_refused_as_one():
    if not shutil.which("go"):
        raise Skip("no go")
    with directory() as d:
        source = executable(d, "main.go", "package main\nfunc main() {}\n", 0o644)
        env = {**os.environ, "CGO_ENABLED": "0", "GOCACHE": os.path.join(d, "cache"), "GO111MODULE": "off"}
        run(["go", "build", "-o", os.path.join(d, "main"), source], env=env, timeout=110)
        done = run(wrapped(os.path.join(d, "main")), env=env_of(), check=False)
        assert done.returncode == 125 and "Go program" in done.stderr, done


def test_a_setuid_program_is_refused():
    if os.getuid():
        raise Skip("needs root, to make a program that is another user's and setuid")
    with directory() as d:
        os.chmod(d, 0o755)
        program = shutil.copy("/bin/true", os.path.join(d, "program"))
        os.chown(program, 65534, 65534)
        os.chmod(program, 0o4755)
        if os.statvfs(d).f_flag & os.ST_NOSUID:
            raise Skip(f"{d} is mounted nosuid")
        done = run(wrapped(program), env=env_of(), check=False)
        assert done.returncode == 125 and "setuid" in done.stderr, done
        os.chown(program, 0, 0)
        os.chmod(program, 0o4755)
        assert run(wrapped(program), env=env_of()).stderr == "", "root's own changes nothing for root"


def test_a_preload_that_had_no_effect_is_said():
    """A library that the dynamic linker passes over: an object file (`ET_REL`) by its header."""
    with directory() as d:
        broken = os.path.join(d, "libturnstile.so")
        with open(harness.lib(), "rb") as f, open(broken, "wb") as out:
            content = bytearray(f.read())
            content[16] = 1
            out.write(content)
        done = run(wrapped("/bin/true"), env={**env_of(), "TURNSTILE_LIB": broken})
        assert "LD_PRELOAD had no effect in /bin/true" in done.stderr, done


# --- the command is as if started directly --------------------------------------------------------------------

def status_of(*command, **options):
    return run(wrapped(*command), env=env_of(), check=False, **options).returncode


def test_the_exit_status_is_the_commands():
    for status in (0, 3, 255):
        assert status_of("/bin/sh", "-c", f"exit {status}") == status


def test_a_command_that_cannot_start_has_the_statuses_of_env():
    with directory() as d:
        text = executable(d, "text", "not a program\n", 0o644)
        assert status_of("no-such-command") == 127
        assert status_of(os.path.join(d, "nothing")) == 127
        assert status_of(text) == 126
        assert status_of(d) == 126


def test_a_script_without_a_first_line_runs_in_the_shell():
    with directory() as d:
        script = executable(d, "script", 'echo "$0 $1"; exit 4\n')
        done = run(wrapped(script, "one"), env=env_of(), check=False)
        assert (done.returncode, done.stdout) == (4, f"{script} one\n"), done


def test_a_command_killed_by_a_signal_kills_the_wrapper_by_the_same():
    code = """
import ctypes, sys
libc, number = ctypes.CDLL(None), int(sys.argv[1])
libc.signal(number, 0)  # SIG_DFL: Python ignores SIGPIPE
getattr(libc, "raise")(number)
"""
    for sig in (signal.SIGTERM, signal.SIGSEGV, signal.SIGKILL, signal.SIGPIPE, signal.SIGRTMIN + 1):
        assert status_of(PYTHON, "-c", code, str(int(sig))) == -sig


def test_what_was_preloaded_stays():
    other = "/usr/lib/libturnstile-test-absent.so"
    done = run(wrapped("/bin/sh", "-c", 'echo "$LD_PRELOAD"'), env={**env_of(), "LD_PRELOAD": other})
    assert done.stdout == f"{os.path.realpath(harness.lib())}:{other}\n", done


def test_run_within_run_preloads_once():
    done = run(wrapped(*wrapped("/bin/sh", "-c", 'echo "$LD_PRELOAD $TURNSTILE_BIN"')), env=env_of())
    assert done.stdout == f"{os.path.realpath(harness.lib())} {os.path.realpath(harness.bin())}\n", done
    assert done.stderr == "", done


def test_descriptors_and_signals_are_those_of_the_bare_command():
    # Without 32 and 33, which are the C library's own: its posix_spawn(3) leaves them ignored.
    code = """
import os
print(sorted(os.listdir("/proc/self/fd")))
for line in open("/proc/self/status"):
    name, _, value = line.partition(":")
    if name in ("SigPnd", "SigBlk", "SigIgn", "SigCgt"):
        print(name, hex(int(value, 16) & 0x7fffffff))
"""
    bare = run([PYTHON, "-c", code], env=env_of()).stdout
    assert run(wrapped(PYTHON, "-c", code), env=env_of()).stdout == bare


COUNTING = """
import os, signal, sys
names = ["HUP", "INT", "QUIT", "USR1", "USR2", "WINCH", "TERM"]
def got(number, frame):
    os.write(1, signal.Signals(number).name.encode() + b"\\n")
    if number == signal.SIGTERM:
        os._exit(9)
for name in names:
    signal.signal(getattr(signal, "SIG" + name), got)
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""


def test_signals_sent_to_the_wrapper_reach_the_command():
    with subprocess.Popen(wrapped(PYTHON, "-c", COUNTING), env=env_of(), stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout.readline() == "ready\n"
        for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGTERM"):
            p.send_signal(getattr(signal, name))
            assert p.stdout.readline() == f"{name}\n"
        assert p.wait(20) == 9


def test_a_killed_wrapper_leaves_the_command_running():
    with subprocess.Popen(wrapped(PYTHON, "-c", COUNTING), env=env_of(), stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout.readline() == "ready\n"
        with open(f"/proc/{p.pid}/task/{p.pid}/children") as f:
            command = int(f.read())
        p.kill()
        p.wait(20)
        os.kill(command, signal.SIGTERM)
        assert p.stdout.readline() == "SIGTERM\n"


# A shell's part: starts the wrapper as the terminal's foreground job, and tells what becomes of it.
JOB_SHELL = """
import os, signal, sys
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
told = int(sys.argv[1])
job = os.fork()
if job == 0:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    for sig in (signal.SIGTTOU, signal.SIGINT, signal.SIGQUIT):  # a shell's background job ignores the latter two
        signal.signal(sig, signal.SIG_DFL)
    os.close(told)
    os.execv(sys.argv[2], sys.argv[2:])
while True:
    _, status = os.waitpid(job, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        os.write(told, f"stopped {os.WSTOPSIG(status)} {job}\\n".encode())
        os.tcsetpgrp(0, job)
        os.killpg(job, signal.SIGCONT)
    else:
        os.write(told, f"ended {os.waitstatus_to_exitcode(status)}\\n".encode())
        os._exit(0)
"""


class Terminal:
    """A terminal with a job of its own in the foreground."""

    def __init__(self, *command):
        read, write = os.pipe()
        os.set_inheritable(write, True)
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.execve(PYTHON, [PYTHON, "-c", JOB_SHELL, str(write), *command], env_of())
        os.close(write)
        self.told = os.fdopen(read)
        self.text = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.master)
        self.told.close()

    def type(self, key):
        os.write(self.master, key)

    def see(self, what, count=1):
        """Reads until `what` has been shown `count` times."""
        def seen():
            if select.select([self.master], [], [], 0)[0]:
                self.text += os.read(self.master, 65536)
            return self.text.count(what) >= count
        wait_until(seen, 20, f"{count} times {what!r} in {self.text!r}")

    def hear(self):
        assert select.select([self.told], [], [], 20)[0], f"the job neither stopped nor ended: {self.text!r}"
        return self.told.readline().split()


def test_the_terminals_interrupt_reaches_the_command_once():
    with Terminal(*wrapped(PYTHON, "-c", COUNTING)) as terminal:
        terminal.see(b"ready\r\n")
        for n in range(1, 4):
            terminal.type(b"\x03")
            terminal.see(b"SIGINT\r\n", n)
        children = f"/proc/{terminal.pid}/task/{terminal.pid}/children"
        with open(children) as f:
            # Behind anything that the wrapper still might pass on.
            os.kill(int(f.read()), signal.SIGTERM)
        assert terminal.hear() == ["ended", "9"]
        terminal.see(b"SIGTERM\r\n")
        assert terminal.text.count(b"SIGINT") == 3, terminal.text


def test_the_terminals_interrupt_ends_a_command_that_does_not_mind():
    with Terminal(*wrapped("/bin/sh", "-c", "echo ready; exec sleep 60")) as terminal:
        terminal.see(b"ready\r\n")
        terminal.type(b"\x03")
        assert terminal.hear() == ["ended", str(-signal.SIGINT)]


def test_the_job_stops_and_continues_with_its_command():
    with Terminal(*wrapped(PYTHON, "-c", COUNTING)) as terminal:
        terminal.see(b"ready\r\n")
        for n in range(1, 3):
            terminal.type(b"\x1a")
            word, sig, job = terminal.hear()
            assert (word, int(sig)) == ("stopped", signal.SIGTSTP)
            os.kill(int(job), signal.SIGUSR1)
            terminal.see(b"SIGUSR1\r\n", n)
        os.kill(int(job), signal.SIGTERM)
        assert terminal.hear() == ["ended", "9"]


if __name__ == "__main__":
    sys.exit(subprocess.call([PYTHON, os.path.join(harness.HERE, "run.py"), "--only", "test_run."]))
