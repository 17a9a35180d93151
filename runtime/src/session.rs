//! One conversation: its tokens, its adapters, its requests.

use std::sync::Arc;

use crate::{
    AdapterId, Error, Generation, Request, Result,
    engine::Shared,
    scheduler::SequenceId,
    sequence::{Active, works_from},
    stream::Stream,
};

/// What a session starts with.
#[derive(Clone, Debug, Default)]
pub struct SessionOptions {
    /// Adapters and their weights; none is the base alone.
    pub adapters: Vec<(AdapterId, f32)>,
    /// Sessions with a higher number go first when a step has not room for all.
    pub priority: i32,
}

/// What happens to cached keys and values when a session's adapters change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnSwitch {
    /// They are computed again under the new adapters: the answers are those of a new session
    /// with that adapter.
    #[default]
    Recompute,
    /// They stay: instant, but what was read before was read by another adapter, and answers
    /// differ from a new session's. [`Session::is_mixed`] tells.
    Keep,
}

/// An adapter of a session.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionAdapter {
    /// The loading that the session was given, which it keeps whatever happens to the name.
    pub id: AdapterId,
    /// The name it had in the store.
    pub name: String,
    /// λ.
    pub scale: f32,
    /// The position from which on it works, as the session's last request found it: 0 unless it has
    /// invocation tokens, `None` if these do not stand in the session.
    pub works_from: Option<usize>,
}

/// A conversation of one [`crate::Engine`]. It keeps the engine alive.
pub struct Session {
    pub(crate) shared: Arc<Shared>,
    pub(crate) id: SequenceId,
}

impl Session {
    pub(crate) fn new(shared: Arc<Shared>, options: &SessionOptions) -> Result<Session> {
        let adapters = Arc::new(shared.adapters.bind(&options.adapters)?);
        let id = shared.scheduler().add(adapters, options.priority);
        Ok(Session { shared, id })
    }

    /// The conversation so far.
    pub fn tokens(&self) -> Vec<u32> {
        self.shared.scheduler().get(self.id).tokens.clone()
    }

    /// How many of its tokens have their keys and values cached.
    pub fn cached_tokens(&self) -> usize {
        self.shared.scheduler().get(self.id).pages.len()
    }

    /// Whether part of the cache was computed under other adapters than the present ones.
    pub fn is_mixed(&self) -> bool {
        self.shared.scheduler().get(self.id).mixed
    }

    /// Changes the adapters: a change of index, whatever their size. A running generation ends, unless
    /// the new ones answer as the old ones do (other loadings of the same adapters with the same
    /// weights, or more of them with weight 0): then they take their place and nothing else changes.
    pub fn set_adapters(&mut self, adapters: &[(AdapterId, f32)], on_switch: OnSwitch) -> Result<()> {
        let bound = Arc::new(self.shared.adapters.bind(adapters)?);
        let keep = on_switch == OnSwitch::Keep;
        self.shared.change(|scheduler| scheduler.switch(self.id, bound, keep));
        Ok(())
    }

    /// The adapters that the session has now.
    pub fn adapters(&self) -> Vec<SessionAdapter> {
        let scheduler = self.shared.scheduler();
        let sequence = scheduler.get(self.id);
        let entries = sequence.adapters.entries().zip(sequence.adapters.set.entries());
        let describe = |((id, name, scale), (adapter, _)): ((AdapterId, &str, f32), &(Arc<_>, f32))| {
            let works_from = works_from(&sequence.phases, adapter);
            SessionAdapter { id, name: name.into(), scale, works_from }
        };
        entries.map(describe).collect()
    }

    /// Sessions with a higher number go first when a step has not room for all.
    pub fn set_priority(&mut self, priority: i32) {
        self.shared.scheduler().set_priority(self.id, priority);
    }

    /// Forgets all tokens from position `len` on.
    pub fn rewind(&mut self, len: usize) {
        self.shared.change(|scheduler| scheduler.rewind(self.id, len));
    }

    /// Forgets everything but the adapters.
    pub fn clear(&mut self) {
        self.rewind(0);
    }

    /// Makes the conversation equal to `tokens`, keeping what is cached of their common
    /// beginning, and returns how many tokens were kept; the rest of `tokens` is for
    /// [`Request::tokens`].
    pub fn rewind_to_common(&mut self, tokens: &[u32]) -> usize {
        self.shared.change(|scheduler| {
            let have = &scheduler.get(self.id).tokens;
            let common = have.iter().zip(tokens).take_while(|(a, b)| a == b).count();
            scheduler.rewind(self.id, common);
            common
        })
    }

    /// A second session with the same tokens, adapters and cached keys and values, which both
    /// share until one of them goes on.
    pub fn fork(&self) -> Session {
        let id = self.shared.scheduler().fork(self.id);
        Session { shared: self.shared.clone(), id }
    }

    /// Appends the request's tokens and starts to answer. One request at a time: a running
    /// generation of this session ends.
    pub fn generate(&mut self, request: Request) -> Result<Generation> {
        let model = &self.shared.model;
        model.files.iter().try_for_each(|f| f.check_unchanged())?;
        let n_ctx = self.shared.n_ctx;
        let vocab = model.decoder.vocab_size();
        if let Some(bad) = request.tokens.iter().find(|t| **t as usize >= vocab) {
            return Err(Error::Request(format!("token {bad} is outside the vocabulary of {vocab}")));
        }
        let stream = Arc::new(Stream::new(request.max_queued));
        // Before the lock: others run meanwhile.
        let active = Active::new(&request, n_ctx, model, stream.clone())?;
        self.shared.change(|scheduler| {
            let len = scheduler.get(self.id).tokens.len() + request.tokens.len();
            if len == 0 {
                let message = "the prompt has no token: give at least one, such as the model's BOS";
                return Err(Error::Request(message.into()));
            }
            if len > n_ctx {
                let message = format!(
                    "the prompt and what is before it have {len} tokens, the context holds {n_ctx}; shorten it or raise the context length"
                );
                return Err(Error::Request(message));
            }
            scheduler.submit(self.id, &request.tokens, active, &model.tokenizer)
        })?;
        Ok(Generation::new(self.shared.clone(), self.id, stream))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.change(|scheduler| scheduler.remove(self.id));
    }
}
