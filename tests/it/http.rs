//! The HTTP endpoints.

use crate::harness::Stack;

#[test]
fn health_and_metrics_are_served() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    assert_eq!(client.ask("STOCK.DECR a 100"), "[INSUFFICIENT, a, 10]");
    assert_eq!(stack.sidecar.get("/livez"), (200, "alive\n".to_owned()));
    let (status, body) = stack.sidecar.get("/readyz?verbose");
    assert_eq!(status, 200);
    for check in ["partition ok: live under epoch 1", "redis ok", "postgres ok", "relay ok"] {
        assert!(body.contains(check), "{body}");
    }
    let (_, metrics) = stack.sidecar.get("/metrics");
    for metric in ["holdfast_up 1", "holdfast_commands_total", "holdfast_relay_applied_changes_total", "holdfast_script_seconds_bucket"] {
        assert!(metrics.contains(metric), "{metric} is not in {metrics}");
    }
    assert_eq!(stack.sidecar.get("/nothing").0, 404);
}
