//! The engine in Rust.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    task::Poll,
    thread,
};

use lory_kernels::backend::KvType;
use lory_models::{
    chat::{ChatTemplate, Message, RenderOptions},
    gguf::Value,
    tokenizer::{DecodeOptions, Detokenizer, EncodeOptions},
};
use lory_runtime::{
    AdapterId, Engine, EngineOptions, Event, FinishReason, Generation, GrammarSource, Hidden, OnSwitch,
    Pooling, Request, SamplerOptions, Session, SessionOptions, normalize,
};
use lory_tests::c_api as c;

use crate::{About, Answer, Api, Ask, Result, metric_names};

pub struct Native(Engine);

fn words(e: impl std::fmt::Display) -> String {
    e.to_string()
}

fn ids(adapters: &[(u64, f32)]) -> Vec<(AdapterId, f32)> {
    adapters.iter().map(|(id, scale)| (AdapterId::from_u64(*id), *scale)).collect()
}

fn request(ask: &Ask) -> Request {
    let sampler = SamplerOptions {
        temp: ask.temp,
        top_p: ask.top_p.unwrap_or(SamplerOptions::default().top_p),
        seed: Some(ask.seed),
        logprobs: ask.logprobs,
        ..SamplerOptions::default()
    };
    Request {
        tokens: ask.tokens.to_vec(),
        max_new_tokens: ask.n,
        sampler,
        stop: ask.stop.iter().map(|s| s.to_string()).collect(),
        ignore_eos: true,
        prompt_logits: ask.prompt_logits,
        prompt_logprobs: ask.prompt_logprobs,
        hidden: if ask.hidden { Hidden::All } else { Hidden::None },
        ..Request::default()
    }
}

fn add(answer: &mut Answer, event: Event) {
    match event {
        Event::Token { id, text, logprob, top } => {
            answer.tokens.push(id);
            answer.text += &text;
            answer.logprobs.extend(logprob.map(|p| (p, top)));
        }
        Event::Text(text) => answer.text += &text,
        Event::Logits { values, .. } => answer.logits.extend(values),
        Event::Hidden { values, .. } => answer.hidden.extend(values),
        Event::Prompt { position, id, logprob, .. } => answer.prompt.push((position, id, logprob)),
        other => panic!("{other:?} was not asked for"),
    }
}

fn end(answer: &mut Answer, generation: &Generation) {
    let stats = generation.stats();
    answer.counts = [stats.cached_tokens, stats.prompt_tokens, stats.generated_tokens].map(|n| n as u64);
    answer.reason = match generation.finish_reason() {
        None => c::LORY_FINISH_NONE,
        Some(FinishReason::Eos) => c::LORY_FINISH_EOS,
        Some(FinishReason::Stop) => c::LORY_FINISH_STOP,
        Some(FinishReason::Length) => c::LORY_FINISH_LENGTH,
        Some(FinishReason::ContextFull) => c::LORY_FINISH_CONTEXT_FULL,
        Some(FinishReason::Cancelled) => c::LORY_FINISH_CANCELLED,
    };
}

fn read(mut generation: Generation, cancel_after: Option<usize>) -> Result<Answer> {
    let mut answer = Answer::default();
    while let Some(event) = generation.next() {
        add(&mut answer, event.map_err(words)?);
        if cancel_after == Some(answer.tokens.len()) {
            generation.canceller().cancel();
        }
    }
    end(&mut answer, &generation);
    Ok(answer)
}

