//! The relay from end to end, between a real Redis and a real Postgres.

use tokio::task::JoinHandle;

use super::*;
use crate::ledger::testing::{Postgres, RedisServer, database, execute, number_of};
use crate::store::Connection;
use crate::store::keys;
use crate::store::stream::testing::{append, send};

const PATIENCE: Duration = Duration::from_secs(60);

/// A Redis with an outbox in it, and a relay that carries it to a Postgres.
struct Stage {
    redis: RedisServer,
    writer: Connection,
    partition: Arc<Partition>,
    cancel: CancellationToken,
    running: Option<JoinHandle<()>>,
    n: u64,
    prev: String,
}

impl Stage {
    async fn new() -> Self {
        let redis = RedisServer::start();
        let writer = Connection::open(&redis.url()).await.unwrap();
        let partition = Arc::new(Partition::new(0, 1 << 20).0);
        Self { redis, writer, partition, cancel: CancellationToken::new(), running: None, n: 0, prev: "-".into() }
    }

    fn live(&self) {
        self.partition.state.send_replace(State::Live { epoch: 1, run_id: self.writer.run_id().to_owned() });
    }

    fn start(&mut self, postgres_url: &str) {
        let relay = Relay {
            partition: self.partition.clone(),
            redis_url: self.redis.url(),
            postgres_url: postgres_url.to_owned(),
            drain: Duration::from_secs(20),
        };
        self.running = Some(tokio::spawn(relay.run(self.cancel.clone())));
    }

    /// Appends what a batch of these lines would.
    async fn append(&mut self, changes: &str) {
        let first = self.n + 1;
        self.n += changes.lines().count() as u64;
        let op = format!("i:stock:{first}");
        append(&mut self.writer, &format!("1-{}", self.n), first, &self.prev, &op, changes).await;
        self.prev = op;
    }

    async fn sell(&mut self, times: usize) {
        for _ in 0..times {
            self.append("0 decr | a -1 0\n1 decr | a -1 0").await;
        }
    }

    async fn applied(&self, n: u64) {
        let mut applied = self.partition.applied.subscribe();
        let reached = tokio::time::timeout(PATIENCE, applied.wait_for(|position| position.n >= n)).await;
        assert!(reached.is_ok(), "applied {}, trouble '{}'", self.partition.applied.borrow().n, self.partition.trouble_text());
    }

    async fn trouble(&self, what: &str) {
        let mut trouble = self.partition.relay_trouble.subscribe();
        let met = tokio::time::timeout(
            PATIENCE,
            trouble.wait_for(|trouble| match trouble {
                Some(Obstacle::Broken(text) | Obstacle::Held(text)) => !what.is_empty() && text.contains(what),
                None => what.is_empty(),
            }),
        )
        .await;
        assert!(met.is_ok(), "trouble is '{}', not '{what}'", self.partition.trouble_text());
    }

