//! The engine through the shared library.

use std::{
    ffi::c_void,
    path::Path,
    ptr,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
};

use lory_tests::c_api::{self as c, Handle, lory};

use crate::{About, Answer, Api, Ask, Result, metric_names};

pub struct ThroughC(Handle<c::lory_engine>);

impl ThroughC {
    fn metrics(&self) -> c::lory_metrics {
        // SAFETY: pointers to what lives during the call; so everywhere below.
        let mut metrics = c::init(|o, n| unsafe { lory().lory_metrics_init(o, n) });
        // SAFETY: as above.
        c::ok(unsafe { lory().lory_engine_metrics(self.0.ptr, &mut metrics) }).expect("metrics");
        metrics
    }
}

/// A text that lory gave away.
fn take_text(fill: impl FnOnce(*mut c::lory_text) -> c::lory_status) -> Result<String> {
    let mut text = c::lory_text::default();
    c::ok(fill(&mut text))?;
    // SAFETY: lory gave it; it ends with NUL behind its length.
    let (got, end) = unsafe {
        let view = c::lory_str { data: text.data, len: text.len };
        (c::view(view), text.data.add(text.len).read())
    };
    assert_eq!(end, 0);
    // SAFETY: freed twice on purpose: the struct is empty after the first time.
    unsafe { (lory().lory_text_free(&mut text), lory().lory_text_free(&mut text)) };
    assert!(text.data.is_null() && text.len == 0);
    Ok(got)
}

fn take_tokens(fill: impl FnOnce(*mut c::lory_tokens) -> c::lory_status) -> Result<Vec<u32>> {
    let mut tokens = c::lory_tokens::default();
    c::ok(fill(&mut tokens))?;
    // SAFETY: lory gave it.
    let got = unsafe { std::slice::from_raw_parts(tokens.data, tokens.len) }.to_vec();
    // SAFETY: as above.
    unsafe { lory().lory_tokens_free(&mut tokens) };
    Ok(got)
}

fn take_floats(fill: impl FnOnce(*mut c::lory_floats) -> c::lory_status) -> Result<Vec<f32>> {
    let mut floats = c::lory_floats::default();
    c::ok(fill(&mut floats))?;
    // SAFETY: lory gave it.
    let got = unsafe { std::slice::from_raw_parts(floats.data, floats.len) }.to_vec();
    // SAFETY: as above.
    unsafe { lory().lory_floats_free(&mut floats) };
    Ok(got)
}

fn value<T: Default>(fill: impl FnOnce(*mut T) -> c::lory_status) -> Result<T> {
    let mut value = T::default();
    c::ok(fill(&mut value))?;
    Ok(value)
}

fn scales(adapters: &[(u64, f32)]) -> Vec<c::lory_adapter_scale> {
    adapters.iter().map(|(id, scale)| c::lory_adapter_scale { id: *id, scale: *scale, reserved: 0 }).collect()
}

fn event() -> c::lory_event {
    // SAFETY: as above.
    c::init(|o, n| unsafe { lory().lory_event_init(o, n) })
}

fn generate(
    s: &Handle<c::lory_session>,
    ask: &Ask,
    grammar: *const c::lory_grammar,
) -> Result<Handle<c::lory_generation>> {
    let mut sampler = c::greedy();
    (sampler.temp, sampler.has_seed, sampler.seed) = (ask.temp, 1, ask.seed);
    sampler.top_p = ask.top_p.unwrap_or(sampler.top_p);
    sampler.logprobs = ask.logprobs.map_or(-1, |n| n as i32);
    let stop: Vec<_> = ask.stop.iter().map(|s| c::str_of(s)).collect();
    let mut request = c::request(ask.tokens, ask.n, &sampler);
    (request.stop, request.n_stop, request.grammar) = (stop.as_ptr(), stop.len(), grammar);
    request.prompt_logits = ask.prompt_logits.into();
    request.prompt_logprobs = ask.prompt_logprobs.map_or(-1, |n| n as i32);
    request.hidden = if ask.hidden { c::LORY_HIDDEN_ALL } else { c::LORY_HIDDEN_NONE };
    c::generate(s.ptr, &request)
}

