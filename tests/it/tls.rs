//! TLS, with certificates on both sides: to clients, on the HTTP port, to Redis, to Postgres; and certificates that change while clients are connected.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::harness::{Database, PATIENCE, Sidecar, Stack, wait_until};
use crate::servers::RedisServer;

/// A directory with an authority and what it has signed; it goes away with the test.
pub struct Authority(PathBuf);

impl Authority {
    pub fn new(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("holdfast-tls-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let authority = Self(directory);
        let subject = format!("/CN={name}");
        let key = ["ecparam", "-genkey", "-name", "prime256v1", "-out", "ca.key"];
        authority.openssl(&key);
        authority.openssl(&["req", "-x509", "-new", "-key", "ca.key", "-subj", &subject, "-days", "10", "-out", "ca.crt"]);
        authority.sign("server");
        authority.sign("client");
        authority
    }

    /// A key and a certificate for the name, for this machine.
    fn sign(&self, name: &str) {
        let (key, request, certificate) = (format!("{name}.key"), format!("{name}.csr"), format!("{name}.crt"));
        std::fs::write(self.0.join("san"), "subjectAltName=IP:127.0.0.1,DNS:localhost\n").unwrap();
        self.openssl(&["ecparam", "-genkey", "-name", "prime256v1", "-out", &key]);
        self.openssl(&["req", "-new", "-key", &key, "-subj", &format!("/CN={name}"), "-out", &request]);
        let signing = ["x509", "-req", "-in", &request, "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "10"];
        self.openssl(&[&signing[..], &["-extfile", "san", "-out", &certificate]].concat());
    }

    fn openssl(&self, arguments: &[&str]) {
        let output = Command::new("openssl").args(arguments).current_dir(&self.0).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    pub fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A client of this authority, as `redis-cli` is given it.
fn as_client(authority: &Authority) -> Vec<String> {
    ["--tls", "--cacert", &authority.file("ca.crt"), "--cert", &authority.file("client.crt"), "--key", &authority.file("client.key")]
        .map(str::to_owned)
        .to_vec()
}

fn cli(sidecar: &Sidecar, options: &[String], command: &[&str]) -> (String, Option<i32>) {
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    sidecar.cli(&[&options[..], command].concat())
}

#[test]
fn clients_show_certificates_and_go_on_while_new_ones_are_taken_over() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let (redis, postgres) = (RedisServer::start_with_tls(&ours.0), Database::new(false));
    let redis_url = format!(
        "rediss://127.0.0.1:{}/?sslrootcert={}&sslcert={}&sslkey={}",
        redis.port(),
        ours.file("ca.crt"),
        ours.file("client.crt"),
        ours.file("client.key")
    );
    let (cert, key, ca) = (ours.file("server.crt"), ours.file("server.key"), ours.file("ca.crt"));
    // What goes wrong in a handshake is for who looks for a fault.
    let level = "info,holdfast::server::stream=debug";
    let flags = ["--tls-cert-file", &cert, "--tls-key-file", &key, "--tls-client-ca-file", &ca, "--log-level", level];
    let mut sidecar = Sidecar::with_settings(&redis_url, &postgres.url, &flags);
    wait_until("it is ready", || sidecar.get("/readyz").0 == 200);

    let client = as_client(&ours);
    assert!(cli(&sidecar, &client, &["STOCK.SET", "a", "1000000"]).0.starts_with("OK\n1000000\n"));
    assert!(cli(&sidecar, &client, &["--latency", "-i", "1"]).1.is_some());
    // As much as fills sockets, records and buffers.
    let many = "STOCK.MGET".to_owned() + &" a".repeat(200);
    let session = |options: &[String]| {
        Command::new("redis-cli")
            .args(["-p", &sidecar.port.to_string()])
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut open = session(&client);
    let mut typed = open.stdin.take().unwrap();
    let mut lines = BufReader::new(open.stdout.take().unwrap()).lines();
    for _ in 0..100 {
        writeln!(typed, "{many}").unwrap();
        assert!((0..200).all(|_| lines.next().unwrap().unwrap() == "1000000"));
    }

    // Each is refused, and for that reason and no other.
    let refused = |options: &[String], why: &str| {
        let before = sidecar.log().matches(why).count();
        let (said, code) = cli(&sidecar, options, &["PING"]);
        assert!(!said.contains("PONG") && code != Some(0), "{why}: {said} {code:?}");
        wait_until(why, || sidecar.log().matches(why).count() > before);
    };
    let nobody: Vec<String> = vec!["--tls".into(), "--cacert".into(), ours.file("ca.crt")];
    refused(&nobody, "peer sent no certificates");
    let mut stranger = as_client(&theirs);
    stranger[2] = ours.file("ca.crt");
    refused(&stranger, "invalid peer certificate");
    refused(&[], "received corrupt message");
    // It does not know the server.
    refused(&as_client(&theirs), "received fatal alert: UnknownCA");

    // From now on the other authority counts. The client that is connected goes on.
    for name in ["server.crt", "server.key", "ca.crt"] {
        std::fs::copy(theirs.0.join(name), ours.0.join(name)).unwrap();
    }
    assert!(Command::new("kill").args(["-HUP", &sidecar.pid().to_string()]).status().unwrap().success());
    sidecar.wait_for_log("certificates reloaded");
    assert_eq!(cli(&sidecar, &as_client(&theirs), &["PING"]).0, "PONG\n");
    writeln!(typed, "STOCK.GET a").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "1000000");
    std::fs::write(ours.0.join("server.key"), "nonsense").unwrap();
    assert!(Command::new("kill").args(["-HUP", &sidecar.pid().to_string()]).status().unwrap().success());
    sidecar.wait_for_log("certificates are not reloaded");
    assert_eq!(cli(&sidecar, &as_client(&theirs), &["PING"]).0, "PONG\n");
    drop(typed);
    assert!(open.wait().unwrap().success());
}

#[test]
fn a_silent_handshake_is_given_up_and_holds_up_nobody() {
    let authority = Authority::new("silent");
    let (cert, key) = (authority.file("server.crt"), authority.file("server.key"));
    let stack = Stack::with_settings(&["--tls-cert-file", &cert, "--tls-key-file", &key, "--auth-within-ms", "500"]);
    let silent: Vec<_> = (0..50).map(|_| stack.sidecar.raw()).collect();
    let mut half = stack.sidecar.raw();
    half.write_all(b"\x16\x03\x01\x02\x00\x01\x00").unwrap();
    let options = ["--tls".to_owned(), "--cacert".to_owned(), authority.file("ca.crt")];
    assert_eq!(cli(&stack.sidecar, &options, &["PING"]).0, "PONG\n");
    for mut stream in silent.into_iter().chain([half]) {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(std::io::Read::read(&mut stream, &mut [0; 64]).unwrap_or(0), 0);
    }
    assert!(stack.sidecar.get("/metrics").1.contains("holdfast_closed_connections_total{why=\"auth_time\"} 51"));
}

#[test]
fn the_http_endpoints_are_served_through_tls_where_that_is_asked_for() {
    let authority = Authority::new("http");
    let (cert, key, ca) = (authority.file("server.crt"), authority.file("server.key"), authority.file("ca.crt"));
    let (redis, postgres) = (RedisServer::start(), Database::new(false));
    let flags = ["--http-tls", "--tls-cert-file", &cert, "--tls-key-file", &key, "--tls-client-ca-file", &ca];
    let sidecar = Sidecar::with_settings(&redis.url(), &postgres.url, &flags);
    let healthcheck = || {
        let address = format!("127.0.0.1:{}", sidecar.http);
        let probe =
            Command::new(env!("CARGO_BIN_EXE_holdfast")).args(["healthcheck", "--http-listen", &address]).args(flags).output().unwrap();
        (probe.status.success(), format!("{}{}", String::from_utf8_lossy(&probe.stdout), String::from_utf8_lossy(&probe.stderr)))
    };
    wait_until("it is ready", || healthcheck().0);
    assert!(healthcheck().1.starts_with("ready"));
    let plain = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| sidecar.get("/livez")));
    assert!(plain.is_err(), "HTTP without TLS");
}

#[test]
fn certificates_that_cannot_be_used_are_named_before_the_start() {
    let authority = Authority::new("broken");
    let run = |flags: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_holdfast")).arg("check-config").args(flags).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (cert, key) = (authority.file("server.crt"), authority.file("server.key"));
    let both = |cert: &str, key: &str| run(&["--tls-cert-file", cert, "--tls-key-file", key]);
    assert_eq!(both(&cert, &key).0, Some(0));
    for ((code, text), why) in [
        (both(&cert, &authority.file("client.key")), "server.crt: "),
        (both(&cert, "/nonexistent"), "/nonexistent: "),
        (both(&authority.file("san"), &key), "there is no certificate in it"),
        (run(&["--tls-cert-file", &cert]), "TLS needs both tls.cert_file and tls.key_file"),
        (run(&["--http-tls"]), "TLS needs both"),
    ] {
        assert!(code == Some(1) && text.contains(why), "{why}: {code:?} {text}");
    }
    assert!(Path::new(&cert).exists());
}

#[test]
fn postgres_is_reached_through_tls_with_certificates_on_both_sides() {
    let (ours, theirs) = (Authority::new("ours-pg"), Authority::new("theirs-pg"));
    let (redis, mut postgres) = (RedisServer::start(), Database::new(true));
    postgres.own.as_mut().unwrap().speak_tls(&ours.0);
    let plain = "sslmode=disable";
    let root = |authority: &Authority| format!("sslmode=verify-full&sslrootcert={}", authority.file("ca.crt"));
    let shown = |authority: &Authority| format!("&sslcert={}&sslkey={}", authority.file("client.crt"), authority.file("client.key"));
    for (options, why) in [
        (root(&ours), "certificate"),
        (root(&ours) + &shown(&theirs), "received fatal alert: UnknownCA"),
        (root(&theirs) + &shown(&ours), "invalid peer certificate: UnknownIssuer"),
    ] {
        let mut refused = Sidecar::with_settings(&redis.url(), &postgres.url.replace(plain, &options), &[]);
        let log = refused.wait_for_log(why);
        assert!(!log.contains("panicked") && refused.get("/readyz").0 == 503, "{options}: {log}");
    }
    let url = postgres.url.replace(plain, &(root(&ours) + &shown(&ours)));
    let stack = Stack { sidecar: Sidecar::with_settings(&redis.url(), &url, &["--reply-within-ms", "20000"]), redis, postgres };
    stack.wait_until_ready();
    let mut client = stack.connect();
    client.ok("STOCK.SET a 5");
    client.ok("STOCK.DECR a 2 ACK postgres");
    assert_eq!(stack.postgres.value("SELECT available FROM holdfast.stock"), "3");
    let sessions = "SELECT ssl::text || ' ' || coalesce(client_dn, '-') FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
        WHERE client_port IS NOT NULL AND pid <> pg_backend_pid() GROUP BY 1";
    assert_eq!(stack.postgres.column(sessions), ["true /CN=client"]);
}
