//! Settings: environment variables for a process, URI parameters for one database.
//!
//! Names of databases come from all kinds of places, `ATTACH` in SQL text among them. So a URI chooses nothing that
//! others rely on: not whom this process sends its descriptors, not which program it starts, not where it is safe. And
//! what the environment sets, a URI may make stricter, never looser.
//!
//! | environment | URI parameter | values | default |
//! |---|---|---|---|
//! | `TURNSTILE_SOCKET` | | path of the broker's socket; given, no broker is ever started | see [`super::place`] |
//! | `TURNSTILE_BROKER_UID` | | users, as numbers with commas, whose broker is believed, besides root's and one's own | |
//! | `TURNSTILE_FALLBACK` | `turnstile_fallback` | `autostart`, `refuse`, `plain`: without a broker | `autostart` |
//! | `TURNSTILE_WAIT` | `turnstile_wait` | how long a wait may last: `30s`, `500ms`, `2m`, `0` | `30s` |
//! | `TURNSTILE_BEGIN` | `turnstile_begin` | `learn`, `immediate`, `deferred`: see [`Begin`] | `learn` |
//! | `TURNSTILE_DURABLE_READS` | `turnstile_durable_reads` | `1`; `0`: readers see commits before their sync | `1` |
//! | `TURNSTILE_MODE` | `turnstile_mode` | `auto`, `guest` | `auto` |
//! | `TURNSTILE_ALLOW_UNSAFE` | | `0`, `1`: databases on filesystems that are refused otherwise | `0` |
//! | `TURNSTILE_BIN` | | the `turnstile` program, for starting a broker | beside the extension, then `PATH` |

use crate::planted::planted;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// All settings, and whether a URI may set them, too.
pub const SETTINGS: [(&str, bool); 9] = [
    ("TURNSTILE_SOCKET", false),
    ("TURNSTILE_BROKER_UID", false),
    ("TURNSTILE_FALLBACK", true),
    ("TURNSTILE_WAIT", true),
    ("TURNSTILE_BEGIN", true),
    ("TURNSTILE_DURABLE_READS", true),
    ("TURNSTILE_MODE", true),
    ("TURNSTILE_ALLOW_UNSAFE", false),
    ("TURNSTILE_BIN", false),
];

/// Who says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The process's owner.
    Environment,
    /// Whoever names a database.
    Uri,
}

/// Whom a broker may belong to: it is sent descriptors of whatever its clients open. (And whom root has given the host's
/// place to: [`super::place::is_hosts`].)
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Believed {
    /// Besides root and this process's own user.
    pub others: Vec<u32>,
}

impl Believed {
    pub fn covers(&self, uid: u32) -> bool {
        let own = nix::unistd::geteuid().as_raw();
        uid == 0 || uid == own || self.others.contains(&uid) || planted("any-broker-is-believed")
    }
}

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
    pub believed: Believed,
    pub fallback: Fallback,
    pub wait: Duration,
    pub begin: Begin,
    /// A reader waits until the commits that it sees are durable.
    pub durable_reads: bool,
    pub guest: bool,
    pub allow_unsafe: bool,
    pub program: Option<PathBuf>,
    /// What the environment has set.
    given: Vec<&'static str>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            socket: None,
            believed: Believed::default(),
            fallback: Fallback::Autostart,
            wait: Duration::from_secs(30),
            begin: Begin::Learn,
            durable_reads: true,
            guest: false,
            allow_unsafe: false,
            program: None,
            given: Vec::new(),
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
    pub fn amend(
        self,
        source: Source,
        lookup: impl Fn(&str) -> Option<String>,
    ) -> Result<Config, BadSetting> {
        let before = self.clone();
        let mut config = self.set(&lookup)?;
        let said = SETTINGS.into_iter().filter_map(|(name, by_uri)| Some((name, by_uri, lookup(name)?)));
        for (name, by_uri, value) in said {
            match source {
                Source::Environment => config.given.push(name),
                Source::Uri if planted("uri-chooses-all") => {}
                Source::Uri if !by_uri => {
                    let expected = "only the environment sets it, not the name of a database";
                    return Err(BadSetting { name: name.into(), value, expected });
                }
                Source::Uri if before.given.contains(&name) && config.is_looser(&before, name) => {
                    let expected = "the environment is stricter, and a URI cannot change that";
                    return Err(BadSetting { name: name.into(), value, expected });
                }
                Source::Uri => {}
            }
        }
        Ok(config)
    }

    /// Where it leaves more to chance than `before`. (How long a connection waits, and when it takes its turn, is its own
    /// affair.)
    fn is_looser(&self, before: &Config, name: &str) -> bool {
        let strictness = |fallback| match fallback {
            Fallback::Plain => 0,
            Fallback::Autostart => 1,
            Fallback::Refuse => 2,
        };
        match name {
            "TURNSTILE_FALLBACK" => strictness(self.fallback) < strictness(before.fallback),
            "TURNSTILE_DURABLE_READS" => before.durable_reads && !self.durable_reads,
            "TURNSTILE_MODE" => self.guest && !before.guest,
            _ => false,
        }
    }

    fn set(mut self, lookup: &impl Fn(&str) -> Option<String>) -> Result<Config, BadSetting> {
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
        if let Some(v) = lookup("TURNSTILE_BROKER_UID") {
            let others = v.split(',').map(|uid| uid.trim().parse()).collect::<Result<_, _>>();
            let expected = "expected the numbers of users, with commas between them";
            self.believed.others = others.map_err(|_| bad("TURNSTILE_BROKER_UID", &v, expected))?;
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

    /// The process's settings.
    pub fn from_environment() -> Result<Config, BadSetting> {
        let text = |name: &str| environment(name).map(|v| v.to_string_lossy().into_owned());
        Config::default().amend(Source::Environment, text)
    }
}

/// A variable of the environment, if that is the owner's. A set-uid program has its user's environment and another's
/// rights: to it, nothing is set.
pub fn environment(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|_| !has_anothers_rights())
}

