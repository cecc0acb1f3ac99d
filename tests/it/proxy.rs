//! A proxy that treats connections as a bad network does: it loses answers, cuts, holds, slows down, and sends requests twice. Controlled
//! while it runs.

#![allow(dead_code, reason = "each of the test binaries uses its own part")]

use std::collections::{HashMap, HashSet};
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

/// See the module.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

/// A way through the proxy.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Requests,
    Answers,
}

struct Shared {
    target: AtomicU16,
    /// What a request contains that may lose its answer or be sent twice.
    marked: &'static [u8],
    to_lose: AtomicUsize,
    to_repeat: AtomicUsize,
    to_silence: AtomicUsize,
    /// Whether what is published is lost.
    mute: AtomicBool,
    delay_us: AtomicU64,
    /// How many marked requests were passed on.
    passed: AtomicUsize,
    /// The number of the next connection.
    next: AtomicU64,
    held: Mutex<Held>,
    /// The connections before this one have their requests kept back.
    old: AtomicU64,
    released: Condvar,
    connections: Mutex<HashMap<u64, [TcpStream; 2]>>,
    ended: AtomicBool,
}

/// What is kept back.
#[derive(Default)]
struct Held {
    directions: Vec<Direction>,
    /// Whether what goes over the connections of subscribers is.
    of_subscribers: bool,
    /// Those that have sent a SUBSCRIBE.
    subscribers: HashSet<u64>,
    /// Those of which nothing passes any more.
    silent: HashSet<u64>,
}

