//! The engine's interface twice: in Rust, and through the shared library as C programs call it.
//! Every scenario knows only the trait; texts of errors must be equal, too.

use std::path::Path;

use lory_kernels::backend::KvType;
use lory_models::{
    chat::{ChatTemplate, Message, RenderOptions},
    tokenizer::EncodeOptions,
};
use lory_runtime::{
    AdapterId, Engine, EngineOptions, Event, FinishReason, OnSwitch, Pooling, Request, SamplerOptions,
    Session, SessionOptions, normalize,
};
use lory_tests::{
    c_api::{self as c, Handle, lory},
    fixtures::{self, fixture},
};

type Result<T> = std::result::Result<T, String>;

/// An answer: its tokens, its text, why it ended (the numbers of `lory.h`), log-probabilities.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    text: String,
    reason: u32,
    logprobs: Vec<(f32, Vec<(u32, f32)>)>,
    logits: Vec<f32>,
}

/// What is asked of a session.
#[derive(Clone, Default)]
struct Ask<'a> {
    tokens: &'a [u32],
    n: usize,
    stop: &'a [&'a str],
    temp: f32,
    top_p: Option<f32>,
    seed: u64,
    logprobs: Option<usize>,
    prompt_logits: bool,
}

trait Api: Sized {
    type Session;
    fn open(path: &Path, n_batch: usize) -> Result<Self>;
    fn tokenize(&self, text: &str) -> Vec<u32>;
    fn detokenize(&self, tokens: &[u32]) -> String;
    fn chat(&self, role: &str, content: &str) -> Result<String>;
    fn load(&self, path: &Path, name: &str) -> Result<u64>;
    fn replace(&self, path: &Path, name: &str) -> Result<u64>;
    fn unload(&self, name: &str) -> Result<()>;
    fn resolve(&self, name: &str) -> Result<u64>;
    /// Names and bytes.
    fn adapters(&self) -> Vec<(String, u64)>;
    fn session(&self, adapters: &[(u64, f32)]) -> Result<Self::Session>;
    fn generated_tokens(&self) -> u64;
    /// Durations until the first token, by bucket, and how many per token after it.
    fn durations(&self) -> (Vec<u64>, u64);
    /// Ids, names, weights, and from where on they work.
    fn session_adapters(s: &mut Self::Session) -> Vec<(u64, String, f32, Option<usize>)>;
    fn set_adapters(s: &mut Self::Session, adapters: &[(u64, f32)], keep: bool) -> Result<()>;
    fn is_mixed(s: &mut Self::Session) -> bool;
    fn ask(s: &mut Self::Session, ask: &Ask) -> Result<Answer>;
    fn tokens(s: &mut Self::Session) -> Vec<u32>;
    fn cached(s: &mut Self::Session) -> usize;
    fn rewind(s: &mut Self::Session, n: usize);
    fn rewind_to_common(s: &mut Self::Session, tokens: &[u32]) -> usize;
    fn fork(s: &mut Self::Session) -> Self::Session;
    fn embed(s: &mut Self::Session, tokens: &[u32]) -> Result<Vec<f32>>;
    fn score(s: &mut Self::Session, prompt: &[u32], continuations: &[&[u32]]) -> Result<Vec<f32>>;
    fn save(s: &mut Self::Session) -> Result<Vec<u8>>;
    fn restore(&self, bytes: &[u8], adapters: &[(u64, f32)]) -> Result<Self::Session>;
}

struct Native(Engine);

fn words(e: impl std::fmt::Display) -> String {
    e.to_string()
}

fn ids(adapters: &[(u64, f32)]) -> Vec<(AdapterId, f32)> {
    adapters.iter().map(|(id, scale)| (AdapterId::from_u64(*id), *scale)).collect()
}

impl Api for Native {
    type Session = Session;

    fn open(path: &Path, n_batch: usize) -> Result<Self> {
        let options = EngineOptions {
            threads: Some(2),
            n_ctx: Some(256),
            kv_type: KvType::F32,
            n_batch,
            ..EngineOptions::default()
        };
        Engine::open(path, &options).map(Native).map_err(words)
    }

    fn tokenize(&self, text: &str) -> Vec<u32> {
        self.0.model().tokenizer.encode(text, EncodeOptions { add_special: true, parse_special: true })
    }

