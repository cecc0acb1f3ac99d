//! Who may connect, and how: the users and the certificates, read at the start and again with each SIGHUP.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{Error, Sessions, commands};
use crate::config::Config;
use crate::limits;
use crate::session::users::Users;
use crate::tls::{Certificates, Files};

/// The users that the configuration names. Errors with what to correct, never with a secret.
pub fn users(config: &Config) -> Result<Users, Error> {
    let path = &config.auth.users_file;
    let named = !path.as_os_str().is_empty();
    let wrong = |why: String| Error(format!("auth.users_file {}: {why}", path.display()));
    let text = if named { Some(read(config).map_err(wrong)?) } else { None };
    let password = Some(config.auth.requirepass.expose()).filter(|password| !password.is_empty());
    let users = Users::read(text.as_deref(), password, &commands(config)).map_err(wrong)?;
    if named && !config.listen.ip().is_loopback() && !config.insecure && users.admit_anybody() {
        return Err(wrong("a user with nopass, while other machines can connect: give it a password, or permit it with --insecure".into()));
    }
    Ok(users)
}

fn read(config: &Config) -> Result<String, String> {
    let path = &config.auth.users_file;
    let unreadable = |why: std::io::Error| format!("cannot be read: {why}");
    let file = fs::File::open(path).map_err(unreadable)?;
    let mode = file.metadata().map_err(unreadable)?.mode();
    if mode & 0o007 != 0 {
        warn!(file = %path.display(), "everybody on this machine may read or change the users file: chmod 640");
    }
    let mut text = String::new();
    file.take(limits::USERS_FILE_MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() as u64 > limits::USERS_FILE_MAX {
        return Err(format!("is longer than {} bytes", limits::USERS_FILE_MAX));
    }
    Ok(text)
}

/// Where the certificates are, if there are any. Errors with what is missing.
pub fn files(config: &Config) -> Result<Option<Files>, Error> {
    let named = |path: &PathBuf| Some(path.clone()).filter(|path| !path.as_os_str().is_empty());
    let tls = &config.tls;
    match (named(&tls.cert_file), named(&tls.key_file), named(&tls.client_ca_file)) {
        (Some(cert), Some(key), client_ca) => Ok(Some(Files { cert, key, client_ca })),
        (None, None, None) if !config.http.tls => Ok(None),
        _ => Err(Error("TLS needs both tls.cert_file and tls.key_file".into())),
    }
}

/// The certificates that the configuration names, if it does. Errors with which file cannot be used.
pub fn certificates(config: &Config) -> Result<Option<Arc<Certificates>>, Error> {
    let Some(files) = files(config)? else {
        if config.auth.is_on() && !config.listen.ip().is_loopback() {
            warn!("passwords come unencrypted from other machines: tls.cert_file and tls.key_file encrypt them");
        }
        return Ok(None);
    };
    let certificates = Certificates::load(files).map_err(Error)?;
    if certificates.has_open_key() {
        warn!("everybody on this machine may read the private key: chmod 640 {}", config.tls.key_file.display());
    }
    Ok(Some(Arc::new(certificates)))
}

/// Reads them again with each SIGHUP. What is wrong changes nothing; a client whose user is gone, is off or has lost the password that it
/// showed is closed, and who listens to or waits for what it may no longer have; the others go on with the rights that their users have now.
pub async fn reload(config: Config, sessions: Sessions, shutdown: CancellationToken) {
    let mut hangups = match signal(SignalKind::hangup()) {
        Ok(hangups) => hangups,
        Err(why) => return error!(error = %why, "cannot take a SIGHUP: nothing is reloaded"),
    };
    while shutdown.run_until_cancelled(hangups.recv()).await.is_some() {
        match users(&config) {
            Ok(users) => {
                let count = users.all().count();
                sessions.users.replace(users);
                let closed = sessions.registry.expel(&sessions.users.users());
                // Who waits for something looks whether it may still have it.
                sessions.registry.wake();
                info!(target: "holdfast::audit", users = count, closed, "users reloaded");
            }
            Err(why) => error!(error = %why, "users are not reloaded, the old ones stay"),
        }
        match sessions.certificates.as_ref().map(|certificates| certificates.reload()) {
            None => {}
            Some(Ok(())) => info!(target: "holdfast::audit", "certificates reloaded"),
            Some(Err(why)) => error!(error = why, "certificates are not reloaded, the old ones stay"),
        }
    }
}
