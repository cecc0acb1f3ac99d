//! Postgres alone, the usual way: lock the product's row, change it, write a ledger row. By pgbench, on the same server.

use std::fs;
use std::process::Command;
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::rounds::{Latency, Round};
use crate::stage::Stage;
use crate::tools::{find, made, run};

const TABLES: &str = "CREATE TABLE IF NOT EXISTS bench_stock (product text PRIMARY KEY, available bigint NOT NULL CHECK (available >= 0));
CREATE TABLE IF NOT EXISTS bench_ledger (id bigserial PRIMARY KEY, product text NOT NULL, delta bigint NOT NULL, at timestamptz NOT NULL);
INSERT INTO bench_stock VALUES ('hot', 1000000000000) ON CONFLICT DO NOTHING";

const TRANSACTION: &str = "BEGIN;
SELECT available FROM bench_stock WHERE product = 'hot' FOR UPDATE;
UPDATE bench_stock SET available = available - 1 WHERE product = 'hot';
INSERT INTO bench_ledger (product, delta, at) VALUES ('hot', -1, now());
COMMIT;
";

/// Whether it can be run.
pub fn prepare(stage: &Stage) -> Result<(), String> {
    find("pgbench")?;
    stage.stack.postgres.execute(TABLES);
    fs::write(made().join("for-update.sql"), TRANSACTION).map_err(|error| error.to_string())
}

pub fn run_for(stage: &Stage, clients: usize, time: Duration) -> Round {
    let mut round = Round::default();
    // Rows that are dead, of the round before, would make each look-up of the hot row longer.
    stage.stack.postgres.execute("VACUUM bench_stock");
    let logs = made().join("pgbench-log");
    let _ = fs::remove_dir_all(&logs);
    fs::create_dir_all(&logs).unwrap();
    let seconds = time.as_secs().max(1);
    let mut command = Command::new(find("pgbench").unwrap());
    // Whole seconds are all it knows.
    command.args(["-n", "-M", "prepared", "-j", "2", "-c", &clients.to_string(), "-T", &seconds.to_string(), "-l"]);
    command.arg(format!("--log-prefix={}", logs.join("log").display())).arg("-f").arg(made().join("for-update.sql"));
    let said = match run(command.arg(&stage.stack.postgres.url)) {
        Ok(said) => said,
        Err(error) => {
            round.errors.insert(error, 1);
            return round;
        }
    };
    // tps = 1234.567890 (without initial connection time)
    let Some(rate) = said.split_once("tps = ").and_then(|(_, rest)| rest.split(' ').next()?.parse::<f64>().ok()) else {
        round.errors.insert("pgbench said no rate".into(), 1);
        return round;
    };
    let mut latency = Histogram::<u64>::new(3).unwrap();
    for log in fs::read_dir(&logs).unwrap().flatten() {
        let text = fs::read_to_string(log.path()).unwrap_or_default();
        // client transaction µs ...
        let micros = text.lines().filter_map(|line| line.split(' ').nth(2)?.parse().ok());
        micros.for_each(|micros| latency.record(micros).unwrap());
    }
    round.operations = latency.len();
    round.took = Duration::from_secs_f64(latency.len() as f64 / rate);
    round.latency = Latency::of(&latency);
    round
}
