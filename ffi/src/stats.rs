//! What a request costs.

use crate::{
    args::{exclusive, object},
    generation::lory_generation,
    status::{guard, lory_status},
    structs::{init, place, versioned},
};

/// What a request cost so far. Initialise it with `lory_stats_init`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lory_stats {
    /// Set by `lory_stats_init`.
    pub struct_size: usize,
    /// Prompt tokens that were already in the KV cache.
    pub cached_tokens: u64,
    /// Prompt tokens that were run.
    pub prompt_tokens: u64,
    /// Nanoseconds of the steps that ran prompt tokens.
    pub prompt_ns: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Nanoseconds of the steps that ran generated tokens.
    pub generated_ns: u64,
    /// The seed in use, also where the request left it open: given again, it gives the same draws.
    pub seed: u64,
}

versioned!(lory_stats, last_of_first = generated_ns);

/// Empties the struct; `struct_size` is `sizeof(lory_stats)`.
///
/// # Safety
/// `struct_size` bytes at `stats` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_stats_init(stats: *mut lory_stats, struct_size: usize) -> lory_status {
    // SAFETY: the caller's word.
    guard(|| unsafe { init(stats, struct_size) })
}

/// What the request has cost so far. `stats` must be initialised.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generation_stats(
    generation: *mut lory_generation,
    stats: *mut lory_stats,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (generation, stats) = (object(generation, "generation")?, place(stats)?);
        let s = exclusive(&generation.reader, "generation")?.generation.stats();
        stats.set(&lory_stats {
            struct_size: 0,
            cached_tokens: s.cached_tokens as u64,
            prompt_tokens: s.prompt_tokens as u64,
            prompt_ns: s.prompt_time.as_nanos() as u64,
            generated_tokens: s.generated_tokens as u64,
            generated_ns: s.generated_time.as_nanos() as u64,
            seed: s.seed,
        });
        Ok(())
    })
}
