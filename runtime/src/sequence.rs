//! One conversation inside the scheduler: its tokens, its pages, its adapters, its request.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use lory_models::{
    adapter::{Adapter, AdapterSet, Phases},
    kv_cache::Pages,
    tokenizer::{DecodeOptions, Detokenizer, EncodeOptions, Tokenizer},
};

use crate::{
    Error, Event, FinishReason, Hidden, LoadedModel, Metrics, Request, Result, Sampler, SamplerOptions,
    Stats,
    adapters::Bound,
    memory,
    sampler::{DryBreakers, Logits, token_logprob},
    stop::StopMatcher,
    stream::Stream,
};

/// A request being worked on.
pub(crate) struct Active {
    pub stream: Arc<Stream>,
    pub stats: Stats,
    /// What decides whose turn it is.
    pub turn: Turn,
    /// Tokens of the session before the request's.
    pub prompt_start: usize,
    /// Tokens of the session when the prompt was complete.
    pub prompt_end: usize,
    outputs: PromptOutputs,
    /// The first prompt token whose outputs were not handed out yet. A request that lost its keys
    /// and values runs tokens a second time, but reports them once.
    report_from: usize,
    /// Tokens that were run once, and are not counted again.
    counted: usize,
    clock: Clock,
    ignore_eos: bool,
    max_new_tokens: usize,
    sampler: Sampler,
    stop: StopMatcher,
    detokenizer: Detokenizer,
    /// Longest the sequence may get.
    n_ctx: usize,
    /// Set when the request is over; the sequence drops it at the end of the step.
    end: Option<Result<FinishReason>>,
}

/// A request's place in the order of requests.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Turn {
    /// When it came, on the scheduler's clock.
    pub arrival: u64,
    /// The last step that ran it.
    pub last_run: u64,
    /// Steps since then in which it could have run.
    pub waited: u32,
    /// Steps in which the cache had no room for it.
    pub starved: u32,
}

/// What a request asks about its own tokens.
#[derive(Clone, Copy, Debug)]
struct PromptOutputs {
    logits: bool,
    logprobs: Option<usize>,
    hidden: Hidden,
}

