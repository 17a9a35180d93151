//! What a session is asked for, and the stream that answers.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use crate::{
    Grammar, Result, SamplerOptions, engine::Shared, progress::Progress, scheduler::SequenceId,
    stream::Stream,
};

/// Final states that a request asks for, normed as the output layer takes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hidden {
    /// None.
    #[default]
    None,
    /// That of the last of the request's tokens.
    Last,
    /// Those of all of the request's tokens.
    All,
}

/// One request to a session: tokens to append, and what to do after them.
#[derive(Clone, Debug)]
pub struct Request {
    /// Appended to the session's tokens. May be empty if the session has some.
    pub tokens: Vec<u32>,
    /// Tokens to generate at most; 0 only runs the prompt.
    pub max_new_tokens: usize,
    /// How the next token is chosen.
    pub sampler: SamplerOptions,
    /// What the answer must match; see [`crate::LoadedModel::grammar`].
    pub grammar: Option<Grammar>,
    /// Generation ends where one of these appears in the text; it is not part of the answer.
    pub stop: Vec<String>,
    /// Goes on past end-of-generation tokens.
    pub ignore_eos: bool,
    /// Also yields the logits after every one of `tokens`: [`Event::Logits`].
    pub prompt_logits: bool,
    /// Also yields the log-probability of every one of `tokens` behind what is before it, with so
    /// many of the most probable alternatives: [`Event::Prompt`]. The first token of a session has
    /// nothing before it, and none.
    pub prompt_logprobs: Option<usize>,
    /// Also yields final states: [`Event::Hidden`].
    pub hidden: Hidden,
    /// Events that may wait for their reader. A request whose queue is full is not run until
    /// somebody reads, and gives its place in batch and cache to others.
    pub max_queued: usize,
}

impl Default for Request {
    fn default() -> Self {
        Request {
            tokens: Vec::new(),
            max_new_tokens: 256,
            sampler: SamplerOptions::default(),
            grammar: None,
            stop: Vec::new(),
            ignore_eos: false,
            prompt_logits: false,
            prompt_logprobs: None,
            hidden: Hidden::None,
            max_queued: 256,
        }
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model chose an end-of-generation token.
    Eos,
    /// A stop string appeared, or the request's grammar allows nothing more.
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
#[non_exhaustive]
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
    /// What the model thought of a prompt token.
    Prompt {
        /// The token's position in the session.
        position: usize,
        /// Its id.
        id: u32,
        /// Its natural log-probability after the tokens before it.
        logprob: f32,
        /// The most probable alternatives (token, log-probability), as many as asked for.
        top: Vec<(u32, f32)>,
    },
    /// The final state of the prompt token at `position` of the session, after the last norm.
    Hidden {
        /// The token's position in the session.
        position: usize,
        /// n_embd values.
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
    /// The seed in use, also where the request left it open: given again, it gives the same draws.
    pub seed: u64,
}

/// Ends a generation from anywhere, at the next step.
#[derive(Clone)]
pub struct Canceller {
    stream: Arc<Stream>,
    progress: Arc<Progress>,
}

impl Canceller {
    /// Asks for the end. Takes effect before the next step starts.
    pub fn cancel(&self) {
        self.stream.cancel();
        self.progress.announce();
    }
}

/// Tells another thread how far a generation has come.
#[derive(Clone)]
pub struct Watch(Arc<Stream>);

impl Watch {
    /// What it has cost so far.
    pub fn stats(&self) -> Stats {
        self.0.stats()
    }
}

/// A running request: an iterator over its events, and a [`futures_core::Stream`] of them.
/// Dropping it cancels the request; so does any change to its session, and the session's end.
///
/// Whichever thread asks for the next event runs a step for all sessions of the engine if nobody
/// else is doing so; there is no thread in the background. A poll runs at most one step, which takes
/// as long as the model takes for a batch, and asks to be polled again; while another thread runs
/// the steps, it returns at once and is woken at the end of each. An executor that must never be
/// held up lets a thread of its own call [`crate::Engine::drive`], and polls only look.
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
        Canceller { stream: self.stream.clone(), progress: self.shared.progress.clone() }
    }

    /// A handle that tells how far it has come, from another thread.
    pub fn watch(&self) -> Watch {
        Watch(self.stream.clone())
    }

    /// Ends this generation at the next step.
    pub fn cancel(&self) {
        self.canceller().cancel();
    }

    /// Why it ended; `None` while it runs or if it ended with an error.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.stream.finish_reason()
    }

    /// What it has cost so far.
    pub fn stats(&self) -> Stats {
        self.stream.stats()
    }

    /// Runs to the end and returns the whole text, without what was read before.
    ///
    /// # Errors
    /// The one that it ended with, also if that was read before.
    pub fn text(&mut self) -> Result<String> {
        let mut text = String::new();
        for event in self.by_ref() {
            if let Event::Token { text: piece, .. } | Event::Text(piece) = event? {
                text += &piece;
            }
        }
        match self.stream.poll() {
            Poll::Ready(Some(Err(e))) => Err(e),
            _ => Ok(text),
        }
    }

    /// The next event if it is there already, the end if it has come; runs nothing. For hosts that
    /// call [`crate::Engine::step`] themselves.
    pub fn poll_next(&mut self) -> Poll<Option<Result<Event>>> {
        if self.done {
            return Poll::Ready(None);
        }
        let was_full = self.stream.room() == 0;
        let next = self.stream.poll();
        if was_full && self.shared.is_driven() {
            self.shared.progress.announce();
        }
        self.done = matches!(next, Poll::Ready(None | Some(Err(_))));
        next
    }

    /// The next event of whichever of these generations of one engine has one first, with that
    /// generation's index; `None` if all of them have ended before. As with [`Iterator::next`],
    /// an event of `None` is the end of that generation.
    pub fn next_of(generations: &mut [&mut Generation]) -> Option<(usize, Option<Result<Event>>)> {
        let shared = generations.iter().find(|g| !g.done)?.shared.clone();
        loop {
            let seen = shared.progress.seen();
            for (i, generation) in generations.iter_mut().enumerate().filter(|(_, g)| !g.done) {
                if let Poll::Ready(next) = generation.poll_next() {
                    return Some((i, next));
                }
            }
            match shared.try_step() {
                Some(true) => {}
                // Room in the cache is what it waits for, while a session is being saved or restored.
                Some(false) => shared.progress.wait_for_change(seen),
                None => shared.progress.wait_for_step(seen),
            }
        }
    }
}

impl Iterator for Generation {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Result<Event>> {
        Generation::next_of(&mut [self]).and_then(|(_, event)| event)
    }
}

impl futures_core::Stream for Generation {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Event>>> {
        let seen = self.shared.progress.seen();
        if let Poll::Ready(next) = Generation::poll_next(&mut self) {
            return Poll::Ready(next);
        }
        if self.shared.is_driven() {
            self.shared.progress.wake_after_step(seen, cx.waker());
            return Poll::Pending;
        }
        match self.shared.try_step() {
            Some(_) => {
                let next = Generation::poll_next(&mut self);
                if next.is_pending() {
                    cx.waker().wake_by_ref();
                }
                next
            }
            None => {
                self.shared.progress.wake_after_step(seen, cx.waker());
                Poll::Pending
            }
        }
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
        self.shared.change(|scheduler| scheduler.cancel(self.id, &self.stream));
    }
}
