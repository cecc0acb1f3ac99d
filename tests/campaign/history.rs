//! What the clients did and were told: every operation with all its tries.

use std::fmt;
use std::time::Duration;

/// Where a change stands: epoch and n, ordered as the server orders them.
pub type Position = (u64, u64);

/// A position as a reply gives it.
pub fn position(text: &str) -> Option<Position> {
    let (epoch, n) = text.split_once('-')?;
    Some((epoch.parse().ok()?, n.parse().ok()?))
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    Decr(Vec<(String, i64)>),
    Incr(String, i64),
    Issue { coupon: String, user: String },
}

impl Operation {
    /// The words of its command.
    pub fn words(&self) -> Vec<String> {
        match self {
            Self::Decr(items) => std::iter::once("STOCK.DECR".to_owned())
                .chain(items.iter().flat_map(|(product, quantity)| [product.clone(), quantity.to_string()]))
                .collect(),
            Self::Incr(product, quantity) => vec!["STOCK.INCR".into(), product.clone(), quantity.to_string()],
            Self::Issue { coupon, user } => vec!["COUPON.ISSUE".into(), coupon.clone(), user.clone()],
        }
    }
}

/// What became of an operation, as far as its client can know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Executed, with the numbers of its reply.
    Accepted { values: Vec<i64>, position: Position },
    /// Surely not executed.
    Refused(String),
    /// No definite answer.
    Unknown,
    /// An answer that it should never get.
    Failed(String),
}

/// One time that an operation was sent. Times are since the load began.
#[derive(Clone, Debug)]
pub struct Try {
    pub sent: Duration,
    pub ended: Duration,
    pub said: String,
}

#[derive(Clone, Debug)]
pub struct Record {
    pub client: usize,
    pub operation: Operation,
    pub request: Option<String>,
    pub tries: Vec<Try>,
    pub outcome: Outcome,
}

impl Record {
    /// When it was sent first: it took effect no earlier.
    pub fn began(&self) -> Duration {
        self.tries.first().map_or(Duration::ZERO, |first| first.sent)
    }

    /// When its last reply came: if it was accepted, it took effect no later.
    pub fn ended(&self) -> Duration {
        self.tries.last().map_or(Duration::MAX, |last| last.ended)
    }

    pub fn is_accepted(&self) -> bool {
        matches!(self.outcome, Outcome::Accepted { .. })
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "client {}: {}", self.client, self.operation.words().join(" "))?;
        if let Some(request) = &self.request {
            write!(f, " REQUEST {request}")?;
        }
        write!(f, ": {:?}", self.outcome)?;
        for Try { sent, ended, said } in &self.tries {
            write!(f, "\n        {:.4}-{:.4} s: {said}", sent.as_secs_f64(), ended.as_secs_f64())?;
        }
        Ok(())
    }
}
