//! Constrained generation: answers that match a grammar or a JSON schema.
//!
//! [`crate::LoadedModel::grammar`] compiles a [`GrammarSource`] for the model's vocabulary once; a [`Grammar`] is shared by
//! all requests that name it. Each sequence follows it with a [`Constraint`] of its own in its sampler: before any other
//! step, tokens that cannot continue a text of the grammar lose their logits; end-of-generation tokens keep theirs only
//! where the grammar may end; and when nothing more can follow, the generation ends.
//!
//! The parser is `llguidance` (Earley's algorithm over bytes), which also compiles JSON schemas; GBNF is translated for it.
//! Both are bounded: see [`GrammarError::TooLarge`] and [`GrammarError::TooComplex`].

mod gbnf;
mod lark;
mod vocabulary;

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use llguidance::{Matcher, ParserFactory, api::TopLevelGrammar};
use lory_models::tokenizer::{EncodeOptions, Tokenizer};
use serde_json::{Value, json};

use crate::{lock, sampler::SamplerError};

/// Stack of the thread that compiles: rules are followed by recursion, and a chain may be as long as there are rules. It is
/// address space, of which only what is used becomes memory.
const STACK: usize = 256 << 20;

/// White space between the parts of a JSON text: a blank, or a line end and its indentation. Without a bound, a small model
/// can go on with blanks for ever.
const JSON_SPACE: &str = r" |\r?\n[ \t]{0,32}";

/// What an answer must look like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GrammarSource {
    /// A grammar in llama.cpp's GBNF notation.
    Gbnf(String),
    /// A JSON schema, as JSON; `{}` is any JSON value.
    JsonSchema(String),
}

/// Why a grammar cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GrammarError {
    /// A fault in the notation.
    #[error("grammar, line {line}, column {column}: {message}")]
    Syntax {
        /// Counted from 1.
        line: usize,
        /// In characters, counted from 1.
        column: usize,
        /// What is wrong there.
        message: String,
    },
    /// A GBNF text without its first rule.
    #[error("the grammar has no rule named `root`, with which every answer begins")]
    NoRoot,
    /// No finite text matches.
    #[error("no finite text matches the grammar: every alternative of `root` leads back to itself")]
    AcceptsNothing,
    /// More than this program takes on.
    #[error("the grammar {0}")]
    TooLarge(String),
    /// More work for the parser than its bounds allow.
    #[error("the grammar cannot be compiled: {0}")]
    TooComplex(String),
    /// No JSON, or a schema with an unknown or impossible demand.
    #[error("the JSON schema cannot be used: {0}")]
    Schema(String),
}

/// A grammar compiled for one model's vocabulary; cheap to clone.
#[derive(Clone)]
pub struct Grammar(Arc<Compiled>);

struct Compiled {
    tokenizer: Arc<Tokenizer>,
    /// At the beginning of the text; sequences start with a copy.
    fresh: Mutex<Matcher>,
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

/// What all grammars of one model share, made when the first one is compiled.
#[derive(Default)]
pub(crate) struct Compiler(Mutex<Option<Arc<ParserFactory>>>);

impl Compiler {
    /// Compiles `source` for the vocabulary of `tokenizer`, which is always the same one.
    pub(crate) fn compile(
        &self,
        tokenizer: &Arc<Tokenizer>,
        source: &GrammarSource,
    ) -> Result<Grammar, GrammarError> {
        let grammar = match source {
            GrammarSource::Gbnf(text) => TopLevelGrammar::from_lark(to_lark(text, tokenizer)?),
            GrammarSource::JsonSchema(text) => TopLevelGrammar::from_json_schema(schema(text)?),
        };
        let is_schema = matches!(source, GrammarSource::JsonSchema(_));
        let mut made = lock(&self.0);
        let factory = made.take();
        let vocabulary = tokenizer.clone();
        let (factory, matcher) = on_large_stack(move || {
            let factory = match factory {
                Some(factory) => factory,
                None => Arc::new(vocabulary::factory(&vocabulary)?),
            };
            let matcher = Matcher::new(factory.create_parser(grammar));
            Ok((factory, matcher))
        })?;
        *made = Some(factory);
        match matcher.get_error() {
            Some(e) if is_schema => Err(GrammarError::Schema(first_line(&e))),
            Some(e) => Err(GrammarError::TooComplex(first_line(&e))),
            None => {
                Ok(Grammar(Arc::new(Compiled { tokenizer: tokenizer.clone(), fresh: Mutex::new(matcher) })))
            }
        }
    }
}

fn to_lark(text: &str, tokenizer: &Tokenizer) -> Result<String, GrammarError> {
    let vocab = u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
    let token_of = |text: &str| {
        let options = EncodeOptions { add_special: false, parse_special: true };
        match tokenizer.encode(text, options).as_slice() {
            [token] => Some(*token),
            _ => None,
        }
    };
    lark::from_gbnf(gbnf::parse(text, vocab, &token_of)?)
}

/// The schema with our white space, unless it sets its own.
fn schema(text: &str) -> Result<Value, GrammarError> {
    if text.len() > gbnf::MAX_SOURCE {
        let message = format!("has {} bytes, more than {}", text.len(), gbnf::MAX_SOURCE);
        return Err(GrammarError::Schema(message));
    }
    let mut schema: Value = serde_json::from_str(text).map_err(|e| GrammarError::Schema(e.to_string()))?;
    match &mut schema {
        Value::Object(map) => {
            map.entry("x-guidance").or_insert_with(|| json!({ "whitespace_pattern": JSON_SPACE }));
        }
        Value::Bool(true) => schema = json!({ "x-guidance": { "whitespace_pattern": JSON_SPACE } }),
        Value::Bool(false) => return Err(GrammarError::Schema("`false` allows no value".into())),
        _ => return Err(GrammarError::Schema("a schema is an object, true or false".into())),
    }
    Ok(schema)
}

fn on_large_stack<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, GrammarError> + Send + 'static,
) -> Result<T, GrammarError> {
    let thread = std::thread::Builder::new().name("grammar".into()).stack_size(STACK);
    let running =
        thread.spawn(f).map_err(|e| GrammarError::TooComplex(format!("no thread to work on: {e}")))?;
    running.join().unwrap_or_else(|_| Err(GrammarError::TooComplex("the parser failed".into())))
}

