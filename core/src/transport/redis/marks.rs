//! Which keys a group handles and has handled: for idempotent subscriptions.
//!
//! A key is marked in the partition that its hash names, whatever the partition of its event: two events of one key need
//! not be together. A delivery that is in the same partition is settled in one transaction with its mark; otherwise the
//! mark comes first, so that a step that is lost in between leads to a duplicate that is absorbed.

use redis::Cmd;

use super::fault::Failure;
use super::hold::{Held, Place};
use super::member::Member;
use super::{scripts, value};
use crate::delivery::Verdict;
use crate::error::Result;
use crate::event::Text;

/// A key that we handle.
#[derive(Debug, Clone)]
pub(super) struct Mark {
    /// Index of its partition.
    pub partition: usize,
    pub key: Text,
    /// Names the holder; never used again.
    pub token: Text,
    /// Names the delivery, whoever holds it.
    pub delivery: Text,
    /// How long it is remembered, in milliseconds.
    pub keep: i64,
}

/// What is done with a mark.
#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    Begin,
    Renew,
    Handled,
    Free,
}

impl Step {
    /// What a verdict means for the mark.
    pub fn of(verdict: &Verdict) -> Self {
        if *verdict == Verdict::Ack { Self::Handled } else { Self::Free }
    }

    fn letter(self) -> &'static str {
        match self {
            Self::Begin => "b",
            Self::Renew => "r",
            Self::Handled => "a",
            Self::Free => "f",
        }
    }
}

/// Names a delivery: the same for everybody who is given it.
pub(super) fn delivery(held: &Held) -> Text {
    match &held.place {
        Place::Pending { id, .. } => format!("{}:{id}", held.partition).into(),
        Place::Work { id, .. } => format!("{}:{id}", held.partition).into(),
    }
}

impl Member {
    /// The call of the script `mark`, by text: it stands in transactions, too.
    pub(super) fn mark_command(&self, marks: &[(Step, Mark)]) -> Cmd {
        let mut command = scripts::MARK.call_by_text(&[&self.keys.marks, &self.keys.handling]);
        command.arg(self.lease);
        for (step, mark) in marks {
            command.arg(step.letter()).arg(&*mark.key).arg(&*mark.token).arg(&*mark.delivery).arg(mark.keep);
        }
        command
    }

    /// The answers of the script `mark`, in order.
    pub(super) async fn mark(&self, marks: &[(Step, Mark)]) -> Result<Vec<i64>, Failure> {
        if marks.is_empty() {
            return Ok(Vec::new());
        }
        let answer = self.partition.work.run(&self.mark_command(marks), self.partition.patience()).await?;
        Ok(value::list(answer)?.into_iter().map(value::number).collect::<Result<_>>()?)
    }
}
