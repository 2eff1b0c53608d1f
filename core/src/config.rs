//! Options of a bus from a file or from the environment: the same file serves Python and TypeScript.
//!
//! Names are those of the options, in `snake_case` or `camelCase`, and `url`. Durations are seconds (`lease: 30`), a
//! text with a unit (`lease: 5m`), or milliseconds under a name that says so (`leaseMs: 30000`). Texts may contain
//! `${VAR}`, `${VAR:-default}` and `$$` for a dollar sign. What comes out is what [`BusOptions::from_json`] reads, and
//! that judges the values.
//!
//! [`BusOptions::from_json`]: crate::BusOptions::from_json

use serde_json::{Map, Value, json};

use crate::error::{Error, Result, nearest};

/// A URL, if one is given, and options as JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where to connect.
    pub url: Option<String>,
    /// For [`BusOptions::from_json`](crate::BusOptions::from_json).
    pub options: String,
}

/// Looks up an environment variable.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Number,
    Flag,
    Duration,
    Retry,
}

const OPTIONS: [(&str, Kind); 22] = [
    ("service", Kind::Text),
    ("bus", Kind::Text),
    ("mode", Kind::Text),
    ("worker_count", Kind::Number),
    ("buffer_size", Kind::Number),
    ("when_full", Kind::Text),
    ("publish_buffer_bytes", Kind::Number),
    ("fail_open", Kind::Flag),
    ("max_payload_bytes", Kind::Number),
    ("retry", Kind::Retry),
    ("durability", Kind::Text),
    ("lease", Kind::Duration),
    ("publish_timeout", Kind::Duration),
    ("retention", Kind::Duration),
    ("max_age", Kind::Duration),
    ("max_events", Kind::Number),
    ("max_bytes", Kind::Number),
    ("confirm", Kind::Text),
    ("idempotency_window", Kind::Duration),
    ("partitions", Kind::Number),
    ("allow_network_fs", Kind::Flag),
    ("on_duplicate", Kind::Text),
];

const RETRY: [(&str, Kind); 5] = [
    ("max_retries", Kind::Number),
    ("initial_delay", Kind::Duration),
    ("max_delay", Kind::Duration),
    ("factor", Kind::Number),
    ("jitter", Kind::Text),
];

/// Reads a JSON file (by its name) or a YAML file. `InvalidConfig` for a missing or malformed file, an unset variable or
/// an unknown name.
pub fn from_file(path: &str, env: Lookup<'_>) -> Result<Config> {
    let text = std::fs::read_to_string(path)
        .map_err(|cause| Error::invalid_config(format!("cannot read {path:?}: {cause}")).caused_by(cause))?;
    let malformed = |cause: String| Error::invalid_config(format!("{path:?} is malformed: {cause}"));
    let value = match path.ends_with(".json") {
        true => serde_json::from_str(&text).map_err(|cause| malformed(cause.to_string()))?,
        false => serde_saphyr::from_str(&text).map_err(|cause| malformed(cause.to_string()))?,
    };
    from_value(value, env)
}

/// Reads a JSON object of the same shape.
pub fn from_json(json: &str, env: Lookup<'_>) -> Result<Config> {
    let value = serde_json::from_str(json)
        .map_err(|cause| Error::invalid_config(format!("the configuration must be an object: {cause}")))?;
    from_value(value, env)
}

/// Reads `POLYBUS_URL`, `POLYBUS_SERVICE` and `POLYBUS_<OPTION>`; for the retry policy, `POLYBUS_RETRY_MAX_RETRIES` and
/// so on. Other variables are left alone, unless they look like a misspelt option.
pub fn from_env(variables: impl IntoIterator<Item = (String, String)>) -> Result<Config> {
    let (mut found, mut retry) = (Map::new(), Map::new());
    for (variable, value) in variables {
        let Some(name) = variable.strip_prefix("POLYBUS_").map(str::to_ascii_lowercase) else { continue };
        let (known, into): (&[_], _) = match name.strip_prefix("retry_") {
            Some(_) => (&RETRY, &mut retry),
            None => (&OPTIONS, &mut found),
        };
        let name = name.strip_prefix("retry_").unwrap_or(&name);
        let plain = name.strip_suffix("_ms").unwrap_or(name);
        if plain == "url" || known.iter().any(|(known, _)| *known == plain) {
            into.insert(name.to_owned(), Value::String(value));
        } else if let Some(near) = nearest(plain, known.iter().map(|(known, _)| *known).chain(["url"])) {
            let near = near.to_ascii_uppercase();
            return Err(Error::invalid_config(format!(
                "the environment has {variable}, which is no option; did you mean POLYBUS_{near}?"
            )));
        }
    }
    if !retry.is_empty() {
        found.insert("retry".to_owned(), Value::Object(retry));
    }
    // Values of the environment are taken as they are: no `${…}` in them.
    options_of(found, &|text| Ok(text.to_owned()))
}

