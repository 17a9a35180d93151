//! A model under test, and what rows say of it.

use std::{path::PathBuf, time::Instant};

use lory_kernels::ceilings::Ceilings;
use lory_models::{cost::Cost, synth::FileType};
use lory_runtime::{EngineOptions, LoadedModel, OpenOptions, Repacking, mapping::Loading};
use serde_json::{Map, Value, json};

use crate::{failure::Outcome, model_flags::note};

use super::{Run, Settings, table::Cell, timing};

/// A file, and how it is opened.
#[derive(Clone)]
pub struct Model {
    /// Where it is.
    pub path: PathBuf,
    /// Mapped or read.
    pub loading: Loading,
}

/// An opened model.
pub struct Opened {
    /// What was opened.
    pub model: Model,
    /// What it became.
    pub loaded: LoadedModel,
    kind: String,
    bytes: u64,
    parameters: u64,
}

impl Opened {
    /// Opens a model for sequences of `n_ctx` tokens.
    pub fn open(model: &Model, settings: &Settings, n_ctx: usize) -> Outcome<Opened> {
        let n_ctx = u32::try_from(n_ctx.max(1)).unwrap_or(u32::MAX);
        let options = OpenOptions { n_ctx: Some(n_ctx), loading: model.loading };
        let start = Instant::now();
        let loaded = LoadedModel::open(&model.path, &options)?;
        let opened_in = start.elapsed();
        let metadata = loaded.gguf.metadata();
        let arch = metadata.str("general.architecture")?;
        let file_type = metadata.opt_u32("general.file_type")?;
        let file_type = FileType::all().find(|t| Some(t.id()) == file_type).map_or("unknown", FileType::name);
        let parameters: u64 = loaded.gguf.tensors().map(|t| t.elements() as u64).sum();
        let bytes = loaded.gguf.tensors().map(|t| t.byte_range().len() as u64).sum();
        if settings.verbose {
            let (file, size) = (model.path.display(), gibibytes(bytes));
            note(&format!(
                "model    {file} ({size} of weights), opened in {:.0} ms",
                opened_in.as_secs_f64() * 1e3
            ));
        }
        Ok(Opened {
            model: model.clone(),
            kind: format!("{arch} {} {file_type}", billions(parameters).replace(' ', "")),
            bytes,
            parameters,
            loaded,
        })
    }

    /// Tokens of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.loaded.decoder.vocab_size()
    }

    /// What it makes the machine do in a run.
    pub fn cost(&self, run: Run) -> Cost {
        let cost = Cost::of(&self.loaded.decoder, run.kv_type);
        if run.embeddings { cost.without_output() } else { cost }
    }

    /// An engine like a run, as far as the run says.
    pub fn engine_options(&self, run: Run, settings: &Settings) -> EngineOptions {
        EngineOptions {
            device: run.device,
            gpu_layers: run.gpu_layers,
            threads: Some(run.threads),
            thread_options: run.thread_options,
            kv_type: run.kv_type,
            loading: self.model.loading,
            repacking: settings.repacking,
            ..EngineOptions::default()
        }
    }

    /// What every row begins with; `device` is what computes, in words.
    pub fn fields(&self, device: &str, run: Run, settings: &Settings) -> Map<String, Value> {
        let kv_type = kv_type(run);
        let (cpu, gpu) = if run.on_gpu() { ("", device) } else { (device, "") };
        let fields = json!({
            "build_version": env!("CARGO_PKG_VERSION"),
            "cpu_info": cpu,
            "gpu_info": gpu,
            "backends": backend(run),
            "model_filename": self.model.path.to_string_lossy(),
            "model_type": self.kind,
            "model_size": self.bytes,
            "model_n_params": self.parameters,
            "n_batch": run.n_batch,
            "n_ubatch": run.n_ubatch,
            "n_threads": run.threads,
            "cpu_mask": run.wanted.mask.to_string(),
            "cpu_strict": run.wanted.strict,
            "poll": run.wanted.poll,
            "type_k": kv_type,
            "type_v": kv_type,
            "n_gpu_layers": run.n_gpu_layers(),
            "use_mmap": self.model.loading == Loading::Map,
            "embeddings": run.embeddings,
            "repack": repacking(settings),
            "test_time": timing::now(),
        });
        match fields {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }

    /// The same for people.
    pub fn cells(&self, run: Run, settings: &Settings) -> Vec<Cell> {
        let mut cells = vec![
            Cell::new("model", self.kind.clone(), 22),
            Cell::new("size", gibibytes(self.bytes), 10),
            Cell::new("params", billions(self.parameters), 10),
            Cell::new("backend", backend(run), 8),
        ];
        let shown = &settings.shown;
        if shown.gpu {
            cells.push(Cell::new("ngl", run.n_gpu_layers().to_string(), 3));
        }
        cells.push(Cell::new("threads", run.threads.to_string(), 7));
        for (shown, cell) in [
            (shown.mask, Cell::new("cpu_mask", run.wanted.mask.to_string(), 10)),
            (shown.strict, Cell::new("cpu_strict", u8::from(run.wanted.strict).to_string(), 10)),
            (shown.poll, Cell::new("poll", run.wanted.poll.to_string(), 4)),
            (shown.kv_type, Cell::new("type_k/v", kv_type(run), 8)),
            (shown.mmap, Cell::new("mmap", u8::from(self.model.loading == Loading::Map).to_string(), 4)),
            (shown.embeddings, Cell::new("embd", u8::from(run.embeddings).to_string(), 4)),
        ] {
            if shown {
                cells.push(cell);
            }
        }
        if settings.repacking != Repacking::Off {
            cells.push(Cell::new("repack", repacking(settings), 6));
        }
        cells
    }
}

