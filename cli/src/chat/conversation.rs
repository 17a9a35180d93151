//! A conversation: what was said, and how it becomes the model's next prompt.

use std::path::Path;

use clap::ValueEnum;
use lory_models::{
    chat::{ChatTemplate, Message, RenderOptions},
    tokenizer::EncodeOptions,
};
use lory_runtime::{Engine, Grammar, OnSwitch, Request, SamplerOptions, Session, SessionOptions};

use super::transcript::Transcript;
use crate::{
    answer::{self, Answer},
    failure::{Failure, Outcome},
    mix::Mix,
    prompt::read_text,
};

/// What happens to what was read so far when the adapters change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnSwitchArg {
    /// It is read again: answers are those of a new conversation with these adapters.
    Recompute,
    /// It stays as the previous adapters read it: instant, and approximate.
    Keep,
}

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
}

/// How answers are made.
#[derive(Clone)]
pub struct Style {
    pub sampler: SamplerOptions,
    pub grammar: Option<Grammar>,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    pub max_new_tokens: usize,
    pub on_switch: OnSwitchArg,
}

/// Everything said so far.
pub struct Conversation {
    engine: Engine,
    format: Format,
    style: Style,
    system: Option<String>,
    /// User and assistant in turn.
    turns: Vec<(&'static str, String)>,
    session: Session,
    mix: Mix,
    /// Answers begun; moves the seed on, so that /regen says something else.
    answers: u64,
    /// Messages dropped for lack of room since somebody asked.
    forgotten: usize,
}

impl Conversation {
    /// Nothing said yet.
    pub fn new(
        engine: &Engine,
        format: Format,
        style: Style,
        mix: Mix,
        system: Option<String>,
    ) -> Outcome<Self> {
        let session = engine.session(&SessionOptions { adapters: mix.entries(), ..Default::default() })?;
        Ok(Conversation {
            engine: engine.clone(),
            format,
            style,
            system,
            turns: Vec::new(),
            session,
            mix,
            answers: 0,
            forgotten: 0,
        })
    }

    pub fn mix(&self) -> &Mix {
        &self.mix
    }

    pub fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    /// The next answers see this system message.
    pub fn set_system(&mut self, text: String) {
        self.system = Some(text).filter(|t| !t.is_empty());
    }

    /// Forgets what was said.
    pub fn clear(&mut self) {
        self.turns.clear();
        self.session.clear();
    }

    /// Everything said so far, to be saved.
    pub fn transcript(&self) -> Transcript {
        Transcript {
            system: self.system.clone(),
            turns: self.turns.clone(),
            adapters: self.mix.parts().iter().map(|p| (p.name.clone(), p.scale)).collect(),
        }
    }

    /// Goes on where a saved conversation ended. On an error this one stays.
    pub fn restore(&mut self, transcript: Transcript, mix: Mix) -> Outcome {
        self.switch(mix)?;
        self.system = transcript.system;
        self.turns = transcript.turns;
        Ok(())
    }

    /// How many of the oldest messages were dropped since the last call, for lack of room.
    pub fn take_forgotten(&mut self) -> usize {
        std::mem::take(&mut self.forgotten)
    }

    /// Speaks with another mix from now on. On an error the old one stays.
    pub fn switch(&mut self, mix: Mix) -> Outcome {
        let on_switch = match self.style.on_switch {
            OnSwitchArg::Recompute => OnSwitch::Recompute,
            OnSwitchArg::Keep => OnSwitch::Keep,
        };
        self.session.set_adapters(&mix.entries(), on_switch)?;
        self.mix = mix;
        Ok(())
    }

    /// Answers a message. On an error the message is not part of the conversation.
    pub fn say(&mut self, text: &str, sink: impl FnMut(&str) -> Outcome) -> Outcome<Answer> {
        self.turns.push(("user", text.into()));
        let answer = self.answer(sink);
        if answer.is_err() {
            self.turns.pop();
        }
        answer
    }

    /// Answers the last message once more.
    pub fn regenerate(&mut self, sink: impl FnMut(&str) -> Outcome) -> Outcome<Answer> {
        let answered = self.turns.last().is_some_and(|(role, _)| *role == "assistant");
        let old = if answered { self.turns.pop() } else { None };
        if self.turns.is_empty() {
            return Err(Failure::runtime("nothing was said yet"));
        }
        let answer = self.answer(sink);
        if answer.is_err() {
            self.turns.extend(old);
        }
        answer
    }

    fn answer(&mut self, sink: impl FnMut(&str) -> Outcome) -> Outcome<Answer> {
        let tokens = self.fitting_prompt()?;
        self.answers += 1;
        let prompt = tokens.len();
        let common = self.session.rewind_to_common(&tokens);
        let request = self.request(tokens.get(common..).unwrap_or_default().to_vec());
        let answer = answer::follow(self.session.generate(request)?, prompt, sink)?;
        self.turns.push(("assistant", answer.text.clone()));
        Ok(answer)
    }

    fn request(&self, tokens: Vec<u32>) -> Request {
        let mut sampler = self.style.sampler.clone();
        sampler.seed = sampler.seed.map(|s| s.wrapping_add(self.answers));
        Request {
            tokens,
            max_new_tokens: self.style.max_new_tokens,
            sampler,
            grammar: self.style.grammar.clone(),
            stop: self.style.stop.clone(),
            ignore_eos: self.style.ignore_eos,
            ..Default::default()
        }
    }

    /// The prompt of the conversation; its oldest turns are dropped where it would leave no room
    /// for an answer.
    fn fitting_prompt(&mut self) -> Outcome<Vec<u32>> {
        loop {
            let tokens = self.prompt(&self.turns)?;
            if tokens.len() < self.engine.n_ctx() || self.turns.len() < 3 {
                return Ok(tokens);
            }
            self.turns.drain(..2);
            self.forgotten += 2;
        }
    }

    fn prompt(&self, turns: &[(&'static str, String)]) -> Outcome<Vec<u32>> {
        let tokenizer = &self.engine.model().tokenizer;
        let text = match &self.format {
            Format::Plain => {
                let texts = self.system.iter().chain(turns.iter().map(|(_, text)| text));
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
                let system = self.system.iter().map(|s| Message::new("system", s.as_str()));
                let said = turns.iter().map(|(role, text)| Message::new(*role, text.as_str()));
                let messages: Vec<Message> = system.chain(said).collect();
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

    /// Asks two mixes the same, in one batch: `question`, or what was asked last. The
    /// conversation stays as it is.
    pub fn compare(&self, mixes: [&Mix; 2], question: Option<&str>) -> Outcome<[Answer; 2]> {
        let mut turns = self.turns.clone();
        match question {
            Some(text) => turns.push(("user", text.into())),
            None => turns.truncate(turns.iter().rposition(|(role, _)| *role == "user").map_or(0, |i| i + 1)),
        }
        if turns.is_empty() {
            return Err(Failure::runtime("nothing was asked yet; write /compare A B TEXT"));
        }
        let tokens = self.prompt(&turns)?;
        let session = |mix: &Mix| {
            self.engine.session(&SessionOptions { adapters: mix.entries(), ..Default::default() })
        };
        let (mut first, mut second) = (session(mixes[0])?, session(mixes[1])?);
        let a = first.generate(self.request(tokens.clone()))?;
        let b = second.generate(self.request(tokens))?;
        answer::follow_both(a, b)
    }
}

/// Seconds since 1970, for templates that print the date.
fn now() -> Option<i64> {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok()?;
    i64::try_from(since.as_secs()).ok()
}
