//! Many questions at once, each to an adapter of its own.

use std::{
    task::Poll,
    time::{Duration, Instant},
};

use lory_runtime::{
    AdapterId, Engine, Event, FinishReason, Generation, Request, SamplerOptions, Session, SessionOptions,
};

use crate::{chat::format::Format, failure::Outcome};

/// A prompt and who is to answer it.
pub struct Question {
    /// The prompt, special tokens included.
    pub tokens: Vec<u32>,
    /// The adapter; the base alone without one.
    pub adapter: Option<AdapterId>,
    /// Tokens of the answer at most.
    pub most: usize,
    /// Goes on to `most`, whatever the model says.
    pub to_the_end: bool,
}

/// What was answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// All of it.
    pub text: String,
    /// Whether the model ended it, rather than its limit.
    pub ended: bool,
}

/// Replies in the order of their questions, and what they cost.
#[derive(Debug, Default)]
pub struct Answers {
    /// One for each question.
    pub replies: Vec<Reply>,
    /// Tokens that were read.
    pub prompt_tokens: usize,
    /// Tokens that were made, the ends of answers included.
    pub generated_tokens: usize,
    /// From the first question to the last answer.
    pub time: Duration,
}

impl Answers {
    /// Tokens per second, read and made.
    pub fn rate(&self) -> f64 {
        (self.prompt_tokens + self.generated_tokens) as f64 / self.time.as_secs_f64().max(1e-9)
    }
}

/// The tokens of a prompt, as the model's template wants it.
pub fn tokens(engine: &Engine, format: &Format, prompt: &str) -> Outcome<Vec<u32>> {
    format.prompt(engine, None, &[("user", prompt.to_owned())])
}

/// Tokens that `answer` takes, with one more to end it.
pub fn length(engine: &Engine, answer: &str) -> usize {
    let plain = lory_models::tokenizer::EncodeOptions { add_special: false, parse_special: false };
    engine.model().tokenizer.encode(answer, plain).len() + 1
}

/// A question that is being answered. The session's end would be that of its generation.
struct Asked {
    question: usize,
    generation: Generation,
    _session: Session,
}

/// Answers all questions greedily, `at_once` side by side; `answered` is told of every answer.
pub fn answer(
    engine: &Engine,
    questions: &[Question],
    at_once: usize,
    mut answered: impl FnMut(),
) -> Outcome<Answers> {
    let start = Instant::now();
    let mut answers = Answers { replies: vec![Reply::default(); questions.len()], ..Answers::default() };
    let mut waiting = questions.iter().enumerate();
    let mut asked: Vec<Asked> = Vec::new();
    loop {
        while asked.len() < at_once.max(1)
            && let Some((i, question)) = waiting.next()
        {
            asked.push(ask(engine, i, question)?);
        }
        if asked.is_empty() {
            break;
        }
        engine.step()?;
        let mut open = Vec::with_capacity(asked.len());
        for mut one in asked {
            if take(&mut one, &mut answers)? {
                open.push(one);
            } else {
                answered();
            }
        }
        asked = open;
    }
    answers.time = start.elapsed();
    Ok(answers)
}

fn ask(engine: &Engine, i: usize, question: &Question) -> Outcome<Asked> {
    let adapters = question.adapter.map(|id| (id, 1.0)).into_iter().collect();
    let mut session = engine.session(&SessionOptions { adapters, ..Default::default() })?;
    let generation = session.generate(Request {
        tokens: question.tokens.clone(),
        max_new_tokens: question.most,
        sampler: SamplerOptions { temp: 0.0, ..SamplerOptions::default() },
        ignore_eos: question.to_the_end,
        ..Default::default()
    })?;
    Ok(Asked { question: i, generation, _session: session })
}

/// Takes what has been answered since; `false` at the end.
fn take(one: &mut Asked, answers: &mut Answers) -> Outcome<bool> {
    loop {
        match one.generation.poll_next() {
            Poll::Pending => return Ok(true),
            Poll::Ready(Some(event)) => {
                if let Event::Token { text, .. } | Event::Text(text) = event?
                    && let Some(reply) = answers.replies.get_mut(one.question)
                {
                    reply.text += &text;
                }
            }
            Poll::Ready(None) => {
                let stats = one.generation.stats();
                answers.prompt_tokens += stats.prompt_tokens + stats.cached_tokens;
                answers.generated_tokens += stats.generated_tokens;
                if let Some(reply) = answers.replies.get_mut(one.question) {
                    reply.ended = one.generation.finish_reason() == Some(FinishReason::Eos);
                }
                return Ok(false);
            }
        }
    }
}
