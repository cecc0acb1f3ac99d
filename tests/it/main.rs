//! Holdfast as its users meet it: the built program, a real Redis, a real Postgres.

#![allow(clippy::unwrap_used, clippy::panic, reason = "what fails shall end the test")]

mod harness;
mod servers;

mod access;
mod bad_input;
mod bounds;
mod bulk;
mod coupon_life;
mod coupon_locks;
mod coupon_model;
mod coupon_reconcile;
mod coupons;
mod crowd;
mod dead_letters;
mod detail;
mod doubt;
mod faults;
mod flows;
mod hostile;
mod http;
mod inbox;
mod late;
mod lock_faults;
mod locks;
mod model;
mod orders;
mod overload;
mod protocol;
mod proxy;
mod pubsub;
mod rebuild;
mod reconcile;
mod replica;
mod speed;
mod stock;
mod tidy;
mod tls;