/// As [`read`], but runs nothing.
fn watch(mut generation: Generation) -> Result<Answer> {
    let mut answer = Answer::default();
    loop {
        match generation.poll_next() {
            Poll::Pending => thread::yield_now(),
            Poll::Ready(Some(event)) => add(&mut answer, event.map_err(words)?),
            Poll::Ready(None) => break,
        }
    }
    end(&mut answer, &generation);
    Ok(answer)
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

    fn open_pack(&self, path: &Path) -> Result<usize> {
        self.0.adapters().open_pack(path).map_err(words)
    }

    fn reopen_pack(&self, path: &Path) -> Result<usize> {
        self.0.adapters().reopen_pack(path).map_err(words)
    }

    fn close_pack(&self, path: &Path) -> Result<()> {
        self.0.adapters().close_pack(path).map_err(words)
    }

    fn prefetch(&self, names: &[&str]) -> Result<usize> {
        self.0.adapters().prefetch(names).map_err(words)
    }

    fn set_budget(&self, bytes: usize) {
        self.0.adapters().set_budget((bytes > 0).then_some(bytes));
    }

    fn about(&self) -> About {
        let model = self.0.model();
        let config = model.decoder.config();
        let architecture = match model.gguf.metadata().get("general.architecture") {
            Some(Value::String(name)) => Some(name.clone()),
            _ => None,
        };
        About {
            n_layers: config.n_layers() as u32,
            n_embd: config.n_embd as u32,
            n_vocab: model.tokenizer.vocab_size() as u32,
            file_bytes: model.files.iter().map(|f| (**f).as_ref().len() as u64).sum(),
            device: self.0.device(),
            architecture,
            missing: None,
            bos_and_pad: [model.tokenizer.bos(), model.tokenizer.pad()],
            metrics: metric_names(&self.0.metrics().prometheus()),
        }
    }

    fn stream(&self, tokens: &[u32]) -> Vec<String> {
        let mut stream = Detokenizer::new(self.0.model().tokenizer.clone(), DecodeOptions::default());
        let mut pieces: Vec<_> = tokens.iter().map(|t| stream.push(*t)).collect();
        pieces.push(stream.finish());
        pieces
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
        read(s.generate(request(ask)).map_err(words)?, ask.cancel_after)
    }

    fn constrained(&self, s: &mut Session, ask: &Ask, kind: u32, grammar: &str) -> Result<Answer> {
        let source = match kind {
            c::LORY_GRAMMAR_GBNF => GrammarSource::Gbnf(grammar.into()),
            _ => GrammarSource::JsonSchema(grammar.into()),
        };
        let grammar = Some(self.0.model().grammar(&source).map_err(words)?);
        read(s.generate(Request { grammar, ..request(ask) }).map_err(words)?, None)
    }

    fn together(sessions: &mut [Session], asks: &[Ask]) -> Result<Vec<Answer>> {
        let start = |(s, ask): (&mut Session, &Ask)| s.generate(request(ask)).map_err(words);
        let mut generations = sessions.iter_mut().zip(asks).map(start).collect::<Result<Vec<_>>>()?;
        let mut answers: Vec<_> = asks.iter().map(|_| Answer::default()).collect();
        while let Some((i, event)) = Generation::next_of(&mut generations.iter_mut().collect::<Vec<_>>()) {
            match event {
                Some(event) => add(&mut answers[i], event.map_err(words)?),
                None => end(&mut answers[i], &generations[i]),
            }
        }
        Ok(answers)
    }

    fn driven(&self, s: &mut Session, ask: &Ask) -> Result<Answer> {
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| self.0.drive(|| !over.load(SeqCst)));
            let answer = s.generate(request(ask)).map_err(words).and_then(watch);
            over.store(true, SeqCst);
            self.0.wake_drivers();
            answer
        })
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

    fn save_file(s: &mut Session, path: &Path) -> Result<()> {
        s.save(path).map_err(words)
    }

    fn restore_file(&self, path: &Path) -> Result<Session> {
        self.0.restore(path, &SessionOptions::default()).map_err(words)
    }

    fn restore(&self, mut bytes: &[u8], adapters: &[(u64, f32)]) -> Result<Session> {
        let options = SessionOptions { adapters: ids(adapters), ..SessionOptions::default() };
        self.0.restore_from(&mut bytes, "the saved session", &options).map_err(words)
    }
}