/// When what happened, for the metrics.
#[derive(Clone, Copy, Debug)]
struct Clock {
    submitted: Instant,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Active {
    /// Checks the options of `request`, and makes what it needs to run: a sampler that looks for the
    /// first time at a vocabulary takes its time, and so may the copy of a grammar's state.
    pub(crate) fn new(
        request: &Request,
        n_ctx: usize,
        model: &LoadedModel,
        stream: Arc<Stream>,
    ) -> Result<Active> {
        let tokenizer = &model.tokenizer;
        let mut sampler = Sampler::with_breakers(&request.sampler, breakers(&request.sampler, model))?;
        if let Some(grammar) = &request.grammar {
            if !grammar.is_for(tokenizer) {
                let message = "the grammar was compiled for another model: compile it for this one";
                return Err(Error::Request(message.into()));
            }
            sampler.constrain(grammar.constraint(!request.ignore_eos));
        }
        // A grammar speaks of every character, also of the blank that the beginning of a text loses.
        let decode = DecodeOptions { special: false, continuation: request.grammar.is_some() };
        Ok(Active {
            stream,
            stats: Stats { seed: sampler.seed(), ..Stats::default() },
            turn: Turn::default(),
            prompt_start: 0,
            prompt_end: 0,
            outputs: PromptOutputs {
                logits: request.prompt_logits,
                logprobs: request.prompt_logprobs,
                hidden: request.hidden,
            },
            report_from: 0,
            counted: 0,
            clock: Clock { submitted: Instant::now(), first_token: None, last_token: None },
            ignore_eos: request.ignore_eos,
            max_new_tokens: request.max_new_tokens,
            sampler,
            stop: StopMatcher::new(&request.stop),
            detokenizer: Detokenizer::new(tokenizer.clone(), decode),
            n_ctx,
            end: None,
        })
    }

    /// Takes the tokens before the answer.
    ///
    /// # Errors
    /// No memory for what penalties look back on.
    pub(crate) fn follow(
        &mut self,
        history: impl ExactSizeIterator<Item = u32> + Clone,
        tokenizer: &Arc<Tokenizer>,
    ) -> Result<()> {
        self.sampler.reserve(history.len().saturating_add(self.max_new_tokens).min(self.n_ctx))?;
        // After nothing but control tokens such as BOS, the answer is the beginning of a text.
        if history.clone().any(|token| !tokenizer.is_control(token)) {
            let decode = DecodeOptions { special: false, continuation: true };
            self.detokenizer = Detokenizer::new(tokenizer.clone(), decode);
        }
        self.sampler.follow(history);
        Ok(())
    }

    /// Whether nobody reads what it has to say.
    pub(crate) fn is_paused(&self) -> bool {
        self.stream.room() == 0
    }

    /// How many tokens may be taken from the cache instead of being run: those whose outputs nobody
    /// asked for, and never the last one, whose logits choose the next.
    pub(crate) fn may_be_cached(&self, tokens: usize) -> usize {
        let PromptOutputs { logits, logprobs, hidden } = self.outputs;
        let all = tokens.saturating_sub(1);
        let all = if logits || hidden == Hidden::All { all.min(self.prompt_start) } else { all };
        match logprobs {
            // A token's log-probability comes from the token before it.
            Some(_) => all.min(self.prompt_start.saturating_sub(1)),
            None => all,
        }
    }

    /// Prompt tokens of one step at most, so that their outputs fit the queue.
    fn rows_at_once(&self) -> usize {
        let PromptOutputs { logits, logprobs, hidden } = self.outputs;
        match usize::from(logits) + usize::from(logprobs.is_some()) + usize::from(hidden == Hidden::All) {
            0 => usize::MAX,
            events => (self.stream.room() / events).max(1),
        }
    }

    fn reports(&self, position: usize) -> bool {
        (self.report_from..self.prompt_end).contains(&position)
    }

    fn wants_prompt_logits(&self, position: usize) -> bool {
        self.outputs.logits && self.reports(position) && position >= self.prompt_start
    }

    fn wants_logprob_after(&self, position: usize) -> bool {
        let next = position + 1;
        self.outputs.logprobs.is_some()
            && self.reports(position)
            && (self.prompt_start..self.prompt_end).contains(&next)
    }

    fn wants_hidden(&self, position: usize) -> bool {
        self.reports(position)
            && match self.outputs.hidden {
                Hidden::None => false,
                Hidden::Last => position + 1 == self.prompt_end,
                Hidden::All => position >= self.prompt_start,
            }
    }
}

/// Which tokens end a repetition; found only if the sampler looks for repetitions.
fn breakers(options: &SamplerOptions, model: &LoadedModel) -> DryBreakers {
    if options.dry.multiplier == 0.0 {
        return DryBreakers::default();
    }
    let tokenizer = &model.tokenizer;
    let piece = |id| tokenizer.token_bytes(id).unwrap_or_default().into_owned();
    let encode = |text: &str| tokenizer.encode(text, EncodeOptions::default());
    let strings = &options.dry.sequence_breakers;
    let make = || DryBreakers::new(strings, tokenizer.vocab_size() as u32, piece, encode);
    model.breakers.get(strings, make)
}

/// The position from which on an adapter works; `None` if it never does.
pub(crate) fn works_from(phases: &Phases, adapter: &Adapter) -> Option<usize> {
    let works = |set: &AdapterSet| set.entries().iter().any(|(a, _)| a.identity() == adapter.identity());
    phases.runs().iter().find(|run| works(&run.set)).map(|run| run.start)
}

/// A sequence of tokens, part of which has its keys and values cached.
pub(crate) struct Sequence {
    pub tokens: Vec<u32>,
    /// Keys and values of the first `pages.len()` tokens.
    pub pages: Pages,
    pub adapters: Arc<Bound>,
    /// Which of its adapters work where; found anew for every request.
    pub phases: Phases,
    /// Whether some cached tokens were computed under another adapter set (`OnSwitch::Keep`).
    pub mixed: bool,
    /// Whether some cached tokens came from a file.
    pub restored: bool,
    /// Whether nobody may take its pages.
    pub pinned: bool,
    pub priority: i32,
    pub last_used: u64,
    pub active: Option<Active>,
}

impl Sequence {
    pub(crate) fn new(adapters: Arc<Bound>, priority: i32) -> Self {
        let phases = Phases::new(&adapters.set, &[]);
        Sequence {
            tokens: Vec::new(),
            pages: Pages::default(),
            adapters,
            phases,
            mixed: false,
            restored: false,
            pinned: false,
            priority,
            last_used: 0,
            active: None,
        }
    }

