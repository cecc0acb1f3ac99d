//! Holdfast: a sidecar that speaks RESP and hands out what must not be handed out twice.
//!
//! A code map, in reading order; ARCHITECTURE.md walks one request through it.
//!
//! - [`domain`]: ids, quantities, positions, changes. Pure.
//! - [`resp`]: bytes to requests and replies to bytes. Knows no command.
//! - [`session`]: what is known of each client.
//! - [`server`]: listener, connections. Knows no command's meaning.
//! - [`command`]: the table of commands, argument matching, dispatch, the handlers.
//! - [`store`]: everything on Redis: connections, keys, scripts, the combiner.
//! - [`outbox`]: carries what the scripts appended from Redis to Postgres.
//! - [`ledger`]: everything on Postgres.
//! - [`reconcile`]: compares both while they are in use, and repairs what differs.
//! - [`tls`], the certificates.
//! - [`bulk`]: all products at once: import, export, audit.
//! - [`telemetry`]: metrics, logs, the HTTP endpoints.
//! - [`app`]: builds all of it, and drains it in reverse.
//! - [`sabotage`]: breaks it on purpose, to show that the tests notice.

pub mod domain;

pub mod config;
pub mod limits;
pub mod resp;
pub mod sabotage;
pub mod telemetry;
pub mod tls;

pub mod command;
pub mod ledger;
pub mod outbox;
pub mod reconcile;
pub mod server;
pub mod session;
pub mod store;

pub mod app;
pub mod bulk;
pub mod cli;
pub mod dev;
