//! The `lory` program: conversations, one-shot runs and inspection from the command line.
//!
//! One file per subcommand, each with its arguments and a `run` that returns a [`failure::Failure`] for
//! `main` to print. Standard output carries results only; everything else goes to standard error.

mod adapter_flags;
mod answer;
mod args;
mod bench;
mod chat;
mod compress;
#[cfg(feature = "demo")]
mod demo;
#[cfg(not(feature = "demo"))]
#[path = "demo/absent.rs"]
mod demo;
mod failure;
mod grammar_flags;
mod inputs;
mod inspect;
mod interrupt;
mod logits;
mod mix;
mod model_flags;
mod output;
mod pack;
mod progress;
mod prompt;
mod run;
mod sampling_flags;
mod speed;
mod switching;
mod synth;
mod synth_adapters;
mod terminal;
mod thread_flags;
mod tokenize;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use failure::Outcome;

/// Runs language models (GGUF files) with adapters (LoRA) that are switched while they talk.
#[derive(Parser)]
#[command(
    name = "lory",
    version,
    // As in llama.cpp, so that a script's flags can be changed behind them.
    args_override_self = true,
    max_term_width = 100,
    arg_required_else_help = true,
    after_help = "Examples:
  lory chat                                            talk to the built-in model and its skills
  lory demo                                            a tour of what adapters do
  lory chat -m model.gguf                              talk to a model of your own
  lory chat -m model.gguf --lora poet.gguf --lora-scaled chef.gguf:0.5
  lory chat -m model.gguf --pack styles.gguf --adapter poet
  lory run -m model.gguf -p 'Once upon a time' -n 64   one text to standard output
  lory inspect model.gguf                              what is in a file
  lory compress -m model.gguf -o styles.gguf adapters/ adapters become one pack
  lory bench -m model.gguf                             how fast

Each command explains itself: lory chat --help, or lory help chat
Exit codes: 0 done, 1 error at run time, 2 wrong usage, 130 interrupted."
)]
struct Lory {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Chat(Box<chat::Chat>),
    #[cfg(feature = "demo")]
    Demo(demo::Demo),
    Run(Box<run::Run>),
    Inspect(inspect::Inspect),
    Tokenize(tokenize::Tokenize),
    Logits(Box<logits::Logits>),
    Synth(synth::Synth),
    Compress(compress::Compress),
    Pack(pack::Pack),
    Bench(Box<bench::Bench>),
}

impl Command {
    fn run(self) -> Outcome {
        match self {
            Command::Chat(c) => c.run(),
            #[cfg(feature = "demo")]
            Command::Demo(c) => c.run(),
            Command::Run(c) => c.run(),
            Command::Inspect(c) => c.run(),
            Command::Tokenize(c) => c.run(),
            Command::Logits(c) => c.run(),
            Command::Synth(c) => c.run(),
            Command::Compress(c) => c.run(),
            Command::Pack(c) => c.run(),
            Command::Bench(c) => c.run(),
        }
    }
}

fn main() -> ExitCode {
    let args = args::expand(std::env::args_os());
    let lory = match Lory::try_parse_from(&args) {
        Ok(lory) => lory,
        Err(e) => return failure::from_clap(e, &args).report(),
    };
    match interrupt::install().and_then(|()| lory.command.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
