//! Postgres is away for long: selling goes on to a stated bound, and everything is carried when it is back.

use crate::harness::{Stack, wait_until};

fn until_postgres_is(stack: &Stack, word: &str) {
    let mut client = stack.connect();
    wait_until("the sidecar sees it", || client.field("HOLDFAST.STATUS", "postgres") == word);
}

#[test]
fn selling_goes_on_without_postgres_until_the_outbox_has_all_the_changes_it_may() {
    let mut stack = Stack::with_flags(&["--outbox-max-changes", "300"]);
    let mut client = stack.connect();
    client.ok("STOCK.SET a 1000000");
    stack.wait_until_applied();
    stack.postgres.own.as_mut().unwrap().kill();
    until_postgres_is(&stack, "down");
    let mut sold = 0_u32;
    let refusal = loop {
        let reply = client.ask("STOCK.DECR a 1");
        if !reply.starts_with("[OK, ") {
            break reply;
        }
        sold += 1;
    };
    assert_eq!(sold, 300);
    assert!(
        refusal.starts_with("-TRYAGAIN the outbox is full, as many changes wait for Postgres as outbox.max_changes permits"),
        "{refusal}"
    );
    assert_eq!(client.ask("STOCK.GET a"), "999700", "reads go on");
    assert!(client.ask("COUPON.ISSUE c u").starts_with("-TRYAGAIN the outbox is full"));
    let ready = stack.sidecar.get("/readyz").1;
    assert!(ready.contains("outbox degraded: the outbox is full"), "{ready}");
    stack.postgres.own.as_mut().unwrap().restart();
    wait_until("it sells again", || client.ask("STOCK.DECR a 1").starts_with("[OK, "));
    stack.wait_until_applied();
    let left = stack.postgres.value("SELECT available FROM holdfast.stock");
    assert_eq!((left.as_str(), client.ask("STOCK.GET a").as_str()), ("999699", "999699"));
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.stock_ledger"), "302");
    assert!(stack.sidecar.get("/readyz?verbose").1.contains("outbox ok"));
}

#[test]
fn selling_goes_on_without_postgres_until_the_outbox_takes_all_the_memory_it_may() {
    let mut stack = Stack::with_flags(&["--outbox-max-mib", "1"]);
    let mut client = stack.connect();
    let products: Vec<String> = (0..50).map(|i| format!("{}-{i}", "x".repeat(100))).collect();
    products.iter().for_each(|product| client.ok(&format!("STOCK.SET {product} 1000000 ACK redis")));
    stack.wait_until_applied();
    stack.postgres.own.as_mut().unwrap().kill();
    until_postgres_is(&stack, "down");
    let all = products.iter().map(|product| format!(" {product} 1")).collect::<String>();
    let refusal = client.until_not(&format!("STOCK.DECR{all}"), "[OK, ");
    assert!(refusal.starts_with("-TRYAGAIN the outbox is full, it takes as much of Redis's memory"), "{refusal}");
    wait_until("the metric says so", || stack.sidecar.get("/metrics").1.contains("holdfast_outbox_full{partition=\"0\"} 1"));
    stack.postgres.own.as_mut().unwrap().restart();
    // What is applied goes, so that there is room again.
    wait_until("it sells again", || client.ask(&format!("STOCK.DECR{all}")).starts_with("[OK, "));
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT available FROM holdfast.stock LIMIT 1"), client.ask(&format!("STOCK.GET {}", products[0])));
}
