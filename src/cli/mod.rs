//! The `turnstile` program's commands.

pub mod backup;
pub mod bench;
pub mod demo;
pub mod doctor;
pub mod extension;
pub mod generate;
pub mod libc;
mod linked;
mod own_broker;
mod processes;
pub mod program;
pub mod run;
pub mod serve;
pub mod status;
