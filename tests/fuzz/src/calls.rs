//! Random sequences of calls through the C interface: whatever the order, every call succeeds or says
//! why not, what comes back is sound, and in the end everything has been given back.

use std::{
    ffi::{CStr, c_void},
    ptr::{null, null_mut},
    sync::OnceLock,
};

use lory::{
    adapter_list::*,
    adapters::*,
    chat::*,
    engine::{lory_engine, lory_engine_drive, lory_engine_step, lory_engine_wake_drivers},
    event::*,
    generation::*,
    grammar::{LORY_GRAMMAR_GBNF, LORY_GRAMMAR_JSON_SCHEMA, lory_grammar, lory_grammar_new},
    memory::*,
    metrics::{lory_engine_metrics, lory_metrics, lory_metrics_init},
    open::lory_engine_open_memory,
    options::{lory_engine_options, lory_engine_options_init},
    request::{lory_request, lory_request_init},
    sampler::{lory_sampler_options, lory_sampler_options_init},
    saved::{lory_session_restore_memory, lory_session_save_memory},
    session::*,
    session_adapters::*,
    stats::{lory_generation_stats, lory_stats, lory_stats_init},
    status::{lory_last_error, lory_status},
    tokenizer::*,
};

static MODEL: &[u8] = include_bytes!("../../fixtures/models/llama.gguf");
static ADAPTERS: [&[u8]; 2] =
    [include_bytes!("../../fixtures/lora/attn.gguf"), include_bytes!("../../fixtures/lora/all.gguf")];
const NAMES: [&str; 3] = ["a", "b", "c"];

struct Engine(*mut lory_engine);

// SAFETY: an engine is shareable.
unsafe impl Send for Engine {}
// SAFETY: as above.
unsafe impl Sync for Engine {}

struct Grammars([*mut lory_grammar; 3]);

// SAFETY: a grammar is shareable.
unsafe impl Send for Grammars {}
// SAFETY: as above.
unsafe impl Sync for Grammars {}

fn init<T>(f: impl FnOnce(*mut T, usize) -> lory_status) -> T {
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    assert_eq!(f(value.as_mut_ptr(), size_of::<T>()), lory_status::LORY_OK);
    // SAFETY: every struct of the header may be zero, and this one has been initialised.
    unsafe { value.assume_init() }
}

/// One engine for all inputs, small enough to be full now and then.
fn engine() -> *mut lory_engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    let open = || {
        // SAFETY: pointers to what lives during the call; so everywhere below.
        let mut options: lory_engine_options = init(|o, n| unsafe { lory_engine_options_init(o, n) });
        (options.threads, options.n_ctx, options.kv_tokens, options.n_batch) = (1, 96, 256, 24);
        let mut engine = null_mut();
        let (data, size) = (MODEL.as_ptr().cast(), MODEL.len());
        let name = c"model".as_ptr();
        // SAFETY: as above.
        let status =
            unsafe { lory_engine_open_memory(data, size, name, 5, None, null_mut(), &options, &mut engine) };
        assert_eq!(status, lory_status::LORY_OK);
        Engine(engine)
    };
    ENGINE.get_or_init(open).0
}

/// Grammars for all inputs: compiling one takes longer than an input may.
fn grammars() -> &'static [*mut lory_grammar; 3] {
    static GRAMMARS: OnceLock<Grammars> = OnceLock::new();
    let compile = |(kind, source): (u32, &CStr)| {
        let mut grammar = null_mut();
        // SAFETY: as above.
        let status =
            unsafe { lory_grammar_new(engine(), kind, source.as_ptr(), source.count_bytes(), &mut grammar) };
        assert_eq!(status, lory_status::LORY_OK);
        grammar
    };
    let sources = [
        (LORY_GRAMMAR_GBNF, c"root ::= [a-z ]{1,9}"),
        (LORY_GRAMMAR_GBNF, c"root ::= \"yes\" | \"no\" root"),
        (LORY_GRAMMAR_JSON_SCHEMA, c"{}"),
    ];
    &GRAMMARS.get_or_init(|| Grammars(sources.map(compile))).0
}

/// Whether the call succeeded; if not, it must say why.
fn ok(status: lory_status) -> bool {
    if status == lory_status::LORY_OK {
        return true;
    }
    assert_ne!(status, lory_status::LORY_E_INTERNAL, "{}", words());
    assert!(!words().is_empty());
    false
}

