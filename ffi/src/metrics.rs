//! What an engine has done and holds.

use lory_runtime::{BUCKETS, Histogram};

use crate::{
    args::{object, out},
    engine::lory_engine,
    memory::lory_text,
    status::{guard, lory_status},
    structs::{init, place, versioned},
};

/// Counts of a `lory_histogram`.
pub const LORY_HISTOGRAM_BUCKETS: usize = 17;

const _: () = assert!(LORY_HISTOGRAM_BUCKETS == BUCKETS.len() + 1);

/// Durations, counted by size.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lory_histogram {
    /// Durations above the bound before and up to 1, 2.5, 5, 10, 25, 50, 100, 250, 500 milliseconds, 1,
    /// 2.5, 5, 10, 25, 50 and 100 seconds; the last counts what is above.
    pub buckets: [u64; LORY_HISTOGRAM_BUCKETS],
    /// Their sum in nanoseconds.
    pub sum_ns: u64,
    /// Their number.
    pub count: u64,
}

impl lory_histogram {
    fn of(h: &Histogram) -> lory_histogram {
        lory_histogram { buckets: h.buckets, sum_ns: h.sum.as_nanos() as u64, count: h.count }
    }
}

/// What an engine has done since it was opened and what it holds. Initialise it with
/// `lory_metrics_init`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lory_metrics {
    /// Set by `lory_metrics_init`.
    pub struct_size: usize,
    /// Steps that ran something.
    pub steps: u64,
    /// Nanoseconds that they took.
    pub step_ns: u64,
    /// Rows that they carried; over `row_capacity` it is how full batches were.
    pub rows: u64,
    /// Rows that they could have carried.
    pub row_capacity: u64,
    /// Requests that were accepted.
    pub requests: u64,
    /// Ended by an end-of-generation token.
    pub ended_eos: u64,
    /// Ended by a stop text.
    pub ended_stop: u64,
    /// Ended by their length.
    pub ended_length: u64,
    /// Ended by a full context.
    pub ended_context_full: u64,
    /// Cancelled.
    pub ended_cancelled: u64,
    /// Ended by an error.
    pub ended_failed: u64,
    /// Prompt tokens that were run.
    pub prompt_tokens: u64,
    /// Prompt tokens that were in the KV cache already.
    pub cached_tokens: u64,
    /// Those of them that other sessions had computed.
    pub shared_tokens: u64,
    /// Tokens that were generated.
    pub generated_tokens: u64,
    /// Idle sessions that lost their keys and values for room.
    pub evictions: u64,
    /// Requests that had to give theirs to others.
    pub preemptions: u64,
    /// Sessions now.
    pub sessions: u64,
    /// Requests that have run at least once and go on.
    pub running: u64,
    /// Requests that wait for their first step.
    pub queued: u64,
    /// Bytes of the KV cache.
    pub kv_bytes: u64,
    /// Bytes of it that sessions hold.
    pub kv_bytes_used: u64,
    /// Bytes of it kept for sessions with the same beginning.
    pub kv_bytes_kept: u64,
    /// Adapters in memory.
    pub adapters_loaded: u64,
    /// Bytes that they have for themselves.
    pub adapter_bytes: u64,
    /// How often one was brought in.
    pub adapter_loads: u64,
    /// How often one was given up for room.
    pub adapter_evictions: u64,
    /// Bytes of the KV cache that were kept and then given up for room.
    pub kv_bytes_dropped: u64,
    /// From a request to its first token.
    pub ttft: lory_histogram,
    /// Per token after the first, the mean of each request.
    pub tpot: lory_histogram,
}

versioned!(lory_metrics, last_of_first = adapter_evictions);

impl lory_metrics {
    fn of(m: &lory_runtime::Metrics) -> lory_metrics {
        lory_metrics {
            struct_size: 0,
            steps: m.steps,
            step_ns: m.step_time.as_nanos() as u64,
            rows: m.rows,
            row_capacity: m.row_capacity,
            requests: m.requests,
            ended_eos: m.endings.eos,
            ended_stop: m.endings.stop,
            ended_length: m.endings.length,
            ended_context_full: m.endings.context_full,
            ended_cancelled: m.endings.cancelled,
            ended_failed: m.endings.failed,
            prompt_tokens: m.prompt_tokens,
            cached_tokens: m.cached_tokens,
            shared_tokens: m.shared_tokens,
            generated_tokens: m.generated_tokens,
            evictions: m.evictions,
            preemptions: m.preemptions,
            sessions: m.sessions as u64,
            running: m.running as u64,
            queued: m.queued as u64,
            kv_bytes: (m.kv_pages * m.kv_page_bytes) as u64,
            kv_bytes_used: (m.kv_pages_used * m.kv_page_bytes) as u64,
            kv_bytes_kept: (m.kv_pages_kept * m.kv_page_bytes) as u64,
            adapters_loaded: m.adapters.loaded as u64,
            adapter_bytes: m.adapters.bytes as u64,
            adapter_loads: m.adapters.loads,
            adapter_evictions: m.adapters.evictions,
            kv_bytes_dropped: m.kv_pages_dropped * m.kv_page_bytes as u64,
            ttft: lory_histogram::of(&m.ttft),
            tpot: lory_histogram::of(&m.tpot),
        }
    }
}

/// Empties the struct; `struct_size` is `sizeof(lory_metrics)`.
///
/// # Safety
/// `struct_size` bytes at `place` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_metrics_init(place: *mut lory_metrics, struct_size: usize) -> lory_status {
    // SAFETY: the caller's word.
    guard(|| unsafe { init(place, struct_size) })
}

/// What the engine has done and holds. `metrics` must be initialised. Waits for a step that is running.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_metrics(
    engine: *const lory_engine,
    metrics: *mut lory_metrics,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, metrics) = (object(engine, "engine")?, place(metrics)?);
        metrics.set(&lory_metrics::of(&engine.engine.metrics()));
        Ok(())
    })
}

/// The same in Prometheus' text format 0.0.4.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_prometheus(
    engine: *const lory_engine,
    text: *mut lory_text,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, text) = (object(engine, "engine")?, out(text, "text")?);
        text.set(lory_text::new(engine.engine.metrics().prometheus()));
        Ok(())
    })
}
