//! What processes take of the processor and of memory, from /proc.

use std::fs;

/// Of a clock tick in /proc: the same on every Linux.
const TICK_NANOS: u64 = 10_000_000;

/// CPU time so far of everybody who has a part in a round, in nanoseconds.
#[derive(Clone, Copy, Default)]
pub struct Cpu {
    pub redis: u64,
    /// The sidecar's threads that serve clients.
    pub front: u64,
    /// Its other threads: the relay and what else talks to Postgres.
    pub back: u64,
    pub postgres: u64,
    /// A proxy between, if there is one.
    pub proxy: u64,
    /// This program and those that it ran to make load.
    pub load: u64,
    /// The whole machine, whoever else is on it.
    pub machine: u64,
}

impl Cpu {
    pub fn since(self, before: Self) -> Self {
        Self {
            redis: self.redis.saturating_sub(before.redis),
            front: self.front.saturating_sub(before.front),
            back: self.back.saturating_sub(before.back),
            postgres: self.postgres.saturating_sub(before.postgres),
            proxy: self.proxy.saturating_sub(before.proxy),
            load: self.load.saturating_sub(before.load),
            machine: self.machine.saturating_sub(before.machine),
        }
    }

    /// What nobody here has used.
    pub fn others(self) -> u64 {
        self.machine.saturating_sub(self.redis + self.front + self.back + self.postgres + self.proxy + self.load)
    }
}

/// CPU time of the machine, without what it idled or waited for a disk; what a hypervisor took from it is in.
pub fn machine() -> u64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    // cpu user nice system idle iowait irq softirq steal
    let fields = stat.lines().next().unwrap_or_default().split_whitespace().skip(1).take(8);
    let ticks = fields.enumerate().filter(|(place, _)| *place != 3 && *place != 4).filter_map(|(_, ticks)| ticks.parse::<u64>().ok());
    ticks.sum::<u64>() * TICK_NANOS
}

/// CPU time of each thread of a process, in nanoseconds.
pub fn threads(pid: u32, mut each: impl FnMut(&str, u64)) {
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let nanos = read("schedstat").split(' ').next().and_then(|nanos| nanos.parse().ok()).unwrap_or(0);
        each(read("comm").trim(), nanos);
    }
}

/// CPU time of a process.
pub fn process(pid: u32) -> u64 {
    let mut sum = 0;
    threads(pid, |_, nanos| sum += nanos);
    sum
}

/// CPU time of a process's children that have ended, and been waited for; in steps of a clock tick.
pub fn ended_children(pid: u32) -> u64 {
    let stat = stat(pid);
    let ticks: u64 = stat.iter().skip(13).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    ticks * TICK_NANOS
}

/// CPU time of a process and of all its children, those that have ended too.
pub fn family(pid: u32) -> u64 {
    let parent = pid.to_string();
    let is_child = |child: &u32| stat(*child).get(1).is_some_and(|ppid| *ppid == parent);
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let children = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_child);
    process(pid) + ended_children(pid) + children.map(process).sum::<u64>()
}

/// The fields of a process's stat that follow its name.
fn stat(pid: u32) -> Vec<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().unwrap_or_default().split(' ').map(str::to_owned).collect()
}

/// The resident memory of a process, in KiB.
pub fn memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
