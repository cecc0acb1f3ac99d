//! What the sidecar takes of memory: when nobody asks for anything, for connections, and while Postgres is behind.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::cpu;
use crate::flow::fill;
use crate::report::Report;
use crate::stage::{Side, Stage, stopped};
use crate::wire::connect;

const CONNECTIONS: usize = 1_000;
const BEHIND: u64 = 1_000_000;

/// On servers that nobody has used.
pub fn run(_: &str, stage: &Stage, report: &mut Report) -> Option<()> {
    let resident = || cpu::memory(stage.stack.sidecar.pid()) as f64;
    let idle = resident();
    report.figure("memory-idle", Some(idle / 1024.0), "just started");
    let connections = stage.runtime.block_on(async {
        let mut connections = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut stream = connect(stage.port(Side::Holdfast)).await;
            stream.write_all(b"PING\r\n").await.unwrap();
            let mut pong = [0; 7];
            stream.read_exact(&mut pong).await.unwrap();
            connections.push(stream);
        }
        connections
    });
    report.figure("memory-connection", Some((resident() - idle) / CONNECTIONS as f64), &format!("{CONNECTIONS} connections"));
    drop(connections);
    stage.create_products();
    let before = resident();
    let (held, lag, errors) = stage.relay_held(|| {
        let errors = fill(stage, false, BEHIND);
        (resident(), stage.lag(), errors)
    });
    report.errors(&errors);
    if stopped() {
        return None;
    }
    report.figure("memory-behind", Some(held / 1024.0), &format!("{:.1} MiB before, {lag:.0} changes behind", before / 1024.0));
    stage.drain();
    report.line(format_args!("    {:.1} MiB when Postgres had them", resident() / 1024.0));
    Some(())
}
