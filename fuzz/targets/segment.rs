//! Any bytes in a segment whose members the broker serves, supervises and clears away.

#![no_main]

use libfuzzer_sys::fuzz_target;
use turnstile_fuzz::clients::{Op, run};
use turnstile_fuzz::messages::{Manner, Message, Which, Wish};

/// Two writers, a reader, and one on the socket lane that has the turn and another one that waits for it.
fn begin() -> Vec<Op> {
    let manner = |file, read_only| Manner {
        file,
        read_only,
        has_shm: false,
        guest: false,
        allow_unsafe: false,
        library: 0,
        lie: None,
    };
    let mut ops = Vec::new();
    for n in 0..4u8 {
        ops.extend([Op::Connect(2), Op::Join(n, manner(0, n == 3))]);
        if n < 2 {
            ops.push(Op::Join(n, manner(1, false)));
        }
        ops.extend([Op::Round(0), Op::Hear(n)]);
    }
    let lock = |seat, wish, ahead| Message::Lock { seat, wish, ahead, connection: 1 };
    for n in 0..3 {
        ops.push(Op::Say(n, lock(Which::Own(0), Wish::File(1, false), n != 2), Vec::new()));
        ops.push(Op::Round(0));
    }
    ops
}

fuzz_target!(|ops: Vec<Op>| run(&begin(), &ops, false));
