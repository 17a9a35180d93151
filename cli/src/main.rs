//! The `lory` program.
fn main() {}
