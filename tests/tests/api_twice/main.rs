//! The engine's interface twice: in Rust, and through the shared library as C programs call it.
//! Every scenario knows only the trait; texts of errors must be equal, too.

mod native;
mod scenarios;
mod through_c;

use std::path::Path;

use native::Native;
use through_c::ThroughC;

type Result<T> = std::result::Result<T, String>;

/// An answer: its tokens, its text, why it ended (the numbers of `lory.h`), log-probabilities.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    text: String,
    reason: u32,
    logprobs: Vec<(f32, Vec<(u32, f32)>)>,
    logits: Vec<f32>,
    /// Position, token, log-probability.
    prompt: Vec<(usize, u32, f32)>,
    hidden: Vec<f32>,
    /// Tokens of the prompt that were cached, that were run, and generated ones.
    counts: [u64; 3],
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
    prompt_logprobs: Option<usize>,
    /// The final states of all tokens.
    hidden: bool,
    /// Tokens after which it is ended from outside.
    cancel_after: Option<usize>,
}

/// What is known about a model.
#[derive(Debug, PartialEq)]
struct About {
    n_layers: u32,
    n_embd: u32,
    n_vocab: u32,
    file_bytes: u64,
    device: String,
    architecture: Option<String>,
    /// Of a key that no model has.
    missing: Option<String>,
    bos_and_pad: [Option<u32>; 2],
    /// What it counts.
    metrics: Vec<String>,
}

/// The metrics that a text in Prometheus' format has.
fn metric_names(text: &str) -> Vec<String> {
    let names = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    names.map(str::to_owned).collect()
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
    /// How many adapters it has; so below.
    fn open_pack(&self, path: &Path) -> Result<usize>;
    fn reopen_pack(&self, path: &Path) -> Result<usize>;
    fn close_pack(&self, path: &Path) -> Result<()>;
    /// Their bytes.
    fn prefetch(&self, names: &[&str]) -> Result<usize>;
    fn set_budget(&self, bytes: usize);
    fn about(&self) -> About;
    /// What each token completes, and what is left in the end.
    fn stream(&self, tokens: &[u32]) -> Vec<String>;
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
    /// An answer that matches a grammar of a kind (the numbers of `lory.h`).
    fn constrained(&self, s: &mut Self::Session, ask: &Ask, kind: u32, grammar: &str) -> Result<Answer>;
    /// Answers of several sessions at once.
    fn together(sessions: &mut [Self::Session], asks: &[Ask]) -> Result<Vec<Answer>>;
    /// An answer that another thread computes, which is lent to the engine, while this one only looks.
    fn driven(&self, s: &mut Self::Session, ask: &Ask) -> Result<Answer>;
    fn tokens(s: &mut Self::Session) -> Vec<u32>;
    fn cached(s: &mut Self::Session) -> usize;
    fn rewind(s: &mut Self::Session, n: usize);
    fn rewind_to_common(s: &mut Self::Session, tokens: &[u32]) -> usize;
    fn fork(s: &mut Self::Session) -> Self::Session;
    fn embed(s: &mut Self::Session, tokens: &[u32]) -> Result<Vec<f32>>;
    fn score(s: &mut Self::Session, prompt: &[u32], continuations: &[&[u32]]) -> Result<Vec<f32>>;
    fn save(s: &mut Self::Session) -> Result<Vec<u8>>;
    fn save_file(s: &mut Self::Session, path: &Path) -> Result<()>;
    fn restore_file(&self, path: &Path) -> Result<Self::Session>;
    fn restore(&self, bytes: &[u8], adapters: &[(u64, f32)]) -> Result<Self::Session>;
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
    packs_open_change_and_close,
    grammars_bind_answers,
    sessions_run_in_the_same_steps,
    a_thread_may_be_lent,
    prompts_are_looked_at,
    answers_are_cancelled,
    models_are_known,
    streams_give_whole_characters,
    errors_have_the_same_words,
);
