//! What is known of the clients: of one, and of all of them. Below the commands, which read and change it, and below the server, which
//! makes it.
//!
//! - [`client`]: one client's session; [`registry`]: all of them, for CLIENT LIST; [`bounds`]: what one may take.
//! - [`hub`]: channels, and who has subscribed to them.
//! - [`user`]: who a client may be, and what that user may do; [`users`]: all of them, for AUTH;
//!   [`guesses`]: wrong passwords, by address; [`chatter`]: log lines that clients can provoke.

pub mod bounds;
pub mod chatter;
pub mod client;
pub mod guesses;
pub mod hub;
pub mod registry;
pub mod user;
pub mod users;

pub use bounds::Bounds;
pub use client::Session;
pub use registry::Registry;
pub use user::User;
pub use users::{Directory, Users};