/// Set-uid, set-gid or with file capabilities (getauxval(3), `AT_SECURE`).
pub fn has_anothers_rights() -> bool {
    // SAFETY: reads the auxiliary vector; no memory is passed.
    let secure = unsafe { libc::getauxval(libc::AT_SECURE) } != 0;
    secure && !planted("anothers-environment")
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
    use crate::planted::fails_without;

    fn with(name: &'static str, value: &'static str) -> Result<Config, BadSetting> {
        Config::default().amend(Source::Environment, |n| (n == name).then(|| value.to_owned()))
    }

    fn by_uri(config: &Config, name: &str, value: &str) -> Result<Config, BadSetting> {
        config.clone().amend(Source::Uri, |n| (n == name).then(|| value.to_owned()))
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
    fn a_uri_chooses_neither_the_broker_nor_a_program_nor_a_place() {
        fails_without("uri-chooses-all", || {
            for (name, value) in [
                ("TURNSTILE_SOCKET", "/tmp/e/s"),
                ("TURNSTILE_BROKER_UID", "54321"),
                ("TURNSTILE_BIN", "/tmp/e/turnstile"),
                ("TURNSTILE_ALLOW_UNSAFE", "1"),
            ] {
                let error = by_uri(&Config::default(), name, value).expect_err(name);
                assert!(error.to_string().contains("only the environment"), "{error}");
            }
        });
    }

    #[test]
    fn a_uri_makes_no_setting_of_the_environment_looser() {
        fails_without("uri-chooses-all", || {
            for (name, stricter, looser) in [
                ("TURNSTILE_FALLBACK", "refuse", "plain"),
                ("TURNSTILE_FALLBACK", "refuse", "autostart"),
                ("TURNSTILE_FALLBACK", "autostart", "plain"),
                ("TURNSTILE_DURABLE_READS", "1", "0"),
                ("TURNSTILE_MODE", "auto", "guest"),
            ] {
                assert!(by_uri(&with(name, stricter).unwrap(), name, looser).is_err(), "{name}={looser}");
                assert!(by_uri(&with(name, looser).unwrap(), name, stricter).is_ok(), "{name}={stricter}");
                assert!(by_uri(&Config::default(), name, looser).is_ok(), "{name}={looser}");
            }
        });
        let waits = with("TURNSTILE_WAIT", "1s").unwrap();
        assert_eq!(by_uri(&waits, "TURNSTILE_WAIT", "2m").unwrap().wait, Duration::from_secs(120));
    }

    #[test]
    fn a_broker_is_roots_ones_own_or_named() {
        let own = nix::unistd::geteuid().as_raw();
        let none = Believed::default();
        let named = with("TURNSTILE_BROKER_UID", "54321, 65534").unwrap().believed;
        assert!(none.covers(0) && none.covers(own) && named.covers(0) && named.covers(own));
        assert!(named.covers(54321) && named.covers(65534) && !named.covers(54322));
        fails_without("any-broker-is-believed", || assert!(!none.covers(54321)));
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
            ("TURNSTILE_BROKER_UID", ""),
            ("TURNSTILE_BROKER_UID", "nobody"),
            ("TURNSTILE_BROKER_UID", "-1"),
        ] {
            let error = with(name, value).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
