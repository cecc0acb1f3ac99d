//! One server process: started, or found again by its pid file, watched, and stopped.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::Error;
use super::account::Account;

/// How long a server may take until it answers. Long, because it may have a log to read back first.
const START_MAX: Duration = Duration::from_secs(60);

/// How long a server that was found running may take until it answers.
const TAKE_OVER_MAX: Duration = Duration::from_secs(10);

/// How long a server may take to stop before it is killed.
const STOP_MAX: Duration = Duration::from_secs(15);

/// How long the system may take to remove a process that was killed.
const KILL_MAX: Duration = Duration::from_secs(5);

/// How often a process is looked at while something is expected of it.
const POLL_EVERY: Duration = Duration::from_millis(20);

/// The size past which a server's log begins afresh with the server.
const LOG_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// How much of a log is read, and how many lines of it are shown, when a server does not start.
const TAIL_BYTES: u64 = 16 * 1024;
const TAIL_LINES: usize = 12;

/// How to start one server.
pub(super) struct Plan {
    /// What to call it.
    pub(super) name: &'static str,
    /// The program and its arguments; one of these is `home`, by which the process is recognized later.
    pub(super) argv: Vec<String>,
    /// The directory with its data.
    pub(super) home: PathBuf,
    /// The file whose first line is its process id, while it runs.
    pub(super) pid_file: PathBuf,
    /// Where its output goes.
    pub(super) log: PathBuf,
    /// The port on loopback on which it listens.
    pub(super) port: u16,
    /// Who runs it, where not we do.
    pub(super) account: Option<Account>,
    /// Asks it to stop in good order.
    pub(super) stop_signal: Signal,
    /// Whether it answers.
    pub(super) is_ready: fn(&Plan) -> bool,
}

/// A server process. One that is dropped is asked to stop, without waiting for it.
pub(super) struct Process {
    name: &'static str,
    pid: Pid,
    home: String,
    stop_signal: Signal,
    /// Absent where a former `dev` started it.
    child: Option<Child>,
}

/// Puts into `slot` the server that a former `dev` has left running, if there is one.
pub(super) fn adopt(plan: &Plan, slot: &mut Option<Process>) {
    *slot = Process::find(plan);
}

/// Brings a server up: the one in `slot`, where it runs as it should, else a new one, in `slot` as soon as there is a process.
pub(super) async fn start(plan: &Plan, slot: &mut Option<Process>) -> Result<(), Error> {
    if let Some(process) = slot
        && process.is_running()
    {
        let is_as_planned = command_line(process.pid).as_ref() == Some(&plan.argv);
        if is_as_planned && wait(TAKE_OVER_MAX, || (plan.is_ready)(plan) || !process.is_running()).await && process.is_running() {
            tracing::info!("{} still runs, as process {}: taking it over", plan.name, process.pid.as_raw_nonzero());
            return Ok(());
        }
        tracing::info!("{} still runs, but not as it should: starting it again", plan.name);
        process.stop().await;
    }
    *slot = None;
    disown(plan);
    let process = slot.insert(Process::spawn(plan)?);
    let pid = process.pid;
    let is_ready = || recorded_pid(plan) == Some(pid) && (plan.is_ready)(plan);
    wait(START_MAX, || is_ready() || !process.is_running()).await;
    if process.is_running() && is_ready() {
        return Ok(());
    }
    let what = if process.is_running() { "does not answer" } else { "ended" };
    Err(Error(format!("{} {what}; the end of {}:\n{}", plan.name, plan.log.display(), tail(&plan.log))))
}

impl Process {
    /// The process that runs on the plan's data.
    fn find(plan: &Plan) -> Option<Self> {
        let pid = recorded_pid(plan)?;
        let home = plan.home.display().to_string();
        command_line(pid).filter(|argv| mentions(argv, &home))?;
        Some(Self { name: plan.name, pid, home, stop_signal: plan.stop_signal, child: None })
    }

    fn spawn(plan: &Plan) -> Result<Self, Error> {
        let failed = |error: io::Error| Error(format!("cannot start {}: {error}; its log is {}", plan.argv.join(" "), plan.log.display()));
        let log = open_log(&plan.log).map_err(failed)?;
        let (program, args) = plan.argv.split_first().ok_or_else(|| Error(format!("{} has no command line", plan.name)))?;
        let mut command = Command::new(program);
        command.args(args).current_dir(&plan.home).stdin(Stdio::null()).stdout(log.try_clone().map_err(failed)?).stderr(log);
        // In a process group of its own, so that a Ctrl-C reaches only us, and we stop it in order.
        command.process_group(0);
        if let Some(account) = &plan.account {
            command.uid(account.uid).gid(account.gid);
        }
        let child = command.spawn().map_err(failed)?;
        let pid =
            i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(|| Error(format!("{} has no process id", plan.name)))?;
        Ok(Self { name: plan.name, pid, home: plan.home.display().to_string(), stop_signal: plan.stop_signal, child: Some(child) })
    }

