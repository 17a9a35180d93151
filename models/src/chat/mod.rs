//! Chat templates: a conversation to the text that the model was trained to continue.
//!
//! Models carry their template as Jinja source in `tokenizer.chat_template`, written for the sandbox in which Hugging Face's
//! `apply_chat_template` runs it. [`ChatTemplate`] gives it the same environment: white space control, Python's methods and
//! printing, `raise_exception`, `strftime_now`, `tojson`, `loop` controls and the `generation` tag.
//!
//! A template is code from a file. It can reach nothing but its inputs, its steps and its output are bounded, and it runs on a
//! thread whose stack is large enough for the deepest value that those steps can nest.

mod bounds;
mod generation;
mod json;
mod python;
mod slice;
#[cfg(test)]
mod tests;
mod time;

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use minijinja::{
    AutoEscape, Environment, ErrorKind, UndefinedBehavior, Value as Jinja, machinery, syntax::SyntaxConfig,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    Error, Result,
    gguf::{self, Metadata},
};

const KEY: &str = "tokenizer.chat_template";
const NAME: &str = "chat_template";

/// Longest template source in bytes; the longest known is below 40 KiB. The compiler recurses once for each operator of a
/// chain, so this also bounds its stack.
const MAX_SOURCE: usize = 128 << 10;
/// Most bytes that one rendering may write, captured blocks included.
const MAX_OUTPUT: usize = 64 << 20;
/// Deepest nesting of a message, a tool or another variable.
const MAX_DEPTH: usize = 128;
/// Instructions granted to any rendering, and per value in its input. Real templates use some tens per value.
const FUEL: u64 = 250_000 * bounds::INSTRUCTIONS_PER_ONE;
const FUEL_PER_VALUE: u64 = 2_000 * bounds::INSTRUCTIONS_PER_ONE;
/// Calls of macros and nested loops.
const MAX_RECURSION: usize = 200;
/// Compiling [`MAX_SOURCE`] operators in a chain takes about 1 KiB for each; so does dropping a list that [`FUEL`] nested.
/// It is address space, of which only what is used becomes memory.
const STACK: usize = 256 << 20;

/// One message of a conversation, in the form of the chat APIs: `role`, `content` (a string, an array of parts, or null), and
/// whatever else the template knows, such as `tool_calls`, `tool_call_id`, `name`, `reasoning_content`. Keys keep their order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Message(Map<String, Value>);

impl Message {
    /// A message with this role: `system`, `user`, `assistant`, `tool`.
    pub fn new(role: impl Into<String>, content: impl Into<Value>) -> Self {
        let mut map = Map::new();
        map.insert("role".into(), Value::String(role.into()));
        map.insert("content".into(), content.into());
        Message(map)
    }

    /// Adds or replaces a key.
    pub fn with(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.0.insert(key.into(), value.into());
        self
    }

    /// Any key's value.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// The role; `None` in a message from JSON that has none, which [`ChatTemplate::render`] refuses.
    pub fn role(&self) -> Option<&str> {
        self.get("role").and_then(Value::as_str)
    }
}

impl From<Map<String, Value>> for Message {
    fn from(map: Map<String, Value>) -> Self {
        Message(map)
    }
}

