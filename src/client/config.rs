//! Settings: environment variables for a process, URI parameters for one database.
//!
//! | environment | URI parameter | values | default |
//! |---|---|---|---|
//! | `TURNSTILE_SOCKET` | `turnstile_socket` | path of the broker's socket; given, no broker is ever started | see [`super::place`] |
//! | `TURNSTILE_FALLBACK` | `turnstile_fallback` | `autostart`, `refuse`, `plain`: without a broker | `autostart` |
//! | `TURNSTILE_WAIT` | `turnstile_wait` | how long a wait may last: `30s`, `500ms`, `2m`, `0` | `30s` |
//! | `TURNSTILE_BEGIN` | `turnstile_begin` | `learn`, `immediate`, `deferred`: see [`Begin`] | `learn` |
//! | `TURNSTILE_DURABLE_READS` | `turnstile_durable_reads` | `1`; `0`: readers see commits before their sync | `1` |
//! | `TURNSTILE_MODE` | `turnstile_mode` | `auto`, `guest` | `auto` |
//! | `TURNSTILE_ALLOW_UNSAFE` | | `0`, `1`: databases on filesystems that are refused otherwise | `0` |
//! | `TURNSTILE_BIN` | | the `turnstile` program, for starting a broker | beside the extension, then `PATH` |

use std::path::PathBuf;
use std::time::Duration;

/// What a URI may set, too. Not the program that would be started, nor where it is safe: names of databases come
/// from all kinds of places.
pub const FOR_ONE_DATABASE: [&str; 6] = [
    "TURNSTILE_SOCKET",
    "TURNSTILE_FALLBACK",
    "TURNSTILE_WAIT",
    "TURNSTILE_MODE",
    "TURNSTILE_BEGIN",
    "TURNSTILE_DURABLE_READS",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    Autostart,
    Refuse,
    Plain,
}

/// When an explicit transaction that begins with a reading statement takes its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// At that statement, if transactions that begin with it have written before.
    Learn,
    /// At its first statement, always, on a connection that may write.
    Immediate,
    /// When it writes, as plain SQLite: too late, if somebody else has written meanwhile.
    Deferred,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub socket: Option<PathBuf>,
    pub fallback: Fallback,
    pub wait: Duration,
    pub begin: Begin,
    /// A reader waits until the commits that it sees are durable.
    pub durable_reads: bool,
    pub guest: bool,
    pub allow_unsafe: bool,
    pub program: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            socket: None,
            fallback: Fallback::Autostart,
            wait: Duration::from_secs(30),
            begin: Begin::Learn,
            durable_reads: true,
            guest: false,
            allow_unsafe: false,
            program: None,
        }
    }
}

/// A setting that cannot be understood: never ignored, the open fails.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name}={value:?}: {expected}")]
pub struct BadSetting {
    name: String,
    value: String,
    expected: &'static str,
}

impl Config {
    /// From a look-up of names, the environment's or a URI's.
    ///
    /// `lookup` is asked for the environment's names; a URI's are their lower-case forms.
    pub fn amend(mut self, lookup: impl Fn(&str) -> Option<String>) -> Result<Config, BadSetting> {
        let bad = |name: &str, value: &str, expected| BadSetting {
            name: name.into(),
            value: value.into(),
            expected,
        };
        if let Some(v) = lookup("TURNSTILE_SOCKET") {
            if v.is_empty() {
                return Err(bad("TURNSTILE_SOCKET", &v, "expected the path of a broker's socket"));
            }
            self.socket = Some(v.into());
        }
        if let Some(v) = lookup("TURNSTILE_FALLBACK") {
            self.fallback = match v.as_str() {
                "autostart" => Fallback::Autostart,
                "refuse" => Fallback::Refuse,
                "plain" => Fallback::Plain,
                _ => return Err(bad("TURNSTILE_FALLBACK", &v, "expected autostart, refuse or plain")),
            };
        }
        if let Some(v) = lookup("TURNSTILE_WAIT") {
            let wait = duration(&v);
            self.wait =
                wait.ok_or_else(|| bad("TURNSTILE_WAIT", &v, "expected a time such as 30s, 500ms, 2m or 0"))?;
        }
        if let Some(v) = lookup("TURNSTILE_BEGIN") {
            self.begin = match v.as_str() {
                "learn" => Begin::Learn,
                "immediate" => Begin::Immediate,
                "deferred" => Begin::Deferred,
                _ => return Err(bad("TURNSTILE_BEGIN", &v, "expected learn, immediate or deferred")),
            };
        }
        if let Some(v) = lookup("TURNSTILE_MODE") {
            self.guest = match v.as_str() {
                "auto" => false,
                "guest" => true,
                _ => return Err(bad("TURNSTILE_MODE", &v, "expected auto or guest")),
            };
        }
        if let Some(v) = lookup("TURNSTILE_DURABLE_READS") {
            self.durable_reads = match v.as_str() {
                "0" => false,
                "1" => true,
                _ => return Err(bad("TURNSTILE_DURABLE_READS", &v, "expected 0 or 1")),
            };
        }
        if let Some(v) = lookup("TURNSTILE_ALLOW_UNSAFE") {
            self.allow_unsafe = match v.as_str() {
                "0" => false,
                "1" => true,
                _ => return Err(bad("TURNSTILE_ALLOW_UNSAFE", &v, "expected 0 or 1")),
            };
        }
        if let Some(v) = lookup("TURNSTILE_BIN") {
            self.program = Some(v.into());
        }
        Ok(self)
    }

    /// The process's settings. A set-uid program has its user's environment and another's rights: it gets the
    /// defaults.
    pub fn from_environment() -> Result<Config, BadSetting> {
        // SAFETY: reads the auxiliary vector; no memory is passed.
        if unsafe { libc::getauxval(libc::AT_SECURE) } != 0 {
            return Ok(Config::default());
        }
        Config::default().amend(|name| std::env::var_os(name).map(|v| v.to_string_lossy().into_owned()))
    }
}

/// `30s`, `500ms`, `2m`, `0`. At most a day.
pub fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let n: u64 = text[..digits].parse().ok()?;
    let unit = match &text[digits..] {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        _ => return None,
    };
    let wait = Duration::from_millis(n.checked_mul(unit)?);
    (wait <= Duration::from_secs(86_400)).then_some(wait)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &'static str, value: &'static str) -> Result<Config, BadSetting> {
        Config::default().amend(|n| (n == name).then(|| value.to_owned()))
    }

    #[test]
    fn times_need_a_unit() {
        assert_eq!(duration("30s"), Some(Duration::from_secs(30)));
        assert_eq!(duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Some(Duration::from_secs(120)));
        assert_eq!(duration("0"), Some(Duration::ZERO));
        for bad in ["", "30", "s", "-1s", "1h", "1.5s", "30 s", "99999999999999999999s", "2000m"] {
            assert_eq!(duration(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_uri_names_no_program_and_allows_no_place() {
        for name in ["TURNSTILE_BIN", "TURNSTILE_ALLOW_UNSAFE"] {
            assert!(!FOR_ONE_DATABASE.contains(&name), "{name}");
        }
    }

    #[test]
    fn malformed_values_are_errors_that_name_the_variable() {
        for (name, value) in [
            ("TURNSTILE_FALLBACK", "maybe"),
            ("TURNSTILE_WAIT", "soon"),
            ("TURNSTILE_MODE", ""),
            ("TURNSTILE_DURABLE_READS", "yes"),
            ("TURNSTILE_ALLOW_UNSAFE", "yes"),
            ("TURNSTILE_SOCKET", ""),
        ] {
            let error = with(name, value).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
