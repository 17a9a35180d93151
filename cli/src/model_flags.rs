//! The model and how it is run: flags shared by every command that computes.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, ValueEnum};
use lory_kernels::{DeviceChoice, backend::KvType};
use lory_runtime::{Engine, EngineOptions, Error, GpuLayers, Repacking, mapping::Loading};

use crate::{
    failure::{Failure, Outcome},
    terminal::bytes,
    thread_flags::ThreadFlags,
};

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

impl KvTypeArg {
    /// As the backend names it.
    pub fn kv_type(self) -> KvType {
        match self {
            KvTypeArg::F32 => KvType::F32,
            KvTypeArg::F16 => KvType::F16,
            KvTypeArg::Q8_0 => KvType::Q8_0,
        }
    }
}

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceArg {
    /// What is known to work best here: the processor.
    Auto,
    /// The processor.
    #[value(aliases = ["none", "CPU"])]
    Cpu,
    /// The first NVIDIA GPU (not yet verified on hardware); an error where there is none.
    #[value(aliases = ["cuda0", "CUDA0", "CUDA"])]
    Cuda,
}

impl DeviceArg {
    /// As the engine names it.
    pub fn choice(self) -> DeviceChoice {
        match self {
            DeviceArg::Auto => DeviceChoice::Auto,
            DeviceArg::Cpu => DeviceChoice::Cpu,
            DeviceArg::Cuda => DeviceChoice::Cuda(0),
        }
    }
}

/// A number of layers; negative ones mean auto, as elsewhere.
pub fn gpu_layers(text: &str) -> Result<GpuLayers, String> {
    match text {
        "auto" => Ok(GpuLayers::Fit),
        "all" => Ok(GpuLayers::Last(usize::MAX)),
        n => match n.parse::<i64>() {
            Ok(..0) => Ok(GpuLayers::Fit),
            Ok(n) => Ok(GpuLayers::Last(usize::try_from(n).unwrap_or(usize::MAX))),
            Err(_) => Err("a number of layers, auto or all".into()),
        },
    }
}

/// Bytes of so many MiB.
fn mebibytes(n: u32) -> usize {
    usize::try_from(u64::from(n) << 20).unwrap_or(usize::MAX)
}

/// Whether weights are repacked.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum RepackArg {
    /// If there is memory to spare.
    Auto,
    /// Always.
    #[value(alias = "1")]
    On,
    /// Never: weights are used where they are mapped.
    #[value(alias = "0")]
    Off,
}

impl RepackArg {
    /// As the engine names it.
    pub fn repacking(self) -> Repacking {
        match self {
            RepackArg::Auto => Repacking::Auto,
            RepackArg::On => Repacking::On,
            RepackArg::Off => Repacking::Off,
        }
    }
}

/// `-m` and what belongs to it.
#[derive(Args, Debug)]
#[command(next_help_heading = "Model")]
pub struct ModelFlags {
    /// The model, a GGUF file (of a sharded one, any shard).
    #[arg(short = 'm', long, value_name = "FILE")]
    pub model: PathBuf,
    /// How it is run.
    #[command(flatten)]
    pub engine: EngineFlags,
}

impl ModelFlags {
    /// Opens the model.
    pub fn open(&self) -> Outcome<Engine> {
        self.engine.open(&self.model)
    }

    /// What `-v` tells, on standard error.
    pub fn describe(&self, engine: &Engine, opened_in: Duration, seed: Option<u64>) {
        self.engine.describe(&self.model.display().to_string(), engine, opened_in, seed);
    }
}

