//! How a conversation becomes the tokens of a prompt.

use std::path::Path;

use lory_models::{
    chat::{ChatTemplate, Message, RenderOptions},
    tokenizer::EncodeOptions,
};
use lory_runtime::Engine;

use crate::{failure::Outcome, prompt::read_text};

/// How messages become a prompt.
pub enum Format {
    /// By the model's template, or one from a file.
    Template(Box<ChatTemplate>),
    /// The texts one after the other: for models that were not trained to converse.
    Plain,
}

impl Format {
    /// The template in `file`, or the model's, or none.
    pub fn choose(engine: &Engine, file: Option<&Path>) -> Outcome<Format> {
        let metadata = engine.model().gguf.metadata();
        let template = match file {
            Some(path) => {
                let source = read_text(path)?;
                let tokenizer = &engine.model().tokenizer;
                let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id));
                let template = ChatTemplate::new(&source, &path.to_string_lossy())?;
                Some(template.with_tokens(text(tokenizer.bos()), text(tokenizer.eos())))
            }
            None => ChatTemplate::from_metadata(metadata)?,
        };
        Ok(template.map_or(Format::Plain, |t| Format::Template(Box::new(t))))
    }

    /// The prompt of what was said: user and assistant in turn, behind a system message if there is one.
    pub fn prompt(
        &self,
        engine: &Engine,
        system: Option<&str>,
        turns: &[(&'static str, String)],
    ) -> Outcome<Vec<u32>> {
        let tokenizer = &engine.model().tokenizer;
        let text = match self {
            Format::Plain => {
                let texts = system.into_iter().chain(turns.iter().map(|(_, text)| text.as_str()));
                let mut prompt = String::new();
                for text in texts {
                    // An answer goes on where the question ended, the next question begins anew.
                    if prompt.ends_with(|c: char| !c.is_whitespace()) && !text.starts_with([' ', '\n']) {
                        prompt.push(' ');
                    }
                    prompt.push_str(text);
                }
                prompt
            }
            Format::Template(template) => {
                let system = system.map(|s| Message::new("system", s));
                let said = turns.iter().map(|(role, text)| Message::new(*role, text.as_str()));
                let messages: Vec<Message> = system.into_iter().chain(said).collect();
                let options = RenderOptions { add_generation_prompt: true, now: now(), ..Default::default() };
                template.render(&messages, &options)?
            }
        };
        let mut tokens = tokenizer.encode(&text, EncodeOptions { add_special: false, parse_special: true });
        // Most templates write the BOS token themselves. No EOS: the answer is to follow.
        if let Some(bos) = tokenizer.bos().filter(|b| tokenizer.add_bos() && tokens.first() != Some(b)) {
            tokens.insert(0, bos);
        }
        Ok(tokens)
    }
}

/// Seconds since 1970, for templates that print the date.
fn now() -> Option<i64> {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok()?;
    i64::try_from(since.as_secs()).ok()
}
