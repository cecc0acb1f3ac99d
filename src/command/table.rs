//! Every command there is, in the order of the documentation, and how one is found by its name.

use std::cell::Cell;
use std::collections::HashMap;

use super::spec::Spec;
use super::{
    acl, client, connection, coupon, cut, dead_letter, describe, drain, holdfast, lock, order, pubsub, server, slowlog, stock,
    unknown_command,
};
use crate::limits::{ERROR_ECHO_MAX, NAME_MAX};
use crate::resp::Request;

/// The commands. A new one is declared above its handler and gets a line here; nothing else lists it.
pub static TABLE: &[&Spec] = &[
    &stock::SET,
    &stock::DEL,
    &stock::GET,
    &stock::MGET,
    &stock::INFO,
    &stock::INCR,
    &stock::DECR,
    &order::RESERVE,
    &order::CONFIRM,
    &order::CANCEL,
    &order::EXTEND,
    &order::GET,
    &order::HISTORY,
    &stock::SCAN,
    &stock::SYNC,
    &stock::UNFREEZE,
    &coupon::CREATE,
    &coupon::ALTER,
    &coupon::ISSUE,
    &coupon::USE,
    &coupon::UNUSE,
    &coupon::REVOKE,
    &coupon::GET,
    &coupon::INFO,
    &coupon::SCAN,
    &coupon::DEL,
    &lock::ACQUIRE,
    &lock::RELEASE,
    &lock::EXTEND,
    &lock::CHECK,
    &lock::INFO,
    &holdfast::STATUS,
    &holdfast::AWAIT,
    &drain::DRAIN,
    &dead_letter::DEADLETTER,
    &connection::HELLO,
    &connection::AUTH,
    &connection::PING,
    &connection::ECHO,
    &connection::SELECT,
    &connection::QUIT,
    &connection::RESET,
    &client::CLIENT,
    &pubsub::SUBSCRIBE,
    &pubsub::UNSUBSCRIBE,
    &pubsub::PSUBSCRIBE,
    &pubsub::PUNSUBSCRIBE,
    &pubsub::PUBSUB_COMMAND,
    &pubsub::MONITOR,
    &describe::COMMAND,
    &server::INFO,
    &server::CONFIG,
    &acl::ACL,
    &server::MODULE,
    &server::TIME,
    &server::DBSIZE,
    &slowlog::SLOWLOG,
    &server::LATENCY,
    &server::CLUSTER,
    &server::READONLY,
    &server::READWRITE,
    &server::ASKING,
];

/// A table made ready for look-ups. Commands and subcommands are numbered together, each command followed by its subcommands.
pub struct Commands {
    specs: Vec<&'static Spec>,
    numbers: HashMap<&'static [u8], usize, foldhash::fast::RandomState>,
    /// What was found last: clients send much of the same.
    last: Cell<usize>,
}