    /// Its phases with the adapters of `set`, whose key is that of its own: what was found for the
    /// request holds, not what has been generated since.
    pub(crate) fn phases_of(&self, set: &Arc<AdapterSet>) -> Phases {
        let mut activations = set.activations(&self.tokens);
        for (start, (adapter, scale)) in activations.iter_mut().zip(set.entries()) {
            if *scale != 0.0 {
                *start = works_from(&self.phases, adapter);
            }
        }
        Phases::starting(set, &activations)
    }

    /// Where nothing is cached, it does not matter any more where it came from.
    pub(crate) fn forget_origin(&mut self) {
        self.mixed &= !self.pages.is_empty();
        self.restored &= !self.pages.is_empty();
    }

    /// Tokens that have still to be run.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.pages.len()
    }

    /// Rows that it would run now, `budget` at most.
    pub(crate) fn rows(&self, budget: usize) -> usize {
        let at_once = self.active.as_ref().map_or(0, Active::rows_at_once);
        self.pending().min(budget).min(at_once)
    }

    /// Whether its keys and values are what any session with these tokens and adapters would have,
    /// so that they may be shared, and dropped to be computed again.
    pub(crate) fn is_pure(&self) -> bool {
        !self.mixed
    }

    /// Whether the logits after the token at `position` are needed.
    pub(crate) fn wants_logits(&self, position: usize) -> bool {
        let last = position + 1 == self.tokens.len();
        self.wants_report(position) || self.active.as_ref().is_some_and(|a| last && a.max_new_tokens > 0)
    }

    /// Whether the logits after the token at `position` are reported on ([`Sequence::report`]).
    pub(crate) fn wants_report(&self, position: usize) -> bool {
        let reported = |a: &Active| a.wants_prompt_logits(position) || a.wants_logprob_after(position);
        self.active.as_ref().is_some_and(reported)
    }

    /// How many of the likeliest of `vocab` tokens are all that is needed of the logits after the token at `position`; `None` if
    /// that is all of them.
    pub(crate) fn wants_top_k(&self, position: usize, vocab: usize) -> Option<usize> {
        self.active.as_ref().filter(|_| !self.wants_report(position))?.sampler.top_k(vocab)
    }

    /// Whether the final state of the token at `position` is needed.
    pub(crate) fn wants_hidden(&self, position: usize) -> bool {
        self.active.as_ref().is_some_and(|a| a.wants_hidden(position))
    }

    /// Ends the request, if there is one.
    pub(crate) fn end(&mut self, end: Result<FinishReason>, metrics: &mut Metrics) {
        let Some(mut active) = self.active.take() else { return };
        let rest = active.stop.finish(&active.detokenizer.finish());
        if !rest.is_empty() {
            active.stream.push(Event::Text(rest));
        }
        metrics.count_end(&end);
        if let (Some(first), Some(last)) = (active.clock.first_token, active.clock.last_token)
            && active.stats.generated_tokens > 1
        {
            metrics.tpot.record((last - first) / (active.stats.generated_tokens as u32 - 1));
        }
        active.stream.set_stats(active.stats);
        active.stream.finish(end);
    }

    /// Takes a request that ended within this step out of the sequence.
    pub(crate) fn retire_finished(&mut self, metrics: &mut Metrics) {
        let pending = self.pending();
        let Some(active) = &mut self.active else { return };
        if active.max_new_tokens == 0 && pending == 0 {
            active.end.get_or_insert(Ok(FinishReason::Length));
        }
        if let Some(end) = active.end.take() {
            self.end(end, metrics);
        }
    }

    /// Counts a step that ran `len` tokens from `start` on.
    pub(crate) fn account(&mut self, start: usize, len: usize, elapsed: Duration, metrics: &mut Metrics) {
        let Some(active) = &mut self.active else { return };
        if start < active.prompt_end {
            let end = (start + len).min(active.prompt_end);
            let new = end.saturating_sub(start.max(active.counted));
            active.counted = active.counted.max(end);
            active.stats.prompt_tokens += new;
            active.stats.prompt_time += elapsed;
            metrics.prompt_tokens += new as u64;
        } else {
            active.stats.generated_time += elapsed;
        }
        active.stream.set_stats(active.stats);
    }

