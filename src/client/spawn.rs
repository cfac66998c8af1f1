//! Starting a daemon from inside somebody else's process without a trace: the host gets no SIGCHLD and no child
//! to wait for, and the daemon gets none of the host's descriptors, signal settings or session.

use std::ffi::{CString, c_char, c_int, c_void};
use std::io;
use std::ptr;

/// What the first child needs, prepared before it is made: after the clone nothing may allocate.
struct Plan {
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
}

/// Runs `argv` (`argv[0]` is the program's path) with `environment` in a session of its own, with `/dev/null`
/// as standard input, output and error. Returns once it has been started (not: once it runs).
pub fn daemon(argv: &[CString], environment: &[CString]) -> io::Result<()> {
    let terminated = |strings: &[CString]| -> Vec<*const c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
    };
    let mut plan = Plan { argv: terminated(argv), envp: terminated(environment) };
    const STACK: usize = 64 * 1024;
    let mut stack = vec![0u64; STACK / 8];
    // Every signal is blocked over the clone, so that no handler of the host runs in the child, which shares
    // the host's memory until it is gone.
    let mut all = nix::sys::signal::SigSet::all();
    let before = all.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_SETMASK)?;
    // SAFETY: CLONE_VM|CLONE_VFORK: the parent's thread sleeps until the child has exited, so stack and plan
    // outlive it. No exit signal: the host's SIGCHLD handler and its wait() see nothing.
    let pid = unsafe {
        let top = stack.as_mut_ptr().add(stack.len()).cast::<c_void>();
        let top = top.map_addr(|a| a & !15);
        libc::clone(first_child, top, libc::CLONE_VM | libc::CLONE_VFORK, (&raw mut plan).cast())
    };
    let error = io::Error::last_os_error();
    let _ = before.thread_set_mask();
    all.clear();
    if pid < 0 {
        return Err(error);
    }
    let mut status = 0;
    // SAFETY: waits for our own clone child, which only __WCLONE sees.
    while unsafe { libc::waitpid(pid, &mut status, libc::__WCLONE) } < 0 {
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            break;
        }
    }
    match libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0 {
        true => Ok(()),
        false => Err(io::Error::other("cannot start a process")),
    }
}

/// Shares the parent's memory: only system calls. Makes the grandchild, which init adopts, and exits.
extern "C" fn first_child(plan: *mut c_void) -> c_int {
    // SAFETY: `plan` is the parent's, which sleeps. fork() is avoided: it would run the host's atfork handlers;
    // a raw fork-like clone copies the memory, and the copy only makes system calls before it execs.
    unsafe {
        let pid = libc::syscall(libc::SYS_clone, libc::SIGCHLD as libc::c_long, 0, 0, 0, 0);
        match pid {
            0 => exec(&*plan.cast::<Plan>()),
            p if p < 0 => libc::_exit(1),
            _ => libc::_exit(0),
        }
    }
}

/// # Safety
/// Runs in a fresh process that shares nothing and has run nothing.
unsafe fn exec(plan: &Plan) -> ! {
    // SAFETY: system calls on this process alone, with memory prepared before the clone.
    unsafe {
        libc::setsid();
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
        libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        libc::dup2(null, 1);
        libc::dup2(null, 2);
        libc::chdir(c"/".as_ptr());
        libc::umask(0o022);
        libc::execve(plan.argv[0], plan.argv.as_ptr(), plan.envp.as_ptr());
        libc::_exit(1)
    }
}
