//! The private Postgres: found on this machine, its data created at the first use.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::process::Signal;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::account::{self, Account};
use super::process::{Plan, last_lines};
use super::{Error, on_path, port};

/// Where Debian and Ubuntu keep the programs of each version, off the PATH.
const VERSIONS: &str = "/usr/lib/postgresql";

/// How to start it on the data under `dir`, which is created where it is missing.
pub(super) async fn plan(dir: &Path) -> Result<Plan, Error> {
    let account = account::for_postgres()?;
    let home = home(dir, account.as_ref())?;
    let data = home.join("data");
    let version = fs::read_to_string(data.join("PG_VERSION")).ok();
    let programs = programs(version.as_deref().map(str::trim))?;
    if version.is_none() {
        create(&home, &data, &programs, account.as_ref()).await?;
    }
    let pid_file = data.join("postmaster.pid");
    let port = port(&home, &pid_file)?;
    let mut argv: Vec<String> = vec![programs.join("postgres").display().to_string(), "-D".into(), data.display().to_string()];
    for setting in [
        format!("port={port}"),
        "listen_addresses=127.0.0.1".into(),
        // Only TCP on loopback: a socket in a common directory could be taken for another server's.
        "unix_socket_directories=".into(),
        "logging_collector=off".into(),
    ] {
        argv.extend(["-c".to_owned(), setting]);
    }
    Ok(Plan {
        name: "postgres",
        argv,
        home: data,
        pid_file,
        log: dir.join("postgres.log"),
        port,
        account,
        // Disconnects clients, rolls back what is open, and ends.
        stop_signal: Signal::INT,
        is_ready,
    })
}

/// Whether it says in its pid file that it accepts connections, as `pg_ctl` looks at it.
fn is_ready(plan: &Plan) -> bool {
    fs::read_to_string(&plan.pid_file).is_ok_and(|text| text.lines().nth(7).map(str::trim) == Some("ready"))
}

/// The directory with the programs: of the version that the data has, else what the PATH has, else the newest.
fn programs(version: Option<&str>) -> Result<PathBuf, Error> {
    let installed = || fs::read_dir(VERSIONS).into_iter().flatten().flatten().map(|entry| entry.path());
    let complete = |dir: &Path| dir.join("initdb").is_file() && dir.join("postgres").is_file();
    let of_data = version.map(|version| Path::new(VERSIONS).join(version).join("bin"));
    let of_path = on_path("postgres").and_then(|file| Some(file.parent()?.to_owned()));
    let newest = installed()
        .filter_map(|dir| Some((dir.file_name()?.to_str()?.parse::<u32>().ok()?, dir.join("bin"))))
        .filter(|(_, dir)| complete(dir))
        .max()
        .map(|(_, dir)| dir);
    [of_data, of_path, newest].into_iter().flatten().find(|dir| complete(dir)).ok_or_else(|| {
        Error("Postgres is not installed (no postgres and initdb on the PATH); install it, on Debian or Ubuntu: sudo apt-get install postgresql".into())
    })
}

/// The directory for the data, which belongs to the account. Where that cannot get there, because `dir` is for instance in root's
/// home, it is elsewhere, and a link in `dir` leads to it.
fn home(dir: &Path, account: Option<&Account>) -> Result<PathBuf, Error> {
    let path = dir.join("postgres");
    let failed = |error: io::Error| Error(format!("cannot keep the data of Postgres in {}: {error}", path.display()));
    if let Ok(home) = path.canonicalize() {
        return match account {
            Some(account) if !account::can_enter(&home, account) => Err(Error(format!(
                "Postgres runs as the user {}, who cannot enter {}: choose another directory with --dir",
                account.name,
                home.display()
            ))),
            _ => Ok(home),
        };
    }
    if path.is_symlink() {
        tracing::warn!("the data of Postgres, to which {} led, is gone: beginning afresh", path.display());
        fs::remove_file(&path).map_err(failed)?;
    }
    let Some(account) = account else {
        fs::create_dir(&path).map_err(failed)?;
        return Ok(path);
    };
    if account::can_enter(dir, account) {
        return own(&path, account).map_err(failed);
    }
    let elsewhere = [Path::new("/var/lib").to_owned(), std::env::temp_dir()];
    let base = elsewhere.iter().find(|base| account::can_enter(base, account)).ok_or_else(|| {
        Error(format!(
            "Postgres runs as the user {}, who cannot enter {}: choose another directory with --dir",
            account.name,
            dir.display()
        ))
    })?;
    let home = own(&base.join(format!("holdfast-dev-{}", uuid::Uuid::new_v4())), account).map_err(failed)?;
    symlink(&home, &path).map_err(failed)?;
    tracing::info!("the user {}, who runs Postgres, cannot enter {}: its data is in {}", account.name, dir.display(), home.display());
    Ok(home)
}

