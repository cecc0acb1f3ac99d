//! What the server tells of itself: logs, metrics, and the HTTP endpoints that say whether it lives and is ready.

pub mod histogram;
pub mod http;
pub mod logs;
pub mod metrics;
