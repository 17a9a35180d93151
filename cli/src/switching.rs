//! How long a switch takes.

use std::time::Instant;

use lory_runtime::{AdapterId, Engine, OnSwitch, SessionOptions};

use crate::{bench::timing::quantile, failure::Outcome};

/// Switches that are timed.
const SWITCHES: usize = 2000;

/// Median time in microseconds in which a session gets another adapter: each of `ids` in turn, and the base after each.
pub fn switch_time(engine: &Engine, ids: &[AdapterId]) -> Outcome<f64> {
    let mut session = engine.session(&SessionOptions::default())?;
    let mut times = Vec::with_capacity(SWITCHES);
    for i in 0..SWITCHES {
        let to: Vec<(AdapterId, f32)> =
            if i % 2 == 0 { ids.get(i / 2 % ids.len().max(1)).map(|id| (*id, 1.0)) } else { None }
                .into_iter()
                .collect();
        let start = Instant::now();
        session.set_adapters(&to, OnSwitch::Recompute)?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    Ok(quantile(&times, 0.5))
}