/// Adds what an event says; its views are valid.
fn add(answer: &mut Answer, event: &c::lory_event, generation: &Handle<c::lory_generation>) {
    let values = || {
        // SAFETY: valid until the next call with the generation; so below.
        unsafe { std::slice::from_raw_parts(event.values, event.n_values) }
    };
    if event.text.len > 0 {
        // SAFETY: as above.
        answer.text += &unsafe { c::view(event.text) };
    }
    match event.kind {
        c::LORY_EVENT_TOKEN => {
            answer.tokens.push(event.token);
            if !event.logprob.is_nan() {
                // SAFETY: as above.
                let top = (0..event.n_top).map(|i| unsafe { *event.top.add(i) });
                answer.logprobs.push((event.logprob, top.map(|t| (t.token, t.logprob)).collect()));
            }
        }
        c::LORY_EVENT_TEXT => {}
        c::LORY_EVENT_LOGITS => answer.logits.extend(values()),
        c::LORY_EVENT_HIDDEN => answer.hidden.extend(values()),
        c::LORY_EVENT_PROMPT => answer.prompt.push((event.position, event.token, event.logprob)),
        c::LORY_EVENT_END => {
            // SAFETY: pointers to what lives during the call; so everywhere below.
            let mut stats = c::init(|o, n| unsafe { lory().lory_stats_init(o, n) });
            // SAFETY: as above.
            c::ok(unsafe { lory().lory_generation_stats(generation.ptr, &mut stats) }).expect("alive");
            answer.counts = [stats.cached_tokens, stats.prompt_tokens, stats.generated_tokens];
            answer.reason = event.finish_reason;
        }
        other => panic!("event {other} was not asked for"),
    }
}

fn read(generation: Handle<c::lory_generation>, cancel_after: Option<usize>) -> Result<Answer> {
    let (mut answer, mut event) = (Answer::default(), event());
    while event.kind != c::LORY_EVENT_END {
        // SAFETY: as above; views are read before the next call.
        c::ok(unsafe { lory().lory_generation_next(generation.ptr, &mut event) })?;
        add(&mut answer, &event, &generation);
        if event.kind == c::LORY_EVENT_TOKEN && cancel_after == Some(answer.tokens.len()) {
            // SAFETY: as above.
            let make = |out: *mut *mut _| unsafe { lory().lory_generation_canceller(generation.ptr, out) };
            // SAFETY: as above.
            let canceller = Handle::new(make, |c| unsafe { lory().lory_canceller_free(c) })?;
            // SAFETY: as above.
            c::ok(unsafe { lory().lory_canceller_cancel(canceller.ptr) })?;
        }
    }
    Ok(answer)
}

/// As [`read`], but runs nothing.
fn watch(generation: Handle<c::lory_generation>) -> Result<Answer> {
    let (mut answer, mut event) = (Answer::default(), event());
    while event.kind != c::LORY_EVENT_END {
        // SAFETY: as above.
        c::ok(unsafe { lory().lory_generation_poll(generation.ptr, &mut event) })?;
        match event.kind {
            c::LORY_EVENT_NONE => thread::yield_now(),
            _ => add(&mut answer, &event, &generation),
        }
    }
    Ok(answer)
}

unsafe extern "C" fn go_on(over: *mut c_void) -> i32 {
    // SAFETY: the test's own pointer, which lives as long as the driver.
    (!unsafe { &*over.cast::<AtomicBool>() }.load(SeqCst)).into()
}

impl Api for ThroughC {
    type Session = Handle<c::lory_session>;

    fn open(path: &Path, n_batch: usize) -> Result<Self> {
        let mut options = c::options();
        options.n_batch = n_batch as u32;
        c::engine(path, &options).map(ThroughC)
    }

