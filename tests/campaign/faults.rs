//! The campaigns: each kind of fault many times, under load, and what must be true afterwards.

use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{PATIENCE, wait_until};
use crate::load::Plan;
use crate::proxy::Direction;
use crate::world::World;

/// How often each fault happens.
mod times {
    pub const SIDECAR_KILLED: usize = 100;
    pub const REDIS_KILLED: usize = 30;
    pub const POSTGRES_KILLED: usize = 30;
    pub const REDIS_EMPTIED: usize = 10;
    pub const REDIS_OLDER: usize = 10;
    pub const STOPPED: usize = 20;
    pub const REPLIES_LOST: usize = 1_000;
    pub const SENT_TWICE: usize = 100;
    pub const CUT: usize = 200;
    pub const MIXED: usize = 40;
    pub const REDIS_AND_SIDECAR_LOST: usize = 30;
    pub const OF_TWO_SIDECARS: usize = 20;
    pub const BY_BATCH: usize = 15;
    pub const BY_BATCH_REPLIES_LOST: usize = 100;
}

/// How long Postgres is away, and how many changes a second there are meanwhile.
fn outage() -> Duration {
    Duration::from_secs(std::env::var("HOLDFAST_TEST_OUTAGE_SECONDS").map_or(60, |text| text.parse().unwrap()))
}

const OUTAGE_RATE: u32 = 2_000;

/// By how much the sidecar may grow: a copy of a change takes less than 512 bytes, and buffers some MiB.
fn outage_kib_max() -> u64 {
    outage().as_secs() * u64::from(OUTAGE_RATE) / 2 + 16 * 1024
}

/// How long a process is stopped, in ms.
const STOPPED_FOR: (u64, u64) = (50, 500);

/// How long the load goes on between two faults, in ms.
const BETWEEN: (u64, u64) = (20, 120);

/// And between two double failures: Postgres shall have got something.
const BETWEEN_DOUBLE: (u64, u64) = (100, 400);

#[test]
fn a_killed_sidecar_loses_and_repeats_nothing() {
    let mut world = World::start(Plan::default());
    for _ in 0..times::SIDECAR_KILLED {
        kill_sidecar(&mut world);
    }
    world.check("sidecar killed");
}

#[test]
fn a_killed_redis_that_keeps_its_data_loses_and_repeats_nothing() {
    let mut world = World::start(Plan::default());
    for _ in 0..times::REDIS_KILLED {
        kill_redis(&mut world);
    }
    world.check("redis killed");
}

#[test]
fn a_killed_postgres_loses_and_repeats_nothing() {
    let mut world = World::start(Plan::default());
    for _ in 0..times::POSTGRES_KILLED {
        kill_postgres(&mut world);
    }
    world.check("postgres killed");
}

#[test]
fn an_emptied_redis_loses_and_repeats_nothing() {
    let mut world = World::start(Plan::default());
    for _ in 0..times::REDIS_EMPTIED {
        empty_redis(&mut world);
    }
    assert!(world.counted("holdfast_rebuilds_total") >= times::REDIS_EMPTIED as u64, "each time it was filled anew");
    assert!(world.counted("holdfast_salvaged_total") > 0, "something was on its way");
    world.check("redis emptied");
}

#[test]
fn an_older_redis_loses_and_repeats_nothing() {
    let mut world = World::start(Plan::default());
    for _ in 0..times::REDIS_OLDER {
        age_redis(&mut world);
    }
    assert!(world.counted("holdfast_rebuilds_total") > 0, "it was filled anew");
    assert!(world.counted("holdfast_salvaged_total") > 0, "something was on its way");
    world.check("redis older");
}

#[test]
fn stopped_processes_lose_and_repeat_nothing() {
    let mut world = World::start(Plan::default());
    for _ in 0..times::STOPPED {
        stop_one(&mut world);
    }
    world.check("stopped");
}

#[test]
fn lost_replies_and_requests_sent_twice_lose_and_repeat_nothing() {
    let mut world = World::start(Plan::default());
    for number in 0..times::REPLIES_LOST {
        lose_a_reply(&mut world);
        if number % (times::REPLIES_LOST / times::SENT_TWICE) == 0 {
            world.to_redis.repeat(1);
        }
    }
    world.wait_until_it_sells();
    world.check("replies lost");
}