    fn detokenize(&self, tokens: &[u32]) -> String {
        self.0.model().tokenizer.decode(tokens)
    }

    fn chat(&self, role: &str, content: &str) -> Result<String> {
        let template = ChatTemplate::required(self.0.model().gguf.metadata()).map_err(words)?;
        let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
        template.render(&[Message::new(role, content)], &options).map_err(words)
    }

    fn load(&self, path: &Path, name: &str) -> Result<u64> {
        self.0.adapters().load_lora(path, Some(name)).map(AdapterId::to_u64).map_err(words)
    }

    fn replace(&self, path: &Path, name: &str) -> Result<u64> {
        self.0.adapters().replace_lora(path, Some(name)).map(AdapterId::to_u64).map_err(words)
    }

    fn unload(&self, name: &str) -> Result<()> {
        self.0.adapters().unload(name).map_err(words)
    }

    fn resolve(&self, name: &str) -> Result<u64> {
        self.0.adapters().resolve(name).map(AdapterId::to_u64).map_err(words)
    }

    fn adapters(&self) -> Vec<(String, u64)> {
        let store = self.0.adapters();
        let info = |name: String| store.info(&name).map(|i| (name, i.bytes as u64)).expect("listed");
        store.names().into_iter().map(info).collect()
    }

    fn session(&self, adapters: &[(u64, f32)]) -> Result<Session> {
        let options = SessionOptions { adapters: ids(adapters), ..SessionOptions::default() };
        self.0.session(&options).map_err(words)
    }

    fn generated_tokens(&self) -> u64 {
        self.0.metrics().generated_tokens
    }

    fn durations(&self) -> (Vec<u64>, u64) {
        let metrics = self.0.metrics();
        assert_eq!(metrics.ttft.buckets.iter().sum::<u64>(), metrics.ttft.count);
        (metrics.ttft.buckets.into(), metrics.tpot.count)
    }

    fn session_adapters(s: &mut Session) -> Vec<(u64, String, f32, Option<usize>)> {
        s.adapters().into_iter().map(|a| (a.id.to_u64(), a.name, a.scale, a.works_from)).collect()
    }

    fn set_adapters(s: &mut Session, adapters: &[(u64, f32)], keep: bool) -> Result<()> {
        let on_switch = if keep { OnSwitch::Keep } else { OnSwitch::Recompute };
        s.set_adapters(&ids(adapters), on_switch).map_err(words)
    }

    fn is_mixed(s: &mut Session) -> bool {
        s.is_mixed()
    }

    fn ask(s: &mut Session, ask: &Ask) -> Result<Answer> {
        let sampler = SamplerOptions {
            temp: ask.temp,
            top_p: ask.top_p.unwrap_or(SamplerOptions::default().top_p),
            seed: Some(ask.seed),
            logprobs: ask.logprobs,
            ..SamplerOptions::default()
        };
        let request = Request {
            tokens: ask.tokens.to_vec(),
            max_new_tokens: ask.n,
            sampler,
            stop: ask.stop.iter().map(|s| s.to_string()).collect(),
            ignore_eos: true,
            prompt_logits: ask.prompt_logits,
            ..Request::default()
        };
        let mut generation = s.generate(request).map_err(words)?;
        let mut answer = Answer::default();
        for event in &mut generation {
            match event.map_err(words)? {
                Event::Token { id, text, logprob, top } => {
                    answer.tokens.push(id);
                    answer.text += &text;
                    answer.logprobs.extend(logprob.map(|p| (p, top)));
                }
                Event::Text(text) => answer.text += &text,
                Event::Logits { values, .. } => answer.logits.extend(values),
                other => panic!("{other:?} was not asked for"),
            }
        }
        answer.reason = match generation.finish_reason() {
            None => c::LORY_FINISH_NONE,
            Some(FinishReason::Eos) => c::LORY_FINISH_EOS,
            Some(FinishReason::Stop) => c::LORY_FINISH_STOP,
            Some(FinishReason::Length) => c::LORY_FINISH_LENGTH,
            Some(FinishReason::ContextFull) => c::LORY_FINISH_CONTEXT_FULL,
            Some(FinishReason::Cancelled) => c::LORY_FINISH_CANCELLED,
        };
        Ok(answer)
    }