/// The parser's message without the dump of its state.
fn first_line(error: &impl ToString) -> String {
    let text = error.to_string();
    text.lines()
        .map(str::trim)
        .find(|l| !l.is_empty() && !l.starts_with('<'))
        .unwrap_or("no reason given")
        .into()
}

impl Grammar {
    /// Whether it was compiled for this tokenizer's vocabulary.
    pub(crate) fn is_for(&self, tokenizer: &Arc<Tokenizer>) -> bool {
        Arc::ptr_eq(&self.0.tokenizer, tokenizer)
    }

    /// A state at the beginning of a text. `may_end` is whether end-of-generation tokens can be chosen.
    pub fn constraint(&self, may_end: bool) -> Constraint {
        let matcher = lock(&self.0.fresh).clone();
        Constraint { grammar: self.clone(), matcher, may_end, fault: None }
    }
}

/// How far one sequence has come in its grammar.
#[derive(Clone)]
pub struct Constraint {
    grammar: Grammar,
    matcher: Matcher,
    may_end: bool,
    /// Why the last token could not be followed; told when the next one is asked for.
    fault: Option<String>,
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint").field("fault", &self.fault).finish_non_exhaustive()
    }
}

impl Constraint {
    /// Back to the beginning of the text.
    pub fn reset(&mut self) {
        *self = self.grammar.constraint(self.may_end);
    }

    /// Follows a token that was drawn.
    pub fn accept(&mut self, token: u32) {
        if let Err(e) = self.matcher.consume_token(token) {
            self.fault.get_or_insert(first_line(&e));
        }
    }

    /// Whether nothing can follow.
    pub fn is_complete(&self) -> bool {
        self.fault.is_none() && !self.matcher.is_error() && self.matcher.is_stopped()
    }

    /// Sets the logits of tokens that cannot follow to −inf.
    ///
    /// # Errors
    /// The parser reached its bounds, or no token of the vocabulary can follow.
    pub(crate) fn mask(&mut self, logits: &mut [f32]) -> Result<(), SamplerError> {
        if let Some(fault) = &self.fault {
            return Err(SamplerError::Grammar(fault.clone()));
        }
        let mask = self.matcher.compute_mask_or_eos().map_err(|e| SamplerError::Grammar(first_line(&e)))?;
        let tokenizer = &self.grammar.0.tokenizer;
        let mut left = false;
        for (id, logit) in logits.iter_mut().enumerate() {
            let token = id as u32;
            let allowed = id < mask.len() && mask.is_allowed(token);
            if allowed && (self.may_end || !tokenizer.is_eog(token)) {
                left |= *logit > f32::NEG_INFINITY;
            } else {
                *logit = f32::NEG_INFINITY;
            }
        }
        match left {
            true => Ok(()),
            false => {
                Err(SamplerError::Grammar("no token of the vocabulary can follow the text so far".into()))
            }
        }
    }
}
