//! The command line: what can be asked for, and with which settings.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use crate::app;
use crate::config::{self, FILE_VARIABLE, Kind, Resolved, SETTINGS, Setting, Sources};
use crate::domain::Side;
use crate::telemetry::http;

/// The exit code for a command line or a configuration that cannot be used: EX_USAGE of sysexits.h. Supervisors need not try again.
const EXIT_USAGE: u8 = 64;

/// What is asked for, and the settings for it.
#[derive(Debug)]
pub struct Invocation {
    /// What to do.
    pub action: Action,
    /// With which settings.
    pub resolved: Resolved,
}

impl Invocation {
    /// The answer, where what is asked for is a question and no work: about the configuration, or to a server that runs.
    pub fn answer(&self) -> Option<io::Result<String>> {
        match self.action {
            Action::CheckConfig => {
                let checked = app::check(&self.resolved.config);
                Some(checked.map(|()| "the configuration can be used".into()).map_err(io::Error::other))
            }
            Action::PrintConfig => Some(Ok(self.resolved.to_toml().trim_end().into())),
            Action::Healthcheck => {
                let config = &self.resolved.config;
                Some(app::probe_client(config).map_err(io::Error::other).and_then(|tls| http::probe(config.http.listen, tls)))
            }
            Action::Serve
            | Action::Dev(_)
            | Action::Migrate
            | Action::Rebuild(_)
            | Action::Import(_)
            | Action::Export
            | Action::Audit { .. } => None,
        }
    }
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Serve clients until told to stop.
    Serve,
    /// Serve clients on a private Redis and Postgres, whose data is in this directory.
    Dev(PathBuf),
    /// Bring Postgres to this version's tables.
    Migrate,
    /// Make one of Redis and Postgres as this one is.
    Rebuild(Side),
    /// Set every product of this CSV file.
    Import(PathBuf),
    /// Write every product to standard output.
    Export,
    /// Say whether the ledgers explain every number.
    Audit {
        /// Write a line for everything, not only for what differs.
        all: bool,
    },
    /// Say whether the configuration can be used.
    CheckConfig,
    /// Show the configuration.
    PrintConfig,
    /// Ask a running server whether it is ready.
    Healthcheck,
}

/// Why there is nothing to do, or nothing that can be done.
#[derive(Debug)]
pub enum Stop {
    /// Help or the version was asked for, or the command line is wrong.
    CommandLine(clap::Error),
    /// The configuration is wrong.
    Config(config::Error),
}

impl Stop {
    /// Says it to the user.
    pub fn report(&self) -> ExitCode {
        match self {
            Self::CommandLine(error) => {
                // Nothing is left to be done where not even this can be written.
                _ = error.print();
                if error.use_stderr() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS }
            }
            Self::Config(error) => {
                for problem in error.to_string().lines() {
                    eprintln!("holdfast: {problem}");
                }
                ExitCode::from(EXIT_USAGE)
            }
        }
    }
}

/// Understands a command line, and resolves its settings.
pub fn parse(args: impl IntoIterator<Item = OsString>, variables: BTreeMap<String, String>) -> Result<Invocation, Stop> {
    let matches = command().try_get_matches_from(args).map_err(Stop::CommandLine)?;
    let (action, matches) = match matches.subcommand() {
        Some(("dev", matches)) => (Action::Dev(matches.get_one::<PathBuf>("dir").cloned().unwrap_or_default()), matches),
        Some(("migrate", matches)) => (Action::Migrate, matches),
        Some(("rebuild", matches)) => {
            let from = matches.get_one::<String>("from").is_some_and(|from| from == "redis");
            (Action::Rebuild(if from { Side::Redis } else { Side::Postgres }), matches)
        }
        Some(("import", matches)) => (Action::Import(matches.get_one::<PathBuf>("file").cloned().unwrap_or_default()), matches),
        Some(("export", matches)) => (Action::Export, matches),
        Some(("audit", matches)) => (Action::Audit { all: matches.get_flag("all") }, matches),
        Some(("check-config", matches)) => (Action::CheckConfig, matches),
        Some(("print-config", matches)) => (Action::PrintConfig, matches),
        Some(("healthcheck", matches)) => (Action::Healthcheck, matches),
        Some((_, matches)) => (Action::Serve, matches),
        // Clap requires a subcommand, so this is never reached.
        None => (Action::Serve, &matches),
    };
    let resolved = config::load(&sources(matches, variables)).map_err(Stop::Config)?;
    Ok(Invocation { action, resolved })
}

fn sources(matches: &ArgMatches, variables: BTreeMap<String, String>) -> Sources {
    let flag = |setting: &Setting| matches.try_get_one::<String>(setting.key).ok().flatten().cloned();
    Sources {
        flags: SETTINGS.iter().filter_map(|setting| Some((setting.key, flag(setting)?))).collect(),
        file: matches.get_one::<PathBuf>("config").cloned(),
        variables,
    }
}

