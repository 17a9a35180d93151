//! `lory demo`: the built-in base with its skills, shown, measured again, or written to files.

mod batch;
mod check;
mod interval;
mod skills;
mod sources;
mod table;
mod tour;
mod world;

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use clap::Args;
use lory_demo::{BASE, PACK};

use crate::{
    failure::Outcome,
    model_flags::note,
    output::{Output, make_folder},
    terminal::ColorChoice,
};

pub use world::World;

/// See what Lory does: one small base model with many skills, each an adapter of a few KiB, all built in.
///
/// Without a flag it is a tour of about half a minute. `lory chat` talks to the same model.
#[derive(Args)]
#[command(after_help = "Examples:
  lory demo                                  the tour
  lory demo --check                          every skill measured again, beside what was recorded
  lory demo --check --family ciphers --skill roman --samples 10
  lory demo --check --json > check.json
  lory demo --export demo/                   base and pack as files, for the other commands:
  lory run -m demo/base.gguf --pack demo/skills.gguf --adapter reverse --temp 0 -p 'hello<|sep|>'

  lory demo --check -m demo/base.gguf --pack mine.gguf    another pack of the same skills

--check of what is built in ends with exit code 1 if the skills answer more than 2 points worse than was recorded.")]
pub struct Demo {
    /// Measure how many answers of each skill are exactly right, and print it beside what was recorded.
    #[arg(long)]
    check: bool,
    /// With --check: one JSON object in place of the table.
    #[arg(long, requires = "check")]
    json: bool,
    /// With --check: only this family. Repeatable; with --skill, both.
    #[arg(long, value_name = "FAMILY", requires = "check")]
    family: Vec<String>,
    /// With --check: only this skill. Repeatable.
    #[arg(long, value_name = "NAME", requires = "check")]
    skill: Vec<String>,
    /// With --check: prompts of each skill at most [default: all that were recorded].
    #[arg(long, value_name = "N", requires = "check", value_parser = clap::value_parser!(u32).range(1..))]
    samples: Option<u32>,
    #[command(flatten)]
    sources: sources::Sources,
    /// With --check --json: list what was answered, too.
    #[arg(long, requires = "json")]
    answers: bool,
    /// Write the base and the pack into this folder instead.
    #[arg(long, value_name = "DIR", conflicts_with = "check")]
    export: Option<PathBuf>,
    /// Threads [default: the physical cores].
    #[arg(short = 't', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Colours: on, off or auto (NO_COLOR is respected).
    #[arg(long, value_name = "WHEN", num_args = 0..=1, default_value = "auto", default_missing_value = "on")]
    color: ColorChoice,
}

impl Demo {
    pub fn run(self) -> Outcome {
        let threads = self.threads.map(usize::from);
        if let Some(folder) = &self.export {
            return export(folder);
        }
        if self.check {
            let selection = check::Selection {
                families: self.family,
                names: self.skill,
                samples: self.samples.map_or(usize::MAX, |n| n as usize),
            };
            let output = match (self.json, self.answers) {
                (false, _) => check::Form::Table,
                (true, answers) => check::Form::Json { answers },
            };
            return check::run(&selection, &self.sources, threads, output);
        }
        tour::run(threads, self.color)
    }
}

fn export(folder: &Path) -> Outcome {
    make_folder(folder)?;
    for (name, content) in [("base.gguf", BASE), ("skills.gguf", PACK)] {
        let path = folder.join(name);
        let mut out = Output::create(&path)?;
        out.write_all(content).map_err(|e| Output::failed(&path, &e))?;
        out.finish()?;
        note(&format!("{} written", path.display()));
    }
    Ok(())
}
