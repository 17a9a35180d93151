//! The model and how it is run: flags shared by every command that computes.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// Element type of the KV cache.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum KvTypeArg {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// 8-bit blocks.
    #[value(name = "q8_0")]
    Q8_0,
}

/// `-m` and what belongs to it.
#[derive(Args, Debug)]
#[command(next_help_heading = "Model")]
pub struct ModelFlags {
    /// The model, a GGUF file (of a sharded one, any shard).
    #[arg(short = 'm', long, value_name = "FILE")]
    pub model: PathBuf,
    /// Longest conversation in tokens [default: what the model was trained on, at most 4096].
    #[arg(short = 'c', long, value_name = "N")]
    pub ctx_size: Option<u32>,
    /// Threads [default: the physical cores].
    #[arg(short = 't', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Prompt tokens per step at most; the smaller of -b and -ub counts.
    #[arg(short = 'b', long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..))]
    pub batch_size: u32,
    /// Rows per step at most (short: -ub).
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub ubatch_size: u32,
    /// Layers on the GPU (short: -ngl). Accepted for the sake of habit: this build runs on the CPU.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub gpu_layers: Option<String>,
    /// Read the files into memory instead of mapping them (for files that may change).
    #[arg(long)]
    pub no_mmap: bool,
    /// Element type of cached keys and values.
    #[arg(long, value_name = "TYPE", value_enum, default_value = "f16")]
    pub kv_type: KvTypeArg,
    /// Say more on standard error: device, sizes, seed.
    #[arg(short = 'v', long)]
    pub verbose: bool,
}
