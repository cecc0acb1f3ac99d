//! Programs that the benchmark runs if they are installed, and how they are made to end.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// What the benchmark makes: programs' packages, the table and the plot.
pub fn made() -> PathBuf {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    std::fs::create_dir_all(&directory).unwrap();
    directory
}

/// A program on PATH, or where Debian keeps those of Postgres.
pub fn find(name: &str) -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let postgres = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().map(|entry| entry.path().join("bin"));
    let mut places: Vec<PathBuf> = postgres.chain(std::env::split_paths(&path)).map(|place| place.join(name)).collect();
    places.retain(|file| file.is_file());
    places.into_iter().next().ok_or_else(|| format!("{name} is not installed"))
}

/// Runs it to its end, which must be a good one; returns what it printed.
pub fn run(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{name}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
    Err(format!("{name} failed: {said}"))
}

/// A server that is killed when dropped.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
