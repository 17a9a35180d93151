//! What an engine has done and what it holds, to read or to export.

use std::{fmt::Write, time::Duration};

use crate::{AdapterUsage, FinishReason, Result};

/// Upper bounds in seconds of a histogram's buckets; one more holds what is above.
pub const BUCKETS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0];

/// Durations, counted by size.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// Durations of at most the bound of [`BUCKETS`] with the same index, and above the one before.
    pub buckets: [u64; BUCKETS.len() + 1],
    /// Their sum.
    pub sum: Duration,
    /// Their number.
    pub count: u64,
}

impl Histogram {
    /// Counts one.
    pub fn record(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        self.buckets[BUCKETS.partition_point(|bound| *bound < seconds)] += 1;
        self.sum += duration;
        self.count += 1;
    }

    /// The mean; zero if there is none.
    pub fn mean(&self) -> Duration {
        self.sum.checked_div(self.count.min(u32::MAX.into()) as u32).unwrap_or_default()
    }
}

/// How requests ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endings {
    /// [`FinishReason::Eos`].
    pub eos: u64,
    /// [`FinishReason::Stop`].
    pub stop: u64,
    /// [`FinishReason::Length`].
    pub length: u64,
    /// [`FinishReason::ContextFull`].
    pub context_full: u64,
    /// [`FinishReason::Cancelled`].
    pub cancelled: u64,
    /// An error.
    pub failed: u64,
}

/// Counters since the engine was opened, and the state at the time of asking.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Metrics {
    /// Steps that ran something.
    pub steps: u64,
    /// Time they took.
    pub step_time: Duration,
    /// Rows they carried; over `row_capacity` it is how full batches were.
    pub rows: u64,
    /// Rows they could have carried.
    pub row_capacity: u64,
    /// Requests that were accepted.
    pub requests: u64,
    /// How they ended.
    pub endings: Endings,
    /// Prompt tokens that were run; a second run after an eviction does not count.
    pub prompt_tokens: u64,
    /// Prompt tokens that were in the KV cache already.
    pub cached_tokens: u64,
    /// Those of them that other sessions had computed.
    pub shared_tokens: u64,
    /// Tokens that were generated.
    pub generated_tokens: u64,
    /// From a request to its first token.
    pub ttft: Histogram,
    /// Per token after the first, the mean of each request.
    pub tpot: Histogram,
    /// Idle sessions that lost their keys and values for room.
    pub evictions: u64,
    /// Requests that had to give theirs to others, and were computed again.
    pub preemptions: u64,
    /// Sessions now.
    pub sessions: usize,
    /// Requests that have run at least once and go on.
    pub running: usize,
    /// Requests that wait for their first step.
    pub queued: usize,
    /// Pages of the KV cache.
    pub kv_pages: usize,
    /// Pages that sessions hold.
    pub kv_pages_used: usize,
    /// Pages that no session holds, kept for sessions with the same beginning.
    pub kv_pages_kept: usize,
    /// Pages so kept that were given up for room.
    pub kv_pages_dropped: u64,
    /// Bytes of a page.
    pub kv_page_bytes: usize,
    /// The adapters.
    pub adapters: AdapterUsage,
}

impl Metrics {
    pub(crate) fn count_end(&mut self, end: &Result<FinishReason>) {
        let e = &mut self.endings;
        *match end {
            Ok(FinishReason::Eos) => &mut e.eos,
            Ok(FinishReason::Stop) => &mut e.stop,
            Ok(FinishReason::Length) => &mut e.length,
            Ok(FinishReason::ContextFull) => &mut e.context_full,
            Ok(FinishReason::Cancelled) => &mut e.cancelled,
            Err(_) => &mut e.failed,
        } += 1;
    }

    /// Requests that have ended.
    pub fn ended(&self) -> u64 {
        let Endings { eos, stop, length, context_full, cancelled, failed } = self.endings;
        eos + stop + length + context_full + cancelled + failed
    }

    /// Generated tokens per second of steps.
    pub fn tokens_per_second(&self) -> f64 {
        match self.step_time.as_secs_f64() {
            0.0 => 0.0,
            seconds => self.generated_tokens as f64 / seconds,
        }
    }

    /// The share of possible rows that steps carried, 0 to 1.
    pub fn batch_fill(&self) -> f64 {
        if self.row_capacity == 0 { 0.0 } else { self.rows as f64 / self.row_capacity as f64 }
    }

