//! The scripts of locks: calling them, until Redis has answered or there is no more time.

use std::time::{Duration, Instant};

use super::super::pack::Pack;
use super::super::script::{self, Script};
use super::super::words::Words;
use super::super::{Error, keys};
use super::hold::Ended;
use super::line::Waiter;
use super::link::Node;
use super::{Inner, Refusal, millis};
use crate::domain::lock::Epoch;
use crate::domain::{Id, LockName};
use crate::limits;

/// One try to acquire.
pub(super) struct Asked {
    /// Its name: sent again, it is carried out once.
    pub op: String,
    pub lease: Duration,
    pub owner: Option<Id>,
    /// Whether it is only wanted where there is the coupon that is issued under it.
    to_issue: bool,
}

impl Asked {
    pub fn of(waiter: &Waiter) -> Self {
        Self { op: waiter.op.clone(), lease: waiter.lease, owner: waiter.owner.clone(), to_issue: waiter.of_the_server }
    }

    /// A try by a client, under this name.
    pub const fn once_more(op: String, lease: Duration, owner: Option<Id>) -> Self {
        Self { op, lease, owner, to_issue: false }
    }

    fn owner(&self) -> &[u8] {
        self.owner.as_ref().map_or(b"", Id::as_bytes)
    }
}

/// What became of a try.
pub(super) enum Tried {
    Got {
        token: u64,
        lease: Duration,
        /// When it was asked for, before which its lease has not begun.
        sent: Instant,
    },
    /// For so many ms; -1: without end. By whom: the field in the lock's key.
    Held(i64, String),
    /// Nobody has it, or what was got under this name is over: it may be asked for under another.
    Free,
}

/// What became of a release.
pub(super) enum Released {
    /// It is still held, as it was acquired more than once.
    Kept,
    Passed {
        token: u64,
        lease: Duration,
        /// When it was asked for, before which its lease has not begun.
        sent: Instant,
    },
    /// So many clients were told.
    ForAll { told: u64 },
    /// It was not held under that token.
    Lost,
}

/// What a look at a lock that is held shows.
pub(super) struct Seen {
    pub remaining_ms: i64,
    /// Whether it is held under the token that was asked for.
    pub held: bool,
    pub field: String,
    pub token: Option<String>,
    pub owner: Option<String>,
}

/// What goes on after an answer that decides nothing.
enum Again {
    /// The node is in doubt.
    Now,
    /// The connection is, and whether it was carried out.
    Lost,
    /// It was too late by Redis's clock, so that ours may have to be set first, or Redis refuses it for now: after so long.
    Later(Duration),
    /// Nothing can be done about it.
    Never(Refusal),
}

impl Inner {
    /// Tries to acquire; where not `fresh`, only for an owner that holds the lock. However long Redis is away, what became of it is found out.
    pub(super) async fn attempt(&self, name: &LockName, asked: &Asked, fresh: bool) -> Result<Tried, Refusal> {
        // Whoever wants it may have gone by the time Redis is there.
        self.ask(name, asked, fresh, Some(Instant::now() + limits::LOCK_CALL_WITHIN)).await
    }

    /// Finds out whether something was acquired by the name of this try, however long Redis is away or refuses to say.
    pub(super) async fn ask_whether(&self, name: &LockName, asked: &Asked) -> Result<Tried, Refusal> {
        self.ask(name, asked, false, None).await
    }

    /// `unsent_until`: as of [`Inner::call_on`].
    async fn ask(&self, name: &LockName, asked: &Asked, fresh: bool, unsent_until: Option<Instant>) -> Result<Tried, Refusal> {
        let until = Instant::now() + limits::LOCK_TRY_WITHIN;
        let mut keys = vec![
            keys::LOCKS.to_owned(),
            keys::lock(name),
            keys::lock_token(name),
            keys::lock_owner(name),
            keys::lock_done(name, &asked.op),
        ];
        keys.extend(name.coupon().filter(|_| asked.to_issue).map(|coupon| keys::coupon_info(&coupon)));
        let lease = millis(asked.lease).to_string();
        let mut sent = Instant::now();
        let mut words = self
            .call_on(&script::LOCK_ACQUIRE, &keys, &asked.op, until, unsent_until, |node| {
                sent = Instant::now();
                let mut args = self.of_node(node, sent);
                args.push(node.epoch.installation.clone().into_bytes());
                args.extend([lease.clone().into_bytes(), asked.owner().to_vec(), if fresh { b"1".to_vec() } else { b"0".to_vec() }]);
                args.extend(notes());
                args
            })
            .await?;
        let read = |words: &mut Words| {
            Ok::<_, Error>(match words.text()?.as_str() {
                "got" => {
                    let token = number(words)?;
                    self.link.saw(token);
                    let got = Tried::Got { token, lease: lasting(words)?, sent };
                    metrics::counter!("holdfast_lock_expired_total").increment(number(words)?);
                    got
                }
                "free" => Tried::Free,
                "held" => Tried::Held(words.integer()?, words.maybe_text()?.unwrap_or_default()),
                other => return Err(Error::Unexpected(format!("{other:?} of lock_acquire"))),
            })
        };
        read(&mut words).map_err(|error| refused(&error))
    }