    async fn until(&self, what: impl Fn(&Partition) -> bool) {
        let began = Instant::now();
        while !what(&self.partition) {
            assert!(began.elapsed() < PATIENCE);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn stop(&mut self) {
        self.cancel.cancel();
        self.running.take().unwrap().await.unwrap();
    }
}

async fn units_and_lines(connection: &mut PgConnection) -> (i64, i64) {
    let units = number_of(connection, "SELECT available FROM holdfast.stock WHERE product_id = 'a'").await;
    (units, number_of(connection, "SELECT count(*) FROM holdfast.stock_ledger").await)
}

#[tokio::test]
async fn what_the_outbox_holds_arrives_once_and_the_rest_on_stopping() {
    let (mut stage, mut database) = (Stage::new().await, database().await);
    stage.append("0 set | a 10000 10000").await;
    stage.start(&database.url);
    stage.until(Partition::ledger_up).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(number_of(&mut database.connection, "SELECT count(*) FROM holdfast.stock_ledger").await, 0, "not verified yet");
    stage.live();
    stage.applied(1).await;
    stage.sell(1_000).await;
    stage.applied(2_001).await;
    assert_eq!(units_and_lines(&mut database.connection).await, (8_000, 2_001));
    stage.sell(300).await;
    stage.stop().await;
    assert_eq!(units_and_lines(&mut database.connection).await, (7_400, 2_601));
    assert_eq!((stage.partition.applied.borrow().n, stage.partition.lag()), (2_601, 0));
    // The next relay takes up where the row says.
    stage.cancel = CancellationToken::new();
    stage.start(&database.url);
    stage.sell(1).await;
    stage.applied(2_603).await;
    stage.stop().await;
    assert_eq!(units_and_lines(&mut database.connection).await, (7_398, 2_603));
}

#[tokio::test]
async fn two_relays_carry_no_more_than_one() {
    let (mut stage, mut database) = (Stage::new().await, database().await);
    stage.live();
    stage.start(&database.url);
    let first = stage.running.take();
    stage.start(&database.url);
    stage.append("0 set | a 10000 10000").await;
    stage.sell(1_000).await;
    stage.applied(2_001).await;
    stage.stop().await;
    first.unwrap().await.unwrap();
    assert_eq!(units_and_lines(&mut database.connection).await, (8_000, 2_001));
}

#[tokio::test]
async fn a_cut_connection_loses_and_repeats_nothing() {
    let (mut stage, mut database) = (Stage::new().await, database().await);
    stage.live();
    stage.start(&database.url);
    stage.append("0 set | a 100000 100000").await;
    for _ in 0..20 {
        stage.sell(100).await;
        execute(
            &mut database.connection,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        .await;
        send(&mut stage.writer, &["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    }
    stage.applied(4_001).await;
    stage.stop().await;
    assert_eq!(units_and_lines(&mut database.connection).await, (96_000, 4_001));
}

#[tokio::test]
async fn what_was_read_ahead_of_a_transaction_that_fails_arrives_once() {
    let (mut stage, mut database) = (Stage::new().await, database().await);
    stage.append("0 set | a 100000 100000").await;
    let entry: Vec<_> = (0..500).map(|k| format!("{k} decr | a -1 0")).collect();
    let all = 1 + 20 * 500;
    for _ in 0..20 {
        stage.append(&entry.join("\n")).await;
    }
    let mut holder = ledger::connect(&database.url).await.unwrap();
    execute(&mut holder, "BEGIN; SELECT * FROM holdfast.partition FOR UPDATE").await;
    stage.live();
    stage.start(&database.url);
    // Two batches are read although Postgres has taken none: the second one behind the transaction that waits for the lock.
    let ahead = RELAY_CHANGES_GOAL as u64 + 1_000;
    stage.until(|partition| partition.lag() >= ahead).await;
    // It gives up waiting for the lock, with what was read pending, and tries again; then it loses its connection.
    tokio::time::sleep(Duration::from_millis(1_300)).await;
    assert_eq!((stage.partition.applied.borrow().n, lines(&mut database.connection).await), (0, 0));
    execute(
        &mut database.connection,
        "SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity a WHERE a.datname = current_database() AND a.wait_event_type = 'Lock'",
    )
    .await;
    execute(&mut holder, "COMMIT").await;
    stage.applied(all).await;
    stage.stop().await;
    assert_eq!(units_and_lines(&mut database.connection).await, (90_000, 10_001));
}

/// How many lines the ledger has.
async fn lines(connection: &mut PgConnection) -> i64 {
    number_of(connection, "SELECT count(*) FROM holdfast.stock_ledger").await
}

#[tokio::test]
async fn a_postgres_that_dies_and_comes_back_has_everything_once() {
    let mut server = tokio::task::spawn_blocking(Postgres::start).await.unwrap();
    let url = server.database().await;
    ledger::migrate(&url).await.unwrap();
    let mut connection = ledger::connect(&url).await.unwrap();
    let row = ledger::partition::load(&mut connection, 0).await.unwrap();
    ledger::partition::take_epoch(&mut connection, 0, &row, "run-1", 0).await.unwrap().unwrap();
    let mut stage = Stage::new().await;
    stage.live();
    stage.start(&url);
    stage.append("0 set | a 100000 100000").await;
    for round in 0..3 {
        // Killed while it has something to do.
        stage.sell(300).await;
        stage.applied(round * 1_200 + 100).await;
        server.kill();
        stage.until(|partition| !partition.ledger_up()).await;
        stage.sell(300).await;
        server = tokio::task::spawn_blocking(move || {
            server.restart();
            server
        })
        .await
        .unwrap();
        stage.until(Partition::ledger_up).await;
        stage.applied((round + 1) * 1_200 + 1).await;
    }
    stage.stop().await;
    let mut connection = ledger::connect(&url).await.unwrap();
    assert_eq!(units_and_lines(&mut connection).await, (96_400, 3_601));
}

#[tokio::test]
async fn an_outbox_that_does_not_continue_is_never_applied() {
    let (mut stage, mut database) = (Stage::new().await, database().await);
    stage.live();
    stage.start(&database.url);
    stage.append("0 set | a 100 100").await;
    stage.sell(2).await;
    stage.applied(5).await;
    // Redis comes back with an older state, and sells on.
    send(&mut stage.writer, &["DEL", keys::OUTBOX]).await;
    append(&mut stage.writer, "1-1", 1, "-", "i:stock:1", "0 set | a 100 100").await;
    send(&mut stage.writer, &["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    stage.trouble("redis went back").await;
    append(
        &mut stage.writer,
        "1-6",
        2,
        "i:stock:1",
        "other:stock:1",
        "0 decr | a -1 0\n1 decr | a -1 0\n2 decr | a -1 0\n3 decr | a -1 0\n4 decr | a -1 0",
    )
    .await;
    stage.trouble("fork").await;
    tokio::time::timeout(PATIENCE, stage.partition.verify.notified()).await.unwrap();
    assert_eq!(units_and_lines(&mut database.connection).await, (96, 5));
    // While the verifier works on it, the relay finds out by itself that the way is free.
    stage.partition.state.send_replace(State::Loading("rebuilding".into()));
    send(&mut stage.writer, &["DEL", keys::OUTBOX]).await;
    stage.trouble("").await;
    stage.sell(1).await;
    stage.live();
    stage.applied(7).await;
    stage.stop().await;
    assert_eq!(units_and_lines(&mut database.connection).await, (94, 7));
}

#[tokio::test]
async fn a_refused_change_is_parked_and_the_rest_goes_on() {
    let (mut stage, mut database) = (Stage::new().await, database().await);
    stage.append("0 set | a 100 100").await;
    stage.sell(10).await;
    stage.append("0 decr | a -1 0\n1 decr | ghost -1 0\n2 decr | a -1 0").await;
    stage.sell(10).await;
    stage.start(&database.url);
    stage.live();
    stage.applied(44).await;
    tokio::time::timeout(PATIENCE, stage.partition.parked.notified()).await.unwrap();
    stage.trouble("").await;
    stage.stop().await;
    assert_eq!(units_and_lines(&mut database.connection).await, (58, 44));
    assert_eq!(
        number_of(&mut database.connection, "SELECT sum(delta)::bigint FROM holdfast.dead_letter WHERE product_id = 'ghost'").await,
        -1
    );
}
