//! The `turnstile` program's commands.

pub mod demo;
pub mod extension;
pub mod run;
pub mod serve;
pub mod status;
