//! What is sold and how it is written down: ids, quantities, positions, changes. Pure: no IO, no async, no clock.

pub mod change;
pub mod coupon;
pub mod dead_letter;
pub mod drift;
pub mod event;
pub mod glob;
pub mod history;
pub mod id;
pub mod lock;
pub mod mark;
pub mod order;
pub mod position;
pub mod quantity;
pub mod request;
pub mod runs;
pub mod side;
pub mod text;

pub use dead_letter::{DeadLetter, Settled};
pub use drift::{Drift, Measure, Remedy};
pub use id::Id;
pub use lock::LockName;
pub use mark::InboxMark;
pub use order::{Order, OrderChange, OrderState, items_text};
pub use position::Position;
pub use request::RequestId;
pub use runs::{Grain, Runs};
pub use side::Side;