    /// Releases, and passes on to `next`. `unsent_until`: as of [`Inner::call_on`].
    pub(super) async fn let_go(
        &self,
        name: &LockName,
        token: u64,
        op: &str,
        next: Option<&Asked>,
        until: Instant,
        unsent_until: Option<Instant>,
    ) -> Result<Released, Refusal> {
        let keys = [
            keys::LOCKS.to_owned(),
            keys::lock(name),
            keys::lock_token(name),
            keys::lock_owner(name),
            keys::lock_done(name, op),
            keys::lock_channel(name),
        ];
        let token = token.to_string();
        let lease = next.map_or(0, |next| millis(next.lease)).to_string();
        let mut sent = Instant::now();
        let mut words = self
            .call_on(&script::LOCK_RELEASE, &keys, op, until, unsent_until, |node| {
                sent = Instant::now();
                let mut args = self.of_node(node, sent);
                args.extend([node.epoch.installation.clone().into_bytes(), token.clone().into_bytes()]);
                args.extend([lease.clone().into_bytes(), next.map_or(b"".as_slice(), Asked::owner).to_vec()]);
                args.push(next.map_or(b"".as_slice(), |next| next.op.as_bytes()).to_vec());
                args.extend(notes());
                args
            })
            .await?;
        let read = |words: &mut Words| {
            Ok::<_, Error>(match words.text()?.as_str() {
                "kept" => Released::Kept,
                "passed" => {
                    let token = number(words)?;
                    self.link.saw(token);
                    Released::Passed { token, lease: lasting(words)?, sent }
                }
                "released" => Released::ForAll { told: number(words)? },
                "lost" => Released::Lost,
                other => return Err(Error::Unexpected(format!("{other:?} of lock_release"))),
            })
        };
        read(&mut words).map_err(|error| refused(&error))
    }

    /// Sets how long these last from now on, or only lets them last as long where not `exactly`; for each whether it is still held.
    pub(super) async fn extend(&self, holds: &[(LockName, u64, Duration)], exactly: bool, until: Instant) -> Result<Vec<bool>, Refusal> {
        let keys: Vec<String> = holds.iter().flat_map(|(name, ..)| [keys::lock(name), keys::lock_owner(name)]).collect();
        let mut batch = Pack::default();
        batch.array(holds.len());
        for (_, token, lease) in holds {
            batch.array(3).text(&token.to_string()).integer(millis(*lease)).is(exactly);
        }
        let (batch, keep) = (batch.into_bytes(), limits::LOCK_NOTE.as_millis().to_string());
        let mut words = self
            .call(&script::LOCK_EXTEND, &keys, &self.op(), until, |node| {
                let deadline = node.time_at(Instant::now() + limits::LOCK_CALL_WITHIN).to_string();
                vec![deadline.into_bytes(), node.epoch.installation.clone().into_bytes(), keep.clone().into_bytes(), batch.clone()]
            })
            .await?;
        holds.iter().map(|_| Ok(words.integer().map_err(|error| refused(&error))? == 1)).collect()
    }

    /// Lets it last so long from now on if no more than `ours` listen on its channel. `false` where they do, or it is not held under this token.
    pub(super) async fn keep(&self, name: &LockName, token: u64, lease: Duration, ours: bool, until: Instant) -> Result<bool, Refusal> {
        let keys = [keys::lock(name), keys::lock_owner(name), keys::lock_channel(name)];
        let (token, lease, ours) = (token.to_string(), millis(lease).to_string(), u8::from(ours).to_string());
        let keep = limits::LOCK_NOTE.as_millis().to_string();
        let mut words = self
            .call(&script::LOCK_KEEP, &keys, &self.op(), until, |node| {
                let deadline = node.time_at(Instant::now() + limits::LOCK_CALL_WITHIN).to_string();
                [&deadline, &node.epoch.installation, &token, &lease, &keep, &ours].map(|arg| arg.clone().into_bytes()).into()
            })
            .await?;
        words.text().map(|word| word == "kept").map_err(|error| refused(&error))
    }

