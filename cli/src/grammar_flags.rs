//! What answers must match: `--grammar`, `--json-schema` and their files.

use std::path::PathBuf;

use clap::Args;
use lory_runtime::{Engine, Grammar, GrammarSource};

use crate::{
    failure::{Failure, Outcome},
    prompt::read_text,
};

/// One of the four. Names are llama.cpp's.
#[derive(Args, Debug)]
#[group(multiple = false)]
#[command(next_help_heading = "Form of the answer")]
pub struct GrammarFlags {
    /// A grammar (GBNF) that answers must match.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub grammar: Option<String>,
    /// A file with the grammar.
    #[arg(long, value_name = "FILE")]
    pub grammar_file: Option<PathBuf>,
    /// A JSON schema that answers must match; {} is any JSON.
    #[arg(short = 'j', long, value_name = "TEXT", allow_hyphen_values = true)]
    pub json_schema: Option<String>,
    /// A file with the JSON schema.
    #[arg(long, value_name = "FILE")]
    pub json_schema_file: Option<PathBuf>,
}

/// A grammar that was given, and where.
pub struct Given {
    source: GrammarSource,
    /// The file; `None` if it stood on the command line.
    file: Option<PathBuf>,
}

impl GrammarFlags {
    /// The grammar as it was given, read from its file.
    pub fn given(&self) -> Outcome<Option<Given>> {
        let text = |t: &Option<String>, make: fn(String) -> GrammarSource| {
            t.clone().map(|t| Given { source: make(t), file: None })
        };
        let file = |f: &Option<PathBuf>, make: fn(String) -> GrammarSource| -> Outcome<Option<Given>> {
            let Some(path) = f else { return Ok(None) };
            Ok(Some(Given { source: make(read_text(path)?), file: f.clone() }))
        };
        Ok(text(&self.grammar, GrammarSource::Gbnf)
            .or(text(&self.json_schema, GrammarSource::JsonSchema))
            .or(file(&self.grammar_file, GrammarSource::Gbnf)?)
            .or(file(&self.json_schema_file, GrammarSource::JsonSchema)?))
    }
}

impl Given {
    /// Compiles it for the engine's model.
    pub fn compile(self, engine: &Engine) -> Outcome<Grammar> {
        let flag = match self.source {
            GrammarSource::Gbnf(_) => "--grammar",
            GrammarSource::JsonSchema(_) => "--json-schema",
        };
        engine.model().grammar(&self.source).map_err(|e| match self.file {
            Some(path) => Failure::runtime(format!("{}: {e}", path.display())),
            None => Failure::usage(format!("{flag}: {e}")),
        })
    }
}
