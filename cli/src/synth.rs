//! `lory synth`: random models and packs of real shape, for measuring where no real ones are at hand.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use lory_models::synth::{self, FileType};

use crate::{
    failure::{Failure, Outcome},
    output::Output,
    synth_adapters::Adapters,
};

/// Write a random model of a published shape, or random adapters for a model.
#[derive(Args)]
#[command(arg_required_else_help = true)]
pub struct Synth {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Model(Model),
    Adapters(Adapters),
}

impl Synth {
    pub fn run(self) -> Outcome {
        match self.what {
            What::Model(model) => model.run(),
            What::Adapters(adapters) => adapters.run(),
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
    #[arg(long, value_name = "N", default_value_t = 1)]
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
        let bar = bytes_bar();
        let written = synth::model(shape, ty, self.seed, out, |p| {
            bar.set_length(p.total);
            bar.set_position(p.done);
        });
        bar.finish_and_clear();
        written.map_err(|e| Output::failed(&self.output, &e))?.finish()
    }
}

/// A bar for bytes on standard error; nothing where that is no terminal.
fn bytes_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {eta} left") {
        bar.set_style(style);
    }
    bar
}
