//! Reading options that came from another language.

use std::time::{Duration, SystemTime};

use serde_json::{Map, Value};

use super::{Key, Naming};
use crate::batch::BatchOptions;
use crate::breaker::BreakerOptions;
use crate::error::{Error, Result, nearest};
use crate::history::HistoryFilter;
use crate::pattern::Pattern;
use crate::retry::{Jitter, RetryPolicy};
use crate::transport::Start;

/// Takes options out of a JSON object, one by one, and complains about what is left.
pub(super) struct Reader {
    what: &'static str,
    /// The option whose members these are, and a dot.
    within: String,
    pub(super) naming: Naming,
    values: Map<String, Value>,
    known: Vec<&'static str>,
}

impl Reader {
    pub(super) fn new(what: &'static str, json: &str, naming: Naming) -> Result<Self> {
        let values = serde_json::from_str(json)
            .map_err(|cause| Error::invalid_config(format!("{what} options must be an object: {cause}")))?;
        Ok(Self { what, within: String::new(), naming, values, known: Vec::new() })
    }

    /// The value of `name`; null counts as absent.
    pub(super) fn take(&mut self, name: &'static str) -> Option<Value> {
        self.known.push(name);
        self.values.remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn wrong(&self, name: &str, value: &Value, wanted: &str) -> Error {
        Error::invalid_config(format!("{}{}={value} is not valid; {wanted}", self.within, self.naming.word(name)))
    }

    pub(super) fn string(&mut self, name: &'static str) -> Result<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(name, &other, "give a string")),
        }
    }

