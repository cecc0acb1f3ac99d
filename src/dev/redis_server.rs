//! The private Redis, or Valkey.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;

use super::process::Plan;
use super::{Error, on_path, port};

/// How long it may take to answer a PING.
const PING_MAX: Duration = Duration::from_millis(500);

/// How to start it on the data under `dir`.
pub(super) fn plan(dir: &Path) -> Result<Plan, Error> {
    let program = on_path("redis-server").or_else(|| on_path("valkey-server")).ok_or_else(|| {
        Error(
            "neither redis-server nor valkey-server is installed; install it, on Debian or Ubuntu: sudo apt-get install redis-server"
                .into(),
        )
    })?;
    let home = dir.join("redis");
    fs::create_dir_all(&home).map_err(|error| Error(format!("cannot create {}: {error}", home.display())))?;
    let pid_file = home.join("redis.pid");
    let port = port(&home, &pid_file)?;
    let mut argv = vec![program.display().to_string()];
    for (name, value) in [
        ("--port", port.to_string().as_str()),
        ("--bind", "127.0.0.1"),
        ("--dir", &home.display().to_string()),
        ("--pidfile", &pid_file.display().to_string()),
        ("--daemonize", "no"),
        // Keeps its command line as it is, by which it is found again.
        ("--set-proc-title", "no"),
        ("--appendonly", "yes"),
        ("--appendfsync", "everysec"),
        ("--maxmemory-policy", "noeviction"),
        ("--save", ""),
    ] {
        argv.extend([name.to_owned(), value.to_owned()]);
    }
    Ok(Plan {
        name: "redis-server",
        argv,
        home,
        pid_file,
        log: dir.join("redis.log"),
        port,
        account: None,
        stop_signal: Signal::TERM,
        is_ready,
    })
}

/// Whether it answers a PING with a PONG: not so while it still loads its data.
fn is_ready(plan: &Plan) -> bool {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, plan.port));
    let Ok(mut stream) = TcpStream::connect_timeout(&address, PING_MAX) else { return false };
    let mut answer = [0; 5];
    stream.set_read_timeout(Some(PING_MAX)).is_ok()
        && stream.write_all(b"PING\r\n").is_ok()
        && stream.read_exact(&mut answer).is_ok()
        && &answer == b"+PONG"
}
