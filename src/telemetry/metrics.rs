//! The metrics: each declared once, in [`METRICS`], with what it means. Whoever measures uses the macros of the crate `metrics` with
//! a name from here. Labels take their values from tables, never from what clients send.

use std::sync::{Mutex, PoisonError};

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::PrometheusBuilder;

use super::histogram::{Collector, Handle};

/// Upper bounds of the buckets for everything that ends in `_seconds`: from a tenth of a millisecond, which a local Redis takes, past
/// the promise of 0.1 s, to the 10 s after which a person has given up.
const SECONDS: &[f64] = &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Upper bounds of the buckets for every other histogram, all of which count what goes together: from one alone past the 512 operations
/// of a script and the 5,000 changes of a transaction.
const COUNTS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1000.0, 2000.0, 5000.0, 10_000.0];

/// One metric.
#[derive(Debug)]
pub struct Metric {
    /// Its name, as Prometheus shows it.
    pub name: &'static str,
    /// How it moves.
    pub kind: Kind,
    /// What it is measured in.
    pub unit: Unit,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// What it means, in one sentence.
    pub doc: &'static str,
}

/// How a metric moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only up.
    Counter,
    /// Up and down.
    Gauge,
    /// Counts how often values fell into each bucket.
    Histogram,
}

/// Every metric, in the order of the documentation.
pub const METRICS: &[Metric] = &[
    Metric { name: "holdfast_up", kind: Kind::Gauge, unit: Unit::Count, labels: &[], doc: "1 while the process answers." },
    Metric {
        name: "holdfast_build_info",
        kind: Kind::Gauge,
        unit: Unit::Count,
        labels: &["version"],
        doc: "1, with the version that runs as its label.",
    },
    Metric {
        name: "holdfast_commands_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &["cmd", "result"],
        doc: "Commands answered; `result` is `ok` or `error`, and a business outcome such as INSUFFICIENT is `ok`.",
    },
    Metric {
        name: "holdfast_command_seconds",
        kind: Kind::Histogram,
        unit: Unit::Seconds,
        labels: &["cmd"],
        doc: "From the arrival of a command to its reply, the wait for an ACK included.",
    },
    Metric { name: "holdfast_connected_clients", kind: Kind::Gauge, unit: Unit::Count, labels: &[], doc: "Clients that are connected." },
    Metric {
        name: "holdfast_rejected_connections_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &[],
        doc: "Clients that were turned away because `max_clients` were connected.",
    },
    Metric {
        name: "holdfast_paused_reads_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &["why"],
        doc: "How often a connection was not read on because it had `in_flight` requests waiting, too much `output` unread, or was refused while it is `crowded`.",
    },
    Metric {
        name: "holdfast_auth_failures_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &[],
        doc: "Wrong passwords, or names that are no user's.",
    },
    Metric {
        name: "holdfast_auth_delayed_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &[],
        doc: "Of these, those whose answer had to wait, because their address had been wrong before.",
    },
    Metric {
        name: "holdfast_auth_refused_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &[],
        doc: "Names and passwords that were not looked at, because their turn did not come within half of `auth.within_ms`.",
    },
    Metric {
        name: "holdfast_auth_queued_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &[],
        doc: "Names and passwords that had to wait for their turn, because a wrong one of their address was not answered yet.",
    },
    Metric {
        name: "holdfast_denied_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &["what"],
        doc: "Commands that a user has no right to; `what` is `command`, `id` or `channel`.",
    },
    Metric {
        name: "holdfast_closed_connections_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &["why"],
        doc: "Connections that the server closed: `why` is the limit that the client passed, `user_changed` where its user may not go on or have what it has, or `killed` by CLIENT KILL.",
    },
    Metric {
        name: "holdfast_half_sent_bytes",
        kind: Kind::Gauge,
        unit: Unit::Bytes,
        labels: &[],
        doc: "What clients have sent of requests that are not complete, or that have to wait; `limits.input_mib` bounds it for each thread.",
    },
    Metric {
        name: "holdfast_suppressed_log_lines_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &["what"],
        doc: "Log lines that clients provoked and that were left out, because more than 10 of them came in a second.",
    },
    Metric {
        name: "holdfast_sent_messages_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &[],
        doc: "Messages to subscribers and to clients that MONITOR.",
    },
    Metric {
        name: "holdfast_refused_subscriptions_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &[],
        doc: "Subscriptions that were refused, because all clients together had as many as they may, or as many different channels or patterns.",
    },
    Metric {
        name: "holdfast_lost_messages_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &[],
        doc: "Messages that were lost because a thread that serves clients was too busy to take them.",
    },
    Metric {
        name: "holdfast_late_replies_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &[],
        doc: "Replies to STOCK and COUPON commands that went out later than `reply_within_ms` after the arrival, or than the wait that was asked for and that.",
    },
    Metric {
        name: "holdfast_late_reply_seconds",
        kind: Kind::Histogram,
        unit: Unit::Seconds,
        labels: &[],
        doc: "By how much they were late.",
    },
    Metric {
        name: "holdfast_stalled_replies_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &[],
        doc: "Replies that were late too, but only by as much as the machine did not let the program run.",
    },
    Metric {
        name: "holdfast_stall_seconds",
        kind: Kind::Histogram,
        unit: Unit::Seconds,
        labels: &[],
        doc: "Stretches in which the thread that serves clients had something to do and was not run.",
    },
    Metric {
        name: "holdfast_script_seconds",
        kind: Kind::Histogram,
        unit: Unit::Seconds,
        labels: &["lane"],
        doc: "From sending a batch to Redis to its answer, or to the end of the connection.",
    },
    Metric {
        name: "holdfast_batch_operations",
        kind: Kind::Histogram,
        unit: Unit::Count,
        labels: &["lane"],
        doc: "Operations in one script call.",
    },
    Metric {
        name: "holdfast_orders_expired_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &["partition"],
        doc: "Orders whose time passed and whose units were given back.",
    },
    Metric {
        name: "holdfast_expired_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &["lane"],
        doc: "Operations that reached their deadline before they were sent and were answered TRYAGAIN.",
    },
    Metric {
        name: "holdfast_indoubt_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &["lane"],
        doc: "Operations that were sent, got no answer in time and were answered INDOUBT.",
    },
    Metric {
        name: "holdfast_relay_lag_changes",
        kind: Kind::Gauge,
        unit: Unit::Count,
        labels: &["partition"],
        doc: "Changes that Redis has and Postgres does not have yet, as far as this sidecar knows.",
    },
    Metric {
        name: "holdfast_relay_applied_changes_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &["partition"],
        doc: "Changes that this sidecar has carried to Postgres.",
    },
    Metric {
        name: "holdfast_relay_batch_changes",
        kind: Kind::Histogram,
        unit: Unit::Count,
        labels: &["partition"],
        doc: "Changes in one transaction of the relay.",
    },
    Metric {
        name: "holdfast_relay_transaction_seconds",
        kind: Kind::Histogram,
        unit: Unit::Seconds,
        labels: &["partition"],
        doc: "How long a transaction of the relay took.",
    },
    Metric {
        name: "holdfast_relay_retries_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &["partition"],
        doc: "Failures on Postgres after which the relay tried again.",
    },
    Metric {
        name: "holdfast_outbox_bytes",
        kind: Kind::Gauge,
        unit: Unit::Bytes,
        labels: &["partition"],
        doc: "How much of Redis's memory the outbox takes, what is applied and kept for a while included.",
    },
    Metric {
        name: "holdfast_outbox_full",
        kind: Kind::Gauge,
        unit: Unit::Count,
        labels: &["partition"],
        doc: "1 while changes are refused because the outbox is full.",
    },
    Metric {
        name: "holdfast_rebuilds_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &[],
        doc: "How often this process has filled Redis from Postgres.",
    },
    Metric {
        name: "holdfast_salvaged_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &["what"],
        doc: "Changes that were answered and saved out of a Redis that lost its data (`what`: saved, owed, handed_over).",
    },
    Metric {
        name: "holdfast_reconcile_rounds_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &["round", "result"],
        doc: "Rounds of the reconciler, `sync` or `initialise`; `result` is `done`, `elsewhere` (another sidecar does it) or `skipped`.",
    },
    Metric {
        name: "holdfast_reconcile_round_seconds",
        kind: Kind::Histogram,
        unit: Unit::Seconds,
        labels: &["round"],
        doc: "How long a round took.",
    },
    Metric {
        name: "holdfast_reconcile_last_round_timestamp_seconds",
        kind: Kind::Gauge,
        unit: Unit::Seconds,
        labels: &["round"],
        doc: "When the last round was done, in Unix time.",
    },
    Metric {
        name: "holdfast_reconcile_products_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &[],
        doc: "Products compared, in rounds and by STOCK.SYNC.",
    },
    Metric { name: "holdfast_reconcile_coupons_total", kind: Kind::Counter, unit: Unit::Count, labels: &[], doc: "Coupons compared." },
    Metric {
        name: "holdfast_reconcile_drift_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &["action"],
        doc: "Differences of products and coupons that were `corrected`, `frozen` or `initialised`.",
    },
    Metric {
        name: "holdfast_dead_letters",
        kind: Kind::Gauge,
        unit: Unit::Count,
        labels: &["partition"],
        doc: "Changes that Postgres refused and that wait for a person, see `HOLDFAST.DEADLETTER`.",
    },
    Metric {
        name: "holdfast_locks_held",
        kind: Kind::Gauge,
        unit: Unit::Count,
        labels: &[],
        doc: "Locks that clients of this sidecar hold, as far as it knows.",
    },
    Metric { name: "holdfast_lock_waiters", kind: Kind::Gauge, unit: Unit::Count, labels: &[], doc: "Clients that wait for a lock." },
    Metric {
        name: "holdfast_lock_acquired_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &["by"],
        doc: "Locks acquired, by what woke the client: `free` (nothing had to), `again` (its owner held it), `passed` (by the one before), `release` and `message` (a release here and elsewhere), `resubscribed`, `timer` (a lease that ended, or a lost message).",
    },
    Metric {
        name: "holdfast_lock_wait_seconds",
        kind: Kind::Histogram,
        unit: Unit::Seconds,
        labels: &[],
        doc: "How long clients waited for the locks that they acquired and that were not free.",
    },
    Metric {
        name: "holdfast_lock_expired_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &[],
        doc: "Locks whose lease ended before they were released; each is counted by one sidecar: that of its holder, or of who acquired it next.",
    },
    Metric {
        name: "holdfast_lock_lost_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &[],
        doc: "Locks that a session lost while it was there.",
    },
    Metric {
        name: "holdfast_lock_fenced_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &[],
        doc: "Tokens that were refused because the lock was no longer held under them.",
    },
    Metric {
        name: "holdfast_inbox_rows_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        labels: &["partition"],
        doc: "Changes that other programs made in Postgres and this sidecar has brought to Redis.",
    },
    Metric {
        name: "holdfast_inbox_waiting_seconds",
        kind: Kind::Gauge,
        unit: Unit::Seconds,
        labels: &["partition"],
        doc: "How long the oldest change that another program made in Postgres has been waiting for Redis, as of the last look.",
    },
];

