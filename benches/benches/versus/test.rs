//! The tests, named as llama-bench names them, and how one is measured.

use std::thread::sleep;
use std::time::{Duration, Instant};

use lory_benches::Samples;
use lory_models::cost::Cost;
use lory_runtime::random_tokens;

use crate::side::Side;

/// What is timed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Test {
    /// A prompt of `n` tokens behind `depth` cached ones; logits of the last.
    Prompt { n: usize, depth: usize },
    /// `n` tokens one after the other behind `depth` cached ones.
    Generate { n: usize, depth: usize },
    /// `sequences` sequences with prompts of `prompt` tokens get `n` more each, all at the same time; with `adapters`
    /// each under an adapter of its own.
    Batched { sequences: usize, prompt: usize, n: usize, adapters: bool },
}

impl Test {
    pub fn name(&self) -> String {
        let at = |depth: usize| if depth == 0 { String::new() } else { format!(" @ d{depth}") };
        match self {
            Test::Prompt { n, depth } => format!("pp{n}{}", at(*depth)),
            Test::Generate { n, depth } => format!("tg{n}{}", at(*depth)),
            Test::Batched { sequences, n, adapters: false, .. } => format!("tg{n}@npl{sequences}"),
            Test::Batched { sequences, n, .. } => format!("tg{n}@npl{sequences}@L{sequences}"),
        }
    }

    pub fn sequences(&self) -> usize {
        match self {
            Test::Batched { sequences, .. } => *sequences,
            _ => 1,
        }
    }

    /// Whether every sequence has an adapter of its own.
    pub fn adapters(&self) -> bool {
        matches!(self, Test::Batched { adapters: true, .. })
    }

    /// Tokens of a sequence before the clock starts.
    pub fn before(&self) -> usize {
        match self {
            Test::Prompt { depth, .. } | Test::Generate { depth, .. } => *depth,
            Test::Batched { prompt, .. } => *prompt,
        }
    }

    /// Tokens that every sequence gets while it runs.
    pub fn length(&self) -> usize {
        match self {
            Test::Prompt { n, .. } | Test::Generate { n, .. } | Test::Batched { n, .. } => *n,
        }
    }

    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.sequences() * self.length()
    }

    fn is_prompt(&self) -> bool {
        matches!(self, Test::Prompt { .. })
    }

    /// Bytes that one sample has to read, and operations that it has to carry out.
    pub fn work(&self, cost: &Cost) -> (f64, f64) {
        let (sequences, n) = (self.sequences(), self.length());
        // Tokens that a row looks back into, itself included, on average.
        let cached = self.before() as f64 + (n as f64 + 1.0) / 2.0;
        match self.is_prompt() {
            true => (cost.step_bytes(1, cached), cost.ops(n, cached, 1)),
            false => (
                n as f64 * cost.step_bytes(sequences, cached),
                cost.ops(self.tokens(), cached, self.tokens()),
            ),
        }
    }

    /// Fills the sequences up to where the clock starts.
    pub fn prepare(&self, side: &mut dyn Side, vocab: usize) -> Result<(), String> {
        for sequence in 0..self.sequences() {
            if self.before() > 0 {
                side.run(&[(sequence, &random_tokens(1 + sequence as u64, self.before(), vocab))])?;
            }
        }
        Ok(())
    }

    /// One sample; the sequences are as before afterwards.
    fn sample(&self, side: &mut dyn Side, vocab: usize) -> Result<Duration, String> {
        let tokens: Vec<Vec<u32>> = (0..self.sequences())
            .map(|sequence| random_tokens(1000 + sequence as u64, self.length(), vocab))
            .collect();
        let start = Instant::now();
        if self.is_prompt() {
            side.run(&[(0, &tokens[0])])?;
        } else {
            for i in 0..self.length() {
                let step: Vec<_> = tokens.iter().map(|t| &t[i..=i]).enumerate().collect();
                side.run(&step)?;
            }
        }
        let time = start.elapsed();
        for sequence in 0..self.sequences() {
            side.truncate(sequence, self.before())?;
        }
        Ok(time)
    }

    /// Both sides in turns, who begins changing from pair to pair, after one run of each that does not
    /// count. A pause lets the threads of the one go to sleep before the other starts.
    pub fn measure(
        &self,
        sides: [&mut dyn Side; 2],
        vocab: usize,
        pairs: usize,
        warm_up: bool,
    ) -> Result<[Samples; 2], String> {
        let mut samples = [(); 2].map(|()| Samples { tokens: self.tokens(), times: Vec::new() });
        let first = if warm_up { 0 } else { 1 };
        for pair in first..=pairs {
            let order = if pair % 2 == 0 { [1, 0] } else { [0, 1] };
            for side in order {
                sleep(Duration::from_millis(40));
                let time = self.sample(&mut *sides[side], vocab)?;
                if pair > 0 {
                    samples[side].times.push(time);
                }
            }
        }
        Ok(samples)
    }
}