fn from_value(value: Value, env: Lookup<'_>) -> Result<Config> {
    match value {
        Value::Object(found) => options_of(found, &|text| expand(text, env)),
        _ => Err(Error::invalid_config("the configuration must be an object with service, url and other options")),
    }
}

fn options_of(found: Map<String, Value>, text: &dyn Fn(&str) -> Result<String>) -> Result<Config> {
    let mut options = read(found, &OPTIONS, text)?;
    let url = match options.remove("url") {
        None | Some(Value::Null) => None,
        Some(Value::String(url)) => Some(url),
        Some(other) => return Err(Error::invalid_config(format!("url={other} is not valid; give a string"))),
    };
    Ok(Config { url, options: Value::Object(options).to_string() })
}

/// The values under the names that the option readers know. Unknown names pass: those readers know the nearest word.
fn read(
    found: Map<String, Value>,
    known: &[(&str, Kind)],
    text: &dyn Fn(&str) -> Result<String>,
) -> Result<Map<String, Value>> {
    let mut options = Map::new();
    for (name, value) in found {
        let name = snake(&name);
        let value = match value {
            Value::String(raw) => Value::String(text(&raw)?),
            other => other,
        };
        let plain = name.strip_suffix("_ms").unwrap_or(&name);
        let kind = known.iter().find(|(known, _)| *known == plain).map(|(_, kind)| *kind);
        let (name, value) = match (kind, value) {
            (Some(Kind::Retry), Value::Object(policy)) => (name, Value::Object(read(policy, &RETRY, text)?)),
            (Some(Kind::Duration), value) => {
                let scale = if plain == name { 1000.0 } else { 1.0 };
                (format!("{plain}_ms"), millis(value, scale))
            }
            (Some(Kind::Number), Value::String(raw)) => (name, number(raw)),
            (Some(Kind::Flag), Value::String(raw)) => (name, flag(raw)),
            (Some(Kind::Text), Value::Number(number)) => (name, Value::String(number.to_string())),
            (_, value) => (name, value),
        };
        options.insert(name, value);
    }
    Ok(options)
}

fn snake(name: &str) -> String {
    let mut snake = String::new();
    for c in name.chars() {
        if c.is_ascii_uppercase() {
            snake.push('_');
        }
        snake.push(c.to_ascii_lowercase());
    }
    snake
}

fn number(raw: String) -> Value {
    match (raw.trim().parse::<u64>(), raw.trim().parse::<f64>()) {
        (Ok(whole), _) => json!(whole),
        (_, Ok(number)) if number.is_finite() => json!(number),
        _ => Value::String(raw),
    }
}

fn flag(raw: String) -> Value {
    match raw.trim().to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Value::Bool(true),
        "false" | "0" | "no" | "off" | "" => Value::Bool(false),
        _ => Value::String(raw),
    }
}

fn millis(value: Value, scale: f64) -> Value {
    match value {
        Value::Number(number) => number.as_f64().map_or(Value::Null, |number| json!(number * scale)),
        Value::String(raw) => match (raw.trim().parse::<f64>(), humantime::parse_duration(raw.trim())) {
            (Ok(number), _) if number.is_finite() => json!(number * scale),
            (_, Ok(duration)) => json!(duration.as_secs_f64() * 1000.0),
            _ => Value::String(raw),
        },
        other => other,
    }
}

