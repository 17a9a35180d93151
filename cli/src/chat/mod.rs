//! `lory chat`: a conversation in the terminal, or through a pipe.

mod columns;
mod commands;
mod completion;
mod conversation;
mod input;
mod transcript;

use std::{
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use clap::Args;
use lory_runtime::{Engine, FinishReason};

use crate::{
    adapter_flags::AdapterFlags,
    answer::Answer,
    failure::{Failure, Outcome, one_line},
    grammar_flags::GrammarFlags,
    mix::{self, Mix},
    model_flags::{ModelFlags, note},
    prompt::{PromptFlags, read_text},
    run::token_limit,
    sampling_flags::SamplingFlags,
    speed::{self, Costs},
    terminal::{ColorChoice, Style, bytes},
};
use commands::Command;
use conversation::{Conversation, Format, OnSwitchArg};
use input::{Entry, Input};
use transcript::Transcript;

/// Adapters listed at once; `/lora list NAME` narrows down.
const LISTED: usize = 50;

/// Talk to a model, and switch its adapters while it talks.
#[derive(Args)]
#[command(after_help = "Examples:
  lory chat -m model.gguf
  lory chat -m model.gguf -sys 'You answer in rhymes.'
  lory chat -m model.gguf --lora poet.gguf --lora-scaled chef.gguf:0.5
  lory chat -m model.gguf --pack styles.gguf --adapter poet
  lory chat -m model.gguf -p 'Why is the sky blue?' -st      one answer, then end
  printf 'Hello\\n/adapter poet\\nHello\\n' | lory chat -m model.gguf --pack styles.gguf

In the conversation, /help lists the commands. Ctrl+C stops an answer, at the prompt it ends
the program; Ctrl+D ends it, too.")]
pub struct Chat {
    #[command(flatten)]
    model: ModelFlags,
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
    /// Tokens of an answer at most; -1 goes on until the model ends or the context is full.
    #[arg(short = 'n', long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    n_predict: i64,
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
        let mut style = conversation::Style {
            sampler: self.sampling.options()?,
            grammar: None,
            stop: self.sampling.reverse_prompt.clone(),
            ignore_eos: self.sampling.ignore_eos,
            max_new_tokens: token_limit(self.n_predict)?,
            on_switch: self.on_switch,
        };
        self.adapters.lora_files()?;
        let grammar = self.grammar.given()?;
        let first = self.first.prompt()?;
        let system = match &self.system_file {
            Some(path) => Some(read_text(path)?),
            None => self.system.clone(),
        };
        let opened = Instant::now();
        let engine = self.model.open()?;
        let format = Format::choose(&engine, self.chat_template.as_deref())?;
        let mix = Mix::load(&self.adapters, &engine)?;
        style.grammar = grammar.map(|g| g.compile(&engine)).transpose()?;
        if self.model.verbose {
            self.model.describe(&engine, opened.elapsed(), style.sampler.seed);
        }
        if matches!(format, Format::Plain) {
            note("the model has no chat template: it continues your text as it is");
        }
        let conversation = Conversation::new(&engine, format, style, mix, system)?;
        let input = Input::open(&engine, Style::stdout(self.color))?;
        let style = Style::stderr(self.color);
        let mut talk = Talk { engine, conversation, input, style, costs: Costs::default() };
        talk.hold(first, self.single_turn)
    }
}

/// A conversation with its terminal.
struct Talk {
    engine: Engine,
    conversation: Conversation,
    input: Input,
    /// Of standard error.
    style: Style,
    costs: Costs,
}