fn words() -> String {
    // SAFETY: NUL-terminated until the next failure.
    unsafe { CStr::from_ptr(lory_last_error()) }.to_str().expect("UTF-8").to_owned()
}

/// The input, a byte at a time.
struct Input<'a>(std::slice::Iter<'a, u8>);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        self.0.next().copied().unwrap_or(0)
    }

    fn below(&mut self, n: usize) -> usize {
        self.byte() as usize % n
    }

    /// Mostly tokens that exist; few bytes for many, so that inputs are mostly calls.
    fn tokens(&mut self) -> Vec<u32> {
        let (n, first, by) = (self.below(40) as u32, u32::from(self.byte()), u32::from(self.byte()));
        let beyond = if by > 250 { 1 << 20 } else { 0 };
        (0..n).map(|i| (first + i * (by % 8)) % 256 + beyond).collect()
    }

    /// Mostly one of those that are there; now and then NULL.
    fn one_of<T>(&mut self, places: &[Option<*mut T>]) -> *mut T {
        let alive: Vec<_> = places.iter().flatten().collect();
        match self.byte() {
            251.. => null_mut(),
            n => alive.get(usize::from(n) % alive.len().max(1)).map_or(null_mut(), |p| **p),
        }
    }

    fn scale(&mut self) -> f32 {
        [0.0, 1.0, -0.5, 0.25, 2.0, 0.7, f32::NAN, f32::INFINITY][self.below(8)]
    }
}

/// What the sequence holds.
#[derive(Default)]
struct State {
    sessions: [Option<*mut lory_session>; 4],
    generations: [Option<*mut lory_generation>; 4],
    cancellers: [Option<*mut lory_canceller>; 2],
    adapters: Vec<lory_adapter>,
}

impl State {
    fn session(&self, input: &mut Input) -> *mut lory_session {
        input.one_of(&self.sessions)
    }

    fn generation(&self, input: &mut Input) -> *mut lory_generation {
        input.one_of(&self.generations)
    }

    fn scales(&self, input: &mut Input) -> Vec<lory_adapter_scale> {
        let n = input.below(3);
        let id =
            |input: &mut Input| self.adapters.iter().rev().nth(input.below(4)).copied().unwrap_or(999_999);
        (0..n).map(|_| lory_adapter_scale { id: id(input), scale: input.scale(), reserved: 0 }).collect()
    }

    fn put_session(&mut self, at: usize, new: *mut lory_session) {
        // SAFETY: freed once: its place is taken over.
        unsafe { lory_session_free(self.sessions[at].replace(new).unwrap_or(null_mut())) };
    }

    fn put_generation(&mut self, at: usize, new: *mut lory_generation) {
        // SAFETY: as above.
        unsafe { lory_generation_free(self.generations[at].replace(new).unwrap_or(null_mut())) };
    }

    fn free(&mut self) {
        // SAFETY: as above.
        unsafe {
            self.sessions.iter_mut().filter_map(Option::take).for_each(|s| lory_session_free(s));
            self.generations.iter_mut().filter_map(Option::take).for_each(|g| lory_generation_free(g));
            self.cancellers.iter_mut().filter_map(Option::take).for_each(|c| lory_canceller_free(c));
            NAMES.iter().for_each(|name| {
                lory_adapter_unload(engine(), name.as_ptr().cast(), 1);
            });
            assert!(ok(lory_adapter_set_budget(engine(), 0)));
        }
    }
}

/// Runs the sequence that `data` describes.
pub fn calls(data: &[u8]) {
    let mut input = Input(data.iter());
    let mut state = State::default();
    while input.0.len() > 0 {
        step(&mut state, &mut input);
    }
    state.free();
    // SAFETY: as above.
    unsafe {
        let mut metrics: lory_metrics = init(|o, n| lory_metrics_init(o, n));
        assert!(ok(lory_engine_metrics(engine(), &mut metrics)));
        assert_eq!((metrics.sessions, metrics.kv_bytes_used), (0, 0), "something was not given back");
    }
}

