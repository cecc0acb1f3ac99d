//! Makes sure that an operation whose answer got lost either has run or never will.

use super::reads::Reads;
use super::requests::Request;
use super::words::Words;
use super::{Error, Partition, keys, script};
use crate::domain::request::Sent;

/// What Redis says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The REQUEST that names it was executed itself, among the first n changes: `<digest> <reply>`.
    Known(u64, String),
    /// If it has run, it is among the first n changes; else it never will.
    Within(u64),
    /// That cannot be said now.
    Unknown,
}

impl Reads {
    /// Settles what was sent; `request` names it, and `generation` is the current one of REQUEST ids. Where it was already on its way and has
    /// not run, it will not run any more. It can be repeated.
    pub async fn settle(&self, partition: &Partition, request: &Request, sent: &Sent, generation: i64) -> Result<Settled, Error> {
        let Some(epoch) = partition.live_epoch() else { return Ok(Settled::Unknown) };
        let buckets = request.buckets(generation);
        let mut all_keys = vec![keys::META];
        all_keys.extend(buckets.iter().map(String::as_str));
        let [epoch, seen, counter] = [epoch, partition.head().n, sent.counter].map(|number| number.to_string());
        let id = request.id.escaped();
        self.with(async |connection| {
            let run_id = connection.run_id().to_owned();
            let args = [&epoch, &run_id, &seen, &sent.lane, &counter, &id].map(|arg| arg.as_bytes());
            let mut words = Words::new(connection.run(&script::SETTLE, &all_keys, &args).await?)?;
            let word = words.text()?;
            if word == "no" {
                return Ok(Settled::Unknown);
            }
            let n = u64::try_from(words.integer()?).unwrap_or(0);
            Ok(if word == "known" { Settled::Known(n, words.text()?) } else { Settled::Within(n) })
        })
        .await
    }
}