    /// Whether it runs.
    pub(super) fn is_running(&mut self) -> bool {
        match &mut self.child {
            Some(child) => matches!(child.try_wait(), Ok(None)),
            None => command_line(self.pid).is_some_and(|argv| mentions(&argv, &self.home)),
        }
    }

    /// Stops it in good order, or kills it where it takes too long.
    pub(super) async fn stop(&mut self) {
        self.send(self.stop_signal);
        if !wait(STOP_MAX, || !self.is_running()).await {
            tracing::warn!("{} did not stop within {} s: killing it", self.name, STOP_MAX.as_secs());
            self.send(Signal::KILL);
            wait(KILL_MAX, || !self.is_running()).await;
        }
    }

    fn send(&mut self, signal: Signal) {
        // Only to what is still ours: its number may belong to someone else by now.
        if self.is_running() {
            _ = kill_process(self.pid, signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.send(self.stop_signal);
    }
}

/// The process id in the plan's pid file.
fn recorded_pid(plan: &Plan) -> Option<Pid> {
    let text = fs::read_to_string(&plan.pid_file).ok()?;
    Pid::from_raw(text.lines().next()?.trim().parse().ok().filter(|&pid| pid > 1)?)
}

/// Makes the pid file that of nobody, since its process has ended. Postgres would not start while the number is that of any process,
/// be it another one by now, or one that has ended but that nobody has waited for. The rest of the file stays: by it Postgres looks
/// whether children of the dead process are still at its data.
fn disown(plan: &Plan) {
    let Ok(text) = fs::read_to_string(&plan.pid_file) else { return };
    let rest = text.split_once('\n').map_or("", |(_, rest)| rest);
    // Above what any system gives out. Where it cannot be written, the server's log will say what is wrong.
    _ = fs::write(&plan.pid_file, format!("{}\n{rest}", i32::MAX));
}

/// Waits until something holds. Returns whether it does.
async fn wait(max: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let begin = Instant::now();
    while !holds() {
        if begin.elapsed() > max {
            return false;
        }
        tokio::time::sleep(POLL_EVERY).await;
    }
    true
}

/// The command line of a process that runs.
fn command_line(pid: Pid) -> Option<Vec<String>> {
    let number = pid.as_raw_nonzero();
    if Path::new("/proc/self/cmdline").exists() {
        let bytes = fs::read(format!("/proc/{number}/cmdline")).ok()?;
        let text = String::from_utf8_lossy(&bytes);
        // A process that has ended, but that nobody has waited for, has none.
        return Some(text.strip_suffix('\0')?.split('\0').map(str::to_owned).collect());
    }
    let output = Command::new("ps").args(["-ww", "-o", "command=", "-p", &number.to_string()]).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.trim_end();
    (!line.is_empty()).then(|| line.split(' ').map(str::to_owned).collect())
}

fn mentions(argv: &[String], home: &str) -> bool {
    argv.iter().any(|arg| arg == home)
}

fn open_log(path: &Path) -> io::Result<File> {
    let is_long = fs::metadata(path).is_ok_and(|metadata| metadata.len() > LOG_BYTES_MAX);
    if is_long {
        fs::remove_file(path)?;
    }
    File::options().create(true).append(true).open(path)
}

/// The last lines of a log.
pub(super) fn tail(path: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    match read() {
        Ok(bytes) => last_lines(&String::from_utf8_lossy(&bytes)),
        Err(error) => format!("  ({error})"),
    }
}

/// The last lines of a text, set in.
pub(super) fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let shown = lines.iter().skip(lines.len().saturating_sub(TAIL_LINES));
    shown.map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_command_line() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        // Until the new program has taken the place of ours.
        let argv = std::iter::repeat_with(|| command_line(pid)).flatten().find(|argv| argv[0] == "sleep").unwrap();
        assert!(mentions(&argv, "60") && !mentions(&argv, "6"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(command_line(pid), None);
    }

    #[test]
    fn the_end_of_a_text_is_shown() {
        let text: String = (0..100).map(|n| format!("line {n}\n\n")).collect();
        let shown = last_lines(&text);
        assert_eq!(shown.lines().count(), TAIL_LINES);
        assert!(shown.starts_with("  line 88\n") && shown.ends_with("  line 99"));
        assert_eq!(last_lines("one"), "  one");
    }
}
