//! Options cross as one JSON object. TypeScript says `leaseMs`, the core reads `lease_ms`: translated here, once.

use std::collections::HashMap;

use polybus_core::config::{self, Config};
use polybus_core::error::{Error, Result};
use polybus_core::options::{Naming, PublishOptions, RequestOptions};
use polybus_core::retry::RetryPolicy;
use polybus_core::transport::Outgoing;
use polybus_core::{Event, SubscribeOptions};
use serde_json::{Map, Value};

use crate::error::throw;

/// The same object with the core's names.
pub fn snake(json: &str) -> Result<String> {
    let value: Value =
        serde_json::from_str(json).map_err(|cause| Error::invalid_config(format!("options: {cause}")))?;
    match value {
        Value::Object(members) => Ok(Value::Object(rename(members)?).to_string()),
        other => Err(Error::invalid_config(format!("options must be an object, not {other}"))),
    }
}

fn rename(members: Map<String, Value>) -> Result<Map<String, Value>> {
    let rename = |(name, value): (String, Value)| {
        let value = match value {
            Value::Object(inner) => Value::Object(rename(inner)?),
            other => other,
        };
        Ok((snake_name(&name)?, value))
    };
    members.into_iter().map(rename).collect()
}

fn snake_name(name: &str) -> Result<String> {
    if name.contains('_') {
        return Err(Error::invalid_config(format!("unknown option {name}; did you mean {}?", camel_name(name))));
    }
    let mut snake = String::with_capacity(name.len() + 4);
    for c in name.chars() {
        if c.is_ascii_uppercase() {
            snake.push('_');
        }
        snake.push(c.to_ascii_lowercase());
    }
    Ok(snake)
}

fn camel_name(name: &str) -> String {
    let mut words = name.split('_').filter(|word| !word.is_empty());
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |camel, word| camel + &word[..1].to_ascii_uppercase() + &word[1..])
}

pub fn subscribe(json: &str) -> Result<SubscribeOptions> {
    SubscribeOptions::from_json(&snake(json)?, Naming::TypeScript)
}

pub fn publish(json: &str) -> Result<PublishOptions> {
    PublishOptions::from_json(&snake(json)?, Naming::TypeScript)
}

pub fn request(json: &str) -> Result<RequestOptions> {
    RequestOptions::from_json(&snake(json)?, Naming::TypeScript)
}

/// `event` with the schedule that `options` gives.
pub fn outgoing(event: Event, options: PublishOptions) -> Outgoing {
    Outgoing { event, delay: options.delay, expires_in: options.expires_in }
}

/// URL and options, as JSON, from the environment, given as a JSON object of its variables.
#[napi_derive::napi]
pub fn config_from_env(variables: String) -> napi::Result<String> {
    config_text(config::from_env(environment(&variables)))
}

/// The same from a JSON or YAML file, in which `${VAR}` stands for a variable.
#[napi_derive::napi]
pub fn config_from_file(path: String, variables: String) -> napi::Result<String> {
    let variables = environment(&variables);
    config_text(config::from_file(&path, &|name| variables.get(name).cloned()))
}

/// The same from a JSON object.
#[napi_derive::napi]
pub fn config_from_object(object: String, variables: String) -> napi::Result<String> {
    let variables = environment(&variables);
    config_text(config::from_json(&object, &|name| variables.get(name).cloned()))
}

fn environment(variables: &str) -> HashMap<String, String> {
    serde_json::from_str(variables).unwrap_or_default()
}

fn config_text(config: Result<Config>) -> napi::Result<String> {
    let Config { url, options } = config.map_err(throw)?;
    Ok(serde_json::json!({"url": url, "options": options}).to_string())
}

/// Checks a retry policy; throws `InvalidConfig`.
#[napi_derive::napi]
pub fn check_retry_policy(policy: String) -> napi::Result<()> {
    retry(&policy).map(drop).map_err(throw)
}

/// Milliseconds until the attempt after `attempt` (from 1), or `null` to give up; `random` lies in `0..1`.
#[napi_derive::napi]
pub fn retry_delay(policy: String, attempt: u32, random: f64) -> napi::Result<Option<f64>> {
    let policy = retry(&policy).map_err(throw)?;
    Ok(policy.delay(attempt, random).map(|delay| delay.as_secs_f64() * 1000.0))
}

fn retry(json: &str) -> Result<RetryPolicy> {
    RetryPolicy::from_json(&snake(json)?, Naming::TypeScript)
}
