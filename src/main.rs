//! The program: command line, logs, one runtime, exit code.

use std::error::Error;
use std::io::{self, Write as _};
use std::process::ExitCode;

use holdfast::cli::{self, Action, Invocation};
use holdfast::config::Sources;
use holdfast::{app, dev, telemetry};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let result = match cli::parse(std::env::args_os(), Sources::variables_of_this_process()) {
        Ok(invocation) => match invocation.answer() {
            Some(answer) => answer.and_then(|answer| writeln!(io::stdout(), "{answer}")).map_err(Into::into),
            None => work(invocation),
        },
        Err(stop) => return stop.report(),
    };
    let Err(error) = result else { return ExitCode::SUCCESS };
    eprintln!("holdfast: {error}");
    ExitCode::FAILURE
}

fn work(invocation: Invocation) -> Result<(), Box<dyn Error>> {
    telemetry::logs::init(&invocation.resolved.config.log)?;
    invocation.resolved.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(until_signalled(invocation));
    // What still blocks a thread, such as a look-up of a name, is not waited for.
    runtime.shutdown_background();
    result
}

/// Does the work until it ends. The first SIGTERM or SIGINT asks it to end, the second does not ask.
async fn until_signalled(Invocation { action, resolved }: Invocation) -> Result<(), Box<dyn Error>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut signalled = async || tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} };
    let shutdown = CancellationToken::new();
    let work = async {
        match action {
            Action::Dev(dir) => Ok(dev::run(resolved.config, dir, shutdown.clone()).await?),
            Action::Migrate => Ok(shutdown.run_until_cancelled(app::migrate(&resolved.config)).await.ok_or("stopped by a signal")??),
            Action::Rebuild(from) => {
                let done = shutdown.run_until_cancelled(app::rebuild(&resolved.config, from)).await;
                Ok(done.ok_or("stopped by a signal: Redis stays closed until it is done; run it again")??)
            }
            Action::Import(file) => Ok(app::import(&resolved.config, &file, shutdown.clone()).await?),
            Action::Export => Ok(shutdown.run_until_cancelled(app::export(&resolved.config)).await.ok_or("stopped by a signal")??),
            Action::Audit { all } => {
                Ok(shutdown.run_until_cancelled(app::audit(&resolved.config, all)).await.ok_or("stopped by a signal")??)
            }
            _ => Ok(app::run(resolved.config, shutdown.clone(), None).await?),
        }
    };
    let signals = async {
        signalled().await;
        tracing::info!("stopping; a second signal ends the process at once");
        shutdown.cancel();
        signalled().await;
    };
    tokio::select! { result = work => result, () = signals => Err("ended at once by a second signal".into()) }
}
