//! The processor as a [`Backend`](crate::Backend).

mod backend;
mod isa;
mod memory;
mod pool;

pub use backend::{Cpu, CpuKv};
pub use isa::{Isa, Level};
pub(crate) use memory::{wrong_page, zeros};
pub use pool::{ThreadPool, physical_cores};