/// `${VAR}`, `${VAR:-default}` and `$$`.
fn expand(text: &str, env: Lookup<'_>) -> Result<String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some(after) = rest.strip_prefix('{') {
            let end = after.find('}').ok_or_else(|| {
                Error::invalid_config("a ${ in the configuration has no }; write $$ for a dollar sign")
            })?;
            let (name, default) = match after[..end].split_once(":-") {
                Some((name, default)) => (name, Some(default)),
                None => (&after[..end], None),
            };
            // As in a shell: an empty variable counts as unset when there is a default.
            match (env(name), default) {
                (Some(value), None) => out.push_str(&value),
                (Some(value), Some(_)) if !value.is_empty() => out.push_str(&value),
                (_, Some(default)) => out.push_str(default),
                (None, None) => {
                    return Err(Error::invalid_config(format!(
                        "the configuration uses ${{{name}}}, which is not set; set it, or write ${{{name}:-default}}"
                    )));
                }
            }
            rest = &after[end + 1..];
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{BusOptions, Naming};
    use std::time::Duration;

    fn env(name: &str) -> Option<String> {
        match name {
            "HOST" => Some("db".into()),
            "WORKERS" => Some("7".into()),
            "EMPTY" => Some(String::new()),
            _ => None,
        }
    }

    fn options(config: &Config) -> BusOptions {
        BusOptions::from_json(&config.options, Naming::Python).unwrap()
    }

    #[test]
    fn reads_either_spelling_and_unit() {
        for json in [
            r#"{"service":"shop","lease":2.5,"worker_count":7,"retry":{"max_retries":5,"initial_delay":0.1}}"#,
            r#"{"service":"shop","leaseMs":2500,"workerCount":7,"retry":{"maxRetries":5,"initialDelayMs":100}}"#,
            r#"{"service":"shop","lease":"2500ms","workerCount":"${WORKERS}","retry":{"maxRetries":"5","initialDelay":"100ms"}}"#,
        ] {
            let options = options(&from_json(json, &env).unwrap());
            assert_eq!(options.lease, Duration::from_millis(2500), "{json}");
            assert_eq!(options.worker_count, 7, "{json}");
            assert_eq!(options.retry.max_retries, 5, "{json}");
            assert_eq!(options.retry.initial_delay, Duration::from_millis(100), "{json}");
        }
    }

    #[test]
    fn expands_variables() {
        let cases = [("${HOST}", "db"), ("a-${NONE:-b}-$$-$x", "a-b-$-$x"), ("${EMPTY:-c}", "c"), ("${EMPTY}", "")];
        for (text, expected) in cases {
            assert_eq!(expand(text, &env).unwrap(), expected);
        }
        for text in ["${NONE}", "${HOST"] {
            assert_eq!(expand(text, &env).unwrap_err().kind(), crate::ErrorKind::InvalidConfig);
        }
    }

    #[test]
    fn reads_yaml_and_json_files() {
        let folder = std::env::temp_dir().join(format!("polybus-config-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let yaml =
            "url: sqlite:///${HOST}.db\nservice: shop\nfail_open: true\nretention: 2h\nretry:\n  max_retries: 1\n";
        for (name, text) in [
            ("a.yaml", yaml),
            (
                "a.json",
                r#"{"url":"sqlite:///db.db","service":"shop","failOpen":true,"retention":7200,"retry":{"maxRetries":1}}"#,
            ),
        ] {
            let path = folder.join(name);
            std::fs::write(&path, text).unwrap();
            let config = from_file(path.to_str().unwrap(), &env).unwrap();
            assert_eq!(config.url.as_deref(), Some("sqlite:///db.db"));
            let options = options(&config);
            assert!(options.fail_open);
            assert_eq!((options.retention, options.retry.max_retries), (Some(Duration::from_secs(7200)), 1));
        }
        let broken = folder.join("b.yaml");
        std::fs::write(&broken, "service: [").unwrap();
        for path in [broken.to_str().unwrap(), "/no/such/file.yaml"] {
            assert_eq!(from_file(path, &env).unwrap_err().kind(), crate::ErrorKind::InvalidConfig);
        }
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn reads_the_environment() {
        let given = [
            ("POLYBUS_URL", "memory://x"),
            ("POLYBUS_SERVICE", "42"),
            ("POLYBUS_FAIL_OPEN", "yes"),
            ("POLYBUS_LEASE_MS", "1500"),
            ("POLYBUS_RETRY_MAX_RETRIES", "9"),
            ("POLYBUS_QQQQQQ", "left alone"),
            ("PATH", "left alone"),
        ];
        let config = from_env(given.map(|(name, value)| (name.to_owned(), value.to_owned()))).unwrap();
        assert_eq!(config.url.as_deref(), Some("memory://x"));
        let options = options(&config);
        assert_eq!(options.service, "42");
        assert!(options.fail_open);
        assert_eq!((options.lease, options.retry.max_retries), (Duration::from_millis(1500), 9));
        let wrong = from_env([("POLYBUS_LEESE".to_owned(), "1".to_owned())]).unwrap_err();
        assert!(wrong.message().contains("POLYBUS_LEASE"), "{wrong}");
    }
}
