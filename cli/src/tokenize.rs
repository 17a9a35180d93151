//! `lory tokenize`: a text's tokens.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use clap::Args;
use lory_models::tokenizer::{EncodeOptions, Tokenizer};
use lory_runtime::mapping::{Loading, open_gguf};

use crate::{
    failure::{Failure, Outcome},
    prompt::PromptFlags,
};

/// Print a text's token ids on one line. A file with a vocabulary and no weights will do.
#[derive(Args)]
#[command(after_help = "Examples:
  lory tokenize -m model.gguf -p 'Hello world'
  lory tokenize -m model.gguf -f text.txt --no-bos
  echo -n Hello | lory tokenize -m model.gguf -f - --show")]
pub struct Tokenize {
    /// The model, a GGUF file.
    #[arg(short = 'm', long, value_name = "FILE")]
    model: PathBuf,
    #[command(flatten)]
    input: PromptFlags,
    /// Leave away the tokens that the model wants around a text (BOS, EOS).
    #[arg(long)]
    no_bos: bool,
    /// Read control tokens that are written out in the text, such as <|im_end|>, as plain text.
    #[arg(long)]
    no_parse_special: bool,
    /// One token per line, with its text.
    #[arg(long)]
    show: bool,
}

impl Tokenize {
    pub fn run(self) -> Outcome {
        let Some(text) = self.input.text()? else {
            return Err(Failure::usage("no text: give -p TEXT or -f FILE (- is standard input)"));
        };
        let open = open_gguf(&self.model, Loading::Map)?;
        let tokenizer = Tokenizer::from_metadata(open.gguf.metadata())?;
        let options = EncodeOptions { add_special: !self.no_bos, parse_special: !self.no_parse_special };
        let ids = tokenizer.encode(&text, options);
        let mut out = io::BufWriter::new(io::stdout().lock());
        if self.show {
            for id in ids {
                let bytes = tokenizer.token_bytes(id).unwrap_or_default();
                writeln!(out, "{id:>8}  {:?}", String::from_utf8_lossy(&bytes))?;
            }
        } else {
            let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
            writeln!(out, "{}", ids.join(" "))?;
        }
        out.flush()?;
        Ok(())
    }
}
