//! All products at once, from the command line: import, export, audit.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use crate::harness::{Program, Stack, wait_until};

/// `holdfast <args>` against the stack's servers.
fn holdfast(stack: &Stack, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast"));
    command.args(args).args(["--redis-url", &stack.redis.url(), "--postgres-url", &stack.postgres.url]);
    command.stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What an audit says, and its exit code.
pub fn audit(stack: &Stack) -> (String, Option<i32>) {
    let Output { status, stdout, .. } = holdfast(stack, &["audit"]).output().unwrap();
    (text(&stdout), status.code())
}

/// A file of a test's own, removed at its end.
struct Csv(PathBuf);

impl Csv {
    fn new(name: &str, content: &str) -> Self {
        let path = std::env::temp_dir().join(format!("holdfast-{name}-{}.csv", std::process::id()));
        std::fs::write(&path, content).unwrap();
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Csv {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn a_file_is_imported_line_by_line_and_what_is_refused_is_named() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 3");
    client.ok("STOCK.SET kept 9");
    let csv = Csv::new("lines", "\u{feff}product,low,available\r\na,2,50\r\n\"b,\"\"x\",,7\n\nbad id,,1\nc,,-1\na,,4\nd,1,0");
    let Output { status, stdout, stderr } = holdfast(&stack, &["import", csv.path()]).output().unwrap();
    let (out, err) = (text(&stdout), text(&stderr));
    assert_eq!((status.code(), out.as_str()), (Some(1), "3 products set, 3 lines refused\n"), "{err}");
    for line in ["line 5: invalid product id", "line 6: invalid available '-1'", "line 7: product 'a' stands in line 2 already"] {
        assert!(err.contains(line), "{line}: {err}");
    }
    assert_eq!(client.ask("STOCK.MGET a b,\"x c d kept"), "[50, 7, nil, 0, 9]");
    assert_eq!(client.field("STOCK.INFO a", "low"), "2");
    let rows = "SELECT product_id || ' ' || available || ' ' || coalesce(low::text, '') FROM holdfast.stock ORDER BY 1";
    assert_eq!(stack.postgres.column(rows), ["a 50 2", "b,\"x 7 ", "d 0 1", "kept 9 "]);
    assert_eq!(audit(&stack), ("4 products and 0 coupons, 0 of them differ\n".into(), Some(0)));

    let exported = text(&holdfast(&stack, &["export"]).output().unwrap().stdout);
    let mut lines: Vec<_> = exported.lines().collect();
    assert_eq!(lines.remove(0), "product,available,low");
    lines.sort_unstable();
    assert_eq!(lines, ["\"b,\"\"x\",7,", "a,50,2", "d,0,1", "kept,9,"]);
    client.ok("STOCK.SET a 1");
    let csv = Csv::new("again", &exported);
    let again = holdfast(&stack, &["import", csv.path()]).output().unwrap();
    assert_eq!((again.status.code(), text(&again.stdout).as_str()), (Some(0), "4 products set, 0 lines refused\n"));
    assert_eq!(client.ask("STOCK.GET a"), "50", "what was exported is what there is");
}

fn kill(stack: &Stack, mut import: Child) {
    import.kill().unwrap();
    import.wait().unwrap();
    // Postgres may take a moment to see that it is gone, and until then another is refused.
    let locks = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database \
                 WHERE d.datname = current_database() AND l.locktype = 'advisory' AND l.objsubid = 1";
    wait_until("its session has ended", || stack.postgres.value(locks) == "0");
}

/// Waits until there are so many products in Redis.
fn wait_for_products(stack: &Stack, count: usize) {
    let mut redis = stack.backing();
    wait_until("so much is imported", || redis.ask("DBSIZE").parse::<usize>().unwrap() >= count);
}

#[test]
fn an_import_that_is_killed_goes_on_and_sets_nothing_twice_while_others_sell() {
    const PRODUCTS: usize = 30_000;
    let stack = Stack::start();
    let mut content = String::from("product,available\n");
    (0..PRODUCTS).for_each(|i| writeln!(content, "p-{i},{}", 100 + i % 7).unwrap());
    let csv = Csv::new("killed", &content);
    for at in [1_000, 9_000] {
        let import = holdfast(&stack, &["import", csv.path()]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_for_products(&stack, at);
        kill(&stack, import);
    }
    // Sold between two runs: what is set a second time would give these units back.
    let mut client = stack.connect();
    let there: Vec<usize> = (0..9_000).step_by(300).filter(|i| client.ask(&format!("STOCK.GET p-{i}")) != "nil").collect();
    assert!(there.len() > 10, "{there:?}");
    there.iter().for_each(|i| client.ok(&format!("STOCK.DECR p-{i} 1")));
    let done = holdfast(&stack, &["import", csv.path()]).output().unwrap();
    let out = text(&done.stdout);
    assert!(done.status.success() && out.contains("lines were done before"), "{out} {}", text(&done.stderr));
    for i in 0..PRODUCTS / 100 {
        let product = i * 100;
        let sold = usize::from(there.contains(&product));
        assert_eq!(client.ask(&format!("STOCK.GET p-{product}")), (100 + product % 7 - sold).to_string(), "p-{product}");
    }
    stack.wait_until_applied();
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.stock"), PRODUCTS.to_string());
    assert_eq!(stack.postgres.value("SELECT count(*) FROM holdfast.stock_ledger WHERE kind = 'set'"), PRODUCTS.to_string(), "each once");
    assert_eq!(client.ask("STOCK.SYNC DRYRUN"), "[]");
    assert_eq!(audit(&stack).1, Some(0));
}

#[test]
fn an_import_that_goes_on_names_what_it_refused_before_it_was_killed() {
    const PRODUCTS: usize = 20_000;
    let stack = Stack::start();
    stack.connect().ok("STOCK.SET last 1");
    stack.backing().ask("HSET stock:product:stuck what is");
    let mut content = String::from("product,available\nbad id,1\nc,-1\np-0,100\np-0,1\nstuck,5\n");
    (1..PRODUCTS).for_each(|i| writeln!(content, "p-{i},{}", 100 + i % 7).unwrap());
    content += "last,2\n";
    let csv = Csv::new("refused", &content);
    let noted = || stack.postgres.column("SELECT lines || ' ' || (done_at IS NULL) FROM holdfast.import");
    // While the last product cannot be set, the import does not end, and is killed where it has noted some lines.
    stack.postgres.holding("BEGIN; SELECT FROM holdfast.stock WHERE product_id = 'last' FOR UPDATE", || {
        let import = holdfast(&stack, &["import", csv.path()]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_until("a place behind the refused lines is noted", || {
            noted().first().is_some_and(|noted| noted.split(' ').next().unwrap().parse::<usize>().unwrap() > 6)
        });
        kill(&stack, import);
    });
    assert!(noted()[0].ends_with(" true"), "it has not ended: {:?}", noted());
    let Output { status, stdout, stderr } = holdfast(&stack, &["import", csv.path()]).output().unwrap();
    let (out, err) = (text(&stdout), text(&stderr));
    assert_eq!(status.code(), Some(1), "{out} {err}");
    assert!(out.contains("4 lines refused") && out.contains("lines were done before"), "{out}");
    for line in [
        "line 2: invalid product id",
        "line 3: invalid available '-1'",
        "line 5: product 'p-0' stands in line 4 already",
        "line 6: product 'stuck' was refused when this import was begun",
    ] {
        assert_eq!(err.matches(line).count(), 1, "{line}: {err}");
    }
    stack.wait_until_applied();
    let set = "SELECT count(*) || ' ' || count(DISTINCT product_id) FROM holdfast.stock_ledger WHERE kind = 'set' AND product_id <> 'last'";
    assert_eq!(stack.postgres.value(set), format!("{PRODUCTS} {PRODUCTS}"), "each once");
    let sum: usize = (0..PRODUCTS).map(|i| 100 + i % 7).sum();
    assert_eq!(stack.postgres.value("SELECT sum(available) FROM holdfast.stock"), (sum + 2).to_string());
}

#[test]
fn an_audit_names_what_the_ledgers_do_not_explain() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    client.ok("STOCK.DECR a 3");
    client.ok("STOCK.SET gone 5");
    client.ok("STOCK.DEL gone");
    assert!(client.ask("STOCK.RESERVE o 60000 a 2").starts_with("[HELD, "));
    client.ok("COUPON.CREATE c 9 PERUSER 3");
    client.ask("COUPON.ISSUE c u");
    client.ask("COUPON.ISSUE c u");
    client.ask("COUPON.USE c u");
    client.ask("COUPON.REVOKE c u");
    client.ok("COUPON.ALTER c TOTAL 4");
    let mut other = Program::new(&stack.postgres);
    other.run("UPDATE holdfast.stock SET available = available + 4 WHERE product_id = 'a'");
    other.run("INSERT INTO holdfast.stock (product_id, available) VALUES ('theirs', 8)");
    stack.wait_until_applied();
    assert_eq!(audit(&stack), ("3 products and 1 coupons, 0 of them differ\n".into(), Some(0)), "also what other programs changed");
    let all = text(&holdfast(&stack, &["audit", "--all"]).output().unwrap().stdout);
    assert!(all.contains("ok: product a: available 9 held 2 held by orders 2\n"), "{all}");
    other.tamper("UPDATE holdfast.stock SET available = available - 1 WHERE product_id = 'a'");
    other.tamper("UPDATE holdfast.coupon_issue SET state = 'issued', used_at = NULL WHERE serial = 1");
    let (said, code) = audit(&stack);
    assert_eq!(code, Some(1));
    assert!(said.contains("differs: product a: available 8, but 9 by the ledger held 2 held by orders 2\n"), "{said}");
    assert!(said.contains("differs: coupon c: total 4 issued 1 used 1 issued to users 1 used by users 0, but 1 by the ledger\n"), "{said}");
    assert!(said.ends_with("3 products and 1 coupons, 2 of them differ\n"), "{said}");
}

#[test]
fn an_audit_names_orders_that_hold_something_else_than_their_products_say() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    client.ok("STOCK.SET b 10");
    assert!(client.ask("STOCK.RESERVE o 600000 a 2 b 1").starts_with("[HELD, "));
    assert!(client.ask("STOCK.RESERVE p 600000 a 3").starts_with("[HELD, "));
    client.ok("STOCK.DEL b");
    stack.wait_until_applied();
    assert_eq!(audit(&stack), ("2 products and 0 coupons, 0 of them differ\n".into(), Some(0)), "also of a product that was deleted");
    let mut other = Program::new(&stack.postgres);
    let mut tampered = |change: &str, undo: &str, differ: &[&str]| {
        other.tamper(&format!("UPDATE holdfast.stock_order SET {change} WHERE order_id = 'o'"));
        let (said, code) = audit(&stack);
        let mut lines: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("differs: product ")).collect();
        lines.sort_unstable();
        assert_eq!((lines.as_slice(), code), (differ, Some(1)), "{change}");
        other.tamper(&format!("UPDATE holdfast.stock_order SET {undo} WHERE order_id = 'o'"));
    };
    let a = |units: i64| format!("a: available 5 held 5 held by orders {units}, but 5 by the ledger");
    let b = |units: i64| format!("b: available 0 held 1 held by orders {units}, but 1 by the ledger");
    tampered("state = 'confirmed'", "state = 'held'", &[&a(3), &b(0)]);
    tampered("units = '{4,1}'", "units = '{2,1}'", &[&a(7)]);
    tampered("products = '{b,a}'", "products = '{a,b}'", &[&a(4), &b(2)]);
    assert_eq!(audit(&stack).1, Some(0));
    for order in ["o", "p"] {
        assert!(client.ask(&format!("STOCK.CANCEL {order}")).starts_with("[CANCELLED, "));
    }
    assert_eq!(audit(&stack).1, Some(0));
}

#[test]
fn dead_letters_are_owed_until_they_are_settled_and_the_audit_knows() {
    let stack = Stack::start();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 10");
    let mut other = Program::new(&stack.postgres);
    other.tamper("UPDATE holdfast.stock SET available = 2 WHERE product_id = 'a'");
    assert_eq!(client.ask("STOCK.DECR a 5"), "[OK, 5, 1-2]");
    stack.wait_until_applied();
    let letters = || stack.postgres.value("SELECT count(*) FROM holdfast.dead_letter");
    assert_eq!(letters(), "1");
    let (said, _) = audit(&stack);
    assert!(said.contains("available 2, but 10 by the ledger"), "only what was tampered with: {said}");
    other.tamper("UPDATE holdfast.stock SET available = 10 WHERE product_id = 'a'");
    assert_eq!(audit(&stack).1, Some(0), "five are owed");
    let id = stack.postgres.value("SELECT id FROM holdfast.dead_letter");
    assert_eq!(client.ask(&format!("HOLDFAST.DEADLETTER DROP {id}")), "[OK]");
    assert_eq!((letters(), audit(&stack).1), ("0".into(), Some(0)), "given up: the ledger has a sale that never came");
    client.until("STOCK.GET a", "10");
}