impl Talk {
    fn hold(&mut self, first: Option<String>, single_turn: bool) -> Outcome {
        if self.input.is_terminal() && !single_turn {
            note(&self.style.dim("/help lists the commands, Ctrl+D ends"));
        }
        let mut first = first;
        loop {
            let text = match first.take() {
                Some(text) => text,
                None => match self.input.next()? {
                    Entry::Text(text) => text,
                    Entry::End => return Ok(()),
                    Entry::Interrupt => return Err(Failure::Interrupted),
                },
            };
            if text.trim().is_empty() {
                continue;
            }
            let done = match Command::parse(&text) {
                Some(Ok(Command::Exit)) => return Ok(()),
                Some(Ok(command)) => self.obey(command),
                Some(Err(advice)) => Err(Failure::runtime(advice)),
                None => self.say(&text),
            };
            match done {
                // One answer was asked for: its failure is the program's.
                Err(e) if single_turn => return Err(e),
                Ok(()) if single_turn && Command::parse(&text).is_none() => return Ok(()),
                Ok(()) => {}
                Err(Failure::Runtime(m) | Failure::Usage(m)) => note(&format!("error: {}", one_line(&m))),
                Err(other) => return Err(other),
            }
        }
    }

    fn obey(&mut self, command: Command) -> Outcome {
        let engine = &self.engine;
        let mut mix = self.conversation.mix().clone();
        match command {
            Command::Help => return print(commands::HELP),
            Command::Exit => {}
            Command::Clear => self.conversation.clear(),
            Command::Regen => return self.regenerate(),
            Command::ShowSystem => {
                return print(self.conversation.system().unwrap_or("(no system message)"));
            }
            Command::System(text) => self.conversation.set_system(text),
            Command::ListAdapters(start) => return self.list(&start),
            Command::Adapter(given) => {
                let (name, scale) = mix::name_and_scale(engine, &given);
                return self.switch(Mix::only(engine, name, scale)?);
            }
            Command::LoraAdd { what, scale } => {
                let (name, scale) = self.add(&what, scale)?;
                mix.set(&self.engine, &name, scale)?;
                return self.switch(mix);
            }
            Command::LoraScale { name, scale } => {
                if !mix.parts().iter().any(|p| p.name == name) {
                    return Err(not_speaking(&name));
                }
                mix.set(engine, &name, scale)?;
                return self.switch(mix);
            }
            Command::LoraRemove(name) => {
                return if mix.remove(&name) { self.switch(mix) } else { Err(not_speaking(&name)) };
            }
            Command::Save(path) => return self.save(&path),
            Command::Load(path) => return self.load(&path),
            Command::Compare { first, second, text } => return self.compare(&first, &second, text),
        }
        Ok(())
    }

    fn save(&self, path: &Path) -> Outcome {
        let transcript = self.conversation.transcript();
        transcript.save(path)?;
        note(&self.style.dim(&format!("{} messages saved in {}", transcript.turns.len(), path.display())));
        Ok(())
    }

    /// On an error everything stays as it was.
    fn load(&mut self, path: &Path) -> Outcome {
        let transcript = Transcript::load(path)?;
        let mut mix = Mix::default();
        for (name, scale) in &transcript.adapters {
            if self.engine.adapters().info(name).is_err() {
                let advice = format!("it speaks with the adapter `{name}`; load that first (/lora add FILE)");
                return Err(Failure::runtime(format!("{}: {advice}", path.display())));
            }
            mix.set(&self.engine, name, *scale)?;
        }
        let messages = transcript.turns.len();
        self.conversation.restore(transcript, mix)?;
        let label = self.conversation.mix().label();
        note(&self.style.dim(&format!("{messages} messages loaded; now speaking: {label}")));
        Ok(())
    }

    /// The name of an adapter that is known or comes from a file, and its weight.
    fn add(&self, what: &str, scale: Option<f32>) -> Outcome<(String, f32)> {
        let (name, named_scale) = mix::name_and_scale(&self.engine, what);
        let scale = scale.unwrap_or(named_scale);
        if self.engine.adapters().info(name).is_ok() {
            return Ok((name.into(), scale));
        }
        if !std::path::Path::new(what).exists() {
            let message = format!("{what}: neither an adapter's name nor a file; /lora list shows the names");
            return Err(Failure::runtime(message));
        }
        Ok((mix::load_lora(&self.engine, what.as_ref())?, scale))
    }