    fn tokenize(&self, text: &str) -> Vec<u32> {
        let flags = c::LORY_ADD_SPECIAL | c::LORY_PARSE_SPECIAL;
        let (data, len) = (text.as_ptr().cast(), text.len());
        // SAFETY: pointers to what lives during the call; so below.
        take_tokens(|out| unsafe { lory().lory_tokenize(self.0.ptr, data, len, flags, out) }).expect("tokens")
    }

    fn detokenize(&self, tokens: &[u32]) -> String {
        let (data, len) = (tokens.as_ptr(), tokens.len());
        // SAFETY: as above.
        take_text(|out| unsafe { lory().lory_detokenize(self.0.ptr, data, len, 0, out) }).expect("a text")
    }

    fn chat(&self, role: &str, content: &str) -> Result<String> {
        let message = c::lory_chat_message { role: c::str_of(role), content: c::str_of(content) };
        // SAFETY: as above.
        let mut options = c::init(|o, n| unsafe { lory().lory_chat_options_init(o, n) });
        (options.messages, options.n_messages) = (&message, 1);
        // SAFETY: as above.
        take_text(|out| unsafe { lory().lory_chat_render(self.0.ptr, &options, out) })
    }

    fn load(&self, path: &Path, name: &str) -> Result<u64> {
        let (p, n) = (c::str_of(path.to_str().expect("UTF-8")), c::str_of(name));
        // SAFETY: as above.
        value(|id| unsafe { lory().lory_adapter_load(self.0.ptr, p.data, p.len, n.data, n.len, id) })
    }

    fn replace(&self, path: &Path, name: &str) -> Result<u64> {
        let (p, n) = (c::str_of(path.to_str().expect("UTF-8")), c::str_of(name));
        // SAFETY: as above.
        value(|id| unsafe { lory().lory_adapter_replace(self.0.ptr, p.data, p.len, n.data, n.len, id) })
    }

    fn unload(&self, name: &str) -> Result<()> {
        let n = c::str_of(name);
        // SAFETY: as above.
        c::ok(unsafe { lory().lory_adapter_unload(self.0.ptr, n.data, n.len) })
    }

    fn resolve(&self, name: &str) -> Result<u64> {
        let n = c::str_of(name);
        // SAFETY: as above.
        value(|id| unsafe { lory().lory_adapter_resolve(self.0.ptr, n.data, n.len, id) })
    }

    fn open_pack(&self, path: &Path) -> Result<usize> {
        let p = c::str_of(path.to_str().expect("UTF-8"));
        // SAFETY: as above.
        value(|n| unsafe { lory().lory_adapter_open_pack(self.0.ptr, p.data, p.len, n) })
    }

    fn reopen_pack(&self, path: &Path) -> Result<usize> {
        let p = c::str_of(path.to_str().expect("UTF-8"));
        // SAFETY: as above.
        value(|n| unsafe { lory().lory_adapter_reopen_pack(self.0.ptr, p.data, p.len, n) })
    }

    fn close_pack(&self, path: &Path) -> Result<()> {
        let p = c::str_of(path.to_str().expect("UTF-8"));
        // SAFETY: as above.
        c::ok(unsafe { lory().lory_adapter_close_pack(self.0.ptr, p.data, p.len) })
    }

    fn prefetch(&self, names: &[&str]) -> Result<usize> {
        let names: Vec<_> = names.iter().map(|n| c::str_of(n)).collect();
        // SAFETY: as above.
        value(|n| unsafe { lory().lory_adapter_prefetch(self.0.ptr, names.as_ptr(), names.len(), n) })
    }

    fn set_budget(&self, bytes: usize) {
        // SAFETY: as above.
        c::ok(unsafe { lory().lory_adapter_set_budget(self.0.ptr, bytes as u64) }).expect("an engine");
    }

