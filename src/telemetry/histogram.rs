//! Histograms that count where they are recorded: a value costs two additions, and no memory however many there are.
//!
//! Those of metrics-exporter-prometheus keep each value with the time until somebody sorts them in: at half a million replies a second some
//! hundred MiB, and a look at the clock a reply. Counters and gauges stay with it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use metrics::{Counter, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use metrics_exporter_prometheus::{PrometheusHandle, PrometheusRecorder};

/// One histogram under one set of labels.
#[derive(Debug)]
struct Buckets {
    /// Upper bounds, growing.
    bounds: &'static [f64],
    /// Of each bound the values up to it and beyond the one before, and of those beyond the last.
    counts: Vec<AtomicU64>,
    /// The sum of the values, as the bits of an f64.
    sum: AtomicU64,
}

impl Buckets {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(), sum: AtomicU64::new(0) }
    }
}

impl HistogramFn for Buckets {
    fn record(&self, value: f64) {
        self.record_many(value, 1);
    }

    fn record_many(&self, value: f64, count: usize) {
        let place = self.bounds.partition_point(|bound| *bound < value);
        self.counts[place].fetch_add(count as u64, Ordering::Relaxed);
        let more = |bits| Some((f64::from_bits(bits) + value * count as f64).to_bits());
        let _ = self.sum.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }
}

/// Every histogram, by name and labels.
type Known = Arc<Mutex<BTreeMap<(String, String), Arc<Buckets>>>>;

/// Gives counters and gauges to the exporter, and keeps the histograms.
pub struct Collector {
    exporter: PrometheusRecorder,
    /// The bounds of the histogram with this name.
    bounds: fn(&str) -> &'static [f64],
    descriptions: Descriptions,
    known: Known,
}

type Descriptions = Arc<Mutex<BTreeMap<String, SharedString>>>;

impl Collector {
    pub fn new(exporter: PrometheusRecorder, bounds: fn(&str) -> &'static [f64]) -> Self {
        Self { exporter, bounds, descriptions: Arc::default(), known: Arc::default() }
    }

    /// What renders all of it.
    pub fn handle(&self) -> Handle {
        Handle { exporter: self.exporter.handle(), descriptions: Arc::clone(&self.descriptions), known: Arc::clone(&self.known) }
    }
}

impl Recorder for Collector {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, description: SharedString) {
        self.exporter.describe_counter(name, unit, description);
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, description: SharedString) {
        self.exporter.describe_gauge(name, unit, description);
    }

    fn describe_histogram(&self, name: KeyName, _: Option<Unit>, description: SharedString) {
        self.descriptions.lock().unwrap_or_else(PoisonError::into_inner).insert(name.as_str().to_owned(), description);
    }

    fn register_counter(&self, key: &Key, metadata: &Metadata<'_>) -> Counter {
        self.exporter.register_counter(key, metadata)
    }

    fn register_gauge(&self, key: &Key, metadata: &Metadata<'_>) -> Gauge {
        self.exporter.register_gauge(key, metadata)
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        // Labels take their values from tables, so nothing in them has to be escaped.
        let labels: String = key.labels().map(|label| format!("{}=\"{}\",", label.key(), label.value())).collect();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let buckets = known.entry((key.name().to_owned(), labels)).or_insert_with(|| Arc::new(Buckets::new((self.bounds)(key.name()))));
        Histogram::from_arc(Arc::clone(buckets))
    }
}

/// Renders the metrics.
#[derive(Clone)]
pub struct Handle {
    exporter: PrometheusHandle,
    descriptions: Descriptions,
    known: Known,
}

impl Handle {
    /// In Prometheus's text format.
    pub fn render(&self) -> String {
        let mut text = self.exporter.render();
        let (known, descriptions) =
            (self.known.lock().unwrap_or_else(PoisonError::into_inner), self.descriptions.lock().unwrap_or_else(PoisonError::into_inner));
        let mut before = "";
        for ((name, labels), buckets) in &*known {
            if name != before {
                if let Some(description) = descriptions.get(name) {
                    let _ = writeln!(text, "# HELP {name} {description}");
                }
                let _ = writeln!(text, "# TYPE {name} histogram");
                before = name;
            }
            let mut all = 0;
            let bounds = buckets.bounds.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
            for (bound, count) in bounds.zip(&buckets.counts) {
                all += count.load(Ordering::Relaxed);
                let _ = writeln!(text, "{name}_bucket{{{labels}le=\"{bound}\"}} {all}");
            }
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.trim_end_matches(',')) };
            let sum = f64::from_bits(buckets.sum.load(Ordering::Relaxed));
            let _ = writeln!(text, "{name}_sum{labels} {sum}\n{name}_count{labels} {all}");
        }
        text
    }
}
