//! `lory chat`: a conversation in the terminal, or through a pipe.

mod adapters;
mod columns;
mod commands;
mod completion;
mod conversation;
pub mod format;
mod input;
mod talk;
mod transcript;

use std::{path::PathBuf, time::Instant};

use clap::Args;

use crate::{
    adapter_flags::AdapterFlags,
    demo::World,
    failure::{Failure, Outcome},
    grammar_flags::GrammarFlags,
    mix::Mix,
    model_flags::{EngineFlags, note},
    prompt::{PromptFlags, read_text},
    run::token_limit,
    sampling_flags::SamplingFlags,
    terminal::{ColorChoice, Style},
};
use conversation::{Conversation, OnSwitchArg};
use format::Format;
use input::Input;
use talk::Talk;

/// Tokens of an answer of the built-in demo: the base alone has no reason to end.
const DEMO_TOKENS: usize = 96;

/// Talk to a model, and switch its adapters while it talks.
#[derive(Args)]
#[command(mut_arg("temp", |temp| {
    temp.help("Temperature; 0 always takes the most likely token [default: 0.8; 0 with the built-in demo]")
}))]
#[command(after_help = "Examples:
  lory chat                                                  a small model and its skills, built in
  lory chat -m model.gguf
  lory chat -m model.gguf -sys 'You answer in rhymes.'
  lory chat -m model.gguf --lora poet.gguf --lora-scaled chef.gguf:0.5
  lory chat -m model.gguf --pack styles.gguf --adapter poet
  lory chat -m model.gguf -p 'Why is the sky blue?' -st      one answer, then end
  printf 'Hello\\n/poet\\nHello\\n' | lory chat -m model.gguf --pack styles.gguf

In the conversation, /help lists the commands. Ctrl+C stops an answer or drops what is typed, and
twice at the prompt it ends the program; Ctrl+D ends it, too. Through a pipe, Ctrl+C ends the
program at any time, and the exit code is 1 if any line failed.")]
pub struct Chat {
    /// The model, a GGUF file (of a sharded one, any shard) [default: the built-in demo, see lory demo --help].
    #[arg(short = 'm', long, value_name = "FILE", help_heading = "Model")]
    model: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineFlags,
    #[command(flatten)]
    first: PromptFlags,
    /// The system message (short: -sys).
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    /// A file with the system message (short: -sysf).
    #[arg(long, value_name = "FILE", conflicts_with = "system")]
    system_file: Option<PathBuf>,
    /// One answer, then end (short: -st).
    #[arg(long)]
    single_turn: bool,
    /// Tokens of an answer at most; -1 goes on until the model ends or the context is full [default: -1; 96 with the
    /// built-in demo].
    #[arg(short = 'n', long, value_name = "N", allow_negative_numbers = true)]
    n_predict: Option<i64>,
    /// A chat template (Jinja) in place of the model's.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// What happens to what was read so far when the adapters change.
    #[arg(long, value_enum, default_value = "recompute")]
    on_switch: OnSwitchArg,
    /// Colours: on, off or auto (NO_COLOR is respected).
    #[arg(long, value_name = "WHEN", num_args = 0..=1, default_value = "auto", default_missing_value = "on")]
    color: ColorChoice,
    #[command(flatten)]
    adapters: AdapterFlags,
    #[command(flatten)]
    sampling: SamplingFlags,
    #[command(flatten)]
    grammar: GrammarFlags,
}

impl Chat {
    pub fn run(self) -> Outcome {
        let built_in = self.model.is_none();
        let limit = if built_in { DEMO_TOKENS } else { usize::MAX };
        let mut style = conversation::Style {
            // A skill's answer is right or wrong; other tokens than the likeliest only make it wrong.
            sampler: if built_in { self.sampling.options_at(0.0)? } else { self.sampling.options()? },
            grammar: None,
            stop: self.sampling.reverse_prompt.clone(),
            ignore_eos: self.sampling.ignore_eos,
            max_new_tokens: self.n_predict.map_or(Ok(limit), token_limit)?,
            on_switch: self.on_switch,
        };
        self.adapters.check(built_in)?;
        let grammar = self.grammar.given()?;
        let first = self.first.prompt()?;
        if self.single_turn && first.as_ref().is_some_and(|text| text.trim().is_empty()) {
            return Err(Failure::usage("the message is empty; give -p or -f a text"));
        }
        let system = match &self.system_file {
            Some(path) => Some(read_text(path)?),
            None => self.system.clone(),
        };
        let opened = Instant::now();
        let (engine, world) = match &self.model {
            Some(path) => (self.engine.open(path)?, None),
            None => {
                let (engine, world) = World::open(&self.engine)?;
                (engine, Some(world))
            }
        };
        let format = Format::choose(&engine, self.chat_template.as_deref())?;
        let mix = Mix::load(&self.adapters, &engine)?;
        style.grammar = grammar.map(|g| g.compile(&engine)).transpose()?;
        if self.engine.verbose {
            let name = self.model.as_ref().map_or("built in".into(), |m| m.display().to_string());
            self.engine.describe(&name, &engine, opened.elapsed(), style.sampler.seed);
        }
        if matches!(format, Format::Plain) {
            note("the model has no chat template: it continues your text as it is");
        }
        let conversation = Conversation::new(&engine, format, style, mix, system)?;
        let families = world.as_ref().map_or_else(Vec::new, World::families);
        let input = Input::open(&engine, families, Style::stdout(self.color))?;
        let mut talk =
            Talk::new(engine, world, conversation, input, Style::stderr(self.color), self.single_turn);
        talk.hold(first)
    }
}
