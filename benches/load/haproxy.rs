//! HAProxy between clients and Redis: what any hop costs that does nothing with what it carries.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::stage::{Side, Stage};
use crate::tools::{Running, find, made};

pub struct HaProxy {
    pub port: u16,
    pub process: Running,
}

impl HaProxy {
    pub fn start(stage: &Stage) -> Result<Self, String> {
        let program = find("haproxy")?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr()).unwrap().port();
        let settings = format!(
            "global\n  maxconn 1000\ndefaults\n  mode tcp\n  timeout connect 1s\n  timeout client 1h\n  timeout server 1h\nlisten redis\n  \
             bind 127.0.0.1:{port}\n  server redis 127.0.0.1:{}\n",
            stage.port(Side::Direct)
        );
        let file = made().join("haproxy.cfg");
        std::fs::write(&file, settings).map_err(|error| error.to_string())?;
        let child = Command::new(program).args(["-db", "-q", "-f"]).arg(file).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let process = Running(child.map_err(|error| error.to_string())?);
        let began = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            if began.elapsed() > Duration::from_secs(10) {
                return Err("haproxy did not start".into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { port, process })
    }
}