fn command() -> Command {
    let sub =
        |name: &'static str, about: &'static str| Command::new(name).about(about).arg(config_flag()).args(SETTINGS.iter().filter_map(flag));
    let dir = Arg::new("dir")
        .long("dir")
        .value_name("DIRECTORY")
        .value_parser(value_parser!(PathBuf))
        .default_value("./.holdfast")
        .help("Where the data of Redis and Postgres, and their logs, are kept");
    Command::new("holdfast")
        .version(env!("CARGO_PKG_VERSION"))
        .about(env!("CARGO_PKG_DESCRIPTION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(sub("serve", "Serves clients in front of a Redis and a Postgres"))
        // Dev brings its own Redis and Postgres: their addresses cannot be chosen.
        .subcommand(
            Command::new("dev")
                .about("Serves clients on a private Redis and Postgres, which it starts and stops")
                .arg(dir)
                .arg(config_flag())
                .args(SETTINGS.iter().filter(|setting| !setting.is_secret()).filter_map(flag)),
        )
        .subcommand(sub("migrate", "Brings Postgres to this version's tables, and ends"))
        .subcommand(
            sub("rebuild", "Makes Redis as Postgres is, or Postgres as Redis is, where a person has to say which is right").arg(
                Arg::new("from")
                    .long("from")
                    .value_name("SIDE")
                    .required(true)
                    .value_parser(["redis", "postgres"])
                    .help("The side that is right"),
            ),
        )
        .subcommand(
            sub(
                "import",
                "Sets every product of a CSV file (product,available,low), while others sell; run again, it goes on where it stopped",
            )
            .arg(Arg::new("file").value_name("FILE").required(true).value_parser(value_parser!(PathBuf)).help("The CSV file")),
        )
        .subcommand(sub("export", "Writes every product to standard output, as import reads them"))
        .subcommand(
            sub("audit", "Replays the ledgers and compares them with every product and coupon: exit code 0, or 1 where one differs").arg(
                Arg::new("all").long("all").action(ArgAction::SetTrue).help("Writes a line for everything, not only for what differs"),
            ),
        )
        .subcommand(sub("check-config", "Says whether the configuration can be used; connects to nothing"))
        .subcommand(sub("print-config", "Shows every setting and where it came from, without passwords"))
        .subcommand(sub("healthcheck", "Asks the server at http.listen whether it is ready: exit code 0 or 1"))
}

fn config_flag() -> Arg {
    Arg::new("config")
        .long("config")
        .value_name("FILE")
        .value_parser(value_parser!(PathBuf))
        .help(format!("The TOML file with the settings [env: {FILE_VARIABLE}]"))
}

fn flag(setting: &'static Setting) -> Option<Arg> {
    let flag = setting.flag()?;
    let doc = setting.doc.trim_end_matches('.');
    let arg = Arg::new(setting.key).long(flag).value_name(setting.placeholder()).help(format!(
        "{doc} [default: {}] [env: {}]",
        setting.default,
        setting.variable()
    ));
    Some(match setting.kind {
        Kind::Switch => arg.num_args(0..=1).require_equals(true).default_missing_value("true"),
        _ => arg,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Invocation, Stop> {
        parse(line.split(' ').map(OsString::from), BTreeMap::new())
    }

    #[test]
    fn the_definition_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_setting_has_a_flag() {
        let invocation =
            run("holdfast serve --listen 127.0.0.1:7000 --insecure --max-clients 5 --redis-url redis://r --log-level=warn").unwrap();
        assert_eq!(invocation.action, Action::Serve);
        let config = invocation.resolved.config;
        assert_eq!((config.listen.port(), config.insecure, config.max_clients), (7000, true, 5));
        assert_eq!((config.redis.url.expose(), config.log.level.as_str()), ("redis://r", "warn"));
        assert!(!run("holdfast serve --insecure=false").unwrap().resolved.config.insecure);
    }

    #[test]
    fn dev_chooses_its_own_servers() {
        let invocation = run("holdfast dev --dir /srv/dev --listen 127.0.0.1:0").unwrap();
        assert_eq!(invocation.action, Action::Dev("/srv/dev".into()));
        assert_eq!(run("holdfast dev").unwrap().action, Action::Dev("./.holdfast".into()));
        assert!(matches!(run("holdfast dev --redis-url redis://r"), Err(Stop::CommandLine(_))));
    }

    #[test]
    fn what_is_done_with_all_products_is_a_command() {
        assert_eq!(run("holdfast import /srv/products.csv").unwrap().action, Action::Import("/srv/products.csv".into()));
        assert_eq!(run("holdfast export --redis-url redis://r").unwrap().action, Action::Export);
        assert_eq!(run("holdfast audit --all").unwrap().action, Action::Audit { all: true });
        assert_eq!(run("holdfast audit").unwrap().action, Action::Audit { all: false });
    }

    #[test]
    fn what_is_wrong_ends_with_64_and_help_with_0() {
        let code = |line: &str| format!("{:?}", run(line).unwrap_err().report());
        let (usage, success) = (format!("{:?}", ExitCode::from(64)), format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(code("holdfast serve --max-clients 0"), usage);
        assert_eq!(code("holdfast serve --no-such-flag"), usage);
        assert_eq!(code("holdfast"), usage);
        assert_eq!(code("holdfast rebuild"), usage);
        assert_eq!(code("holdfast rebuild --from backup"), usage);
        assert_eq!(code("holdfast import"), usage);
        assert_eq!(code("holdfast --version"), success);
        assert_eq!(code("holdfast serve --help"), success);
    }
}
