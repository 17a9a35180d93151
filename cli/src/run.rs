//! `lory run`: continues one text.

use std::{
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use clap::Args;
use lory_runtime::{Engine, Request, SessionOptions};

use crate::{
    adapter_flags::AdapterFlags,
    answer,
    failure::{Failure, Outcome},
    grammar_flags::GrammarFlags,
    inputs::Inputs,
    mix::Mix,
    model_flags::ModelFlags,
    output::Output,
    prompt::{PromptFlags, encode},
    sampling_flags::SamplingFlags,
    speed,
    terminal::{ColorChoice, Style},
};

/// Continue a text once. Standard output gets the new text and nothing else.
#[derive(Args)]
#[command(after_help = "Examples:
  lory run -m model.gguf -p 'Once upon a time' -n 100
  lory run -m model.gguf -f prompt.txt --temp 0 -n 200 > out.txt
  lory run -m model.gguf --lora-scaled poet.gguf:0.8 -p 'Dear' -s 42
  lory run -m model.gguf -p 'Name three birds.' -j '{\"type\":\"array\",\"items\":{\"type\":\"string\"}}'
  lory run -m model.gguf --pack styles.gguf --adapter poet --adapter chef:0.5 -p Hello")]
pub struct Run {
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    input: PromptFlags,
    /// New tokens at most; -1 goes on until the model ends or the context is full.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 256, allow_negative_numbers = true)]
    n_predict: i64,
    /// Print the prompt before its continuation.
    #[arg(long)]
    echo: bool,
    /// Colours on standard error: on, off or auto.
    #[arg(long, value_name = "WHEN", num_args = 0..=1, default_value = "auto", default_missing_value = "on")]
    color: ColorChoice,
    /// Write the engine's metrics to FILE at the end, as text that Prometheus reads.
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    #[command(flatten)]
    adapters: AdapterFlags,
    #[command(flatten)]
    sampling: SamplingFlags,
    #[command(flatten)]
    grammar: GrammarFlags,
}

/// `-n` in tokens.
pub fn token_limit(n: i64) -> Outcome<usize> {
    match n {
        -1 => Ok(usize::MAX),
        n => usize::try_from(n)
            .map_err(|_| Failure::usage(format!("-n {n}: a number of tokens, or -1 for no limit"))),
    }
}

impl Run {
    pub fn run(self) -> Outcome {
        let max_new_tokens = token_limit(self.n_predict)?;
        let sampler = self.sampling.options()?;
        self.adapters.check(false)?;
        let grammar = self.grammar.given()?;
        let Some(prompt) = self.input.prompt()? else {
            return Err(Failure::usage("no text: give -p TEXT or -f FILE (- is standard input)"));
        };
        let metrics = self.metrics.as_deref().map(|path| self.metrics_file(path)).transpose()?;
        let opened = Instant::now();
        let engine = self.model.open()?;
        let mix = Mix::load(&self.adapters, &engine)?;
        let grammar = grammar.map(|g| g.compile(&engine)).transpose()?;
        if self.model.engine.verbose {
            self.model.describe(&engine, opened.elapsed(), sampler.seed);
        }
        let mut session =
            engine.session(&SessionOptions { adapters: mix.entries(), ..Default::default() })?;
        let tokens = encode(&engine, &prompt)?;
        let prompt_tokens = tokens.len();
        let generation = session.generate(Request {
            tokens,
            max_new_tokens,
            sampler,
            grammar,
            stop: self.sampling.reverse_prompt.clone(),
            ignore_eos: self.sampling.ignore_eos,
            ..Default::default()
        })?;
        let mut out = io::stdout().lock();
        if self.echo {
            out.write_all(prompt.as_bytes())?;
        }
        let answer = answer::follow(generation, prompt_tokens, |piece| {
            out.write_all(piece.as_bytes())?;
            Ok(out.flush()?)
        })?;
        if out.is_terminal() {
            writeln!(out)?;
        }
        out.flush()?;
        report(&engine, &mix, &answer, Style::stderr(self.color));
        if let (Some(mut file), Some(path)) = (metrics, &self.metrics) {
            file.write_all(engine.metrics().prometheus().as_bytes()).map_err(|e| Output::failed(path, &e))?;
            file.finish()?;
        }
        match answer.was_interrupted() {
            true => Err(Failure::Interrupted),
            false => Ok(()),
        }
    }

    /// Begun before the answer: what cannot be written is known before the work.
    fn metrics_file(&self, path: &Path) -> Outcome<Output> {
        let texts = [&self.input.file, &self.grammar.grammar_file, &self.grammar.json_schema_file];
        let inputs = Inputs::default().model(&self.model.model).adapters(&self.adapters)?;
        inputs.texts(texts.into_iter().flatten()).refuse("--metrics", path)?;
        Output::create(path)
    }
}

fn report(engine: &Engine, mix: &Mix, answer: &answer::Answer, style: Style) {
    let line = speed::line(answer, mix, engine, None);
    // Whoever closed standard error does not want to know.
    let _ = writeln!(io::stderr(), "{}", style.dim(&line));
}