    fn tokens(s: &mut Session) -> Vec<u32> {
        s.tokens()
    }

    fn cached(s: &mut Session) -> usize {
        s.cached_tokens()
    }

    fn rewind(s: &mut Session, n: usize) {
        s.rewind(n);
    }

    fn rewind_to_common(s: &mut Session, tokens: &[u32]) -> usize {
        s.rewind_to_common(tokens)
    }

    fn fork(s: &mut Session) -> Session {
        s.fork()
    }

    fn embed(s: &mut Session, tokens: &[u32]) -> Result<Vec<f32>> {
        let mut vectors = s.embed(tokens, Pooling::Mean).map_err(words)?;
        vectors.iter_mut().for_each(|v| normalize(v));
        Ok(vectors.concat())
    }

    fn score(s: &mut Session, prompt: &[u32], continuations: &[&[u32]]) -> Result<Vec<f32>> {
        let continuations: Vec<_> = continuations.iter().map(|c| c.to_vec()).collect();
        let scores = s.score(prompt, &continuations).map_err(words)?;
        Ok(scores.into_iter().flat_map(|s| s.logprobs).collect())
    }

    fn save(s: &mut Session) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        s.save_to(&mut bytes).map_err(words)?;
        Ok(bytes)
    }

    fn restore(&self, mut bytes: &[u8], adapters: &[(u64, f32)]) -> Result<Session> {
        let options = SessionOptions { adapters: ids(adapters), ..SessionOptions::default() };
        self.0.restore_from(&mut bytes, "the saved session", &options).map_err(words)
    }
}

struct ThroughC(Handle<c::lory_engine>);

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
        let mut sampler = c::greedy();
        (sampler.temp, sampler.has_seed, sampler.seed) = (ask.temp, 1, ask.seed);
        sampler.top_p = ask.top_p.unwrap_or(sampler.top_p);
        sampler.logprobs = ask.logprobs.map_or(-1, |n| n as i32);
        let stop: Vec<_> = ask.stop.iter().map(|s| c::str_of(s)).collect();
        let mut request = c::request(ask.tokens, ask.n, &sampler);
        (request.stop, request.n_stop) = (stop.as_ptr(), stop.len());
        request.prompt_logits = ask.prompt_logits.into();
        let generation = c::generate(s.ptr, &request)?;
        // SAFETY: as above.
        let mut event = c::init(|o, n| unsafe { lory().lory_event_init(o, n) });
        let mut answer = Answer::default();
        loop {
            // SAFETY: as above; views are read before the next call.
            c::ok(unsafe { lory().lory_generation_next(generation.ptr, &mut event) })?;
            if event.kind == c::LORY_EVENT_END {
                answer.reason = event.finish_reason;
                return Ok(answer);
            }
            if event.text.len > 0 {
                // SAFETY: as above.
                answer.text += &unsafe { c::view(event.text) };
            }
            match event.kind {
                c::LORY_EVENT_TOKEN => {
                    answer.tokens.push(event.token);
                    if !event.logprob.is_nan() {
                        let top = (0..event.n_top)
                            // SAFETY: as above.
                            .map(|i| unsafe { *event.top.add(i) })
                            .map(|t| (t.token, t.logprob));
                        answer.logprobs.push((event.logprob, top.collect()));
                    }
                }
                c::LORY_EVENT_TEXT => {}
                c::LORY_EVENT_LOGITS => {
                    // SAFETY: as above.
                    answer.logits.extend(unsafe { std::slice::from_raw_parts(event.values, event.n_values) });
                }
                other => panic!("event {other} was not asked for"),
            }
        }
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

fn llama<A: Api>() -> A {
    A::open(&fixture("models/llama.gguf"), 64).unwrap_or_else(|e| panic!("{e}"))
}

fn greedy(tokens: &[u32], n: usize) -> Ask<'_> {
    Ask { tokens, n, ..Ask::default() }
}

/// Runs each scenario natively and through C; what it returns must be equal, too.
macro_rules! twice {
    ($($scenario:ident),* $(,)?) => {
        $(
            #[test]
            fn $scenario() {
                assert_eq!(scenarios::$scenario::<Native>(), scenarios::$scenario::<ThroughC>());
            }
        )*
    };
}

