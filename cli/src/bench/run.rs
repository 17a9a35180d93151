//! Combinations of flags other than the tests' own: on what, with which threads, how many rows at a time.

use clap::Args;
use lory_kernels::{
    Device, DeviceChoice,
    backend::KvType,
    cpu::{CpuMask, ThreadOptions},
};
use lory_runtime::{Bare, GpuLayers, mapping::Loading};

use crate::{
    failure::{Failure, Outcome},
    model_flags::{DeviceArg, KvTypeArg},
    thread_flags::{ProcessFlags, Wanted, default_threads, settle},
};

use super::{
    opened::Model,
    ranges::{Layers, Numbers},
};

/// Lists of which every combination is run.
#[derive(Args)]
pub struct RunFlags {
    /// Prompt tokens per step at most; the smaller of -b and -ub counts.
    #[arg(short = 'b', long, value_name = "N,…", default_value = "2048")]
    batch_size: Vec<Numbers>,
    /// Rows per step at most (short: -ub).
    #[arg(long, value_name = "N,…", default_value = "512")]
    ubatch_size: Vec<Numbers>,
    /// Threads [default: the physical cores].
    #[arg(short = 't', long, value_name = "N,…")]
    threads: Vec<Numbers>,
    /// Where to compute; `cuda` has not been verified on hardware yet (short: -dev).
    #[arg(long, value_name = "DEVICE", value_enum, default_value = "auto")]
    device: DeviceArg,
    /// Layers on the GPU (short: -ngl), the last ones; the output counts as one more. Any number but 0 needs one, also without --device
    /// cuda; auto is all that there is room for, if --device cuda says so.
    #[arg(
        long,
        value_name = "N,…|auto|all",
        default_value = "auto",
        alias = "n-gpu-layers",
        allow_negative_numbers = true
    )]
    gpu_layers: Vec<Layers>,
    /// 1: embeddings instead of logits, without the output matrix (short: -embd).
    #[arg(long, value_name = "0|1,…", default_value = "0")]
    embeddings: Vec<Numbers>,
    /// Processors to run on, in hexadecimal: 0x5 is numbers 0 and 2 [default: all].
    #[arg(short = 'C', long, value_name = "HEX,…", value_delimiter = ',', help_heading = "Threads")]
    cpu_mask: Vec<CpuMask>,
    /// 1: each thread stays on one of them.
    #[arg(long, value_name = "0|1,…", default_value = "0", help_heading = "Threads")]
    cpu_strict: Vec<Numbers>,
    /// How long an idle thread polls before it sleeps, 0 to 100: 50 is 80 µs, 0 is not at all.
    #[arg(long, value_name = "N,…", default_value = "50", help_heading = "Threads")]
    poll: Vec<Numbers>,
    #[command(flatten)]
    process: ProcessFlags,
    /// Element type of cached keys (short: -ctk; also --kv-type); values have the same.
    #[arg(
        long,
        alias = "kv-type",
        value_name = "TYPE,…",
        value_enum,
        default_value = "f16",
        value_delimiter = ','
    )]
    cache_type_k: Vec<KvTypeArg>,
    /// Element type of cached values (short: -ctv) [default: that of keys].
    #[arg(long, value_name = "TYPE,…", value_enum, value_delimiter = ',')]
    cache_type_v: Vec<KvTypeArg>,
}

/// One combination.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where.
    pub device: DeviceChoice,
    /// How many layers, on a GPU.
    pub gpu_layers: GpuLayers,
    /// Threads of the processor.
    pub threads: usize,
    /// What was asked of them.
    pub wanted: Wanted,
    /// What that comes to.
    pub thread_options: ThreadOptions,
    /// `-b`.
    pub n_batch: usize,
    /// `-ub`.
    pub n_ubatch: usize,
    /// Whether it ends before the output matrix.
    pub embeddings: bool,
    /// Of cached keys and values.
    pub kv_type: KvType,
}

impl Run {
    /// Rows of a step at most.
    pub fn rows(self) -> usize {
        self.n_batch.min(self.n_ubatch)
    }

    /// Whether a GPU has a part in it.
    pub fn on_gpu(self) -> bool {
        matches!(self.device, DeviceChoice::Cuda(_))
    }

    /// Layers on the GPU; -1 is auto and -2 all, as llama.cpp numbers them.
    pub fn n_gpu_layers(self) -> i64 {
        match self.gpu_layers {
            _ if !self.on_gpu() => 0,
            GpuLayers::Fit => -1,
            GpuLayers::Last(usize::MAX) => -2,
            GpuLayers::Last(n) => i64::try_from(n).unwrap_or(i64::MAX),
        }
    }

    /// Whether another run computes in the same place.
    pub fn shares_a_device_with(self, other: Run) -> bool {
        let place = |run: Run| (run.device, run.gpu_layers, run.threads, run.thread_options, run.kv_type);
        place(self) == place(other)
    }

    /// Puts the calling thread where the first of its threads belongs.
    pub fn settle(self) -> Outcome {
        settle(&self.thread_options)
    }

    /// Appends tokens to sequences, and computes what is wanted after the last of each.
    pub fn append(self, bare: &mut Bare<'_, Device>, work: &[(usize, &[u32])]) -> Outcome {
        if self.embeddings {
            bare.embed(work)?;
        } else {
            bare.run(work)?;
        }
        Ok(())
    }
}

/// Every value of a flag.
pub fn all(flags: &[Numbers]) -> Vec<usize> {
    flags.iter().flat_map(|n| n.0.iter().copied()).collect()
}