/// Collects metrics from now on, and returns what renders them. Called again, returns the same. Errors where something else collects them.
pub fn install() -> Result<Handle, metrics::SetRecorderError<Collector>> {
    static INSTALLED: Mutex<Option<Handle>> = Mutex::new(None);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(handle) = &*installed {
        return Ok(handle.clone());
    }
    let collector = collector();
    let handle = collector.handle();
    metrics::set_global_recorder(collector)?;
    describe();
    *installed = Some(handle.clone());
    Ok(handle)
}

/// The metrics as a table in Markdown, for the README.
pub fn markdown_table() -> String {
    let mut table = String::from("| metric | kind | labels | |\n|---|---|---|---|\n");
    for metric in METRICS {
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let kind = format!("{:?}", metric.kind).to_lowercase();
        table.push_str(&format!("| `{}` | {kind} | {} | {} |\n", metric.name, labels.join(", "), metric.doc));
    }
    table
}

fn collector() -> Collector {
    Collector::new(PrometheusBuilder::new().build_recorder(), |name| if name.ends_with("_seconds") { SECONDS } else { COUNTS })
}

fn describe() {
    for metric in METRICS {
        match metric.kind {
            Kind::Counter => describe_counter!(metric.name, metric.unit, metric.doc),
            Kind::Gauge => describe_gauge!(metric.name, metric.unit, metric.doc),
            Kind::Histogram => describe_histogram!(metric.name, metric.unit, metric.doc),
        }
    }
    gauge!("holdfast_up").set(1.0);
    gauge!("holdfast_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_prometheus() {
        for metric in METRICS {
            let Metric { name, kind, unit, doc, .. } = metric;
            assert!(name.starts_with("holdfast_") && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}");
            assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}: counters end in _total");
            assert_eq!(name.ends_with("_seconds"), *unit == Unit::Seconds, "{name}: the unit is in the name");
            assert!(doc.ends_with('.'), "{name} is documented in a sentence");
        }
        assert!(SECONDS.is_sorted() && COUNTS.is_sorted());
    }

    #[test]
    fn what_is_described_is_rendered_and_histograms_have_buckets() {
        let recorder = collector();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            describe();
            metrics::histogram!("holdfast_test_seconds").record(0.03);
            metrics::histogram!("holdfast_batch_operations", "lane" => "stock").record_many(3, 2);
            metrics::histogram!("holdfast_batch_operations", "lane" => "stock").record(20_000);
        });
        let text = handle.render();
        assert!(text.contains("# HELP holdfast_up 1 while the process answers."), "{text}");
        assert!(text.contains(&format!("holdfast_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"))), "{text}");
        assert!(text.contains("holdfast_test_seconds_bucket{le=\"0.05\"} 1"), "{text}");
        for line in [
            "# TYPE holdfast_batch_operations histogram",
            "holdfast_batch_operations_bucket{lane=\"stock\",le=\"2\"} 0",
            "holdfast_batch_operations_bucket{lane=\"stock\",le=\"4\"} 2",
            "holdfast_batch_operations_bucket{lane=\"stock\",le=\"+Inf\"} 3",
            "holdfast_batch_operations_sum{lane=\"stock\"} 20006",
            "holdfast_batch_operations_count{lane=\"stock\"} 3",
            "holdfast_test_seconds_count 1",
        ] {
            assert!(text.lines().any(|known| known == line), "{line}: {text}");
        }
    }

    #[test]
    fn installing_twice_is_harmless() {
        install().unwrap();
        install().unwrap();
    }
}
