//! From what the scripts appended in Redis to Postgres: the relay, and the verifier that compares both before anything is sold.

pub mod relay;
pub mod verify;