impl Proxy {
    /// Passes everything on to a port of this machine. `marked`: what a request contains that [`Proxy::lose`] and [`Proxy::repeat`] are for;
    /// empty for all requests.
    pub fn start(target: u16, marked: &'static [u8]) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            target: AtomicU16::new(target),
            marked,
            to_lose: AtomicUsize::new(0),
            to_repeat: AtomicUsize::new(0),
            to_silence: AtomicUsize::new(0),
            mute: AtomicBool::new(false),
            delay_us: AtomicU64::new(0),
            passed: AtomicUsize::new(0),
            next: AtomicU64::new(0),
            held: Mutex::default(),
            old: AtomicU64::new(0),
            released: Condvar::new(),
            connections: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let serving = Arc::clone(&shared);
        thread::spawn(move || {
            for (number, client) in (0..).zip(listener.incoming().flatten()) {
                if serving.ended.load(Ordering::SeqCst) {
                    return;
                }
                serving.next.store(number + 1, Ordering::SeqCst);
                if let Ok(server) = TcpStream::connect(("127.0.0.1", serving.target.load(Ordering::SeqCst))) {
                    pass(number, client, server, &serving);
                }
            }
        });
        Self { port, shared }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn redis_url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    /// Leads connections made from now on to another port.
    pub fn lead_to(&self, target: u16) {
        self.shared.target.store(target, Ordering::SeqCst);
    }

    /// Passes the next marked requests on, and cuts their connections instead of passing on an answer.
    pub fn lose(&self, answers: usize) {
        self.shared.to_lose.fetch_add(answers, Ordering::SeqCst);
    }

    /// How many answers are still to be lost.
    pub fn left_to_lose(&self) -> usize {
        self.shared.to_lose.load(Ordering::SeqCst)
    }

    /// Sends the next marked requests twice.
    pub fn repeat(&self, requests: usize) {
        self.shared.to_repeat.fetch_add(requests, Ordering::SeqCst);
    }

    /// How many requests are still to be sent twice.
    pub fn left_to_repeat(&self) -> usize {
        self.shared.to_repeat.load(Ordering::SeqCst)
    }

    /// Keeps back the next marked requests, and all that goes over their connections, which stay open, until [`Proxy::release`].
    pub fn silence(&self, requests: usize) {
        self.shared.to_silence.fetch_add(requests, Ordering::SeqCst);
    }

    /// How many requests are still to silence their connection.
    pub fn left_to_silence(&self) -> usize {
        self.shared.to_silence.load(Ordering::SeqCst)
    }

    /// Loses every message of a subscription from now on (RESP3), and nothing else.
    pub fn mute(&self) {
        self.shared.mute.store(true, Ordering::SeqCst);
    }

    /// Takes this long over everything that passes.
    pub fn slow_down(&self, delay: Duration) {
        self.shared.delay_us.store(u64::try_from(delay.as_micros()).unwrap(), Ordering::SeqCst);
    }

    /// Keeps back what goes this way, until [`Proxy::release`].
    pub fn hold(&self, direction: Direction) {
        self.shared.held.lock().unwrap().directions.push(direction);
    }

    /// Keeps back what goes either way over the connections that have sent a SUBSCRIBE, and over each that does from now on, until
    /// [`Proxy::release`].
    pub fn hold_subscribers(&self) {
        self.shared.held.lock().unwrap().of_subscribers = true;
    }

    /// Keeps back the requests of the connections that there are, until [`Proxy::release`].
    pub fn hold_old(&self) {
        self.shared.old.store(self.shared.next.load(Ordering::SeqCst), Ordering::SeqCst);
    }

    /// How many marked requests were passed on, each counted once.
    pub fn passed(&self) -> usize {
        self.shared.passed.load(Ordering::SeqCst)
    }

    pub fn release(&self) {
        let mut held = self.shared.held.lock().unwrap();
        self.shared.old.store(0, Ordering::SeqCst);
        held.directions.clear();
        held.of_subscribers = false;
        held.silent.clear();
        drop(held);
        self.shared.released.notify_all();
    }

    /// Cuts every connection at its client's end. What is kept back still arrives.
    pub fn cut_clients(&self) {
        for [client, _] in self.shared.connections.lock().unwrap().values() {
            drop(client.shutdown(Shutdown::Both));
        }
    }

    /// Cuts every connection.
    pub fn cut(&self) {
        for ends in self.shared.connections.lock().unwrap().values() {
            ends.iter().for_each(|end| drop(end.shutdown(Shutdown::Both)));
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.release();
        self.cut();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Shared {
    fn wait_if_told(&self, direction: Direction, number: u64) {
        let held = self.held.lock().unwrap();
        let is_old = || direction == Direction::Requests && number < self.old.load(Ordering::SeqCst);
        let is_held = |held: &mut Held| {
            let of_subscriber = held.of_subscribers && held.subscribers.contains(&number);
            held.directions.contains(&direction) || of_subscriber || held.silent.contains(&number) || is_old()
        };
        drop(self.released.wait_while(held, is_held).unwrap());
        match self.delay_us.load(Ordering::SeqCst) {
            0 => {}
            delay => thread::sleep(Duration::from_micros(delay)),
        }
    }

    fn is_marked(&self, bytes: &[u8]) -> bool {
        self.marked.is_empty() || contains(bytes, self.marked)
    }
}

fn contains(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window == what)
}

/// An answer without the messages of a release in it.
fn without_messages(answer: &[u8]) -> Vec<u8> {
    let (mut rest, mut kept) = (answer, Vec::new());
    let find = |text: &[u8], what: &[u8]| text.windows(what.len()).position(|window| window == what);
    let (begin, end) = (b">3\r\n$7\r\nmessage\r\n".as_slice(), b"\r\n$1\r\n0\r\n".as_slice());
    while let Some(at) = find(rest, begin) {
        kept.extend_from_slice(&rest[..at]);
        let Some(length) = find(&rest[at..], end) else { panic!("half a message") };
        rest = &rest[at + length + end.len()..];
    }
    kept.extend_from_slice(rest);
    kept
}

fn take_one(from: &AtomicUsize) -> bool {
    from.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

fn pass(number: u64, client: TcpStream, server: TcpStream, shared: &Arc<Shared>) {
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (mut from_client, mut to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    let (mut from_server, mut to_client) = (server.try_clone().unwrap(), client.try_clone().unwrap());
    shared.connections.lock().unwrap().insert(number, [client, server]);
    let losing = Arc::new(AtomicBool::new(false));
    let (loses, all) = (Arc::clone(&losing), Arc::clone(shared));
    thread::spawn(move || {
        let mut buffer = [0; 65536];
        while let Ok(read @ 1..) = from_client.read(&mut buffer) {
            let request = &buffer[..read];
            if contains(request, b"SUBSCRIBE") {
                all.held.lock().unwrap().subscribers.insert(number);
            }
            let marked = all.is_marked(request);
            if marked && take_one(&all.to_silence) {
                all.held.lock().unwrap().silent.insert(number);
            }
            all.wait_if_told(Direction::Requests, number);
            if marked && take_one(&all.to_lose) {
                loses.store(true, Ordering::SeqCst);
            }
            // Half a request may not be sent twice: that would be another one.
            let whole = read < buffer.len() && request.ends_with(b"\r\n");
            let times = if marked && whole && take_one(&all.to_repeat) { 2 } else { 1 };
            if (0..times).any(|_| to_server.write_all(request).is_err()) {
                break;
            }
            all.passed.fetch_add(usize::from(marked), Ordering::SeqCst);
        }
        let _ = to_server.shutdown(Shutdown::Both);
    });
    let all = Arc::clone(shared);
    thread::spawn(move || {
        let mut buffer = [0; 65536];
        while let Ok(read @ 1..) = from_server.read(&mut buffer) {
            all.wait_if_told(Direction::Answers, number);
            let answer = if all.mute.load(Ordering::SeqCst) { &without_messages(&buffer[..read]) } else { &buffer[..read] };
            if losing.load(Ordering::SeqCst) || to_client.write_all(answer).is_err() {
                break;
            }
        }
        let _ = (to_client.shutdown(Shutdown::Both), from_server.shutdown(Shutdown::Both));
        all.connections.lock().unwrap().remove(&number);
    });
}
