//! The processor as a [`Backend`](crate::Backend).

mod activations;
mod adapted;
mod adapted_turn;
mod aligned;
#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod amx_bf16;
mod attention;
mod attention_span;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_half;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
mod backend;
mod bands;
mod cores;
mod cpu_mask;
mod float_matmul;
mod frame;
mod int_direct;
mod int_matmul;
mod int_sum;
mod int_tile;
mod isa;
mod kv;
mod lanes;
mod lora;
mod matmul;
mod output;
mod panel;
mod pointwise;
mod pool;
mod portable;
mod prepared;
mod repack;
mod simd;
mod source;
mod thread_options;
mod unpack;

pub use backend::Cpu;
pub use cpu_mask::CpuMask;
pub use isa::{Isa, Level};
pub use kv::CpuKv;
pub use pool::{ThreadPool, physical_cores};
pub use thread_options::ThreadOptions;