    pub(super) fn boolean(&mut self, name: &'static str) -> Result<Option<bool>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(name, &other, "give true or false")),
        }
    }

    /// `true`, or `"function"` when the language has one that tells the key.
    pub(super) fn key(&mut self, name: &'static str) -> Result<Option<Key>> {
        match self.take(name) {
            None | Some(Value::Bool(false)) => Ok(None),
            Some(Value::Bool(true)) => Ok(Some(Key::Event)),
            Some(Value::String(word)) if word == "function" => Ok(Some(Key::Handler)),
            Some(other) => Err(self.wrong(name, &other, "give true, or a function that tells the key of an event")),
        }
    }

    pub(super) fn integer(&mut self, name: &'static str, range: std::ops::RangeInclusive<u64>) -> Result<Option<u64>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_u64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ if *range.end() == u64::MAX => {
                Err(self.wrong(name, &value, &format!("give a whole number from {}", range.start())))
            }
            _ => {
                let wanted = format!("give a whole number from {} to {}", range.start(), range.end());
                Err(self.wrong(name, &value, &wanted))
            }
        }
    }

    pub(super) fn duration(&mut self, name: &'static str, least: Duration) -> Result<Option<Duration>> {
        const MOST: Duration = Duration::from_secs(10 * 365 * 86_400);
        let Some(value) = self.take(name) else { return Ok(None) };
        let millis = value.as_f64().filter(|millis| millis.is_finite() && *millis >= 0.0);
        let duration = millis.map(|millis| Duration::from_secs_f64((millis / 1000.0).min(1e12)));
        match duration {
            Some(duration) if (least..=MOST).contains(&duration) => Ok(Some(duration)),
            _ => {
                let (shown, wanted) = match self.naming {
                    Naming::Python => (
                        value.as_f64().map_or(value.clone(), |millis| Value::from(millis / 1000.0)),
                        format!("give seconds, at least {}", least.as_secs_f64()),
                    ),
                    Naming::TypeScript => (value.clone(), format!("give milliseconds, at least {}", least.as_millis())),
                };
                Err(self.wrong(name, &shown, &wanted))
            }
        }
    }

    pub(super) fn word<T: Copy>(&mut self, name: &'static str, words: &[(&str, T)]) -> Result<Option<T>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        if let Some((_, meaning)) = words.iter().find(|(word, _)| value.as_str() == Some(word)) {
            return Ok(Some(*meaning));
        }
        let known: Vec<_> = words.iter().map(|(word, _)| *word).collect();
        let hint = value.as_str().and_then(|word| nearest(word, known.iter().copied()));
        let hint = hint.map_or(String::new(), |near| format!("did you mean {near:?}? "));
        Err(self.wrong(name, &value, &format!("{hint}known: {}", known.join(", "))))
    }

    pub(super) fn start(&mut self, name: &'static str) -> Result<Option<Start>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match &value {
            Value::String(word) if word == "new" => Ok(Some(Start::New)),
            Value::String(word) if word == "beginning" => Ok(Some(Start::Beginning)),
            Value::Number(millis) if millis.as_f64().is_some_and(|millis| (0.0..1e15).contains(&millis)) => {
                let since = Duration::from_secs_f64(millis.as_f64().unwrap_or_default() / 1000.0);
                Ok(Some(Start::At(SystemTime::UNIX_EPOCH + since)))
            }
            _ => Err(self.wrong(name, &value, "give \"new\", \"beginning\" or a time")),
        }
    }

    pub(super) fn time(&mut self, name: &'static str) -> Result<Option<SystemTime>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64().filter(|millis| (0.0..1e15).contains(millis)) {
            Some(millis) => Ok(Some(SystemTime::UNIX_EPOCH + Duration::from_secs_f64(millis / 1000.0))),
            None => Err(self.wrong(name, &value, "give a time")),
        }
    }

    pub(super) fn events(&mut self) -> Result<HistoryFilter> {
        Ok(HistoryFilter {
            pattern: self.string("pattern")?.map(|pattern| Pattern::new(&pattern)).transpose()?,
            since: self.time("since")?,
            until: self.time("until")?,
        })
    }

    pub(super) fn retry(&mut self, name: &'static str) -> Result<Option<RetryPolicy>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value {
            Value::Object(_) => RetryPolicy::from_json(&value.to_string(), self.naming).map(Some),
            other => Err(self.wrong(name, &other, "give a retry policy")),
        }
    }

    /// An option that is an object, or `true` for one with the defaults; `false` counts as absent.
    pub(super) fn members<T>(
        &mut self,
        name: &'static str,
        read: impl Fn(&mut Self) -> Result<T>,
    ) -> Result<Option<T>> {
        let values = match self.take(name) {
            None | Some(Value::Bool(false)) => return Ok(None),
            Some(Value::Bool(true)) => Map::new(),
            Some(Value::Object(values)) => values,
            Some(other) => return Err(self.wrong(name, &other, "give an object, or true for the defaults")),
        };
        let mut from = Self { what: name, within: format!("{name}."), naming: self.naming, values, known: Vec::new() };
        let members = read(&mut from)?;
        from.finish()?;
        Ok(Some(members))
    }

    pub(super) fn breaker(&mut self) -> Result<BreakerOptions> {
        let (base, least) = (BreakerOptions::default(), Duration::from_millis(1));
        Ok(BreakerOptions {
            threshold: self.integer("threshold", 1..=100_000)?.map_or(base.threshold, |n| n as u32),
            window: self.duration("window_ms", least)?.unwrap_or(base.window),
            recovery: self.duration("recovery_ms", least)?.unwrap_or(base.recovery),
            probes: self.integer("probes", 1..=100_000)?.map_or(base.probes, |n| n as u32),
        })
    }

    pub(super) fn batch(&mut self) -> Result<BatchOptions> {
        let base = BatchOptions::default();
        Ok(BatchOptions {
            size: self.integer("size", 1..=100_000)?.map_or(base.size, |n| n as usize),
            wait: self.duration("wait_ms", Duration::ZERO)?.unwrap_or(base.wait),
        })
    }

    pub(super) fn policy(&mut self) -> Result<RetryPolicy> {
        let base = RetryPolicy::default();
        let factor = self.take("factor");
        let policy = RetryPolicy {
            max_retries: self.integer("max_retries", 0..=u64::from(u32::MAX))?.map_or(base.max_retries, |n| n as u32),
            initial_delay: self.duration("initial_delay_ms", Duration::ZERO)?.unwrap_or(base.initial_delay),
            max_delay: self.duration("max_delay_ms", Duration::ZERO)?.unwrap_or(base.max_delay),
            factor: match factor.as_ref().map(Value::as_f64) {
                None => base.factor,
                Some(Some(factor)) if (1.0..=1000.0).contains(&factor) => factor,
                Some(_) => {
                    return Err(self.wrong("factor", &factor.unwrap_or_default(), "give a number from 1 to 1000"));
                }
            },
            jitter: self.word("jitter", &[("full", Jitter::Full), ("none", Jitter::None)])?.unwrap_or_default(),
        };
        Ok(policy)
    }

    pub(super) fn finish(self) -> Result<()> {
        let Some(unknown) = self.values.keys().next() else { return Ok(()) };
        let word = self.naming.word(unknown);
        // `respond` is what `bus.respond` says, nobody else.
        let known = self.known.iter().filter(|name| **name != "respond");
        let known: Vec<_> = known.map(|name| self.naming.word(name)).collect();
        let hint = nearest(&word, known.iter().map(String::as_str))
            .map_or_else(|| format!("known: {}", known.join(", ")), |near| format!("did you mean {near}?"));
        Err(Error::invalid_config(format!("unknown {} option {word}; {hint}", self.what)))
    }
}