twice!(
    answers_are_the_references,
    tokens_and_text,
    chat_templates,
    conversations_continue_rewind_and_fork,
    adapters_come_change_and_go,
    sampling_repeats_with_its_seed,
    stop_texts_end_answers,
    logits_and_logprobs,
    embeddings_and_scores,
    sessions_are_saved_and_restored,
    errors_have_the_same_words,
);

mod scenarios {
    use super::*;

    pub fn answers_are_the_references<A: Api>() -> Vec<Answer> {
        let f = fixtures::model("llama");
        let run = |n_batch| {
            let engine = A::open(&fixture("models/llama.gguf"), n_batch).expect("opened");
            let mut session = engine.session(&[]).expect("a session");
            let answer = A::ask(&mut session, &greedy(&f.tokens, f.greedy.len())).expect("an answer");
            assert_eq!(answer.tokens, f.greedy);
            assert_eq!(answer.reason, c::LORY_FINISH_LENGTH);
            assert_eq!(engine.generated_tokens(), f.greedy.len() as u64);
            let (first, later) = engine.durations();
            assert_eq!((first.len(), first.iter().sum(), later), (17, 1, 1), "one request");
            answer
        };
        [1, 5, 64].map(run).into()
    }

    pub fn tokens_and_text<A: Api>() -> (Vec<u32>, String) {
        let engine = llama::<A>();
        let tokens = engine.tokenize("Once upon a tïme 🦙");
        assert_eq!(engine.detokenize(&tokens), "Once upon a tïme 🦙");
        assert_eq!(engine.detokenize(&[]), "");
        (tokens, engine.detokenize(&[1, 2, 3]))
    }

    pub fn chat_templates<A: Api>() -> Vec<Result<String>> {
        let open = |name: &str| A::open(&fixture(&format!("models/{name}.gguf")), 8).expect("opened");
        let all: Vec<_> = ["llama", "qwen3", "llama_tied"].map(|m| open(m).chat("user", "Hello")).into();
        assert!(all[0].as_ref().is_ok_and(|text| text.contains("Hello")), "{all:?}");
        all
    }

    pub fn conversations_continue_rewind_and_fork<A: Api>() {
        let f = fixtures::model("llama");
        let engine = llama::<A>();
        let mut session = engine.session(&[]).expect("a session");
        let first = A::ask(&mut session, &greedy(&f.tokens, 10)).expect("an answer").tokens;
        let mut fork = A::fork(&mut session);
        for s in [&mut session, &mut fork] {
            let second = A::ask(s, &greedy(&[], 14)).expect("an answer").tokens;
            assert_eq!([&first[..], &second].concat(), f.greedy);
            assert_eq!(A::tokens(s), [&f.tokens[..], &f.greedy].concat());
            assert!(A::cached(s) >= f.tokens.len());
        }
        A::rewind(&mut session, f.tokens.len());
        assert_eq!(A::ask(&mut session, &greedy(&[], 24)).expect("an answer").tokens, f.greedy);
        let other: Vec<u32> = f.tokens[..3].iter().copied().chain([9, 9]).collect();
        assert_eq!(A::rewind_to_common(&mut session, &other), 3);
        assert_eq!(A::tokens(&mut session), f.tokens[..3]);
        drop(engine);
        assert_eq!(A::ask(&mut session, &greedy(&f.tokens[3..], 24)).expect("goes on").tokens, f.greedy);
    }