/// How a model is run, whichever it is.
#[derive(Args, Debug)]
#[command(next_help_heading = "Model")]
pub struct EngineFlags {
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
    /// Where to compute; `cuda` has not been verified on hardware yet.
    #[arg(long, value_name = "DEVICE", value_enum, default_value = "auto")]
    pub device: DeviceArg,
    /// Layers on the GPU with --device cuda (short: -ngl), the last ones; the output counts as one more. The processor has the others. auto:
    /// all that there is room for.
    #[arg(long, alias = "n-gpu-layers", value_name = "N|auto|all", default_value = "auto", allow_negative_numbers = true, value_parser = gpu_layers)]
    pub gpu_layers: GpuLayers,
    /// MiB that adapters may have on the GPU with --device cuda [default: what the model leaves, all but 1/32 of its memory]. With less than is needed at a
    /// time they are copied again and again: slower, with the same answers.
    #[arg(long, value_name = "MIB")]
    pub device_adapter_mib: Option<u32>,
    /// Read the files into memory instead of mapping them (for files that may change).
    #[arg(long)]
    pub no_mmap: bool,
    /// Copy the weights into an order that is faster to read, for their size in memory again: answers are the same, tokens come
    /// sooner. auto does it where the system has three times that available.
    #[arg(long, value_name = "WHEN", value_enum, default_value = "off")]
    pub repack: RepackArg,
    /// Element type of cached keys and values (also --cache-type-k, -ctk).
    #[arg(long, alias = "cache-type-k", value_name = "TYPE", value_enum, default_value = "f16")]
    pub kv_type: KvTypeArg,
    /// Say more on standard error: device, sizes, seed.
    #[arg(short = 'v', long)]
    pub verbose: bool,
    /// Where threads run.
    #[command(flatten)]
    pub placed: ThreadFlags,
}

impl EngineFlags {
    /// Opens the model in a file.
    pub fn open(&self, model: &Path) -> Outcome<Engine> {
        self.engine(|options| Engine::open(model, options))
    }

    /// Has an engine opened with these options; a context that is too long is the user's mistake.
    pub fn engine(&self, open: impl FnOnce(&EngineOptions) -> Result<Engine, Error>) -> Outcome<Engine> {
        if self.device != DeviceArg::Cuda {
            let given = [
                ("-ngl", matches!(self.gpu_layers, GpuLayers::Last(1..))),
                ("--device-adapter-mib", self.device_adapter_mib.is_some()),
            ];
            for (flag, _) in given.into_iter().filter(|(_, given)| *given) {
                note(&format!("{flag} has no effect without --device cuda"));
            }
        }
        let (threads, thread_options) = self.placed.settle(self.threads)?;
        let options = EngineOptions {
            device: self.device.choice(),
            gpu_layers: self.gpu_layers,
            threads: Some(threads),
            thread_options,
            n_ctx: self.ctx_size.filter(|n| *n > 0),
            n_batch: self.batch_size.min(self.ubatch_size) as usize,
            kv_type: self.kv_type.kv_type(),
            device_adapter_bytes: self.device_adapter_mib.map(mebibytes),
            loading: if self.no_mmap { Loading::Read } else { Loading::Map },
            repacking: self.repack.repacking(),
            ..EngineOptions::default()
        };
        open(&options).map_err(|e| match (e, self.ctx_size) {
            (e @ Error::ContextTooLong { .. }, Some(n)) => Failure::usage(format!("-c {n}: {e}")),
            (e, _) => e.into(),
        })
    }

    /// What `-v` tells about an engine on the model of this name, on standard error.
    pub fn describe(&self, model: &str, engine: &Engine, opened_in: Duration, seed: Option<u64>) {
        let size: usize = engine.model().gguf.tensors().map(|t| t.byte_range().len()).sum();
        note(&format!("model   {model} ({} of weights)", bytes(size as u64)));
        note(&format!("device  {}", engine.device()));
        if engine.repacked_bytes() > 0 {
            note(&format!("repacked {} of weights", bytes(engine.repacked_bytes() as u64)));
        }
        note(&format!("context {} tokens", engine.n_ctx()));
        note(&format!("opened  in {:.0} ms", opened_in.as_secs_f64() * 1e3));
        let names = engine.adapters().names().len();
        note(&format!("adapters {names}"));
        if let Some(seed) = seed {
            note(&format!("seed    {seed}"));
        }
    }
}

/// A remark on standard error; whoever closed it does not want to know.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}
