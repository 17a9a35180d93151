//! `lory synth`: random models and packs of real shape, for measuring where no real ones are at hand.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use lory_kernels::QuantType;
use lory_models::{
    adapter::{
        BaseInfo,
        pack::{SynthSpec, synth_pack},
    },
    synth::{self, FileType},
};
use lory_runtime::mapping::{Loading, open_gguf};

use crate::{
    compress::storage_type,
    failure::{Failure, Outcome},
    inputs::Inputs,
    output::Output,
    progress::bytes_bar,
    synth_adapters::Adapters,
};

/// Write a random model of a published shape, or random adapters for a model: files, or a pack.
#[derive(Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:
  lory synth model llama-1b --type Q4_0 -o synth.gguf
  lory synth adapters -m synth.gguf --n 200 -o adapters/
  lory synth pack -m synth.gguf --adapters 1000 -o pack.gguf"
)]
pub struct Synth {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Model(Model),
    Adapters(Adapters),
    Pack(Pack),
}

impl Synth {
    pub fn run(self) -> Outcome {
        match self.what {
            What::Model(model) => model.run(),
            What::Adapters(adapters) => adapters.run(),
            What::Pack(pack) => pack.run(),
        }
    }
}

/// A GGUF model with the keys, tensors and vocabulary size of a published one, and random weights.
#[derive(Args)]
#[command(after_help = after_help())]
struct Model {
    /// The shape.
    #[arg(value_name = "SHAPE")]
    shape: String,
    /// Format of the weights, as llama.cpp names file types: Q4_0, Q4_K_M, Q8_0, F16 …
    #[arg(long = "type", value_name = "TYPE", default_value = "Q4_0")]
    ty: String,
    /// The file to write.
    #[arg(short = 'o', long, value_name = "FILE")]
    output: PathBuf,
    /// The same seed gives the same file.
    #[arg(short = 's', long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

fn names<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.collect::<Vec<_>>().join(" ")
}

fn after_help() -> String {
    let shapes = names(synth::shapes().iter().map(|s| s.name));
    let types = names(FileType::all().map(|t| t.name()));
    format!(
        "Shapes: {shapes}\nTypes:  {types}\n\nExample:\n  lory synth model llama-1b --type Q4_0 -o synth.gguf"
    )
}

impl Model {
    fn run(self) -> Outcome {
        let Some(shape) = synth::shape(&self.shape) else {
            let known = names(synth::shapes().iter().map(|s| s.name));
            return Err(Failure::usage(format!("no shape `{}`; known: {known}", self.shape)));
        };
        let Some(ty) = FileType::from_name(&self.ty) else {
            let known = names(FileType::all().map(|t| t.name()));
            return Err(Failure::usage(format!("no type `{}`; known: {known}", self.ty)));
        };
        let out = Output::create(&self.output)?;
        let bar = bytes_bar(1);
        let written = synth::model(shape, ty, self.seed, out, |p| {
            bar.set_length(p.total);
            bar.set_position(p.done);
        });
        bar.finish_and_clear();
        written.map_err(|e| Output::failed(&self.output, &e))?.finish()
    }
}

/// A pack of random adapters for all projections of a model, named synth-00000, synth-00001 …
#[derive(Args)]
#[command(after_help = "Examples:
  lory synth pack -m model.gguf --adapters 1000 --rank 16 --clusters 4 -o pack.gguf
  lory synth pack -m model.gguf --adapters 8 --rank 16 --clusters 0 -o loras.gguf
  lory run -m model.gguf --pack pack.gguf --adapter synth-00007 -p Hello")]
struct Pack {
    /// The model that the adapters are for.
    #[arg(short = 'm', long, value_name = "FILE")]
    model: PathBuf,
    /// How many (also --n).
    #[arg(long, alias = "n", value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    adapters: u32,
    /// Rank of the shared bases.
    #[arg(long, value_name = "R", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    rank: u16,
    /// Number of bases; the adapters are spread evenly over them. 0: plain LoRAs, each with factors of its own.
    #[arg(long, value_name = "K", default_value_t = 1)]
    clusters: u16,
    /// One V for projections with the same input (q, k and v; gate and up), as `compress --share-v` makes it.
    #[arg(long)]
    share_v: bool,
    /// Diagonal cores (r numbers per projection) instead of full ones (r x r).
    #[arg(long)]
    diagonal: bool,
    /// Format of the bases.
    #[arg(long, value_name = "TYPE", default_value = "F16", value_parser = storage_type)]
    basis_type: QuantType,
    /// Format of the cores.
    #[arg(long, value_name = "TYPE", default_value = "F16", value_parser = storage_type)]
    core_type: QuantType,
    /// The file to write.
    #[arg(short = 'o', long, value_name = "PACK")]
    output: PathBuf,
    /// The same seed gives the same file.
    #[arg(short = 's', long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

impl Pack {
    fn run(self) -> Outcome {
        Inputs::default().model(&self.model).refuse("-o", &self.output)?;
        let base = BaseInfo::from_gguf(&open_gguf(&self.model, Loading::Map)?.gguf)?;
        let spec = SynthSpec {
            n_adapters: self.adapters as usize,
            clusters: self.clusters.into(),
            rank: self.rank.into(),
            diagonal: self.diagonal,
            share_v: self.share_v,
            basis_type: self.basis_type,
            core_type: self.core_type,
            seed: self.seed,
        };
        let mut out = Output::create(&self.output)?;
        let bar = bytes_bar(0);
        let written = synth_pack(&base, &spec, bar.wrap_write(&mut out)).map(drop);
        bar.finish_and_clear();
        written?;
        out.finish()
    }
}