/// Creates a directory that belongs to the account alone.
fn own(path: &Path, account: &Account) -> io::Result<PathBuf> {
    fs::create_dir(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
    chown(path, Some(account.uid), Some(account.gid))?;
    path.canonicalize()
}

/// Creates the data: beside its place, and moved there when it is whole, so that one that was interrupted is never used.
async fn create(home: &Path, data: &Path, programs: &Path, account: Option<&Account>) -> Result<(), Error> {
    tracing::info!("creating the data of Postgres in {}", data.display());
    let new = home.join("data.new");
    match fs::remove_dir_all(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error(format!("cannot remove {}: {error}", new.display()))),
        _ => {}
    }
    let place = new.display().to_string();
    // Whoever reaches the port may do anything: it is a port on loopback, with data for trying things out.
    let args = ["-D", &place, "-U", "holdfast", "--auth=trust", "--encoding=UTF8", "--locale=C"];
    run(programs.join("initdb"), &args, "", home, account).await?;
    run(programs.join("postgres"), &["--single", "-D", &place, "postgres"], "CREATE DATABASE holdfast\n", home, account).await?;
    fs::rename(&new, data).map_err(|error| Error(format!("cannot move {} to {}: {error}", new.display(), data.display())))
}

/// Runs a program to its end.
async fn run(program: PathBuf, args: &[&str], input: &str, home: &Path, account: Option<&Account>) -> Result<(), Error> {
    let failed = |error: io::Error| Error(format!("cannot run {}: {error}", program.display()));
    let mut command = Command::new(&program);
    command.args(args).current_dir(home).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.process_group(0).kill_on_drop(true);
    if let Some(account) = account {
        command.uid(account.uid).gid(account.gid);
    }
    let mut child = command.spawn().map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends without reading says why in its output.
        _ = stdin.write_all(input.as_bytes()).await;
    }
    let output = child.wait_with_output().await.map_err(failed)?;
    let said = String::from_utf8_lossy(&output.stderr);
    // In single-user mode Postgres ends well although a statement failed.
    if output.status.success() && !said.contains("ERROR:") {
        return Ok(());
    }
    Err(Error(format!("{} ended with {}:\n{}", program.display(), output.status, last_lines(&said))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_is_elsewhere_where_its_user_cannot_enter() {
        if !rustix::process::geteuid().is_root() {
            // Only root runs Postgres as somebody else.
            return;
        }
        let dir = std::env::temp_dir().join(format!("holdfast-{}", uuid::Uuid::new_v4()));
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        let stranger = Account { name: "stranger".into(), uid: 54_321, gid: 54_321 };
        let elsewhere = home(&dir, Some(&stranger)).unwrap();
        assert!(!elsewhere.starts_with(&dir) && account::can_enter(&elsewhere, &stranger));
        assert_eq!(home(&dir, Some(&stranger)).unwrap(), elsewhere, "found again");
        fs::remove_dir_all(&elsewhere).unwrap();
        let again = home(&dir, Some(&stranger)).unwrap();
        assert_ne!(again, elsewhere, "a link that leads nowhere is replaced");
        fs::remove_dir_all(again).unwrap();
        fs::remove_dir_all(dir).unwrap();
    }
}
