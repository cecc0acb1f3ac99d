//! Which of the two backends is right, where they differ.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Redis,
    Postgres,
}
