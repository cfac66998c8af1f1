"""`turnstile run`, by how a program comes to its SQLite: modules bound to their own libraries first, namespaces of the
dynamic linker, a VFS that is named, a SQLite written in Go.
"""

import os
import shutil

import harness
from harness import Broker, PYTHON, SHELL, Skip, create, fails_without, run
from test_run import MAIN_C, PROBE_C, STATUS, build, bundled_sqlite, directory, env_of, executable, gated, system_sqlite, wrapped

# Loads each plugin as `how` says, and calls what it finds there.
LOADER_C = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
int main(int c, char **v){
  const char *how = v[1], *path = v[2];
  for(int i=3; i<c; i++){
    void *plugin = !strcmp(how, "deepbind") ? dlopen(v[i], RTLD_NOW | RTLD_DEEPBIND)
                 : !strcmp(how, "apart")    ? dlmopen(LM_ID_NEWLM, v[i], RTLD_NOW)
                 : !strcmp(how, "base")     ? dlmopen(LM_ID_BASE, v[i], RTLD_NOW | RTLD_DEEPBIND)
                 :                            dlopen(v[i], RTLD_NOW);
    if( !plugin ){ fprintf(stderr, "%s\n", dlerror()); return 1; }
    int (*probe)(const char *) = (int (*)(const char *))dlsym(plugin, "probe");
    if( probe && probe(path) ) return 2;
  }
  return 0;
}
"""

APART = "namespace of its own"


def plugin(d, name="plugin.so", sqlite=None):
    return build(d, name, [PROBE_C], "-shared", *(sqlite or [system_sqlite()]))


# --- RTLD_DEEPBIND -------------------------------------------------------------------------------------------------

@fails_without("deepbind_kept", message="plain")
def test_a_plugin_loaded_with_deepbind_is_reached():
    """PHP loads its modules so, and Apache PHP. The name does not tell that it is SQLite's, what it needs does."""
    with directory() as d, Broker() as broker:
        db = create(broker.path("app.db"))
        loader, module = build(d, "loader", [LOADER_C]), plugin(d)
        for how in ("deepbind", "base"):
            assert run([loader, how, db, module], env=env_of()).stdout.split()[1] == "plain", "the proof is none"
            done = run(wrapped(loader, how, db, module), env=env_of(broker))
            assert done.stdout.split()[1] == "turnstile", f"plain: {how}: {done}"


@fails_without("deepbind_kept", message="plain")
def test_a_module_of_sqlite_by_its_name_loaded_with_deepbind_is_reached():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        code = "import os, sys; sys.setdlopenflags(os.RTLD_NOW | os.RTLD_DEEPBIND)\n" + STATUS
        assert gated(run(wrapped(PYTHON, "-c", code, db), env=env_of(broker)).stdout), "plain"


DEEPBIND_C = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
int answer(void){ return 1; }                        /* hides a library's own, unless that is bound first */
int main(int c, char **v){
  for(int i=1; i<c; i++){
    void *library = dlopen(v[i], RTLD_NOW | RTLD_DEEPBIND);
    int (*ask)(void) = library ? (int (*)(void))dlsym(library, "ask") : 0;
    printf("%d ", ask ? ask() : -1);
  }
  return 0;
}
"""


def test_other_libraries_keep_their_deepbind():
    """What does not need SQLite is bound as the program asked; what is no library is the dynamic linker's to judge."""
    with directory() as d:
        program = build(d, "program", [DEEPBIND_C], "-rdynamic")
        own = build(d, "own.so", ["int answer(void){ return 2; } int ask(void){ return answer(); }"], "-shared")
        files = [own]
        with open(own, "rb") as f:
            content = f.read()
        for cut in (0, 10, 40):
            files.append(executable(d, f"cut{cut}.so", ""))
            with open(files[-1], "wb") as f:
                f.write(content[:cut])
        bare = run([program, *files], env=env_of()).stdout
        assert bare == "2 -1 -1 -1 ", bare
        assert run(wrapped(program, *files), env=env_of()).stdout == bare


# --- namespaces of the dynamic linker --------------------------------------------------------------------------------

@fails_without("dlmopen_unsaid", message="nobody")
def test_sqlite_in_a_namespace_of_its_own_is_named():
    """dlmopen() makes copies of libraries that nothing preloaded gets between."""
    with directory() as d, Broker() as broker:
        loader = build(d, "loader", [LOADER_C])
        for name, sqlite in (("needs.so", None), ("holds.so", [bundled_sqlite(d), "-lm", "-Wl,-Bsymbolic"])):
            module = plugin(d, name, sqlite)
            done = run(wrapped(loader, "apart", os.path.join(d, "app.db"), f"./{name}"), env=env_of(broker), cwd=d)
            assert done.stdout.split()[1] == "plain", done
            assert done.stderr.count(APART) == 1 and module in done.stderr, f"nobody says so: {done}"
        done = run(wrapped(loader, "apart", "x", "libsqlite3.so.0"), env=env_of(broker))
        assert f"libsqlite3.so.0 is loaded into a {APART}" in done.stderr, f"nobody says so: {done}"


