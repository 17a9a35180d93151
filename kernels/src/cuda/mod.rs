//! [`Cuda`]: an NVIDIA device, through its driver, which is found at run time.
//!
//! The kernels (`kernels/*.cu`) are compiled to PTX ahead (`build.sh`) and lie in `ptx/`; the driver compiles them for the
//! device it has. Nothing here has been run on a device yet: the kernels and this code are tested on an emulated
//! driver (`emulator/`), which shows indices, tails, barriers and launches, but neither speed nor what a
//! real driver does differently. `README.md` beside this file keeps the account.
//!
//! What every operation promises holds here too: the bits of a row depend on that row alone. They differ from the
//! CPU's in the last places, because sums are cut into strands (`kernels/strands.cuh`).

mod arena;
mod attention;
mod backend;
mod constants;
mod device;
mod kv;
mod launches;
mod lora;
mod memory;
mod pool;
mod products;
mod ptx;
mod scratch;
mod tables;
mod top_k;
mod weights;

pub use backend::Cuda;
pub use kv::CudaKv;
pub use launches::LaunchCounts;
pub use memory::CudaBuffer;
pub use pool::AdapterPool;
pub use tables::TableCopies;