    fn about(&self) -> About {
        let (l, e) = (lory(), self.0.ptr);
        // SAFETY: as above.
        let mut info = c::init(|o, n| unsafe { l.lory_model_info_init(o, n) });
        // SAFETY: as above.
        c::ok(unsafe { l.lory_engine_model_info(e, &mut info) }).expect("an engine");
        // SAFETY: as above.
        let special = |role| value(|t| unsafe { l.lory_token_special(e, role, t) }).ok();
        let metadata = |key: &str| {
            let key = c::str_of(key);
            // SAFETY: as above.
            take_text(|out| unsafe { l.lory_engine_metadata(e, key.data, key.len, out) }).ok()
        };
        About {
            n_layers: info.n_layers,
            n_embd: info.n_embd,
            n_vocab: info.n_vocab,
            file_bytes: info.file_bytes,
            // SAFETY: as above.
            device: take_text(|out| unsafe { l.lory_engine_device(e, out) }).expect("an engine"),
            architecture: metadata("general.architecture"),
            missing: metadata("no.such.key"),
            bos_and_pad: [c::LORY_TOKEN_BOS, c::LORY_TOKEN_PAD].map(special),
            // SAFETY: as above.
            metrics: take_text(|out| unsafe { l.lory_engine_prometheus(e, out) })
                .map(|text| metric_names(&text))
                .expect("an engine"),
        }
    }

    fn stream(&self, tokens: &[u32]) -> Vec<String> {
        let l = lory();
        // SAFETY: as above.
        let make = |out: *mut *mut _| unsafe { l.lory_detokenizer_new(self.0.ptr, 0, out) };
        // SAFETY: as above.
        let stream = Handle::new(make, |d| unsafe { lory().lory_detokenizer_free(d) }).expect("a stream");
        let piece = |fill: &dyn Fn(*mut c::lory_str) -> c::lory_status| {
            let text = value(fill).expect("a text");
            // SAFETY: valid until the next call with the stream.
            unsafe { c::view(text) }
        };
        // SAFETY: as above.
        let push = |t: &u32| piece(&|out| unsafe { l.lory_detokenizer_push(stream.ptr, *t, out) });
        let mut pieces: Vec<_> = tokens.iter().map(push).collect();
        // SAFETY: as above.
        pieces.push(piece(&|out| unsafe { l.lory_detokenizer_finish(stream.ptr, out) }));
        pieces
    }

    fn adapters(&self) -> Vec<(String, u64)> {
        // SAFETY: as above.
        let make =
            |out: *mut *mut c::lory_adapter_list| unsafe { lory().lory_adapter_list_new(self.0.ptr, out) };
        // SAFETY: as above.
        let list = Handle::new(make, |l| unsafe { lory().lory_adapter_list_free(l) }).expect("a list");
        // SAFETY: as above.
        let mut info = c::init(|o, n| unsafe { lory().lory_adapter_info_init(o, n) });
        // SAFETY: as above.
        let len = unsafe { lory().lory_adapter_list_len(list.ptr) };
        let get = |i| {
            // SAFETY: as above.
            c::ok(unsafe { lory().lory_adapter_list_get(list.ptr, i, &mut info) }).expect("in the list");
            // SAFETY: the list lives.
            (unsafe { c::view(info.name) }, info.bytes)
        };
        (0..len).map(get).collect()
    }

    fn session(&self, adapters: &[(u64, f32)]) -> Result<Self::Session> {
        c::session(self.0.ptr, &scales(adapters))
    }

    fn generated_tokens(&self) -> u64 {
        self.metrics().generated_tokens
    }

    fn durations(&self) -> (Vec<u64>, u64) {
        let metrics = self.metrics();
        assert_eq!(metrics.ttft.buckets.iter().sum::<u64>(), metrics.ttft.count);
        (metrics.ttft.buckets.into(), metrics.tpot.count)
    }

