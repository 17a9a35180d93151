//! `lory synth adapters`: collections that look trained, for measuring without downloads.

use std::{fs, path::PathBuf};

use clap::{Args, ValueEnum};
use lory_compress::{Error, Kind, Synthetic};
use lory_models::adapter::BaseInfo;
use lory_runtime::mapping::{Loading, open_gguf};

use crate::{
    compress::in_pool,
    failure::{Failure, Outcome},
    output::make_folder,
};

/// GGUF LoRA files for every projection of a base: families of adapters with noise, norms up to eightfold.
#[derive(Args)]
#[command(after_help = "Example:
  lory synth adapters -m model.gguf --n 200 --rank 16 --kind shared -o adapters/")]
pub struct Adapters {
    /// The base model.
    #[arg(short = 'm', long, value_name = "FILE")]
    model: PathBuf,
    /// How many (also --adapters).
    #[arg(long, alias = "adapters", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    n: u32,
    /// Rank of each.
    #[arg(long, value_name = "R", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    rank: u16,
    /// Whether all begin at one random A, or each at its own, which is harder to compress.
    #[arg(long, value_enum, default_value = "shared")]
    kind: KindArg,
    /// The folder to write them into.
    #[arg(short = 'o', long, value_name = "DIR")]
    output: PathBuf,
    /// The same seed gives the same files.
    #[arg(short = 's', long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum KindArg {
    Shared,
    Independent,
}

impl Adapters {
    pub fn run(self) -> Outcome {
        let kind = match self.kind {
            KindArg::Shared => Kind::Shared,
            KindArg::Independent => Kind::Independent,
        };
        let synthetic = Synthetic::new(self.n as usize, usize::from(self.rank), kind, self.seed);
        make_folder(&self.output)?;
        // Fewer than before would stand among the old ones.
        let mut entries = fs::read_dir(&self.output).into_iter().flatten().flatten();
        if let Some(old) = entries.find(|e| e.path().extension().is_some_and(|x| x == "gguf")) {
            let message = format!("{}: is there already; name another folder", old.path().display());
            return Err(Failure::runtime(message));
        }
        in_pool(0, |bar, cancel| {
            let open = open_gguf(&self.model, Loading::Map).map_err(|e| Error::Request(e.to_string()))?;
            let base = BaseInfo::from_gguf(&open.gguf)?;
            synthetic.write(&base, &self.output, bar, cancel)
        })?;
        Ok(())
    }
}