/// As `-ctk` has it.
fn kv_type(run: Run) -> String {
    format!("{:?}", run.kv_type).to_lowercase()
}

/// As llama.cpp names it.
fn backend(run: Run) -> &'static str {
    if run.on_gpu() { "CUDA" } else { "CPU" }
}

/// As `--repack` has it.
fn repacking(settings: &Settings) -> String {
    format!("{:?}", settings.repacking).to_lowercase()
}

fn billions(n: u64) -> String {
    match n {
        1_000_000_000.. => format!("{:.2} B", n as f64 / 1e9),
        _ => format!("{:.2} M", n as f64 / 1e6),
    }
}

fn gibibytes(n: u64) -> String {
    match n {
        0x4000_0000.. => format!("{:.2} GiB", n as f64 / f64::from(1 << 30)),
        _ => format!("{:.2} MiB", n as f64 / f64::from(1 << 20)),
    }
}

/// Bytes and operations per second, and their shares of the ceilings.
pub struct Reached {
    gb: f64,
    gop: f64,
    of_read: f64,
    of_peak: f64,
}

impl Reached {
    /// `bytes` and `ops` in `seconds`.
    pub fn new(cost: &Cost, ceilings: &Ceilings, bytes: f64, ops: f64, seconds: f64) -> Reached {
        let (gb, gop) = (bytes / seconds / 1e9, ops / seconds / 1e9);
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        Reached { gb, gop, of_read: share(gb, ceilings.read), of_peak: share(gop, ceilings.of(cost.ty)) }
    }

    /// For programs.
    pub fn fields(&self, fields: &mut Map<String, Value>) {
        for (name, value) in [
            ("gb_per_s", self.gb),
            ("share_of_read", self.of_read),
            ("gop_per_s", self.gop),
            ("share_of_peak", self.of_peak),
        ] {
            fields.insert(name.into(), json!(value));
        }
    }

    /// For people; a share of a ceiling that was not measured is a dash.
    pub fn cells(&self) -> [Cell; 4] {
        let percent = |share: f64| if share > 0.0 { format!("{:.0} %", 100.0 * share) } else { "-".into() };
        [
            Cell::new("GB/s", format!("{:.1}", self.gb), 6),
            Cell::new("of read", percent(self.of_read), 7),
            Cell::new("Gop/s", format!("{:.0}", self.gop), 6),
            Cell::new("of peak", percent(self.of_peak), 7),
        ]
    }
}
