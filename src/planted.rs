//! Planted bugs: each name takes one safety rule away, in builds with the `planted` feature only, so that a
//! test can be shown to fail without the rule it stands for. `TURNSTILE_PLANTED` names them, comma-separated.
//! Without the feature the function is a constant `false` and nothing reads the environment.

#[cfg(not(feature = "planted"))]
#[inline(always)]
pub const fn planted(_name: &str) -> bool {
    false
}

#[cfg(feature = "planted")]
pub fn planted(name: &str) -> bool {
    static NAMES: once_cell::sync::Lazy<Vec<String>> = once_cell::sync::Lazy::new(|| {
        let names = std::env::var("TURNSTILE_PLANTED").unwrap_or_default();
        names.split(',').map(str::to_owned).collect()
    });
    WITHOUT.with_borrow(|rule| rule.as_deref() == Some(name)) || NAMES.iter().any(|n| n == name)
}

#[cfg(feature = "planted")]
thread_local! {
    static WITHOUT: std::cell::RefCell<Option<String>> = const { std::cell::RefCell::new(None) };
}

/// Runs `test`, which must pass; in a `planted` build runs it once more without the rule `name`, where it must
/// panic.
pub fn fails_without(name: &str, test: impl Fn() + std::panic::RefUnwindSafe) {
    test();
    let _ = name;
    #[cfg(feature = "planted")]
    {
        WITHOUT.set(Some(name.to_owned()));
        let noticed = std::panic::catch_unwind(&test).is_err();
        WITHOUT.set(None);
        assert!(noticed, "the test does not notice that rule {name} is missing");
    }
}
