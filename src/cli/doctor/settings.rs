//! The settings that a program would have here, and where each comes from.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use serde::Serialize;
use turnstile::client::config::{Begin, Config, Fallback, SETTINGS, Source};

use super::findings::Findings;

/// Variables that are none of the client's settings, and no mistake either.
const OTHERS: &[&str] = &["TURNSTILE_LIB", "TURNSTILE_LOG", "TURNSTILE_RUN", "TURNSTILE_RUN_REPORT"];

fn is_known(name: &str) -> bool {
    SETTINGS.iter().map(|(setting, _)| setting).chain(OTHERS).any(|n| *n == name)
}

#[derive(Debug, Serialize)]
pub struct Setting {
    pub name: &'static str,
    pub value: String,
    /// `default`, `environment`, `URI`, `--socket`.
    pub from: &'static str,
}

/// The environment's, amended by the database's URI.
#[derive(Debug)]
pub struct Settings {
    pub config: Config,
    from: BTreeMap<&'static str, &'static str>,
}

impl Settings {
    /// The file that `database` means, and the settings for it. What cannot be understood is a problem: with it no
    /// connection opens.
    pub fn of(database: &OsStr, findings: &mut Findings) -> (PathBuf, Settings) {
        let mut settings = Settings { config: Config::default(), from: BTreeMap::new() };
        let environment =
            |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        for (name, _) in SETTINGS {
            settings.take(name, environment(name), Source::Environment, findings);
        }
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("TURNSTILE_") && !is_known(&name) {
                findings.warning(
                    "setting-unknown",
                    format!("{name} is set, and means nothing to turnstile"),
                    "is it misspelled? The names are in the README, under Settings",
                );
            }
        }
        let Some((path, parameters)) = uri(database) else { return (PathBuf::from(database), settings) };
        for (name, _) in SETTINGS {
            let value = parameters.get(name.to_ascii_lowercase().as_str()).cloned();
            settings.take(name, value, Source::Uri, findings);
        }
        (path, settings)
    }

    fn take(&mut self, name: &'static str, value: Option<String>, source: Source, findings: &mut Findings) {
        let Some(value) = value else { return };
        let from = match source {
            Source::Environment => "environment",
            Source::Uri => "URI",
        };
        match self.config.clone().amend(source, |n| (n == name).then(|| value.clone())) {
            Ok(config) => {
                self.config = config;
                self.from.insert(name, from);
            }
            Err(e) => findings.problem(
                "setting-invalid",
                format!("{e} ({from})"),
                "correct or unset it: until then no connection opens",
            ),
        }
    }

    pub fn use_socket(&mut self, socket: PathBuf) {
        self.config.socket = Some(socket);
        self.from.insert("TURNSTILE_SOCKET", "--socket");
    }

    pub fn listed(&self) -> Vec<Setting> {
        let c = &self.config;
        let path = |p: &Option<PathBuf>, none: &str| {
            p.as_ref().map_or_else(|| none.to_owned(), |p| p.display().to_string())
        };
        let flag = |set: bool| String::from(if set { "1" } else { "0" });
        let value = |name: &str| match name {
            "TURNSTILE_SOCKET" => path(&c.socket, "the host's, else the user's"),
            "TURNSTILE_BROKER_UID" => match c.believed.others.as_slice() {
                [] => "root's and one's own".into(),
                others => others.iter().map(u32::to_string).collect::<Vec<_>>().join(","),
            },
            "TURNSTILE_FALLBACK" => match c.fallback {
                Fallback::Autostart => "autostart".into(),
                Fallback::Refuse => "refuse".into(),
                Fallback::Plain => "plain".into(),
            },
            "TURNSTILE_WAIT" => format!("{}ms", c.wait.as_millis()),
            "TURNSTILE_BEGIN" => match c.begin {
                Begin::Learn => "learn".into(),
                Begin::Immediate => "immediate".into(),
                Begin::Deferred => "deferred".into(),
            },
            "TURNSTILE_DURABLE_READS" => flag(c.durable_reads),
            "TURNSTILE_MODE" => if c.guest { "guest" } else { "auto" }.into(),
            "TURNSTILE_ALLOW_UNSAFE" => flag(c.allow_unsafe),
            _ => path(&c.program, "beside the extension, else in PATH"),
        };
        let setting = |(name, _): (&'static str, bool)| Setting {
            name,
            value: value(name),
            from: self.from.get(name).copied().unwrap_or("default"),
        };
        SETTINGS.into_iter().map(setting).collect()
    }
}

/// The path and the parameters of a `file:` URI (sqlite.org/uri.html); `None`: it is a plain name.
fn uri(database: &OsStr) -> Option<(PathBuf, BTreeMap<String, String>)> {
    let rest = database.as_bytes().strip_prefix(b"file:")?;
    let rest = rest.split(|b| *b == b'#').next().unwrap_or_default();
    let mut halves = rest.splitn(2, |b| *b == b'?');
    let mut path = halves.next().unwrap_or_default();
    if let Some(after) = path.strip_prefix(b"//") {
        // An authority, which may be empty or `localhost`.
        path = &after[after.iter().position(|b| *b == b'/').unwrap_or(after.len())..];
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(&unescaped(bytes)).into_owned();
    let parameter = |pair: &[u8]| {
        let mut halves = pair.splitn(2, |b| *b == b'=');
        (text(halves.next().unwrap_or_default()), text(halves.next().unwrap_or_default()))
    };
    let query = halves.next().unwrap_or_default();
    let parameters = query.split(|b| *b == b'&').filter(|p| !p.is_empty()).map(parameter).collect();
    Some((PathBuf::from(std::ffi::OsString::from_vec(unescaped(path))), parameters))
}

/// `%HH` as the byte that it stands for.
fn unescaped(bytes: &[u8]) -> Vec<u8> {
    let digit = |at: usize| bytes.get(at).and_then(|b| char::from(*b).to_digit(16));
    let (mut out, mut at) = (Vec::new(), 0);
    while let Some(byte) = bytes.get(at) {
        match (byte, digit(at + 1), digit(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                at += 3;
            }
            _ => {
                out.push(*byte);
                at += 1;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_is_taken_apart_as_sqlite_does() {
        let of = |text: &str| {
            let (path, parameters) = uri(OsStr::new(text)).unwrap();
            (path.display().to_string(), parameters)
        };
        assert_eq!(of("file:app.db").0, "app.db");
        assert_eq!(of("file:///srv/a%20b.db?mode=ro").0, "/srv/a b.db");
        assert_eq!(of("file://localhost/srv/app.db#here").0, "/srv/app.db");
        assert_eq!(of("file:100%.db").0, "100%.db");
        let (_, parameters) = of("file:app.db?turnstile_wait=2s&mode=ro&nolock");
        assert_eq!(parameters["turnstile_wait"], "2s");
        assert_eq!(parameters["nolock"], "");
        assert!(uri(OsStr::new("app.db")).is_none());
    }
}