    /// What the request wants to know of the logits after a token of its prompt.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub(crate) fn report(&self, position: usize, logits: &[f32]) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        let Some(active) = &self.active else { return Ok(events) };
        if active.wants_prompt_logits(position) {
            let values = memory::copied(logits, "the logits of a prompt token")?;
            events.push(Event::Logits { position, values });
        }
        if active.wants_logprob_after(position)
            && let (Some(id), Some(n)) = (self.tokens.get(position + 1), active.outputs.logprobs)
        {
            let (logprob, top) = token_logprob(logits, *id, n);
            events.push(Event::Prompt { position: position + 1, id: *id, logprob, top });
        }
        Ok(events)
    }

    /// Hands out what came of the token at `position`, and chooses the next token if it was the last one. Returns when, if it did.
    pub(crate) fn take_outputs(
        &mut self,
        position: usize,
        hidden: Option<Vec<f32>>,
        report: Result<Vec<Event>>,
        logits: Option<Logits<'_>>,
        tokenizer: &Tokenizer,
    ) -> Option<Instant> {
        let active = self.active.as_mut()?;
        if let Some(values) = hidden.filter(|_| active.wants_hidden(position)) {
            active.stream.push(Event::Hidden { position, values });
        }
        match report {
            Ok(events) => events.into_iter().for_each(|event| active.stream.push(event)),
            Err(e) => {
                active.end = Some(Err(e));
                return None;
            }
        }
        active.report_from = active.report_from.max(position + 1);
        let wants_token = position + 1 == self.tokens.len() && active.max_new_tokens > 0;
        logits.filter(|_| wants_token).and_then(|logits| self.choose(logits, tokenizer))
    }

    fn choose(&mut self, logits: Logits<'_>, tokenizer: &Tokenizer) -> Option<Instant> {
        let active = self.active.as_mut()?;
        if self.tokens.len() >= active.n_ctx {
            active.end = Some(Ok(FinishReason::ContextFull));
            return None;
        }
        // A grammar whose only text is empty.
        if active.sampler.is_complete() {
            active.end = Some(Ok(FinishReason::Stop));
            return None;
        }
        let room = memory::reserve(&mut self.tokens, 1, "a session's tokens");
        let sample = || match logits {
            Logits::Whole(logits) => active.sampler.sample(logits),
            Logits::Likeliest(tokens) => active.sampler.sample_likeliest(tokens),
        };
        let choice = match room.and_then(|()| Ok(sample()?)) {
            Ok(choice) => choice,
            Err(e) => {
                active.end = Some(Err(e));
                return None;
            }
        };
        let (id, now) = (choice.token, Instant::now());
        active.sampler.accept(id);
        active.stats.generated_tokens += 1;
        self.tokens.push(id);
        let eog = tokenizer.is_eog(id) && !active.ignore_eos;
        let piece = if eog { String::new() } else { active.detokenizer.push(id) };
        let complete = active.sampler.is_complete();
        let found = active.stop.push(&piece);
        active.stream.push(Event::Token { id, text: found.text, logprob: choice.logprob, top: choice.top });
        let done = active.stats.generated_tokens >= active.max_new_tokens;
        active.end = match (eog, found.stopped || complete, done) {
            (true, ..) => Some(Ok(FinishReason::Eos)),
            (_, true, _) => Some(Ok(FinishReason::Stop)),
            (_, _, true) => Some(Ok(FinishReason::Length)),
            _ => None,
        };
        Some(now)
    }

    /// Counts a token that was chosen then.
    pub(crate) fn count_token(&mut self, at: Instant, metrics: &mut Metrics) {
        metrics.generated_tokens += 1;
        let Some(active) = &mut self.active else { return };
        if active.clock.first_token.is_none() {
            active.clock.first_token = Some(at);
            metrics.ttft.record(at - active.clock.submitted);
        }
        active.clock.last_token = Some(at);
    }
}

impl Active {
    /// Where the request begins and ends in a sequence of `prompt_end` tokens, of which `cached`
    /// need not be run.
    pub(crate) fn place(&mut self, prompt_start: usize, prompt_end: usize) {
        (self.prompt_start, self.prompt_end) = (prompt_start, prompt_end);
    }

    /// Notes that the first `tokens` need not be run.
    pub(crate) fn found_cached(&mut self, tokens: usize) {
        let tokens = tokens.min(self.prompt_end);
        self.stats.cached_tokens += tokens.saturating_sub(self.counted);
        self.counted = self.counted.max(tokens);
        self.stream.set_stats(self.stats);
    }
}
