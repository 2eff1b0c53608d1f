//! Receipts as text: the plain ones so that JavaScript need not parse them.

use polybus_core::error::Result;
use polybus_core::transport::Receipt;
use serde_json::{Value, json};

use crate::error;

/// Length of the ids that we make.
const ID: usize = 36;

/// The receipts of one publish. Where each has an id of 36 characters and a position, and nothing else to say:
/// `=<id><position>\n…`. Otherwise a JSON array.
pub fn text(receipts: &[Receipt]) -> String {
    plain(receipts.iter()).unwrap_or_else(|| Value::from_iter(receipts.iter().map(value)).to_string())
}

/// The same for publishes that may fail each for itself; in the array an error is `{"error": …}`.
pub fn of_each(outcomes: &[Result<Receipt>]) -> String {
    let all = outcomes.iter().all(Result::is_ok).then(|| plain(outcomes.iter().flatten())).flatten();
    all.unwrap_or_else(|| {
        let outcome = |outcome: &Result<Receipt>| match outcome {
            Ok(receipt) => value(receipt),
            Err(error) => json!({ "error": error::text(error) }),
        };
        Value::from_iter(outcomes.iter().map(outcome)).to_string()
    })
}

fn plain<'a>(receipts: impl Iterator<Item = &'a Receipt>) -> Option<String> {
    let mut text = String::with_capacity(receipts.size_hint().0 * 56 + 1);
    text.push('=');
    for receipt in receipts {
        let position = receipt.position.as_deref()?;
        let is_plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        if receipt.duplicate || receipt.id.len() != ID || !is_plain(&receipt.id) || !is_plain(position) {
            return None;
        }
        text.push_str(&receipt.id);
        text.push_str(position);
        text.push('\n');
    }
    Some(text)
}

fn value(receipt: &Receipt) -> Value {
    let mut value = json!({ "id": &*receipt.id });
    if let Some(position) = &receipt.position {
        value["position"] = (**position).into();
    }
    if receipt.duplicate {
        value["duplicate"] = true.into();
    }
    value
}