/// A request with options of all kinds; it is handed to `then` while its parts live.
fn request(input: &mut Input, then: impl FnOnce(&lory_request)) {
    let tokens = input.tokens();
    // SAFETY: as above.
    let mut sampler: lory_sampler_options = init(|o, n| unsafe { lory_sampler_options_init(o, n) });
    sampler.temp = [0.0, 0.0, 0.8, 0.8, 1.3, 2.0, -1.0, 0.1][input.below(8)];
    (sampler.has_seed, sampler.seed) = (1, u64::from(input.byte()));
    sampler.logprobs = input.below(4) as i32 - 1;
    // SAFETY: as above.
    let mut request: lory_request = init(|o, n| unsafe { lory_request_init(o, n) });
    (request.tokens, request.n_tokens) = (tokens.as_ptr(), tokens.len());
    request.max_new_tokens = input.below(24);
    request.sampler = &sampler;
    request.ignore_eos = (input.byte() & 1).into();
    request.prompt_logits = u32::from(input.below(8) == 7);
    request.hidden = input.below(4) as u32;
    request.max_queued = input.below(20);
    request.prompt_logprobs = input.below(8) as i32 - 5;
    request.grammar = match input.below(8) {
        n @ 0..3 => grammars()[n],
        _ => null(),
    };
    then(&request);
}

fn check(event: &lory_event) {
    assert!(event.kind <= LORY_EVENT_HIDDEN);
    if event.text.len > 0 {
        // SAFETY: valid until the next call with the generation.
        let bytes = unsafe { std::slice::from_raw_parts(event.text.data.cast::<u8>(), event.text.len) };
        assert!(std::str::from_utf8(bytes).is_ok());
    }
    if event.n_values > 0 {
        // SAFETY: as above.
        let values = unsafe { std::slice::from_raw_parts(event.values, event.n_values) };
        assert!(values.iter().all(|v| v.is_finite()));
    }
}

fn step(state: &mut State, input: &mut Input) {
    let e = engine();
    // SAFETY: as above; handles are NULL or alive.
    unsafe {
        match input.below(24) {
            0 | 1 => {
                let set = state.scales(input);
                let mut options: lory_session_options = init(|o, n| lory_session_options_init(o, n));
                (options.adapters, options.n_adapters) = (set.as_ptr(), set.len());
                options.priority = input.byte().into();
                let mut new = null_mut();
                if ok(lory_session_new(e, &options, &mut new)) {
                    state.put_session(input.below(4), new);
                }
            }
            2..=4 => {
                let (session, at) = (state.session(input), input.below(4));
                let mut new = null_mut();
                let mut done = false;
                request(input, |r| done = ok(lory_session_generate(session, r, &mut new)));
                if done {
                    state.put_generation(at, new);
                }
            }
            5 | 6 => {
                let mut event: lory_event = init(|o, n| lory_event_init(o, n));
                if ok(lory_generation_next(state.generation(input), &mut event)) {
                    check(&event);
                    assert_ne!(event.kind, LORY_EVENT_NONE);
                }
            }
            7 => {
                let mut event: lory_event = init(|o, n| lory_event_init(o, n));
                if ok(lory_generation_poll(state.generation(input), &mut event)) {
                    check(&event);
                }
            }
            8 => {
                let all: Vec<_> = state.generations.iter().flatten().copied().collect();
                let mut event: lory_event = init(|o, n| lory_event_init(o, n));
                let mut index = usize::MAX;
                if ok(lory_generations_next(all.as_ptr(), all.len(), &mut index, &mut event)) {
                    check(&event);
                    assert!(index <= all.len());
                }
            }
            9 => {
                ok(lory_engine_step(e, &mut 0));
            }
            10 => {
                let mut text = lory_text { data: null_mut(), len: 0 };
                ok(lory_generation_text(state.generation(input), &mut text));
                lory_text_free(&mut text);
            }
            11 => {
                let g = state.generation(input);
                ok(lory_generation_cancel(g));
                let mut new = null_mut();
                if ok(lory_generation_canceller(g, &mut new)) {
                    lory_canceller_free(state.cancellers[input.below(2)].replace(new).unwrap_or(null_mut()));
                }
            }
            12 => {
                ok(lory_canceller_cancel(state.cancellers[input.below(2)].unwrap_or(null_mut())));
            }
            13 => {
                let set = state.scales(input);
                let how = input.below(3) as u32;
                ok(lory_session_set_adapters(state.session(input), set.as_ptr(), set.len(), how));
            }
            14 => {
                ok(lory_session_rewind(state.session(input), input.below(48)));
            }
            15 => {
                let mut new = null_mut();
                if ok(lory_session_fork(state.session(input), &mut new)) {
                    state.put_session(input.below(4), new);
                }
            }
            16 => {
                let (bytes, name) = (ADAPTERS[input.below(2)], NAMES[input.below(3)]);
                let cut = if input.below(8) == 7 { input.byte().into() } else { bytes.len() };
                let (data, name, replace) =
                    (bytes.as_ptr().cast(), name.as_ptr().cast(), input.below(2) as i32);
                let mut id = 0;
                if ok(lory_adapter_load_memory(e, data, cut, name, 1, replace, &mut id)) {
                    state.adapters.push(id);
                }
            }
            17 => {
                ok(lory_adapter_unload(e, NAMES[input.below(3)].as_ptr().cast(), 1));
            }
            18 => {
                let at = input.below(8);
                match at {
                    0..4 => state.put_session(at, null_mut()),
                    _ => state.put_generation(at - 4, null_mut()),
                }
            }
            19 => texts_and_states(state, input),
            20 => run(state, input),
            21 => adapters(state, input),
            22 => texts(input),
            _ => sessions(state, input),
        }
    }
}