    fn session_adapters(s: &mut Self::Session) -> Vec<(u64, String, f32, Option<usize>)> {
        // SAFETY: as above.
        let list = |out: *mut *mut _| unsafe { lory().lory_session_adapters_new(s.ptr, out) };
        // SAFETY: as above.
        let list = Handle::new(list, |l| unsafe { lory().lory_session_adapters_free(l) }).expect("a list");
        // SAFETY: as above.
        let n = unsafe { lory().lory_session_adapters_len(list.ptr) };
        let adapter = |i| {
            // SAFETY: as above.
            let mut a = c::init(|o, n| unsafe { lory().lory_session_adapter_init(o, n) });
            // SAFETY: as above.
            c::ok(unsafe { lory().lory_session_adapters_get(list.ptr, i, &mut a) }).expect("there");
            // SAFETY: the list lives.
            (a.id, unsafe { c::view(a.name) }, a.scale, (a.works != 0).then_some(a.works_from))
        };
        (0..n).map(adapter).collect()
    }

    fn set_adapters(s: &mut Self::Session, adapters: &[(u64, f32)], keep: bool) -> Result<()> {
        let set = scales(adapters);
        let on_switch = if keep { c::LORY_ON_SWITCH_KEEP } else { c::LORY_ON_SWITCH_RECOMPUTE };
        // SAFETY: as above.
        c::ok(unsafe { lory().lory_session_set_adapters(s.ptr, set.as_ptr(), set.len(), on_switch) })
    }

    fn is_mixed(s: &mut Self::Session) -> bool {
        // SAFETY: as above.
        value(|out: *mut i32| unsafe { lory().lory_session_is_mixed(s.ptr, out) }).expect("a session") != 0
    }

    fn ask(s: &mut Self::Session, ask: &Ask) -> Result<Answer> {
        read(generate(s, ask, ptr::null())?, ask.cancel_after)
    }

    fn constrained(&self, s: &mut Self::Session, ask: &Ask, kind: u32, grammar: &str) -> Result<Answer> {
        let source = c::str_of(grammar);
        let make = |out: *mut *mut c::lory_grammar| {
            // SAFETY: as above.
            unsafe { lory().lory_grammar_new(self.0.ptr, kind, source.data, source.len, out) }
        };
        // SAFETY: as above.
        let grammar = Handle::new(make, |g| unsafe { lory().lory_grammar_free(g) })?;
        let generation = generate(s, ask, grammar.ptr)?;
        drop(grammar);
        read(generation, None)
    }

    fn together(sessions: &mut [Self::Session], asks: &[Ask]) -> Result<Vec<Answer>> {
        let start = |(s, ask): (&mut Self::Session, &Ask)| generate(s, ask, ptr::null());
        let generations = sessions.iter_mut().zip(asks).map(start).collect::<Result<Vec<_>>>()?;
        let all: Vec<_> = generations.iter().map(|g| g.ptr).collect();
        let mut answers: Vec<_> = asks.iter().map(|_| Answer::default()).collect();
        let mut event = event();
        loop {
            let mut i = usize::MAX;
            // SAFETY: as above.
            c::ok(unsafe { lory().lory_generations_next(all.as_ptr(), all.len(), &mut i, &mut event) })?;
            if i == all.len() {
                assert_eq!(event.kind, c::LORY_EVENT_NONE);
                return Ok(answers);
            }
            add(&mut answers[i], &event, &generations[i]);
        }
    }

    fn driven(&self, s: &mut Self::Session, ask: &Ask) -> Result<Answer> {
        let over = AtomicBool::new(false);
        let engine = self.0.ptr as usize;
        thread::scope(|scope| {
            let user: usize = ptr::from_ref(&over) as usize;
            // SAFETY: an engine may be used by many threads; so below.
            let drive = move || unsafe { lory().lory_engine_drive(engine as _, Some(go_on), user as _) };
            let driver = scope.spawn(drive);
            let answer = generate(s, ask, ptr::null()).and_then(watch);
            over.store(true, SeqCst);
            // SAFETY: as above.
            c::ok(unsafe { lory().lory_engine_wake_drivers(self.0.ptr) })?;
            assert_eq!(driver.join().expect("no panic"), c::LORY_OK);
            answer
        })
    }

    fn tokens(s: &mut Self::Session) -> Vec<u32> {
        // SAFETY: as above.
        take_tokens(|out| unsafe { lory().lory_session_tokens(s.ptr, out) }).expect("tokens")
    }