impl Commands {
    /// # Panics
    /// If a name is too long for [`NAME_MAX`]: a mistake in the table, which its test finds.
    pub fn new(table: &[&'static Spec]) -> Self {
        let mut specs = Vec::new();
        let mut numbers = HashMap::default();
        for spec in table {
            for spec in std::iter::once(spec).chain(spec.subcommands) {
                assert!(spec.name.len() <= NAME_MAX, "{} is too long", spec.name);
                numbers.insert(spec.name.as_bytes(), specs.len());
                specs.push(*spec);
            }
        }
        Self { specs, numbers, last: Cell::new(0) }
    }

    /// How many there are, subcommands included; also the number that stands for every unknown command.
    pub fn len(&self) -> usize {
        self.specs.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.specs.is_empty()
    }

    /// Commands and subcommands, by number.
    pub fn all(&self) -> &[&'static Spec] {
        &self.specs
    }

    /// The commands without their subcommands.
    pub fn top(&self) -> impl Iterator<Item = &'static Spec> + '_ {
        self.specs.iter().copied().filter(|spec| spec.name_words == 1)
    }

    /// Finds a command, or a subcommand as `client|list`, whatever the case.
    pub fn named(&self, name: &[u8]) -> Option<(usize, &'static Spec)> {
        let last = self.last.get();
        if let Some(spec) = self.specs.get(last).filter(|spec| spec.name.as_bytes() == name) {
            return Some((last, spec));
        }
        let mut upper = [0_u8; NAME_MAX];
        let upper = upper.get_mut(..name.len())?;
        upper.copy_from_slice(name);
        upper.make_ascii_uppercase();
        let number = *self.numbers.get(&*upper)?;
        self.last.set(number);
        Some((number, self.specs[number]))
    }

    /// Finds what a request runs; errors with the error reply's text.
    pub fn find(&self, words: &Request) -> Result<(usize, &'static Spec), String> {
        let (number, spec) = self.named(&words[0]).filter(|(_, spec)| spec.name_words == 1).ok_or_else(|| unknown_command(words))?;
        let Some(sub) = words.get(1).filter(|_| !spec.subcommands.is_empty()) else { return Ok((number, spec)) };
        let place = spec.subcommands.iter().position(|known| known.name.as_bytes()[spec.name.len() + 1..].eq_ignore_ascii_case(sub));
        match place {
            Some(place) => Ok((number + 1 + place, spec.subcommands[place])),
            None => Err(format!("ERR unknown subcommand '{}'. Try {} HELP.", cut(sub, ERROR_ECHO_MAX), spec.name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::args::Args;
    use crate::command::spec::{Arg, Presence};
    use crate::config::{SETTINGS, Setting};
    use crate::limits::SPEC_ARGS_MAX;

    #[test]
    fn every_spec_is_complete() {
        let commands = Commands::new(TABLE);
        let mut names = std::collections::HashSet::new();
        for spec in commands.all() {
            let name = spec.name;
            assert!(names.insert(name), "{name} is declared twice");
            assert!(name.bytes().all(|b| b.is_ascii_uppercase() || matches!(b, b'.' | b'|' | b'-')), "{name}");
            assert!(spec.run.is_some() || !spec.subcommands.is_empty(), "{name} does nothing");
            assert!(spec.summary.ends_with('.') && !spec.summary[..spec.summary.len() - 1].contains(". "), "{name}: one sentence");
            assert!(!spec.reply.is_empty() && !spec.complexity.is_empty() && spec.since.split('.').count() == 3, "{name}");
            for sub in spec.subcommands {
                assert!(sub.name.starts_with(&format!("{name}|")) && sub.subcommands.is_empty(), "{}", sub.name);
            }
        }
    }

    #[test]
    fn every_command_with_an_ack_has_a_setting_for_its_default_and_no_other_has() {
        let named = |name: &str| name.to_ascii_lowercase().replace('.', "_");
        let mut commands: Vec<_> = TABLE.iter().filter(|spec| spec.at.ack.is_some()).map(|spec| named(spec.name)).collect();
        let mut settings: Vec<_> = SETTINGS
            .iter()
            .map(Setting::section_and_name)
            .filter(|(section, _)| *section == "ack")
            .map(|(_, name)| name.to_owned())
            .collect();
        commands.sort();
        settings.sort();
        assert_eq!(commands, settings);
    }

    #[test]
    fn arguments_are_declared_in_the_order_they_are_matched_in() {
        for spec in Commands::new(TABLE).all() {
            let rank = |arg: &Arg| match (arg.token, arg.presence) {
                (None, Presence::Required) => 0,
                (None, Presence::Optional) => 1,
                (None, _) => 2,
                (Some(_), _) => 3,
            };
            assert!(spec.args.is_sorted_by_key(rank), "{}", spec.name);
            assert!(spec.args.len() <= SPEC_ARGS_MAX, "{}", spec.name);
            for (at, arg) in spec.args.iter().enumerate() {
                assert!(!spec.args[..at].iter().any(|other| other.name == arg.name), "{} declares {} twice", spec.name, arg.name);
            }
        }
    }

    #[test]
    fn every_example_matches_its_spec() {
        let commands = Commands::new(TABLE);
        for spec in commands.all() {
            let example = spec.example.replace('|', " ");
            let words: Request = example.split(' ').collect();
            let (_, found) = commands.find(&words).unwrap_or_else(|error| panic!("{example}: {error}"));
            assert!(found.name.starts_with(spec.name), "{example} is not {}", spec.name);
            if let Err(error) = Args::parse(found, words) {
                panic!("{example}: {error}");
            }
        }
    }

    #[test]
    fn names_are_found_in_any_case() {
        let commands = Commands::new(TABLE);
        assert_eq!(commands.named(b"client|SetName").map(|(_, spec)| spec.name), Some("CLIENT|SETNAME"));
        assert!(commands.named(&[b'x'; 200]).is_none());
        assert!(commands.find(&["client|id"].into_iter().collect()).is_err());
    }
}