    pub fn adapters_come_change_and_go<A: Api>() -> (Vec<(String, u64)>, Vec<u32>, String) {
        let f = fixtures::model("llama");
        let engine = llama::<A>();
        let attn = engine.load(&fixture("lora/attn.gguf"), "attn").expect("loaded");
        let all = engine.load(&fixture("lora/all.gguf"), "all").expect("loaded");
        assert_eq!(engine.resolve("attn"), Ok(attn));
        let listed = engine.adapters();
        assert_eq!(listed.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["all", "attn"]);

        let mut session = engine.session(&[(all, 1.0)]).expect("a session");
        let adapted = A::ask(&mut session, &greedy(&f.tokens, 16)).expect("an answer").tokens;
        assert_ne!(adapted, f.greedy[..16]);
        A::set_adapters(&mut session, &[], false).expect("switched");
        A::rewind(&mut session, 0);
        assert_eq!(A::ask(&mut session, &greedy(&f.tokens, 16)).expect("an answer").tokens, f.greedy[..16]);
        A::set_adapters(&mut session, &[(attn, 0.7), (all, -0.4)], true).expect("switched");
        assert!(A::is_mixed(&mut session));
        let mut own = A::session_adapters(&mut session);
        own.iter_mut().for_each(|a| a.3 = None);
        assert_eq!(own, [(attn, "attn".into(), 0.7, None), (all, "all".into(), -0.4, None)]);

        // In flight: the session keeps what it has, the number is refused to others.
        A::set_adapters(&mut session, &[(all, 1.0)], false).expect("switched");
        let newer = engine.replace(&fixture("lora/attn.gguf"), "all").expect("replaced");
        assert!(newer > all);
        A::rewind(&mut session, 0);
        assert_eq!(A::ask(&mut session, &greedy(&f.tokens, 16)).expect("an answer").tokens, adapted);
        let refused = engine.session(&[(all, 1.0)]).err().expect("it is gone");
        engine.unload("all").expect("unloaded");
        assert!(engine.resolve("all").is_err());
        (listed, adapted, refused)
    }

    pub fn sampling_repeats_with_its_seed<A: Api>() -> Answer {
        let f = fixtures::model("llama");
        let engine = llama::<A>();
        let mut session = engine.session(&[]).expect("a session");
        let ask = Ask { temp: 1.3, top_p: Some(0.9), seed: 7, ..greedy(&f.tokens, 20) };
        let first = A::ask(&mut session, &ask).expect("an answer");
        A::rewind(&mut session, 0);
        assert_eq!(A::ask(&mut session, &ask).expect("an answer"), first);
        A::rewind(&mut session, 0);
        let other = A::ask(&mut session, &Ask { seed: 8, ..ask }).expect("an answer");
        assert_ne!(other.tokens, first.tokens);
        first
    }

    pub fn stop_texts_end_answers<A: Api>() -> Answer {
        let f = fixtures::model("llama");
        let engine = llama::<A>();
        let mut session = engine.session(&[]).expect("a session");
        let whole = A::ask(&mut session, &greedy(&f.tokens, 24)).expect("an answer").text;
        let stop: String = whole.chars().skip(5).take(2).collect();
        A::rewind(&mut session, 0);
        let ask = Ask { stop: &["never in it", &stop], ..greedy(&f.tokens, 24) };
        let answer = A::ask(&mut session, &ask).expect("an answer");
        assert_eq!(answer.reason, c::LORY_FINISH_STOP);
        assert!(whole.starts_with(&answer.text) && !answer.text.contains(&stop));
        answer
    }

    pub fn logits_and_logprobs<A: Api>() -> Answer {
        let f = fixtures::model("llama");
        let engine = llama::<A>();
        let mut session = engine.session(&[]).expect("a session");
        let ask = Ask { prompt_logits: true, logprobs: Some(3), ..greedy(&f.tokens, 4) };
        let answer = A::ask(&mut session, &ask).expect("an answer");
        assert!(fixtures::relative_error(&answer.logits, &f.logits) < 1e-3);
        assert_eq!(answer.logprobs.len(), 4);
        for ((p, top), id) in answer.logprobs.iter().zip(&f.greedy) {
            assert_eq!((top.len(), top[0]), (3, (*id, *p)), "greedy takes the likeliest");
        }
        answer
    }

    pub fn embeddings_and_scores<A: Api>() -> (Vec<f32>, Vec<f32>) {
        let f = fixtures::model("llama");
        let engine = llama::<A>();
        let mut session = engine.session(&[]).expect("a session");
        let vector = A::embed(&mut session, &f.tokens).expect("a vector");
        let length: f32 = vector.iter().map(|v| v * v).sum();
        assert!((length - 1.0).abs() < 1e-5, "{length}");
        let scores = A::score(&mut session, &f.tokens, &[&f.greedy[..3], &[5, 6]]).expect("scores");
        assert_eq!(scores.len(), 5);
        assert!(scores.iter().all(|p| *p <= 0.0) && scores[0] > scores[3]);
        assert!(A::tokens(&mut session).is_empty(), "the session does not change");
        (vector, scores)
    }

