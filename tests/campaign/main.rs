//! Nothing lost, nothing twice, whatever dies: many clients, faults from a seeded random generator, and a checker over all that the clients
//! were told and both backends hold. `HOLDFAST_TEST_SEED` repeats the choices of a run.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what fails shall end the test")]

#[path = "../it/harness.rs"]
mod harness;
#[path = "../it/proxy.rs"]
mod proxy;
#[path = "../it/servers.rs"]
mod servers;

mod checker;
mod faults;
mod history;
mod load;
mod random;
mod world;