/// What a callback of `lory_generation_run` knows.
struct Run {
    generation: *mut lory_generation,
    /// Events until it asks for the end.
    left: usize,
}

unsafe extern "C-unwind" fn on_event(user: *mut c_void, event: *const lory_event) -> i32 {
    // SAFETY: the pointers of the call that is running.
    unsafe {
        check(&*event);
        let run = &mut *user.cast::<Run>();
        let mut other: lory_event = init(|o, n| lory_event_init(o, n));
        assert_eq!(lory_generation_poll(run.generation, &mut other), lory_status::LORY_E_BUSY);
        ok(lory_engine_step(engine(), &mut 0));
        run.left = run.left.saturating_sub(1);
        (run.left == 0).into()
    }
}

unsafe extern "C-unwind" fn go_on(left: *mut c_void) -> i32 {
    // SAFETY: the pointer of the call that is running.
    unsafe {
        let left = &mut *left.cast::<usize>();
        // It must not sleep: there is no other thread.
        assert!(ok(lory_engine_wake_drivers(engine())));
        *left = left.saturating_sub(1);
        (*left > 0).into()
    }
}

fn run(state: &mut State, input: &mut Input) {
    // SAFETY: as above.
    unsafe {
        let generation = state.generation(input);
        match input.below(4) {
            0 => {
                let mut left = input.below(16);
                assert!(ok(lory_engine_drive(engine(), Some(go_on), (&raw mut left).cast())));
            }
            1 => {
                let mut stats: lory_stats = init(|o, n| lory_stats_init(o, n));
                ok(lory_generation_stats(generation, &mut stats));
            }
            _ => {
                let mut run = Run { generation, left: input.below(16) };
                ok(lory_generation_run(generation, Some(on_event), (&raw mut run).cast(), null_mut()));
            }
        }
    }
}

fn adapters(state: &mut State, input: &mut Input) {
    let e = engine();
    // SAFETY: as above.
    unsafe {
        match input.below(5) {
            0 => {
                let mut list = null_mut();
                assert!(ok(lory_adapter_list_new(e, &mut list)));
                let mut info: lory_adapter_info = init(|o, n| lory_adapter_info_init(o, n));
                let at = input.below(5);
                assert_eq!(ok(lory_adapter_list_get(list, at, &mut info)), at < lory_adapter_list_len(list));
                lory_adapter_list_free(list);
            }
            1 => {
                let mut list = null_mut();
                if ok(lory_session_adapters_new(state.session(input), &mut list)) {
                    let mut one: lory_session_adapter = init(|o, n| lory_session_adapter_init(o, n));
                    let at = input.below(4);
                    let there = at < lory_session_adapters_len(list);
                    assert_eq!(ok(lory_session_adapters_get(list, at, &mut one)), there);
                }
                lory_session_adapters_free(list);
            }
            2 => {
                let budget = [0, 1, 20_000, 60_000, 1 << 40][input.below(5)];
                assert!(ok(lory_adapter_set_budget(e, budget)));
            }
            3 => {
                let mut id = 0;
                if ok(lory_adapter_resolve(e, NAMES[input.below(3)].as_ptr().cast(), 1, &mut id)) {
                    state.adapters.push(id);
                }
            }
            _ => {
                let names = [lory_str { data: NAMES[input.below(3)].as_ptr().cast(), len: 1 }];
                ok(lory_adapter_prefetch(e, names.as_ptr(), input.below(2), &mut 0));
            }
        }
    }
}