    pub fn sessions_are_saved_and_restored<A: Api>() -> Vec<String> {
        let f = fixtures::model("llama");
        let engine = llama::<A>();
        let attn = engine.load(&fixture("lora/attn.gguf"), "attn").expect("loaded");
        let mut session = engine.session(&[]).expect("a session");
        A::ask(&mut session, &greedy(&f.tokens, 10)).expect("an answer");
        let saved = A::save(&mut session).expect("saved");
        let other = llama::<A>();
        let mut restored = other.restore(&saved, &[]).expect("restored");
        assert_eq!(A::tokens(&mut restored), A::tokens(&mut session));
        assert_eq!(A::cached(&mut restored), A::cached(&mut session));
        assert_eq!(A::ask(&mut restored, &greedy(&[], 14)).expect("an answer").tokens, f.greedy[10..]);

        let mut refusals = Vec::new();
        let mut refuse = |bytes: &[u8], adapters: &[(u64, f32)]| {
            refusals.push(engine.restore(bytes, adapters).err().expect("refused"));
        };
        refuse(&saved, &[(attn, 1.0)]);
        refuse(&[], &[]);
        for cut in [4, 40, saved.len() / 2, saved.len() - 1] {
            refuse(&saved[..cut], &[]);
        }
        let mut flipped = saved.clone();
        flipped[saved.len() / 2] ^= 16;
        refuse(&flipped, &[]);
        refusals
    }

    pub fn errors_have_the_same_words<A: Api>() -> Vec<String> {
        let engine = llama::<A>();
        let attn = engine.load(&fixture("lora/attn.gguf"), "attn").expect("loaded");
        let mut s = engine.session(&[]).expect("a session");
        let mut words = Vec::new();
        let mut note = |what: &str, error: Option<String>| {
            words.push(format!("{what}: {}", error.unwrap_or_else(|| panic!("{what} is accepted"))));
        };
        note("no file", A::open(Path::new("/nowhere/model.gguf"), 8).err());
        note("a folder", A::open(&fixture("models"), 8).err());
        note("no model", A::open(&fixture("lora/all.gguf"), 8).err());
        note("text for a model", A::open(&fixture("README.md"), 8).err());
        note("batch of 0", A::open(&fixture("models/llama.gguf"), 0).err());
        note("a model for an adapter", engine.load(&fixture("models/llama.gguf"), "x").err());
        note("no adapter there", engine.load(&fixture("peft/missing"), "x").err());
        note("name taken", engine.load(&fixture("lora/attn.gguf"), "attn").err());
        note("empty name", engine.load(&fixture("lora/attn.gguf"), "").err());
        note("unknown name", engine.resolve("nobody").err());
        note("unknown unloaded", engine.unload("nobody").err());
        note("no prompt", A::ask(&mut s, &greedy(&[], 4)).err());
        note("token out of range", A::ask(&mut s, &greedy(&[1, 1 << 30], 4)).err());
        note("last token", A::ask(&mut s, &greedy(&[u32::MAX], 4)).err());
        note("prompt too long", A::ask(&mut s, &greedy(&[1; 300], 4)).err());
        note("temp NaN", A::ask(&mut s, &Ask { temp: f32::NAN, ..greedy(&[1], 4) }).err());
        note("top_p 2", A::ask(&mut s, &Ask { top_p: Some(2.0), ..greedy(&[1], 4) }).err());
        note("scale NaN", A::set_adapters(&mut s, &[(attn, f32::NAN)], false).err());
        note("scale inf", A::set_adapters(&mut s, &[(attn, f32::INFINITY)], false).err());
        note("twice", A::set_adapters(&mut s, &[(attn, 1.0), (attn, 2.0)], false).err());
        note("adapter 0", A::set_adapters(&mut s, &[(0, 1.0)], false).err());
        note("adapter out of nowhere", A::set_adapters(&mut s, &[(u64::MAX, 1.0)], false).err());
        note("nothing to embed", A::embed(&mut s, &[]).err());
        note("nothing to score after", A::score(&mut s, &[], &[&[1]]).err());
        // And afterwards everything works.
        let f = fixtures::model("llama");
        assert_eq!(A::ask(&mut s, &greedy(&f.tokens, 24)).expect("an answer").tokens, f.greedy);
        words
    }
}
