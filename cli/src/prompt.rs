//! Texts that commands are given: `-p TEXT` or `-f FILE`.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use clap::Args;
use lory_runtime::Engine;

use crate::{
    failure::{Failure, Outcome},
    model_flags::note,
};

/// One of the two.
#[derive(Args, Debug)]
#[group(multiple = false)]
#[command(next_help_heading = "Text")]
pub struct PromptFlags {
    /// The text.
    #[arg(short = 'p', long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// A file with the text; - is standard input.
    #[arg(short = 'f', long, value_name = "FILE")]
    pub file: Option<PathBuf>,
}

impl PromptFlags {
    /// The text exactly as given; `None` without either flag.
    pub fn text(&self) -> Outcome<Option<String>> {
        match (&self.prompt, &self.file) {
            (Some(text), _) => Ok(Some(text.clone())),
            (None, Some(path)) => read_text(path).map(Some),
            (None, None) => Ok(None),
        }
    }

    /// The text without the newline with which editors end a file.
    pub fn prompt(&self) -> Outcome<Option<String>> {
        let from_file = self.prompt.is_none();
        Ok(self.text()?.map(|text| match text.strip_suffix('\n') {
            Some(line) if from_file => line.strip_suffix('\r').unwrap_or(line).to_owned(),
            _ => text,
        }))
    }
}

/// A text's tokens, with those that the model wants around it; a BOS that stands in the text as well is told, and stays, as
/// in llama.cpp.
///
/// # Errors
/// As [`check_length`].
pub fn encode(engine: &Engine, text: &str) -> Outcome<Vec<u32>> {
    let tokens = engine.model().encode_prompt(text);
    let tokenizer = &engine.model().tokenizer;
    if let (Some(bos), [first, second, ..]) = (tokenizer.bos(), tokens.as_slice())
        && tokenizer.add_bos()
        && *first == bos
        && *second == bos
    {
        let written = String::from_utf8_lossy(&tokenizer.token_bytes(bos).unwrap_or_default()).into_owned();
        note(&format!("the text begins with {written}, which is added anyway: leave it out"));
    }
    check_length(engine, &tokens)?;
    Ok(tokens)
}

/// An error for a prompt that is longer than the context.
pub fn check_length(engine: &Engine, tokens: &[u32]) -> Outcome {
    match (tokens.len(), engine.n_ctx()) {
        (n, limit) if n > limit => Err(Failure::runtime(format!(
            "the prompt has {n} tokens and the context holds {limit}: shorten it, or give a longer context with -c"
        ))),
        _ => Ok(()),
    }
}

/// A file's text; `-` is standard input.
pub fn read_text(path: &Path) -> Outcome<String> {
    let name = path.to_string_lossy();
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        io::stdin().lock().read_to_end(&mut bytes).map_err(|e| Failure::io("standard input", &e))?;
        bytes
    } else {
        match fs::metadata(path) {
            Ok(m) if m.is_dir() => {
                return Err(Failure::runtime(format!("{name}: is a directory; name the file in it")));
            }
            _ => fs::read(path).map_err(|e| Failure::io(&name, &e))?,
        }
    };
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Failure::runtime(format!("{name}: is not UTF-8 text (byte {at}); convert it first"))
    })
}