def test_other_libraries_in_a_namespace_of_their_own_are_not_mentioned():
    with directory() as d:
        loader = build(d, "loader", [LOADER_C])
        other = build(d, "other.so", ["int probe(const char *x){ return !x; }"], "-shared")
        done = run(wrapped(loader, "apart", "x", other), env=env_of())
        assert done.stderr == "", done.stderr


def test_what_a_program_loads_is_found_by_its_own_run_path():
    """The dynamic linker takes the run path of the caller of dlopen(), which must not become ours."""
    with directory() as d:
        os.mkdir(os.path.join(d, "libs"))
        build(d, "libs/mine.so", ["int probe(const char *x){ return !x; }"], "-shared")
        loader = build(d, "loader", [LOADER_C], "-Wl,--enable-new-dtags,-rpath,$ORIGIN/libs")
        for how in ("plain", "deepbind", "apart", "base"):
            run([loader, how, "x", "mine.so"], env=env_of())
            run(wrapped(loader, how, "x", "mine.so"), env=env_of())


# --- a VFS that is named ---------------------------------------------------------------------------------------------

def test_a_program_that_names_the_unix_vfs_is_brokered():
    with Broker() as broker:
        db = create(broker.path("app.db"))
        code = STATUS.replace("sqlite3.connect(sys.argv[1], timeout=0)",
                              "sqlite3.connect(f'file:{sys.argv[1]}?vfs=unix', uri=True, timeout=0)")
        assert code != STATUS
        assert gated(run(wrapped(PYTHON, "-c", code, db), env=env_of(broker)).stdout)
        assert gated(run(wrapped(SHELL, "-vfs", "unix", db, "PRAGMA turnstile_status"), env=env_of(broker)).stdout)


def test_a_c_program_that_names_the_unix_vfs_is_brokered():
    with directory() as d, Broker() as broker:
        db = create(broker.path("app.db"))
        probe = PROBE_C.replace("int sqlite3_open(const char *, sqlite3 **)",
                                "int sqlite3_open_v2(const char *, sqlite3 **, int, const char *)")
        probe = probe.replace("sqlite3_open(path, &db)", 'sqlite3_open_v2(path, &db, 2, "unix")')
        program = build(d, "program", [probe, MAIN_C], system_sqlite())
        assert run(wrapped(program, db), env=env_of(broker)).stdout.split()[1] == "turnstile"


# --- a SQLite in Go ----------------------------------------------------------------------------------------------------

def test_a_sqlite_written_in_go_is_refused_before_it_starts():
    """By its package's name, which is all that such a program has in common with SQLite; static or not."""
    if not shutil.which("go"):
        raise Skip("no go")
    with directory() as d:
        package = os.path.join(d, "src", "modernc.org", "sqlite")
        os.makedirs(package)
        executable(package, "sqlite.go", 'package sqlite\n//go:noinline\nfunc Open() string { return "opened" }\n', 0o644)
        main = 'package main\nimport ("fmt"; "modernc.org/sqlite"; {})\nfunc main() {{ {}fmt.Println(sqlite.Open()) }}\n'
        kinds = {"static": ("0", main.format("", "")), "dynamic": ("1", main.format('"net"', "net.Dial(\"\", \"\"); "))}
        for name, (cgo, text) in kinds.items():
            source = executable(d, f"{name}.go", text, 0o644)
            program = os.path.join(d, name)
            env = {**os.environ, "CGO_ENABLED": cgo, "GO111MODULE": "off", "GOPATH": d, "GOFLAGS": "",
                   "GOCACHE": os.path.join(harness.CACHE, "go") if os.access(harness.CACHE, os.W_OK) else f"{d}/cache"}
            run(["go", "build", "-ldflags=-s -w", "-o", program, source], env=env, timeout=110)
            done = run(wrapped(program), env=env_of(), check=False)
            assert (done.returncode, done.stdout) == (125, ""), done
            assert "modernc.org/sqlite" in done.stderr and "mattn/go-sqlite3" in done.stderr, done.stderr
            assert run(wrapped(program, options=["--anyway"]), env=env_of()).stdout == "opened\n"