/// What a template gets besides the messages.
#[derive(Debug, Clone, Default)]
pub struct RenderOptions {
    /// End with the beginning of an answer of the assistant.
    pub add_generation_prompt: bool,
    /// Tool definitions, usually an array of JSON schemas.
    pub tools: Option<Value>,
    /// Documents for retrieval-augmented templates.
    pub documents: Option<Value>,
    /// Local time in seconds since 1970-01-01 00:00, for `strftime_now`; without it the template sees no such function.
    pub now: Option<i64>,
    /// Further variables, such as `enable_thinking`. They override everything but `messages`.
    pub extra: Map<String, Value>,
}

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    env: Environment<'static>,
    source: Arc<str>,
    file: Arc<str>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl ChatTemplate {
    /// Compiles Jinja source; `file` names it in errors.
    ///
    /// # Errors
    /// Source that is too long or does not parse.
    pub fn new(source: &str, file: &str) -> Result<Self> {
        let fault = |message: String| template_error(file, message);
        if source.len() > MAX_SOURCE {
            return Err(fault(format!("has {} bytes, more than {MAX_SOURCE}", source.len())));
        }
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|e| fault(e.to_string()))?);
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_recursion_limit(MAX_RECURSION);
        env.set_unknown_method_callback(python::method);
        env.add_filter("tojson", json::tojson);
        env.add_filter("string", python::to_str);
        env.add_test("sequence", python::is_sequence);
        env.add_function("raise_exception", raise_exception);
        let rewritten = generation::rewrite(source);
        let compile = move || {
            env.add_template_owned(NAME, rewritten).map_err(|e| describe(&e))?;
            bounded(&env).map(drop)?;
            Ok(env)
        };
        let env = on_large_stack(compile).map_err(fault)?;
        Ok(ChatTemplate { env, source: source.into(), file: file.into(), bos_token: None, eos_token: None })
    }

    /// The template of a model file with the texts of its bos and eos tokens; `None` if it has none.
    pub fn from_metadata(meta: &Metadata) -> Result<Option<Self>> {
        Self::from_key(meta, KEY)
    }

    /// One of several templates of a model file, such as `tool_use`.
    pub fn named(meta: &Metadata, name: &str) -> Result<Option<Self>> {
        Self::from_key(meta, &format!("{KEY}.{name}"))
    }

    /// As [`ChatTemplate::from_metadata`], with an error that says what to do if there is none.
    pub fn required(meta: &Metadata) -> Result<Self> {
        Self::from_metadata(meta)?.ok_or_else(|| {
            let message = "the model has no chat template. Complete plain text instead, or give a Jinja template that fits the model's training";
            meta.error(KEY, message)
        })
    }

    fn from_key(meta: &Metadata, key: &str) -> Result<Option<Self>> {
        let Some(source) = meta.opt_str(key)? else { return Ok(None) };
        let template = Self::new(source, meta.file())?;
        Ok(Some(template.with_tokens(token_text(meta, "bos"), token_text(meta, "eos"))))
    }

    /// Sets `bos_token` and `eos_token`.
    pub fn with_tokens(mut self, bos: Option<&str>, eos: Option<&str>) -> Self {
        self.bos_token = bos.map(str::to_owned);
        self.eos_token = eos.map(str::to_owned);
        self
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// What the template raises, a variable or type it did not expect, and its bounds.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String> {
        let fault = |message: String| template_error(&self.file, message);
        let variables = self.variables(messages, options).map_err(fault)?;
        let mut env = self.env.clone();
        env.set_fuel(Some(FUEL + FUEL_PER_VALUE * count(&variables)));
        if let Some(now) = options.now {
            env.add_function("strftime_now", move |format: &str| time::strftime(now, format));
        }
        let written = Arc::new(AtomicUsize::new(0));
        let charged = Arc::clone(&written);
        env.set_formatter(move |out, _, value| python::print(out, value, &charged, MAX_OUTPUT));
        bounds::install(&mut env, &bounds::Meter::default());
        on_large_stack(move || run(&env, &variables)).map_err(fault)
    }

    fn variables(&self, messages: &[Message], options: &RenderOptions) -> std::result::Result<Value, String> {
        let mut map = Map::new();
        for (name, token) in [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)] {
            if let Some(token) = token {
                map.insert(name.into(), token.clone().into());
            }
        }
        map.insert("tools".into(), options.tools.clone().unwrap_or_default());
        map.insert("documents".into(), options.documents.clone().unwrap_or_default());
        map.insert("add_generation_prompt".into(), options.add_generation_prompt.into());
        map.extend(options.extra.clone());
        if let Some(i) = messages.iter().position(|m| m.role().is_none()) {
            return Err(format!("message {i} has no `role` that is a string"));
        }
        map.insert("messages".into(), messages.iter().map(|m| Value::Object(m.0.clone())).collect());
        let variables = Value::Object(map);
        if too_deep(&variables, MAX_DEPTH) {
            return Err(format!("a variable is nested deeper than {MAX_DEPTH}"));
        }
        Ok(variables)
    }
}

