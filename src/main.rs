//! The program: command line, logs, one runtime, exit code.

use std::error::Error;
use std::io::{self, Write as _};
use std::process::ExitCode;

use holdfast::cli::{self, Action, Invocation};
use holdfast::config::{Config, Resolved, Sources};
use holdfast::telemetry::{http, logs};
use holdfast::{app, dev};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let Invocation { action, resolved } = match cli::parse(std::env::args_os(), Sources::variables_of_this_process()) {
        Ok(invocation) => invocation,
        Err(stop) => return stop.report(),
    };
    match act(action, resolved) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("holdfast: {error}");
            ExitCode::FAILURE
        }
    }
}

fn act(action: Action, resolved: Resolved) -> Result<(), Box<dyn Error>> {
    match action {
        Action::CheckConfig => Ok(writeln!(io::stdout(), "the configuration can be used")?),
        Action::PrintConfig => Ok(io::stdout().write_all(resolved.to_toml().as_bytes())?),
        Action::Healthcheck => Ok(writeln!(io::stdout(), "{}", http::probe(resolved.config.http.listen)?)?),
        Action::Serve | Action::Dev(_) | Action::Migrate => {
            logs::init(&resolved.config.log)?;
            resolved.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
            _ = rustls::crypto::ring::default_provider().install_default();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let result = runtime.block_on(until_signalled(action, resolved.config));
            // What still blocks a thread, such as a look-up of a name, is not waited for.
            runtime.shutdown_background();
            result
        }
    }
}

/// Does it until it ends. The first SIGTERM or SIGINT asks it to, the second does not ask.
async fn until_signalled(action: Action, config: Config) -> Result<(), Box<dyn Error>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let shutdown = CancellationToken::new();
    let work = async {
        match action {
            Action::Dev(dir) => Ok(dev::run(config, dir, shutdown.clone()).await?),
            Action::Migrate => Ok(app::migrate(&config).await?),
            _ => Ok(app::run(config, shutdown.clone(), None).await?),
        }
    };
    let signals = async {
        next(&mut terminate, &mut interrupt).await;
        tracing::info!("stopping; a second signal ends the process at once");
        shutdown.cancel();
        next(&mut terminate, &mut interrupt).await;
    };
    tokio::select! {
        result = work => result,
        () = signals => Err("ended at once by a second signal".into()),
    }
}

async fn next(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
}