    /// Prometheus' text exposition format, version 0.0.4.
    pub fn prometheus(&self) -> String {
        let mut out = Exposition(String::new());
        let page = self.kv_page_bytes as u64;
        out.counter("steps_total", "Steps of the model.", self.steps as f64);
        out.counter("step_seconds_total", "Time in steps.", self.step_time.as_secs_f64());
        out.counter("step_rows_total", "Rows that steps carried.", self.rows as f64);
        out.counter("step_row_capacity_total", "Rows that steps could carry.", self.row_capacity as f64);
        out.counter("requests_total", "Requests accepted.", self.requests as f64);
        out.endings(&self.endings);
        out.counter("prompt_tokens_total", "Prompt tokens run.", self.prompt_tokens as f64);
        out.counter(
            "prompt_cached_tokens_total",
            "Prompt tokens found in the KV cache.",
            self.cached_tokens as f64,
        );
        out.counter(
            "prompt_shared_tokens_total",
            "Prompt tokens found there that another session computed.",
            self.shared_tokens as f64,
        );
        out.counter("generated_tokens_total", "Tokens generated.", self.generated_tokens as f64);
        out.histogram("time_to_first_token_seconds", "From a request to its first token.", &self.ttft);
        out.histogram(
            "time_per_output_token_seconds",
            "Per token after the first, mean per request.",
            &self.tpot,
        );
        out.counter("kv_evictions_total", "Idle sessions that lost their KV cache.", self.evictions as f64);
        out.counter(
            "kv_preemptions_total",
            "Requests that gave their KV cache to others.",
            self.preemptions as f64,
        );
        out.counter(
            "kv_kept_pages_dropped_total",
            "Kept KV pages given up for room.",
            self.kv_pages_dropped as f64,
        );
        out.gauge("tokens_per_second", "Tokens generated per second of steps.", self.tokens_per_second());
        out.gauge("batch_fill_ratio", "Share of possible rows that steps carried.", self.batch_fill());
        out.gauge("sessions", "Sessions.", self.sessions as f64);
        out.gauge("requests_running", "Requests being run.", self.running as f64);
        out.gauge("requests_queued", "Requests waiting for their first step.", self.queued as f64);
        let kv = |pages: usize| (pages as u64 * page) as f64;
        out.gauge("kv_bytes", "Size of the KV cache.", kv(self.kv_pages));
        out.gauge("kv_used_bytes", "KV cache that sessions hold.", kv(self.kv_pages_used));
        out.gauge("kv_kept_bytes", "KV cache kept for later sessions.", kv(self.kv_pages_kept));
        let a = &self.adapters;
        out.gauge("adapters_loaded", "Adapters in memory.", a.loaded as f64);
        out.gauge("adapter_bytes", "Bytes that adapters have for themselves.", a.bytes as f64);
        if let Some(budget) = a.budget {
            out.gauge("adapter_budget_bytes", "Bytes that they may have.", budget as f64);
        }
        out.counter("adapter_loads_total", "Adapters brought in.", a.loads as f64);
        out.counter("adapter_evictions_total", "Adapters evicted for the budget.", a.evictions as f64);
        out.0
    }
}

/// Text in the exposition format. Writing to a string cannot fail.
struct Exposition(String);

impl Exposition {
    fn head(&mut self, name: &str, help: &str, kind: &str) {
        let _ = writeln!(self.0, "# HELP lory_{name} {help}\n# TYPE lory_{name} {kind}");
    }

    fn counter(&mut self, name: &str, help: &str, value: f64) {
        self.head(name, help, "counter");
        let _ = writeln!(self.0, "lory_{name} {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.head(name, help, "gauge");
        let _ = writeln!(self.0, "lory_{name} {value}");
    }

    fn endings(&mut self, e: &Endings) {
        self.head("requests_ended_total", "Requests that ended, by reason.", "counter");
        let all = [
            ("eos", e.eos),
            ("stop", e.stop),
            ("length", e.length),
            ("context_full", e.context_full),
            ("cancelled", e.cancelled),
            ("error", e.failed),
        ];
        for (reason, count) in all {
            let _ = writeln!(self.0, "lory_requests_ended_total{{reason=\"{reason}\"}} {count}");
        }
    }

    fn histogram(&mut self, name: &str, help: &str, h: &Histogram) {
        self.head(name, help, "histogram");
        let mut sum = 0;
        for (bound, count) in BUCKETS.iter().zip(&h.buckets) {
            sum += count;
            let _ = writeln!(self.0, "lory_{name}_bucket{{le=\"{bound}\"}} {sum}");
        }
        let _ = writeln!(self.0, "lory_{name}_bucket{{le=\"+Inf\"}} {}", h.count);
        let _ = writeln!(self.0, "lory_{name}_sum {}\nlory_{name}_count {}", h.sum.as_secs_f64(), h.count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_count_up_to_and_including_their_bounds() {
        let mut h = Histogram::default();
        [1u64, 2, 3, 100, 200_000].iter().for_each(|ms| h.record(Duration::from_millis(*ms)));
        assert_eq!((h.buckets[0], h.buckets[1], h.buckets[2], h.buckets[6]), (1, 1, 1, 1));
        assert_eq!((h.buckets[16], h.count), (1, 5));
        assert_eq!(h.mean(), Duration::from_millis(200_106) / 5);
        assert_eq!(Histogram::default().mean(), Duration::ZERO);
    }

    #[test]
    fn exposition_is_what_prometheus_parses() {
        let mut m = Metrics { steps: 3, kv_pages: 2, kv_page_bytes: 1024, ..Metrics::default() };
        m.ttft.record(Duration::from_millis(20));
        m.count_end(&Ok(FinishReason::Stop));
        let text = m.prometheus();
        for line in [
            "# TYPE lory_steps_total counter",
            "lory_steps_total 3",
            "lory_kv_bytes 2048",
            "lory_requests_ended_total{reason=\"stop\"} 1",
            "lory_time_to_first_token_seconds_bucket{le=\"0.01\"} 0",
            "lory_time_to_first_token_seconds_bucket{le=\"0.025\"} 1",
            "lory_time_to_first_token_seconds_bucket{le=\"+Inf\"} 1",
            "lory_time_to_first_token_seconds_sum 0.02",
        ] {
            assert!(text.lines().any(|l| l == line), "no line `{line}` in\n{text}");
        }
        // Every sample stands under a type, each name once, and all end in a number.
        let mut names: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("# TYPE ")).collect();
        let n = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), n);
        for sample in text.lines().filter(|l| !l.starts_with('#')) {
            assert!(sample.rsplit_once(' ').is_some_and(|(_, v)| v.parse::<f64>().is_ok()), "{sample}");
        }
        assert!(text.ends_with('\n'));
    }
}