#[test]
fn cut_held_and_slow_connections_lose_and_repeat_nothing() {
    let mut world = World::start(Plan::default());
    for _ in 0..times::CUT {
        cut(&mut world);
    }
    world.wait_until_it_sells();
    world.check("connections cut");
}

#[test]
fn all_kinds_of_faults_in_any_order_lose_and_repeat_nothing() {
    const KINDS: [fn(&mut World); 8] = [kill_sidecar, kill_redis, kill_postgres, empty_redis, age_redis, stop_one, lose_a_reply, cut];
    let mut world = World::start(Plan::default());
    for _ in 0..times::MIXED {
        let kind = world.random.below(KINDS.len() as u64);
        KINDS[usize::try_from(kind).unwrap()](&mut world);
        // One failure at a time.
        world.wait_until_it_sells();
    }
    world.check("mixed");
}

#[test]
fn two_sidecars_of_which_either_dies_lose_and_repeat_nothing() {
    let kinds: [fn(&mut World); 5] = [kill_sidecar, kill_the_second, kill_the_second, kill_redis, empty_redis];
    // As many clients whatever is in a row: two sidecars, Redis and Postgres share the machine with them.
    let mut world = World::start_two(Plan { clients: 8, ..Plan::default() });
    for _ in 0..times::OF_TWO_SIDECARS {
        let kind = world.random.below(kinds.len() as u64);
        kinds[usize::try_from(kind).unwrap()](&mut world);
        // One failure at a time.
        world.wait_until_it_sells();
        world.wait_until_carried();
    }
    world.check("two sidecars");
}

#[test]
fn with_a_row_a_batch_nothing_is_lost_or_repeated() {
    let kinds: [fn(&mut World); 4] = [kill_sidecar, empty_redis, age_redis, kill_postgres];
    let mut world = World::start(Plan::default().by_batch());
    for number in 0..times::BY_BATCH {
        kinds[number % kinds.len()](&mut world);
        // One failure at a time.
        world.wait_until_it_sells();
        world.wait_until_carried();
    }
    for _ in 0..times::BY_BATCH_REPLIES_LOST {
        lose_a_reply(&mut world);
    }
    world.wait_until_it_sells();
    assert_ne!(world.database.value("SELECT count(*) FROM holdfast.stock_ledger WHERE operations > 1"), "0");
    world.check("a row a batch");
}

#[test]
fn what_postgres_acknowledged_survives_redis_and_the_sidecar() {
    let mut world = World::start(Plan { ack_postgres: true, ..Plan::default() });
    for _ in 0..times::REDIS_AND_SIDECAR_LOST {
        world.go_on(BETWEEN_DOUBLE);
        world.lose_redis_and_sidecar();
        world.wait_until_it_sells();
    }
    world.check("redis and sidecar lost, with ACK postgres");
}

#[test]
fn redis_and_the_sidecar_take_with_them_only_what_postgres_did_not_have() {
    let mut world = World::start(Plan::default());
    let mut deaths = Vec::new();
    for _ in 0..times::REDIS_AND_SIDECAR_LOST {
        world.go_on(BETWEEN_DOUBLE);
        fall_behind(&mut world);
        deaths.push(world.lose_redis_and_sidecar());
        world.wait_until_it_sells();
    }
    world.check_but("redis and sidecar lost, with ACK redis", &deaths);
}

