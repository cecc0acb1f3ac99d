//! What is done with all products at once, from the command line: import, export, audit.

mod audit;
mod csv;
mod export;
mod import;

pub use audit::{Found, audit};
pub use export::export;
pub use import::{Imported, import};