    fn cached(s: &mut Self::Session) -> usize {
        // SAFETY: as above.
        value(|out| unsafe { lory().lory_session_cached_tokens(s.ptr, out) }).expect("a number")
    }

    fn rewind(s: &mut Self::Session, n: usize) {
        // SAFETY: as above.
        c::ok(unsafe { lory().lory_session_rewind(s.ptr, n) }).expect("rewound");
    }

    fn rewind_to_common(s: &mut Self::Session, tokens: &[u32]) -> usize {
        let (data, len) = (tokens.as_ptr(), tokens.len());
        // SAFETY: as above.
        value(|out| unsafe { lory().lory_session_rewind_to_common(s.ptr, data, len, out) }).expect("rewound")
    }

    fn fork(s: &mut Self::Session) -> Self::Session {
        // SAFETY: as above.
        let fork = |out: *mut *mut c::lory_session| unsafe { lory().lory_session_fork(s.ptr, out) };
        // SAFETY: as above.
        Handle::new(fork, |s| unsafe { lory().lory_session_free(s) }).expect("a fork")
    }

    fn embed(s: &mut Self::Session, tokens: &[u32]) -> Result<Vec<f32>> {
        let (data, len, pooling) = (tokens.as_ptr(), tokens.len(), c::LORY_POOLING_MEAN);
        // SAFETY: as above.
        take_floats(|out| unsafe { lory().lory_session_embed(s.ptr, data, len, pooling, 1, out) })
    }

    fn score(s: &mut Self::Session, prompt: &[u32], continuations: &[&[u32]]) -> Result<Vec<f32>> {
        let span = |c: &&[u32]| c::lory_token_span { data: c.as_ptr(), len: c.len() };
        let spans: Vec<_> = continuations.iter().map(span).collect();
        let (data, len) = (prompt.as_ptr(), prompt.len());
        // SAFETY: as above.
        take_floats(|out| unsafe {
            lory().lory_session_score(s.ptr, data, len, spans.as_ptr(), spans.len(), out)
        })
    }

    fn save(s: &mut Self::Session) -> Result<Vec<u8>> {
        let mut bytes = c::lory_text::default();
        // SAFETY: as above.
        c::ok(unsafe { lory().lory_session_save_memory(s.ptr, &mut bytes) })?;
        // SAFETY: lory gave it.
        let got = unsafe { std::slice::from_raw_parts(bytes.data.cast::<u8>(), bytes.len) }.to_vec();
        // SAFETY: as above.
        unsafe { lory().lory_text_free(&mut bytes) };
        Ok(got)
    }

    fn save_file(s: &mut Self::Session, path: &Path) -> Result<()> {
        let p = c::str_of(path.to_str().expect("UTF-8"));
        // SAFETY: as above.
        c::ok(unsafe { lory().lory_session_save(s.ptr, p.data, p.len) })
    }

    fn restore_file(&self, path: &Path) -> Result<Self::Session> {
        let (p, none) = (c::str_of(path.to_str().expect("UTF-8")), ptr::null());
        // SAFETY: as above.
        let restore =
            |out: *mut *mut _| unsafe { lory().lory_session_restore(self.0.ptr, p.data, p.len, none, out) };
        // SAFETY: as above.
        Handle::new(restore, |s| unsafe { lory().lory_session_free(s) })
    }

    fn restore(&self, bytes: &[u8], adapters: &[(u64, f32)]) -> Result<Self::Session> {
        let set = scales(adapters);
        // SAFETY: as above.
        let mut options = c::init(|o, n| unsafe { lory().lory_session_options_init(o, n) });
        (options.adapters, options.n_adapters) = (set.as_ptr(), set.len());
        let (e, data, len) = (self.0.ptr, bytes.as_ptr().cast(), bytes.len());
        // SAFETY: as above.
        let restore =
            |out: *mut *mut _| unsafe { lory().lory_session_restore_memory(e, data, len, &options, out) };
        // SAFETY: as above.
        Handle::new(restore, |s| unsafe { lory().lory_session_free(s) })
    }
}
