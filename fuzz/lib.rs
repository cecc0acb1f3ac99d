//! The rooms of Holdfast that read what comes from outside, without all the rest: so this builds in seconds. Rooms import each other one way,
//! and these three need no other.

#![allow(dead_code, reason = "only the readers are used")]

#[path = "../src/domain/mod.rs"]
pub mod domain;
#[path = "../src/limits.rs"]
pub mod limits;
#[path = "../src/resp/mod.rs"]
pub mod resp;