/// Calls `f` on a thread of its own.
fn on_large_stack<T: Send + 'static>(
    f: impl FnOnce() -> std::result::Result<T, String> + Send + 'static,
) -> std::result::Result<T, String> {
    let thread = std::thread::Builder::new().name("chat template".into()).stack_size(STACK);
    let running = thread.spawn(f).map_err(|e| format!("no thread to work on: {e}"))?;
    running.join().unwrap_or_else(|_| Err("the template engine failed".into()))
}

/// Runs the template; the error is its text.
fn run(env: &Environment<'_>, variables: &Value) -> std::result::Result<String, String> {
    let program = bounded(env)?;
    let mut text = String::new();
    let mut out = machinery::make_string_output(&mut text);
    let variables = to_jinja(variables);
    machinery::eval(env, &program.instructions, variables, &program.blocks, &mut out, AutoEscape::None)
        .map_err(|e| describe(&e))?;
    drop(out);
    Ok(text)
}

/// The compiled template with its bounds built in.
fn bounded<'env>(env: &'env Environment<'env>) -> std::result::Result<bounds::Bounded<'env>, String> {
    let template = env.get_template(NAME).map_err(|e| describe(&e))?;
    bounds::Bounded::new(machinery::get_compiled_template(&template))
}

fn raise_exception(message: &str) -> std::result::Result<Jinja, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("the template refuses: {message}")))
}

/// Adds to the bytes written so far, and fails beyond the limit.
fn charge(written: &AtomicUsize, bytes: usize, limit: usize) -> std::result::Result<(), minijinja::Error> {
    let before = written.fetch_add(bytes, Ordering::Relaxed);
    if before.saturating_add(bytes) > limit {
        return Err(minijinja::Error::new(
            ErrorKind::InvalidOperation,
            format!("writes more than {limit} bytes"),
        ));
    }
    Ok(())
}

fn template_error(file: &str, message: String) -> Error {
    Error::Template { file: file.into(), message }
}

/// The engine's words with line numbers and causes, in one line.
fn describe(error: &minijinja::Error) -> String {
    let mut text = match error.kind() {
        ErrorKind::OutOfFuel => "takes too many steps".to_owned(),
        _ => error.to_string(),
    };
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn too_deep(value: &Value, left: usize) -> bool {
    match value {
        _ if left == 0 => true,
        Value::Array(items) => items.iter().any(|v| too_deep(v, left - 1)),
        Value::Object(map) => map.values().any(|v| too_deep(v, left - 1)),
        _ => false,
    }
}

/// The engine's value for a JSON value; dicts keep their order.
fn to_jinja(value: &Value) -> Jinja {
    match value {
        Value::Null => Jinja::from(()),
        Value::Bool(b) => Jinja::from(*b),
        Value::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => Jinja::from(i),
            (_, Some(u)) => Jinja::from(u),
            _ => Jinja::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(s) => Jinja::from(s.as_str()),
        Value::Array(items) => items.iter().map(to_jinja).collect(),
        Value::Object(map) => Jinja::from_pairs(map.iter().map(|(k, v)| (k.as_str(), to_jinja(v)))),
    }
}

/// Number of values in a tree that is known not to be too deep.
fn count(value: &Value) -> u64 {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum(),
        _ => 0,
    }
}

/// The text of the file's bos or eos token. Wrong ids are the tokenizer's to report.
fn token_text<'m>(meta: &'m Metadata, role: &str) -> Option<&'m str> {
    let id = meta.get(&format!("tokenizer.ggml.{role}_token_id")).and_then(gguf::Value::as_i64)?;
    let tokens = meta.opt_strings("tokenizer.ggml.tokens").ok()??;
    tokens.get(usize::try_from(id).ok()?).map(String::as_str)
}