    fn switch(&mut self, mix: Mix) -> Outcome {
        self.conversation.switch(mix)?;
        let mix = self.conversation.mix();
        let size = mix.size(&self.engine).map(|s| format!(" ({s})")).unwrap_or_default();
        note(&self.style.dim(&format!("now speaking: {}{size}", mix.label())));
        Ok(())
    }

    fn list(&self, start: &str) -> Outcome {
        let names: Vec<String> =
            self.engine.adapters().names().into_iter().filter(|n| n.starts_with(start)).collect();
        let parts = self.conversation.mix().parts();
        let mut text = String::new();
        for name in names.iter().take(LISTED) {
            let info = self.engine.adapters().info(name)?;
            let part = parts.iter().find(|p| p.name == *name);
            let mark = part.map_or("  ".into(), |p| format!("* {:<5}", p.scale));
            let size = if info.loaded { bytes(info.bytes as u64) } else { "not loaded yet".into() };
            text += &format!("{mark:<8}{name:<24} {size:>14}  {}\n", info.origin.display());
        }
        if names.len() > LISTED {
            text += &format!("and {} more; /lora list NAME narrows down\n", names.len() - LISTED);
        }
        print(if names.is_empty() { "no adapters" } else { text.trim_end() })
    }

    fn say(&mut self, text: &str) -> Outcome {
        let answer = self.conversation.say(text, show)?;
        self.after(&answer)
    }

    fn regenerate(&mut self) -> Outcome {
        let answer = self.conversation.regenerate(show)?;
        self.after(&answer)
    }

    /// Ends the answer's last line and tells what it cost.
    fn after(&mut self, answer: &Answer) -> Outcome {
        let mut out = io::stdout().lock();
        if !answer.text.ends_with('\n') {
            writeln!(out)?;
        }
        out.flush()?;
        let forgotten = self.conversation.take_forgotten();
        if forgotten > 0 {
            let text = format!(
                "[the context is full: the {forgotten} oldest messages were forgotten (-c raises it)]"
            );
            note(&self.style.dim(&text));
        }
        let mix = self.conversation.mix();
        self.costs.add(&mix.label(), &answer.stats);
        let end = match answer.finish {
            FinishReason::Cancelled => " · stopped",
            FinishReason::ContextFull => " · the context is full (-c raises it)",
            FinishReason::Length => " · cut by -n",
            _ => "",
        };
        let line = speed::line(&answer.stats, mix, &self.engine, Some(&self.costs));
        note(&self.style.dim(&format!("[{line}{end}]")));
        Ok(())
    }

    fn compare(&mut self, first: &str, second: &str, text: Option<String>) -> Outcome {
        let mix = |given: &str| {
            let (name, scale) = mix::name_and_scale(&self.engine, given);
            Mix::only(&self.engine, name, scale)
        };
        let mixes = [mix(first)?, mix(second)?];
        let answers = self.conversation.compare([&mixes[0], &mixes[1]], text.as_deref())?;
        let labels = [mixes[0].label(), mixes[1].label()];
        let size = console::Term::stdout().size_checked();
        let width = size.filter(|_| io::stdout().is_terminal()).map(|(_, columns)| usize::from(columns));
        let texts = [answers[0].text.as_str(), answers[1].text.as_str()];
        print(columns::lay_out([&labels[0], &labels[1]], texts, width).trim_end())?;
        for (mix, answer) in mixes.iter().zip(&answers) {
            let line = speed::line(&answer.stats, mix, &self.engine, None);
            note(&self.style.dim(&format!("[both at once: {line}]")));
        }
        Ok(())
    }
}

fn not_speaking(name: &str) -> Failure {
    Failure::runtime(format!("`{name}` is not among the adapters that speak; /lora list shows them"))
}

/// A piece of an answer, at once.
fn show(piece: &str) -> Outcome {
    let mut out = io::stdout().lock();
    out.write_all(piece.as_bytes())?;
    Ok(out.flush()?)
}

/// A whole text.
fn print(text: &str) -> Outcome {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}
