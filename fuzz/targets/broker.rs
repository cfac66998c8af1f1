//! Packets, of any kind and in any order, to the broker's whole handling of sessions.

#![no_main]

use libfuzzer_sys::fuzz_target;
use turnstile_fuzz::clients::{Op, run};

fuzz_target!(|input: (bool, Vec<Op>)| run(&[], &input.1, input.0));
