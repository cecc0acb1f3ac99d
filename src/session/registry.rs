//! Every connected client, on whatever thread it is served.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use dashmap::DashMap;
use tokio_util::sync::CancellationToken;

use super::client::Client;
use super::users::Users;

/// The clients by id, and how many there have been.
pub struct Registry {
    clients: DashMap<u64, Arc<Client>>,
    clients_max: AtomicUsize,
    next_id: AtomicU64,
    connected: AtomicUsize,
    blocked: AtomicUsize,
    received_total: AtomicU64,
    rejected_total: AtomicU64,
}

impl Registry {
    /// Admits at most `clients_max` clients at once.
    pub fn new(clients_max: usize) -> Self {
        Self {
            clients: DashMap::new(),
            clients_max: AtomicUsize::new(clients_max),
            next_id: AtomicU64::new(1),
            connected: AtomicUsize::new(0),
            blocked: AtomicUsize::new(0),
            received_total: AtomicU64::new(0),
            rejected_total: AtomicU64::new(0),
        }
    }

    /// Takes a client in; `None` where there are too many.
    pub fn admit(self: &Arc<Self>, address: SocketAddr, local: SocketAddr, fd: i32, stop: CancellationToken) -> Option<Admission> {
        self.received_total.fetch_add(1, Ordering::Relaxed);
        if self.connected.fetch_add(1, Ordering::Relaxed) >= self.clients_max() {
            self.connected.fetch_sub(1, Ordering::Relaxed);
            self.rejected_total.fetch_add(1, Ordering::Relaxed);
            metrics::counter!("holdfast_rejected_connections_total").increment(1);
            return None;
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let client = Arc::new(Client::new(id, address, local, fd, stop));
        self.clients.insert(id, Arc::clone(&client));
        metrics::gauge!("holdfast_connected_clients").increment(1.0);
        Some(Admission { registry: Arc::clone(self), client })
    }

    /// The clients, oldest first.
    pub fn clients(&self) -> Vec<Arc<Client>> {
        let mut clients: Vec<Arc<Client>> = self.clients.iter().map(|entry| Arc::clone(entry.value())).collect();
        clients.sort_by_key(|client| client.id);
        clients
    }

    /// Closes the connections whose user may not go on, or may no longer have what it has subscribed to, after the users have changed; returns
    /// how many.
    pub fn expel(&self, users: &Users) -> usize {
        let may_stay = |client: &Client| {
            let profile = client.profile();
            let Some(login) = &profile.login else { return true };
            users.renew(login).is_some_and(|user| profile.suits(&user))
        };
        let clients = self.clients();
        clients.iter().filter(|client| !may_stay(client)).map(|client| client.kill("user_changed")).count()
    }

    /// Lets every connection look again at how long it may be silent, and at what it waits for.
    pub fn wake(&self) {
        self.clients.iter().for_each(|entry| entry.value().wake());
    }

    /// How many are connected.
    pub fn connected(&self) -> usize {
        self.connected.load(Ordering::Relaxed)
    }

    /// How many wait for what may take long, such as a lock.
    pub fn blocked(&self) -> usize {
        self.blocked.load(Ordering::Relaxed)
    }

    /// Counts one more that waits, until what is returned is dropped.
    pub fn block(self: &Arc<Self>) -> Blocked {
        self.blocked.fetch_add(1, Ordering::Relaxed);
        Blocked(Arc::clone(self))
    }

    pub fn clients_max(&self) -> usize {
        self.clients_max.load(Ordering::Relaxed)
    }

    /// Changes it; those who are in stay.
    pub fn set_clients_max(&self, clients_max: usize) {
        self.clients_max.store(clients_max, Ordering::Relaxed);
    }

    /// Connections accepted since the start.
    pub fn received_total(&self) -> u64 {
        self.received_total.load(Ordering::Relaxed)
    }

    /// Of these, those turned away because there were too many.
    pub fn rejected_total(&self) -> u64 {
        self.rejected_total.load(Ordering::Relaxed)
    }
}

/// A client's place, given back when dropped.
pub struct Admission {
    registry: Arc<Registry>,
    pub client: Arc<Client>,
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.registry.clients.remove(&self.client.id);
        metrics::gauge!("holdfast_connected_clients").decrement(1.0);
        self.registry.connected.fetch_sub(1, Ordering::Relaxed);
    }
}

/// See [`Registry::block`].
pub struct Blocked(Arc<Registry>);

impl Drop for Blocked {
    fn drop(&mut self) {
        self.0.blocked.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_and_given_back() {
        let registry = Arc::new(Registry::new(1));
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        let admit = || registry.admit(address, address, 3, CancellationToken::new());
        let first = admit().unwrap();
        assert!(admit().is_none());
        assert_eq!((registry.connected(), registry.clients()[0].id), (1, first.client.id));
        drop(first);
        assert_eq!(registry.clients().len(), 0);
        assert!(admit().unwrap().client.id > 1);
        assert_eq!((registry.received_total(), registry.rejected_total()), (3, 1));
    }
}
