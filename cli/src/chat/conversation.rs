//! A conversation: what was said, and how it becomes the model's next prompt.

use clap::ValueEnum;
use lory_runtime::{Engine, Grammar, OnSwitch, Request, SamplerOptions, Session, SessionOptions};

use super::{format::Format, transcript::Transcript};
use crate::{
    answer::{self, Answer},
    failure::{Failure, Outcome},
    mix::Mix,
    prompt::check_length,
};

/// What happens to what was read so far when the adapters change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnSwitchArg {
    /// It is read again: answers are those of a new conversation with these adapters.
    Recompute,
    /// It stays as the previous adapters read it: instant, and approximate.
    Keep,
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

    /// Whether the format has a place for a system message; a template may pass over it in silence.
    pub fn heeds_system(&self) -> bool {
        let prompt = |system| self.format.prompt(&self.engine, system, &[("user", String::new())]).ok();
        prompt(Some("x")) != prompt(None)
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
        check_length(&self.engine, &tokens)?;
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
        self.format.prompt(&self.engine, self.system.as_deref(), turns)
    }

    /// Asks several mixes the same, in one batch: `question`, or what was asked last. The conversation stays as it is.
    pub fn compare(&self, mixes: &[Mix], question: Option<&str>) -> Outcome<Vec<Answer>> {
        let mut turns = self.turns.clone();
        match question {
            Some(text) => turns.push(("user", text.into())),
            None => turns.truncate(turns.iter().rposition(|(role, _)| *role == "user").map_or(0, |i| i + 1)),
        }
        if turns.is_empty() {
            return Err(Failure::runtime("nothing was asked yet; write /compare A B TEXT"));
        }
        let tokens = self.prompt(&turns)?;
        check_length(&self.engine, &tokens)?;
        // A session's end would be that of its generation.
        let mut sessions = mixes
            .iter()
            .map(|mix| self.engine.session(&SessionOptions { adapters: mix.entries(), ..Default::default() }))
            .collect::<Result<Vec<Session>, _>>()?;
        let generations = sessions
            .iter_mut()
            .map(|s| s.generate(self.request(tokens.clone())))
            .collect::<Result<_, _>>()?;
        answer::follow_all(generations)
    }
}
