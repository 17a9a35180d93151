//! `lory logits`: the model's raw output at every position, as a NumPy file.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use clap::Args;
use lory_runtime::{Event, FinishReason, Request, SessionOptions};

use crate::{
    adapter_flags::AdapterFlags,
    failure::{Failure, Outcome},
    inputs::Inputs,
    interrupt,
    mix::Mix,
    model_flags::ModelFlags,
    output::Output,
    progress,
    prompt::{PromptFlags, check_length, encode},
};

/// Write the logits after every token of a text: a NumPy array of f32, tokens x vocabulary.
#[derive(Args)]
#[command(after_help = "Examples:
  lory logits -m model.gguf -p 'Hello world' -o out.npy
  lory logits -m model.gguf --tokens 1,403,29889 -o out.npy
  lory logits -m model.gguf --pack styles.gguf --adapter poet:0.5 -p Hi -o out.npy")]
pub struct Logits {
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    input: PromptFlags,
    /// Token ids instead of a text; nothing is added to them.
    #[arg(long, value_name = "ID,ID,…", value_delimiter = ',', value_parser = token, conflicts_with_all = ["prompt", "file"])]
    tokens: Option<Vec<u32>>,
    /// The file to write.
    #[arg(short = 'o', long, value_name = "OUT.npy")]
    output: PathBuf,
    #[command(flatten)]
    adapters: AdapterFlags,
}

fn token(text: &str) -> Result<u32, String> {
    text.trim().parse().map_err(|_| "is not the id of a token; write numbers such as 1,403".into())
}

impl Logits {
    pub fn run(self) -> Outcome {
        self.adapters.check(false)?;
        let inputs = Inputs::default().model(&self.model.model).adapters(&self.adapters)?;
        inputs.texts(&self.input.file).refuse("-o", &self.output)?;
        let text = self.input.text()?;
        if text.is_none() && self.tokens.is_none() {
            return Err(Failure::usage("no text: give -p TEXT, -f FILE or --tokens 1,2,3"));
        }
        let engine = self.model.open()?;
        let mix = Mix::load(&self.adapters, &engine)?;
        let tokens = match (self.tokens, text) {
            (Some(tokens), _) => tokens,
            (None, text) => encode(&engine, &text.unwrap_or_default())?,
        };
        check_length(&engine, &tokens)?;
        let count = tokens.len();
        let mut session =
            engine.session(&SessionOptions { adapters: mix.entries(), ..Default::default() })?;
        let request = Request { tokens, max_new_tokens: 0, prompt_logits: true, ..Default::default() };
        let mut generation = session.generate(request)?;
        let canceller = generation.canceller();
        let _guard = interrupt::catch(move || canceller.cancel());
        let reading = progress::Prompt::watch(generation.watch(), count);
        let mut out = Output::create(&self.output)?;
        let mut written = 0;
        for event in &mut generation {
            if let Event::Logits { position, values } = event? {
                if position != written {
                    let message = format!("logits of position {position} came where {written} was due");
                    return Err(Failure::runtime(message));
                }
                if written == 0 {
                    write(&mut out, &self.output, &npy_header(count, values.len()))?;
                }
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                write(&mut out, &self.output, &bytes)?;
                written += 1;
            }
        }
        drop(reading);
        if generation.finish_reason() == Some(FinishReason::Cancelled) {
            return Err(Failure::Interrupted);
        }
        if written != count {
            return Err(Failure::runtime(format!("{written} of {count} positions were computed")));
        }
        out.finish()
    }
}

fn write(out: &mut Output, path: &Path, bytes: &[u8]) -> Outcome {
    out.write_all(bytes).map_err(|e| Output::failed(path, &e))
}

/// The head of a NumPy file, version 1.0, of little-endian f32 in C order (source: numpy's
/// `lib/format.py`): its length is a multiple of 64.
fn npy_header(rows: usize, cols: usize) -> Vec<u8> {
    let mut dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
    // Magic, version and length take 10 bytes, the newline one.
    let padding = (64 - (10 + dict.len() + 1) % 64) % 64;
    dict.push_str(&" ".repeat(padding));
    dict.push('\n');
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    // Two numbers of at most 20 digits: always short enough.
    header.extend_from_slice(&(dict.len() as u16).to_le_bytes());
    header.extend_from_slice(dict.as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_what_numpy_writes() {
        for (rows, cols) in [(1, 1), (3, 512), (100_000, 262_144)] {
            let header = npy_header(rows, cols);
            assert_eq!(header.len() % 64, 0);
            assert_eq!(usize::from(u16::from_le_bytes([header[8], header[9]])), header.len() - 10);
            let text = String::from_utf8_lossy(&header[10..]).into_owned();
            assert!(text.starts_with("{'descr': '<f4', 'fortran_order': False, 'shape': ("));
            assert!(text.contains(&format!("({rows}, {cols}), }}")) && text.ends_with('\n'));
        }
    }
}
