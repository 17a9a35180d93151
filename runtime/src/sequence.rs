//! One conversation inside the scheduler: its tokens, its pages, its adapters, its request.

use std::{sync::Arc, time::Duration};

use lory_models::{
    adapter::AdapterSet,
    kv_cache::Pages,
    tokenizer::{DecodeOptions, Detokenizer, EncodeOptions, Tokenizer},
};

use crate::{
    Error, Event, FinishReason, Request, Result, Sampler, SamplerOptions,
    generate::{Stats, Stream},
    sampler::DryBreakers,
    stop::StopMatcher,
};

/// A request being worked on.
pub(crate) struct Active {
    pub stream: Arc<Stream>,
    pub arrival: u64,
    pub stats: Stats,
    /// Tokens of the session when the prompt was complete.
    pub prompt_end: usize,
    prompt_logits: bool,
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

impl Active {
    /// Checks the options of `request`. `history` are the tokens before the answer, which
    /// penalties look at.
    pub(crate) fn new(
        request: &Request,
        history: &[u32],
        n_ctx: usize,
        tokenizer: &Arc<Tokenizer>,
        stream: Arc<Stream>,
    ) -> Result<Active> {
        let mut sampler = Sampler::with_breakers(&request.sampler, breakers(&request.sampler, tokenizer))?;
        for token in history {
            sampler.accept(*token);
        }
        // After nothing but control tokens such as BOS, the answer is the beginning of a text.
        let continuation = history.iter().any(|t| !tokenizer.is_control(*t));
        let decode = DecodeOptions { special: false, continuation };
        Ok(Active {
            stream,
            arrival: 0,
            stats: Stats::default(),
            prompt_end: 0,
            prompt_logits: request.prompt_logits,
            ignore_eos: request.ignore_eos,
            max_new_tokens: request.max_new_tokens,
            sampler,
            stop: StopMatcher::new(&request.stop),
            detokenizer: Detokenizer::new(tokenizer.clone(), decode),
            n_ctx,
            end: None,
        })
    }
}

/// Which tokens end a repetition; found only if the sampler looks for repetitions.
fn breakers(options: &SamplerOptions, tokenizer: &Tokenizer) -> DryBreakers {
    if options.dry.multiplier == 0.0 {
        return DryBreakers::default();
    }
    let piece = |id| tokenizer.token_bytes(id).unwrap_or_default().into_owned();
    let encode = |text: &str| tokenizer.encode(text, EncodeOptions::default());
    DryBreakers::new(&options.dry.sequence_breakers, tokenizer.vocab_size() as u32, piece, encode)
}

/// A sequence of tokens, part of which has its keys and values cached.
pub(crate) struct Sequence {
    pub tokens: Vec<u32>,
    /// Keys and values of the first `pages.len()` tokens.
    pub pages: Pages,
    pub adapters: Arc<AdapterSet>,
    /// Whether some cached tokens were computed under another adapter set (`OnSwitch::Keep`).
    pub mixed: bool,
    pub priority: i32,
    pub last_used: u64,
    pub active: Option<Active>,
}

impl Sequence {
    pub(crate) fn new(adapters: Arc<AdapterSet>, priority: i32) -> Self {
        Sequence {
            tokens: Vec::new(),
            pages: Pages::default(),
            adapters,
            mixed: false,
            priority,
            last_used: 0,
            active: None,
        }
    }

    /// Tokens that have still to be run.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.pages.len()
    }

    /// Whether the logits after the token at `position` are needed.
    pub(crate) fn wants_logits(&self, position: usize) -> bool {
        let last = position + 1 == self.tokens.len();
        self.active
            .as_ref()
            .is_some_and(|a| (last && a.max_new_tokens > 0) || (a.prompt_logits && position < a.prompt_end))
    }

    /// Ends the request, if there is one.
    pub(crate) fn end(&mut self, end: Result<FinishReason>) {
        if let Some(mut active) = self.active.take() {
            let rest = active.stop.finish(&active.detokenizer.finish());
            if !rest.is_empty() {
                active.stream.push(Event::Text(rest));
            }
            active.stream.set_stats(active.stats);
            active.stream.finish(end);
        }
    }

    /// Takes a request that ended within this step out of the sequence.
    pub(crate) fn retire_finished(&mut self) {
        let pending = self.pending();
        let Some(active) = &mut self.active else { return };
        if active.max_new_tokens == 0 && pending == 0 {
            active.end.get_or_insert(Ok(FinishReason::Length));
        }
        if let Some(end) = active.end.take() {
            self.end(end);
        }
    }

    /// Counts a step that ran `len` tokens from `start` on.
    pub(crate) fn account(&mut self, start: usize, len: usize, elapsed: Duration) {
        let Some(active) = &mut self.active else { return };
        if start < active.prompt_end {
            active.stats.prompt_tokens += len;
            active.stats.prompt_time += elapsed;
        } else {
            active.stats.generated_time += elapsed;
        }
        active.stream.set_stats(active.stats);
    }

    /// Handles the logits after the token at `position`: hands them out, and chooses the next
    /// token if it was the last one.
    pub(crate) fn take_logits(&mut self, position: usize, logits: &mut [f32], tokenizer: &Tokenizer) {
        let last = position + 1 == self.tokens.len();
        let Some(active) = &mut self.active else { return };
        if active.prompt_logits && position < active.prompt_end {
            active.stream.push(Event::Logits { position, values: logits.to_vec() });
        }
        if !last || active.max_new_tokens == 0 {
            return;
        }
        if self.tokens.len() >= active.n_ctx {
            active.end = Some(Ok(FinishReason::ContextFull));
            return;
        }
        let choice = match active.sampler.sample(logits) {
            Ok(choice) => choice,
            Err(e) => {
                active.end = Some(Err(Error::from(e)));
                return;
            }
        };
        let id = choice.token;
        active.sampler.accept(id);
        active.stats.generated_tokens += 1;
        self.tokens.push(id);
        let eog = tokenizer.is_eog(id) && !active.ignore_eos;
        let piece = if eog { String::new() } else { active.detokenizer.push(id) };
        let found = active.stop.push(&piece);
        active.stream.push(Event::Token { id, text: found.text, logprob: choice.logprob, top: choice.top });
        let done = active.stats.generated_tokens >= active.max_new_tokens;
        active.end = match (eog, found.stopped, done) {
            (true, ..) => Some(Ok(FinishReason::Eos)),
            (_, true, _) => Some(Ok(FinishReason::Stop)),
            (_, _, true) => Some(Ok(FinishReason::Length)),
            _ => None,
        };
    }
}