/// The same, or what holds without the flag.
pub fn or(flags: &[Numbers], default: &[usize]) -> Vec<usize> {
    if flags.is_empty() { default.to_vec() } else { all(flags) }
}

/// A flag of zeros and ones.
fn switches(flag: &str, values: &[Numbers]) -> Outcome<Vec<bool>> {
    let switch = |n: usize| match n {
        0 | 1 => Ok(n == 1),
        n => Err(Failure::usage(format!("{flag} {n}: expected 0 or 1"))),
    };
    all(values).into_iter().map(switch).collect()
}

impl RunFlags {
    /// All combinations, in a program with the priority that was asked for.
    pub fn runs(&self) -> Outcome<Vec<Run>> {
        self.process.prioritize()?;
        let (threads, kv_types) = (self.all_threads()?, self.kv_types()?);
        let mut runs = Vec::new();
        for gpu_layers in self.gpu_layers.iter().flat_map(|layers| layers.0.iter().copied()) {
            let device = self.choice(gpu_layers)?;
            for (threads, wanted, thread_options) in threads.iter().copied() {
                for n_batch in all(&self.batch_size) {
                    for n_ubatch in all(&self.ubatch_size) {
                        if !(1..=1 << 16).contains(&n_batch.min(n_ubatch)) {
                            return Err(Failure::usage(format!(
                                "-b {n_batch} -ub {n_ubatch}: expected 1 to 65536"
                            )));
                        }
                        for embeddings in switches("-embd", &self.embeddings)? {
                            runs.extend(kv_types.iter().map(|kv_type| Run {
                                device,
                                gpu_layers,
                                threads,
                                wanted,
                                thread_options,
                                n_batch,
                                n_ubatch,
                                embeddings,
                                kv_type: *kv_type,
                            }));
                        }
                    }
                }
            }
        }
        Ok(runs)
    }

    /// Those of keys, which values must have as well.
    fn kv_types(&self) -> Outcome<Vec<KvType>> {
        let keys: Vec<KvType> = self.cache_type_k.iter().map(|k| k.kv_type()).collect();
        let values = self.cache_type_v.iter().map(|v| v.kv_type());
        if values.flat_map(|v| keys.iter().map(move |k| v != *k)).any(|differ| differ) {
            let message =
                "-ctk and -ctv differ: keys and values have the same type here, that of -ctk without -ctv";
            return Err(Failure::usage(message));
        }
        Ok(keys)
    }

    /// Numbers of threads, and what is asked of them.
    fn all_threads(&self) -> Outcome<Vec<(usize, Wanted, ThreadOptions)>> {
        let masks = match &self.cpu_mask[..] {
            [] => &[CpuMask::default()],
            given => given,
        };
        let mut all_threads = Vec::new();
        for mask in masks.iter().copied() {
            for strict in switches("--cpu-strict", &self.cpu_strict)? {
                for poll in all(&self.poll) {
                    let wanted = Wanted { mask, strict, poll };
                    let options = wanted.options(self.process.numa)?;
                    for threads in or(&self.threads, &[default_threads(&options)]) {
                        if !(1..=1024).contains(&threads) {
                            return Err(Failure::usage(format!("-t {threads}: expected 1 to 1024")));
                        }
                        all_threads.push((threads, wanted, options));
                    }
                }
            }
        }
        // Where one run binds this thread, the next one has to say where it may go then.
        if all_threads.iter().any(|(_, _, options)| !options.cpus.is_empty())
            && let Ok(everywhere) = CpuMask::of_this_thread()
        {
            let free = all_threads.iter_mut().filter(|(_, _, options)| options.cpus.is_empty());
            free.for_each(|(_, _, options)| options.cpus = everywhere);
        }
        Ok(all_threads)
    }

    /// What computes with so many layers on the GPU.
    fn choice(&self, layers: GpuLayers) -> Outcome<DeviceChoice> {
        match (self.device, layers) {
            (_, GpuLayers::Last(0)) => Ok(DeviceChoice::Cpu),
            (DeviceArg::Cpu, GpuLayers::Last(_)) => {
                Err(Failure::usage("-ngl: --device cpu has no layers on the GPU"))
            }
            (DeviceArg::Auto, GpuLayers::Last(_)) => Ok(DeviceArg::Cuda.choice()),
            (device, _) => Ok(device.choice()),
        }
    }
}

/// What runs differ in or ask for, and people therefore see.
#[derive(Clone, Copy)]
pub struct Shown {
    /// Layers on a GPU.
    pub gpu: bool,
    /// Rows at a time.
    pub rows: bool,
    /// Processors.
    pub mask: bool,
    /// One for each thread.
    pub strict: bool,
    /// Polling.
    pub poll: bool,
    /// Embeddings.
    pub embeddings: bool,
    /// The type of the cache.
    pub kv_type: bool,
    /// Whether files are mapped.
    pub mmap: bool,
}

impl Shown {
    /// Of these runs on these models.
    pub fn of(runs: &[Run], models: &[Model]) -> Shown {
        let any = |told: fn(&Run) -> bool| runs.iter().any(told);
        Shown {
            gpu: any(|run| run.on_gpu()),
            rows: any(|run| run.n_batch != 2048 || run.n_ubatch != 512),
            mask: any(|run| !run.wanted.mask.is_empty()),
            strict: any(|run| run.wanted.strict),
            poll: any(|run| run.wanted.poll != 50),
            embeddings: any(|run| run.embeddings),
            kv_type: any(|run| run.kv_type != KvType::F16),
            mmap: models.iter().any(|model| model.loading != Loading::Map),
        }
    }
}
