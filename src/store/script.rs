//! The Lua scripts: their text is in lua/, `build.rs` resolves what they include and names their keys and arguments.

use std::sync::OnceLock;

use redis::{RedisWrite as _, Value};

use super::connection::{Connection, Error};
use crate::sabotage::breaks;

/// One script. Called by the hash of its text, so that two releases can run side by side on one Redis.
pub struct Script {
    pub name: &'static str,
    source: &'static str,
    /// What is sent instead, by what it breaks (`sabotage.rs`): empty in a build that is to be used.
    broken: &'static [(&'static str, &'static str)],
    fixed_keys: usize,
    args: usize,
    sha: OnceLock<String>,
}

include!(concat!(env!("OUT_DIR"), "/scripts.rs"));

impl Script {
    const fn new(
        name: &'static str,
        source: &'static str,
        broken: &'static [(&'static str, &'static str)],
        fixed_keys: usize,
        args: usize,
    ) -> Self {
        Self { name, source, broken, fixed_keys, args, sha: OnceLock::new() }
    }

    fn source(&self) -> &'static str {
        self.broken.iter().find(|(what, _)| breaks(what)).map_or(self.source, |(_, instead)| instead)
    }

    fn sha(&self) -> &str {
        self.sha.get_or_init(|| redis::Script::new(self.source()).get_hash().to_owned())
    }

    /// The call by hash: `ERR NOSCRIPT` where Redis does not know the script yet.
    pub fn evalsha(&self, keys: &[&str], args: &[&[u8]]) -> redis::Cmd {
        self.command("EVALSHA", self.sha(), keys, args)
    }

    /// The call with the text, which Redis then knows.
    pub fn eval(&self, keys: &[&str], args: &[&[u8]]) -> redis::Cmd {
        self.command("EVAL", self.source(), keys, args)
    }

    fn command(&self, verb: &str, body: &str, keys: &[&str], args: &[&[u8]]) -> redis::Cmd {
        debug_assert!(keys.len() >= self.fixed_keys && args.len() == self.args, "{}: {} keys, {} args", self.name, keys.len(), args.len());
        let mut command = redis::cmd(verb);
        command.arg(body).arg(keys.len());
        for key in keys {
            command.arg(*key);
        }
        for arg in args {
            // Not Cmd::arg: an empty slice would be no argument at all.
            command.write_arg(arg);
        }
        command
    }
}

impl Connection {
    /// Runs a script: by its hash, and where Redis does not know it (it surely did not run then) by its text, on this same connection.
    pub async fn run(&mut self, script: &Script, keys: &[&str], args: &[&[u8]]) -> Result<Value, Error> {
        match self.send(&script.evalsha(keys, args)).await {
            Err(error) if error.is_no_script() => self.send(&script.eval(keys, args)).await,
            answer => answer,
        }
    }
}