/// The bytes of the input as text, cut into tokens one by one, and in a conversation.
fn texts(input: &mut Input) {
    let (e, tokens) = (engine(), input.tokens());
    // SAFETY: as above.
    unsafe {
        let mut stream = null_mut();
        if ok(lory_detokenizer_new(e, input.below(16) as u32, &mut stream)) {
            let mut piece = lory_str { data: null(), len: 0 };
            for token in &tokens {
                ok(lory_detokenizer_push(stream, *token, &mut piece));
            }
            assert!(ok(lory_detokenizer_finish(stream, &mut piece)));
        }
        lory_detokenizer_free(stream);
        let mut text = lory_text { data: null_mut(), len: 0 };
        let token = u32::from(input.byte()) * 2;
        if ok(lory_token_bytes(e, token, &mut text)) {
            let roles = [c"user", c"assistant", c"system", c"nobody"];
            let role = lory_str { data: roles[input.below(4)].as_ptr(), len: usize::MAX };
            let message = lory_chat_message { role, content: lory_str { data: text.data, len: text.len } };
            let mut options: lory_chat_options = init(|o, n| lory_chat_options_init(o, n));
            (options.messages, options.n_messages) = (&message, 1);
            let mut rendered = lory_text { data: null_mut(), len: 0 };
            ok(lory_chat_render(e, &options, &mut rendered));
            lory_text_free(&mut rendered);
        }
        lory_text_free(&mut text);
        ok(lory_token_is_end(e, token, &mut 0));
        ok(lory_token_special(e, input.below(9) as u32, &mut 0));
    }
}

fn sessions(state: &mut State, input: &mut Input) {
    let (session, tokens) = (state.session(input), input.tokens());
    // SAFETY: as above.
    unsafe {
        match input.below(4) {
            0 => {
                let mut kept = usize::MAX;
                if ok(lory_session_rewind_to_common(session, tokens.as_ptr(), tokens.len(), &mut kept)) {
                    assert!(kept <= tokens.len());
                }
            }
            1 => {
                ok(lory_session_set_priority(session, i32::from(input.byte()) - 128));
            }
            2 => {
                let at = input.below(tokens.len() + 1);
                let span = |t: &[u32]| lory_token_span { data: t.as_ptr(), len: t.len() };
                let spans = [span(&tokens[..at]), span(&tokens[at..])];
                let mut scores = lory_floats { data: null_mut(), len: 0 };
                if ok(lory_session_score(session, [1].as_ptr(), 1, spans.as_ptr(), 2, &mut scores)) {
                    assert_eq!(scores.len, tokens.len());
                }
                lory_floats_free(&mut scores);
            }
            _ => {
                let (mut n, mut mixed, mut all) = (0, 0, lory_tokens { data: null_mut(), len: 0 });
                if ok(lory_session_tokens(session, &mut all)) {
                    assert!(ok(lory_session_cached_tokens(session, &mut n)) && n <= all.len);
                    assert!(ok(lory_session_is_mixed(session, &mut mixed)));
                }
                lory_tokens_free(&mut all);
            }
        }
    }
}

fn texts_and_states(state: &mut State, input: &mut Input) {
    let (e, tokens) = (engine(), input.tokens());
    // SAFETY: as above.
    unsafe {
        let mut text = lory_text { data: null_mut(), len: 0 };
        if ok(lory_detokenize(e, tokens.as_ptr(), tokens.len(), 0, &mut text)) {
            let mut again = lory_tokens { data: null_mut(), len: 0 };
            assert!(ok(lory_tokenize(e, text.data, text.len, 1, &mut again)));
            lory_tokens_free(&mut again);
            lory_text_free(&mut text);
        }
        let session = state.session(input);
        let mut vectors = lory_floats { data: null_mut(), len: 0 };
        if input.below(4) == 0
            && ok(lory_session_embed(session, tokens.as_ptr(), tokens.len(), 1, 1, &mut vectors))
        {
            lory_floats_free(&mut vectors);
        }
        if ok(lory_session_save_memory(session, &mut text)) {
            let cut = text.len.saturating_sub([0, 0, 1, 77][input.below(4)]);
            let mut new = null_mut();
            if ok(lory_session_restore_memory(e, text.data.cast(), cut, null(), &mut new)) {
                state.put_session(input.below(4), new);
            }
            lory_text_free(&mut text);
        }
    }
}
