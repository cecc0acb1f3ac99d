//! A coupon issued under a distributed lock for each issue, as services do it today: redis-py's Lock, redlock for Node.js, Redisson.
//!
//! Each is a small program of its own language in benches/locks. All get the same: on the same Redis, 100 workers with a connection each
//! acquire the lock, GET how many are issued, write one more and the user in one pipeline, and release. That is less than Holdfast does:
//! no limit a user, no outbox. Their packages are installed under target/bench, once.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::rounds::{Latency, Round};
use crate::stage::{Side, Stage};
use crate::tools::{find, made, run};

pub struct Program {
    pub name: &'static str,
    program: PathBuf,
    words: Vec<String>,
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/locks")
}

/// All that can be run here, and why the others cannot.
pub fn programs() -> Vec<Result<Program, String>> {
    let named = |name: &'static str, made: Result<Program, String>| made.map_err(|error| format!("{name}: {error}"));
    vec![named("redis-py Lock", redis_py()), named("redlock", redlock()), named("Redisson RLock", redisson())]
}

fn redis_py() -> Result<Program, String> {
    let (venv, wanted) = (made().join("venv"), sources().join("requirements.txt"));
    once(&venv, &wanted, || {
        run(Command::new(find("python3")?).args(["-m", "venv", "--clear"]).arg(&venv))?;
        run(Command::new(venv.join("bin/pip")).args(["install", "--quiet", "--disable-pip-version-check", "-r"]).arg(&wanted))
    })?;
    let words = vec![sources().join("redis_py.py").display().to_string()];
    Ok(Program { name: "redis-py", program: venv.join("bin/python"), words })
}

fn redlock() -> Result<Program, String> {
    let (directory, wanted) = (made().join("node"), sources().join("package-lock.json"));
    once(&directory, &wanted, || {
        std::fs::create_dir_all(&directory).map_err(|error| error.to_string())?;
        for file in ["package.json", "package-lock.json"] {
            std::fs::copy(sources().join(file), directory.join(file)).map_err(|error| error.to_string())?;
        }
        run(Command::new(find("npm")?).args(["ci", "--silent", "--no-audit", "--no-fund"]).current_dir(&directory))
    })?;
    // Modules are looked for from where the program is.
    let script = directory.join("redlock.mjs");
    std::fs::copy(sources().join("redlock.mjs"), &script).map_err(|error| error.to_string())?;
    Ok(Program { name: "redlock", program: find("node")?, words: vec![script.display().to_string()] })
}

fn redisson() -> Result<Program, String> {
    let (java, maven) = (find("java")?, find("mvn")?);
    let directory = made().join("java");
    once(&directory, &sources().join("pom.xml"), || {
        let made = format!("-Dmade={}", directory.display());
        run(Command::new(maven).args(["--quiet", "--batch-mode", "compile", &made, "-f"]).arg(sources()))
    })?;
    let classes = format!("{}:{}", directory.join("classes").display(), directory.join("lib/*").display());
    Ok(Program { name: "redisson", program: java, words: vec!["-cp".into(), classes, "RedissonLock".into()] })
}

/// Installs something, unless what is there was made of the same file.
fn once(directory: &Path, of: &Path, install: impl FnOnce() -> Result<String, String>) -> Result<(), String> {
    let note = directory.join("installed-of");
    let wanted = std::fs::read(of).map_err(|error| error.to_string())?;
    if std::fs::read(&note).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    install()?;
    std::fs::write(note, wanted).map_err(|error| error.to_string())
}

impl Program {
    /// Issues for a while.
    pub fn issue(&self, stage: &Stage, workers: usize, time: Duration) -> Round {
        let prefix = format!("direct:lock-{}", stage.fresh());
        let mut command = Command::new(&self.program);
        command.args(&self.words).args([stage.port(Side::Direct).to_string(), workers.to_string(), time.as_secs_f64().to_string()]);
        let said = run(command.arg(&prefix).env("PYTHONDONTWRITEBYTECODE", "1"));
        stage.stack.backing().ask(&format!("UNLINK {prefix}:issued {prefix}:users {prefix}:lock"));
        let mut round = Round::default();
        let numbers: Vec<f64> = match &said {
            Ok(said) => said.split_whitespace().filter_map(|number| number.parse().ok()).collect(),
            Err(error) => {
                round.errors.insert(error.clone(), 1);
                return round;
            }
        };
        if let [issued, seconds, p50, p99, p999, max] = numbers[..] {
            round.operations = issued as u64;
            round.took = Duration::from_secs_f64(seconds);
            round.latency = Latency { p50, p99, p999, max };
        } else {
            round.errors.insert(format!("{} has not printed what it is to", self.name), 1);
        }
        round
    }
}