    /// Counts those of these that ended by their leases. What was released, through whichever sidecar, did not.
    pub(super) async fn count_ended(&self, holds: &[Ended]) {
        // Their leases began in Redis a little later than they count here.
        tokio::time::sleep(limits::LOCK_ENDED_AFTER).await;
        for some in holds.chunks(limits::LOCK_RENEWALS_AT_ONCE) {
            let keys: Vec<String> = some.iter().flat_map(|ended| [keys::lock(&ended.name), keys::lock_owner(&ended.name)]).collect();
            let mut batch = Pack::default();
            batch.array(some.len());
            for ended in some {
                batch.text(&ended.token.to_string());
            }
            let batch = batch.into_bytes();
            let until = Instant::now() + limits::LOCK_CALL_WITHIN;
            let op = self.op();
            let answer =
                self.call(&script::LOCK_ENDED, &keys, &op, until, |node| vec![node.epoch.installation.clone().into_bytes(), batch.clone()]);
            let Ok(mut words) = answer.await else { return };
            let ended: u64 = some.iter().map(|_| number(&mut words).unwrap_or(0)).sum();
            metrics::counter!("holdfast_lock_expired_total").increment(ended);
        }
    }

    /// Looks at a lock; `None` where nobody holds it.
    pub(super) async fn look(&self, name: &LockName, token: u64, until: Instant) -> Result<Option<Seen>, Refusal> {
        let (keys, token) = ([keys::lock(name), keys::lock_owner(name)], token.to_string());
        let mut words = self
            .call(&script::LOCK_LOOK, &keys, &self.op(), until, |node| {
                vec![node.epoch.installation.clone().into_bytes(), token.clone().into_bytes()]
            })
            .await?;
        let read = |words: &mut Words| {
            let (remaining_ms, held) = (words.integer()?, words.integer()? == 1);
            if remaining_ms == -2 {
                return Ok(None);
            }
            let (field, token, owner) = (words.maybe_text()?.unwrap_or_default(), words.maybe_text()?, words.maybe_text()?);
            Ok::<_, Error>(Some(Seen { remaining_ms, held, field, token, owner }))
        };
        read(&mut words).map_err(|error| refused(&error))
    }

    /// [`Inner::call_on`] of what is given up at the same time whether or not it was sent.
    async fn call(
        &self,
        script: &Script,
        keys: &[String],
        op: &str,
        until: Instant,
        args: impl FnMut(&Node) -> Vec<Vec<u8>>,
    ) -> Result<Words, Refusal> {
        self.call_on(script, keys, op, until, Some(until), args).await
    }

    /// Calls a script, on another connection where one breaks. Its first argument, and the first word of its answer, is `op`: an answer to
    /// something else says that this connection is off by one. `until`: until when it is sent again where it may have run. `unsent_until`: until
    /// when it may be sent for the first time, if that is earlier, and then Redis refuses it but once; `None`: nobody else would do it, so it is
    /// tried again also where Redis refuses it for now.
    async fn call_on(
        &self,
        script: &Script,
        keys: &[String],
        op: &str,
        until: Instant,
        unsent_until: Option<Instant>,
        mut args: impl FnMut(&Node) -> Vec<Vec<u8>>,
    ) -> Result<Words, Refusal> {
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let mut sent = false;
        let may_have_run = |sent: bool| sent && script.name != script::LOCK_LOOK.name;
        let over = |sent: bool| if may_have_run(sent) { Refusal::InDoubt } else { self.silent() };
        let ends = |sent: bool| unsent_until.filter(|at| !sent && *at < until).unwrap_or(until);
        loop {
            let Ok(node) = tokio::time::timeout_at(ends(sent).into(), self.link.node()).await else { return Err(over(sent)) };
            let args = args(&node);
            let args: Vec<&[u8]> = std::iter::once(op.as_bytes()).chain(args.iter().map(Vec::as_slice)).collect();
            let mut connection = node.connection.clone();
            let limit = until.min(Instant::now() + limits::LOCK_CALL_WITHIN);
            let again = match tokio::time::timeout_at(limit.into(), connection.run(script, &keys, &args)).await {
                Ok(Ok(value)) => match self.judge(value, &node, op) {
                    Ok(words) => return Ok(words),
                    Err(again) => again,
                },
                Ok(Err(error @ Error::Connection(_))) => {
                    tracing::debug!(%error, script = script.name, "the connection of locks broke");
                    sent = true;
                    self.link.failed(&node);
                    Again::Now
                }
                // Whoever asked has no more time; Redis may have.
                Err(_) if limit == until => return Err(over(true)),
                Err(_) => {
                    sent = true;
                    self.link.failed(&node);
                    Again::Now
                }
                Ok(Err(error)) if error.is_of_the_role() || error.code() == "LOADING" => {
                    self.link.failed(&node);
                    Again::Now
                }
                // It may have run when it was sent before.
                Ok(Err(error)) if error.is_for_now() && (may_have_run(sent) || unsent_until.is_none()) => {
                    tracing::debug!(%error, script = script.name, "Redis refuses a lock's script for now");
                    Again::Later(limits::LOCK_POLL)
                }
                Ok(Err(_)) if may_have_run(sent) => Again::Never(Refusal::InDoubt),
                Ok(Err(error)) => Again::Never(refused(&error)),
            };
            sent |= matches!(again, Again::Lost);
            match again {
                Again::Never(refusal) => return Err(refusal),
                Again::Now | Again::Lost if Instant::now() >= ends(sent) => return Err(over(sent)),
                Again::Later(pause) if Instant::now() + pause >= ends(sent) => return Err(over(sent)),
                Again::Now | Again::Lost => {}
                Again::Later(pause) => tokio::time::sleep(pause).await,
            }
        }
    }

