//! The one subscription of this sidecar: to the channels of the locks that somebody waits for, on which a release is told.
//!
//! What is told is a hint. Nothing waits for it alone.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::{Mutex as AsyncMutex, Notify};
use tracing::{debug, info, warn};

use super::super::{Connection, Error, keys};
use super::Inner;
use crate::domain::lock::LockName;
use crate::limits::{HEARTBEAT_EVERY, HEARTBEAT_WITHIN, LOCK_CHANNELS_AT_ONCE, LOCK_RECONNECT_AFTER};

/// What became of a wish to hear of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// It was heard of already.
    Already,
    /// From now on: what was told before was missed.
    FromNow,
    /// Not now: all that wait are woken when it is heard of again.
    Not,
}

/// See the module.
pub(super) struct Subscriber {
    redis_url: String,
    locks: Weak<Inner>,
    /// The channels wanted, and whether Redis has confirmed each.
    channels: Mutex<HashMap<String, (LockName, bool)>>,
    /// The connection, while there is one. Held over each change of a subscription, so that they take effect in order.
    connection: AsyncMutex<Option<Connection>>,
    broken: Notify,
}

impl Subscriber {
    pub fn new(redis_url: &str, locks: Weak<Inner>) -> Self {
        Self {
            redis_url: redis_url.to_owned(),
            locks,
            channels: Mutex::default(),
            connection: AsyncMutex::default(),
            broken: Notify::new(),
        }
    }

    fn channels(&self) -> MutexGuard<'_, HashMap<String, (LockName, bool)>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether releases of this lock are heard of.
    pub fn hears(&self, name: &LockName) -> bool {
        self.channels().get(&keys::lock_channel(name)).is_some_and(|(_, confirmed)| *confirmed)
    }

    /// Whether releases of this lock are to be heard of, be it only once Redis is there again.
    pub fn wants(&self, name: &LockName) -> bool {
        self.channels().contains_key(&keys::lock_channel(name))
    }

    /// Hears of releases of this lock from now on.
    pub async fn hear(&self, name: &LockName) -> Heard {
        let channel = keys::lock_channel(name);
        let mut current = self.connection.lock().await;
        let confirmed = self.channels().entry(channel.clone()).or_insert_with(|| (name.clone(), false)).1;
        if confirmed {
            return Heard::Already;
        }
        let Some(connection) = current.as_mut() else { return Heard::Not };
        match self.ask(connection, std::slice::from_ref(&channel)).await {
            Ok(()) => Heard::FromNow,
            Err(_) => {
                // Whoever stands behind this does not wait for it once more.
                *current = None;
                Heard::Not
            }
        }
    }

    /// No longer hears of these.
    pub async fn forget(&self, names: &[LockName]) {
        let mut current = self.connection.lock().await;
        let channels: Vec<String> = names.iter().map(keys::lock_channel).collect();
        {
            let mut known = self.channels();
            channels.iter().for_each(|channel| _ = known.remove(channel));
        }
        let Some(connection) = current.as_mut() else { return };
        for some in channels.chunks(LOCK_CHANNELS_AT_ONCE) {
            if !matches!(tokio::time::timeout(HEARTBEAT_WITHIN, connection.unsubscribe(some)).await, Ok(Ok(()))) {
                self.broken.notify_one();
                *current = None;
                return;
            }
        }
    }

    async fn ask(&self, connection: &mut Connection, channels: &[String]) -> Result<(), Error> {
        let asked = tokio::time::timeout(HEARTBEAT_WITHIN, connection.subscribe(channels)).await;
        match asked.unwrap_or_else(|_| Err(Error::Unexpected("no answer to SUBSCRIBE".to_owned()))) {
            Ok(()) => {
                let mut known = self.channels();
                for channel in channels {
                    if let Some((_, confirmed)) = known.get_mut(channel) {
                        *confirmed = true;
                    }
                }
                Ok(())
            }
            Err(error) => {
                debug!(%error, "not subscribed");
                self.broken.notify_one();
                Err(error)
            }
        }
    }

    /// Listens, and connects again where that ends. Never returns.
    pub async fn run(&self) {
        let mut said = false;
        loop {
            match self.listen().await {
                Ok(()) => said = false,
                Err(error) if said => debug!(%error, "the subscription to locks is not there"),
                Err(error) => {
                    warn!(%error, "the subscription to locks is not there: those that wait look themselves");
                    said = true;
                }
            }
            self.connection.lock().await.take();
            self.channels().values_mut().for_each(|(_, confirmed)| *confirmed = false);
            tokio::time::sleep(LOCK_RECONNECT_AFTER).await;
        }
    }

    /// Listens on one connection until it ends.
    async fn listen(&self) -> Result<(), Error> {
        let locks = self.locks.clone();
        let told = move |channel: Option<&[u8]>| {
            let Some(locks) = locks.upgrade() else { return };
            match channel.map(std::str::from_utf8) {
                Some(Ok(channel)) => locks.told(channel),
                Some(Err(_)) => {}
                None => locks.subscriber.broken.notify_one(),
            }
        };
        let mut connection = Connection::open_listening(&self.redis_url, told).await?;
        {
            // Whoever wants to hear of a lock meanwhile waits for this.
            let mut current = self.connection.lock().await;
            let wanted: Vec<String> = self.channels().keys().cloned().collect();
            for some in wanted.chunks(LOCK_CHANNELS_AT_ONCE) {
                self.ask(&mut connection, some).await?;
            }
            *current = Some(connection.clone());
            if !wanted.is_empty() {
                info!(locks = wanted.len(), "subscribed to locks again");
            }
        }
        if let Some(locks) = self.locks.upgrade() {
            locks.resubscribed();
        }
        loop {
            tokio::select! {
                () = self.broken.notified() => return Ok(()),
                () = tokio::time::sleep(HEARTBEAT_EVERY) => {
                    let answered = tokio::time::timeout(HEARTBEAT_WITHIN, connection.send(&redis::cmd("PING"))).await;
                    answered.unwrap_or_else(|_| Err(Error::Unexpected("no answer to PING".to_owned())))?;
                }
            }
        }
    }

    /// Which lock a channel is of.
    pub fn lock_of(&self, channel: &str) -> Option<LockName> {
        self.channels().get(channel).map(|(name, _)| name.clone())
    }
}