#[test]
fn postgres_away_for_a_minute_stops_no_sale_and_is_caught_up() {
    let mut world = World::start(Plan { rate: Some(OUTAGE_RATE), ..Plan::default() });
    let before = world.memory_kib();
    world.postgres().kill();
    let (accepted, began) = (world.accepted(), Instant::now());
    thread::sleep(outage());
    let rate = u64::try_from(u128::from(world.accepted() - accepted) * 1000 / began.elapsed().as_millis()).unwrap();
    assert!(rate >= u64::from(OUTAGE_RATE) * 8 / 10, "sales went on, but only {rate} a second");
    let grown = world.memory_kib().saturating_sub(before);
    assert!(grown <= outage_kib_max(), "the sidecar has grown by {grown} KiB");
    let behind = world.behind();
    world.postgres().restart();
    let restarted = Instant::now();
    wait_until("the relay carries on", || world.behind() < behind);
    let (began, accepted) = (Instant::now(), world.accepted());
    let from = world.behind();
    // Within a second of what arrives meanwhile.
    while world.behind() > u64::from(OUTAGE_RATE) {
        assert!(began.elapsed() < outage() * 2, "never caught up: {} behind", world.behind());
        thread::sleep(Duration::from_millis(20));
    }
    let carried = from + world.accepted() - accepted;
    let speed = u128::from(carried) * 1000 / began.elapsed().as_millis().max(1);
    eprintln!(
        "postgres away for {outage:?} at {rate} changes a second: {behind} behind, {grown} KiB more, caught up {:?} after its start, at {speed} a second",
        restarted.elapsed(),
        outage = outage(),
    );
    // What is not optimised promises nothing about speed.
    assert!(cfg!(debug_assertions) || speed >= u128::from(rate) * 5, "caught up at {speed} a second");
    world.check("postgres away");
}

fn kill_sidecar(world: &mut World) {
    world.go_on(BETWEEN);
    world.kill_sidecar();
    world.restart_sidecar();
    world.wait_until_it_sells();
}

fn kill_the_second(world: &mut World) {
    world.go_on(BETWEEN);
    world.restart_second();
    world.wait_until_it_sells();
}

fn kill_redis(world: &mut World) {
    world.go_on(BETWEEN);
    world.redis.kill();
    world.redis.restart();
    world.wait_until_it_sells();
}

fn kill_postgres(world: &mut World) {
    world.go_on(BETWEEN);
    world.postgres().kill();
    world.go_on(BETWEEN);
    world.postgres().restart();
    world.wait_until_it_sells();
}

/// By a command, or as a server that comes up with an empty disk.
fn empty_redis(world: &mut World) {
    world.go_on(BETWEEN);
    fall_behind(world);
    if world.random.chance(50) {
        world.tell_redis("FLUSHALL");
    } else {
        world.redis.kill();
        world.redis.restart_empty();
    }
    world.to_postgres.release();
    world.wait_until_it_sells();
}

/// Often: lets Postgres fall behind, so that there is something to be saved when Redis loses its data.
fn fall_behind(world: &mut World) {
    if world.random.chance(70) {
        world.to_postgres.hold(Direction::Requests);
        world.go_on(BETWEEN);
    }
}

/// As a backup that is some moments old brings it back.
fn age_redis(world: &mut World) {
    world.go_on(BETWEEN);
    let copy = world.redis.copy_of_data();
    world.go_on(BETWEEN);
    fall_behind(world);
    world.redis.kill();
    world.redis.restart_from(&copy);
    std::fs::remove_dir_all(copy).unwrap();
    world.to_postgres.release();
    world.wait_until_it_sells();
}

fn stop_one(world: &mut World) {
    world.go_on(BETWEEN);
    let pid = match world.random.below(3) {
        0 => world.redis.pid(),
        1 => world.postgres().pid(),
        _ => world.sidecar.pid(),
    };
    world.stall(pid, STOPPED_FOR);
    world.wait_until_it_sells();
}

fn lose_a_reply(world: &mut World) {
    let proxy = match world.random.below(5) {
        0 => &world.to_postgres,
        1 | 2 => &world.to_redis,
        _ => &world.to_sidecar,
    };
    let began = Instant::now();
    proxy.lose(1);
    while proxy.left_to_lose() > 0 {
        assert!(began.elapsed() < PATIENCE, "nothing asks any more");
        thread::sleep(Duration::from_millis(1));
    }
}

fn cut(world: &mut World) {
    world.go_on((5, 40));
    let (proxy, how, ms) = (world.random.below(3), world.random.below(4), world.random.between(5, 60));
    let proxy = [&world.to_sidecar, &world.to_redis, &world.to_postgres][usize::try_from(proxy).unwrap()];
    match how {
        0 => proxy.hold(Direction::Requests),
        1 => proxy.hold(Direction::Answers),
        2 => proxy.slow_down(Duration::from_millis(2)),
        _ => {}
    }
    if how < 3 {
        thread::sleep(Duration::from_millis(ms));
    }
    proxy.cut();
    proxy.slow_down(Duration::ZERO);
    proxy.release();
}