    /// Why nothing was sent.
    pub(super) fn silent(&self) -> Refusal {
        Refusal::TryAgain(self.link.trouble().unwrap_or_else(|| "Redis does not answer".to_owned()))
    }

    /// What a script that gives out tokens is told of the node, and until when it may, sent at this time.
    fn of_node(&self, node: &Node, sent: Instant) -> Vec<Vec<u8>> {
        let numbers =
            [node.epoch.number.to_string(), self.link.seen().to_string(), node.time_at(sent + limits::LOCK_CALL_WITHIN).to_string()];
        let [epoch, seen, deadline] = numbers.map(String::into_bytes);
        vec![epoch, node.connection.run_id().as_bytes().to_vec(), seen, deadline]
    }

    /// Whether an answer decides anything.
    fn judge(&self, value: redis::Value, node: &Node, op: &str) -> Result<Words, Again> {
        let unexpected = |error: &Error| Again::Never(refused(error));
        let mut values = match value {
            redis::Value::Array(values) => values,
            _ => Vec::new(),
        };
        let bytes = |value: Option<&redis::Value>| match value {
            Some(redis::Value::BulkString(bytes)) => bytes.clone(),
            _ => Vec::new(),
        };
        if bytes(values.first()) != op.as_bytes() {
            tracing::warn!("Redis answered something else than it was asked about a lock: another connection is used");
            self.link.failed(node);
            return Err(Again::Lost);
        }
        values.remove(0);
        let word = bytes(values.first());
        let mut words = Words::new(redis::Value::Array(values)).map_err(|error| unexpected(&error))?;
        match word.as_slice() {
            b"epoch" => self.link.stale(node, 0),
            b"spent" => {
                let spent = words.text().and_then(|_| number(&mut words)).map_err(|error| unexpected(&error))?;
                if Epoch::of(spent) >= limits::LOCK_EPOCH_MAX {
                    let why = "its counter, redisson_lock_token:{<name>}, is too high for what Lua counts exactly: set it lower";
                    return Err(Again::Never(Refusal::Failed(why.to_owned())));
                }
                self.link.stale(node, spent);
            }
            b"late" => return Err(Again::Later(limits::LOCK_RECONNECT_AFTER)),
            b"absent" => return Err(Again::Never(Refusal::NoCoupon)),
            b"type" => {
                let kind = words.text().and_then(|_| words.text()).map_err(|error| unexpected(&error))?;
                return Err(Again::Never(Refusal::NotALock(kind)));
            }
            _ => return Ok(words),
        }
        Err(Again::Now)
    }
}

/// For how many ms Redis remembers what was done to a lock, and what is counted.
fn notes() -> [Vec<u8>; 2] {
    [limits::LOCK_NOTE, limits::LOCK_COUNTED_NOTE].map(|note| note.as_millis().to_string().into_bytes())
}

fn number(words: &mut Words) -> Result<u64, Error> {
    let integer = words.integer()?;
    u64::try_from(integer).map_err(|_| Error::Unexpected(format!("{integer} where a token belongs")))
}

/// A lease that Redis says in ms.
fn lasting(words: &mut Words) -> Result<Duration, Error> {
    Ok(Duration::from_millis(u64::try_from(words.integer()?).unwrap_or(0)))
}

fn refused(error: &Error) -> Refusal {
    Refusal::Failed(error.to_string())
}
