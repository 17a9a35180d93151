//! The line of speeds after an answer, with what the adapters cost.

use std::{collections::HashMap, time::Duration};

use lory_runtime::{Engine, FinishReason, Stats};

use crate::{answer::Answer, mix::Mix};

/// Time per generated token by mix, over a whole conversation.
#[derive(Debug, Default)]
pub struct Costs {
    by_label: HashMap<String, (usize, Duration)>,
}

impl Costs {
    /// Adds an answer. Its first token came with the prompt's last step.
    pub fn add(&mut self, label: &str, stats: &Stats) {
        let entry = self.by_label.entry(label.into()).or_default();
        entry.0 += stats.generated_tokens.saturating_sub(1);
        entry.1 += stats.generated_time;
    }

    /// Milliseconds per token, where some were measured.
    fn per_token(&self, label: &str) -> Option<f64> {
        let (tokens, time) = self.by_label.get(label).filter(|(tokens, _)| *tokens > 0)?;
        Some(time.as_secs_f64() * 1e3 / *tokens as f64)
    }

    /// Milliseconds per token that `label` takes longer than the base, if both were measured.
    pub fn over_base(&self, label: &str) -> Option<f64> {
        Some(self.per_token(label)? - self.per_token("base")?)
    }
}

fn rate(tokens: usize, time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds > 0.0 && tokens > 0 => format!("{:.1} t/s", tokens as f64 / seconds),
        _ => "-".into(),
    }
}

/// Why an answer ended, where that was not for the model to say.
fn end(finish: &FinishReason) -> &'static str {
    match finish {
        FinishReason::Cancelled => " · stopped",
        FinishReason::ContextFull => " · the context is full (-c raises it)",
        FinishReason::Length => " · cut by -n",
        _ => "",
    }
}

/// `prompt 12 tokens (+40 cached) at 101.3 t/s · answer 57 tokens at 23.4 t/s · poet (12.3 KiB, +0.8 ms/token)`, and why
/// it ended.
pub fn line(answer: &Answer, mix: &Mix, engine: &Engine, costs: Option<&Costs>) -> String {
    let stats = &answer.stats;
    let cached = match stats.cached_tokens {
        0 => String::new(),
        n => format!(" (+{n} cached)"),
    };
    let label = mix.label();
    let over = costs.and_then(|c| c.over_base(&label)).filter(|_| !mix.parts().is_empty());
    let cost = match (mix.size(engine), over) {
        (None, _) => String::new(),
        (Some(size), None) => format!(" ({size})"),
        (Some(size), Some(ms)) => format!(" ({size}, {ms:+.2} ms/token)"),
    };
    format!(
        "prompt {} tokens{cached} at {} · answer {} tokens at {} · {label}{cost}{}",
        stats.prompt_tokens,
        rate(stats.prompt_tokens, stats.prompt_time),
        stats.generated_tokens,
        rate(stats.generated_tokens.saturating_sub(1), stats.generated_time),
        end(&answer.finish),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(tokens: usize, ms: u64) -> Stats {
        Stats { generated_tokens: tokens, generated_time: Duration::from_millis(ms), ..Stats::default() }
    }

    #[test]
    fn the_cost_of_a_mix_is_its_difference_to_the_base() {
        let mut costs = Costs::default();
        costs.add("poet", &stats(11, 120));
        assert_eq!(costs.over_base("poet"), None, "no base to compare with");
        costs.add("base", &stats(6, 50));
        costs.add("base", &stats(6, 50));
        assert!((costs.over_base("poet").unwrap() - 2.0).abs() < 1e-9);
        costs.add("chef", &stats(1, 0));
        assert_eq!(costs.over_base("chef"), None, "one token says nothing");
    }
}
