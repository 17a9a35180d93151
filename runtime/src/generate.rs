//! What a session is asked for, and the stream that answers.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
    time::Duration,
};

use crate::{Result, SamplerOptions, engine::Shared, lock, scheduler::SequenceId};

/// One request to a session: tokens to append, and what to do after them.
#[derive(Clone, Debug)]
pub struct Request {
    /// Appended to the session's tokens. May be empty if the session has some.
    pub tokens: Vec<u32>,
    /// Tokens to generate at most; 0 only runs the prompt.
    pub max_new_tokens: usize,
    /// How the next token is chosen.
    pub sampler: SamplerOptions,
    /// Generation ends where one of these appears in the text; it is not part of the answer.
    pub stop: Vec<String>,
    /// Goes on past end-of-generation tokens.
    pub ignore_eos: bool,
    /// Also yields the logits after every prompt token that has to be run: [`Event::Logits`].
    pub prompt_logits: bool,
}

impl Default for Request {
    fn default() -> Self {
        Request {
            tokens: Vec::new(),
            max_new_tokens: 256,
            sampler: SamplerOptions::default(),
            stop: Vec::new(),
            ignore_eos: false,
            prompt_logits: false,
        }
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model chose an end-of-generation token.
    Eos,
    /// A stop string appeared.
    Stop,
    /// `max_new_tokens` were generated.
    Length,
    /// The session's context is full.
    ContextFull,
    /// [`Generation::cancel`] or [`Canceller::cancel`] was called.
    Cancelled,
}

/// One step of an answer.
#[derive(Clone, Debug)]
pub enum Event {
    /// A token was chosen.
    Token {
        /// Its id.
        id: u32,
        /// Text that became certain with it: whole characters, nothing that could still turn out
        /// to be part of a stop string. May be empty.
        text: String,
        /// Natural log-probability, if asked for, before any sampler changed the distribution.
        logprob: Option<f32>,
        /// The most probable alternatives (token, log-probability), if asked for.
        top: Vec<(u32, f32)>,
    },
    /// Text held back until the end; only when there is some.
    Text(String),
    /// Logits after the prompt token at `position` of the session, one per vocabulary entry.
    Logits {
        /// The token's position in the session.
        position: usize,
        /// vocab values.
        values: Vec<f32>,
    },
}

/// What a request cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Prompt tokens that were already in the KV cache.
    pub cached_tokens: usize,
    /// Prompt tokens that were run.
    pub prompt_tokens: usize,
    /// Time of the steps that ran prompt tokens.
    pub prompt_time: Duration,
    /// Tokens generated.
    pub generated_tokens: usize,
    /// Time of the steps that ran generated tokens.
    pub generated_time: Duration,
}

/// Where the scheduler leaves events for whoever holds the [`Generation`].
#[derive(Default)]
pub(crate) struct Stream {
    state: Mutex<StreamState>,
    cancelled: AtomicBool,
}

#[derive(Default)]
struct StreamState {
    events: VecDeque<Event>,
    end: Option<Result<FinishReason>>,
    stats: Stats,
}

/// Events that may wait before a request pauses until its reader catches up.
const BACKPRESSURE: usize = 256;

impl Stream {
    pub(crate) fn push(&self, event: Event) {
        lock(&self.state).events.push_back(event);
    }

    pub(crate) fn finish(&self, end: Result<FinishReason>) {
        lock(&self.state).end.get_or_insert(end);
    }

    pub(crate) fn set_stats(&self, stats: Stats) {
        lock(&self.state).stats = stats;
    }

    pub(crate) fn is_full(&self) -> bool {
        lock(&self.state).events.len() >= BACKPRESSURE
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }
}

/// Ends a generation from anywhere, at the next step.
#[derive(Clone)]
pub struct Canceller(Arc<Stream>);

impl Canceller {
    /// Asks for the end. Takes effect before the next step starts.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Release);
    }
}

/// A running request: an iterator over its events. Dropping it cancels the request; so does any
/// change to its session, and the session's end.
///
/// Whichever thread asks for the next event runs a step for all sessions of the engine if nobody
/// else is doing so; there is no thread in the background.
pub struct Generation {
    shared: Arc<Shared>,
    id: SequenceId,
    stream: Arc<Stream>,
    done: bool,
}

impl Generation {
    pub(crate) fn new(shared: Arc<Shared>, id: SequenceId, stream: Arc<Stream>) -> Self {
        Generation { shared, id, stream, done: false }
    }

    /// A handle that ends this generation from another thread.
    pub fn canceller(&self) -> Canceller {
        Canceller(self.stream.clone())
    }

    /// Ends this generation at the next step.
    pub fn cancel(&self) {
        self.canceller().cancel();
    }

    /// Why it ended; `None` while it runs or if it ended with an error.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        match &lock(&self.stream.state).end {
            Some(Ok(reason)) => Some(*reason),
            _ => None,
        }
    }

    /// What it has cost so far.
    pub fn stats(&self) -> Stats {
        lock(&self.stream.state).stats
    }

    /// Runs to the end and returns the whole text.
    pub fn text(&mut self) -> Result<String> {
        let mut text = String::new();
        for event in self {
            match event? {
                Event::Token { text: piece, .. } | Event::Text(piece) => text += &piece,
                Event::Logits { .. } => {}
            }
        }
        Ok(text)
    }

    fn poll(&mut self) -> Option<Option<Result<Event>>> {
        let mut state = lock(&self.stream.state);
        if let Some(event) = state.events.pop_front() {
            return Some(Some(Ok(event)));
        }
        match &state.end {
            None => None,
            Some(Ok(_)) => Some(None),
            Some(Err(e)) => Some(Some(Err(e.clone()))),
        }
    }

    /// The next event if it is there already; runs nothing. For hosts that call
    /// [`crate::Engine::step`] themselves.
    pub fn poll_next(&mut self) -> Poll<Option<Result<Event>>> {
        if self.done {
            return Poll::Ready(None);
        }
        match self.poll() {
            Some(next) => {
                self.done = !matches!(next, Some(Ok(_)));
                Poll::Ready(next)
            }
            None => Poll::Pending,
        }
    }

    /// The next event of whichever of these generations of one engine has one first, with that
    /// generation's index; `None` if all of them have ended before. As with [`Iterator::next`],
    /// an event of `None` is the end of that generation.
    pub fn next_of(generations: &mut [&mut Generation]) -> Option<(usize, Option<Result<Event>>)> {
        let shared = generations.iter().find(|g| !g.done)?.shared.clone();
        loop {
            let seen = shared.steps_seen();
            for (i, generation) in generations.iter_mut().enumerate().filter(|(_, g)| !g.done) {
                if let Poll::Ready(next) = generation.poll_next() {
                    return Some((i, next));
                }
            }
            match shared.try_step() {
                Some(Ok(_)) => {}
                Some(Err(e)) => {
                    let first = generations.iter_mut().position(|g| !g.done)?;
                    generations.get_mut(first)?.done = true;
                    return Some((first, Some(Err(e))));
                }
                None => shared.wait_for_step(seen),
            }
        }
    }
}

impl Iterator for Generation {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Result<Event>> {
        if self.done {
            return None;
        }
        Generation::next_of(&mut [self]).and_then(|(_, event)| event)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        // Lets a step of another thread end early enough, then takes the request out: nobody may
        // ever run another step.
        self.cancel();
        lock(&self.shared.scheduler).cancel(self.id, &self.stream);
    }
}
