//! `arrive`: what an adapter's arrival costs the other sessions.

use std::{sync::mpsc, thread, time::Instant};

use lory_runtime::{Engine, Event, Request, SamplerOptions, SessionOptions, random_tokens};

use crate::failure::{Failure, Outcome};

/// Steps of a session that decodes, in microseconds, by turns: `alone`, and `arriving`, each while another thread brings in an adapter that
/// nobody has used yet.
#[derive(Default)]
pub struct Steps {
    pub alone: Vec<f64>,
    pub arriving: Vec<f64>,
}

/// Tokens that the session begins with.
const PROMPT: usize = 8;

/// Tokens of the session for so many arrivals.
pub fn tokens(arrivals: usize) -> usize {
    PROMPT + 1 + 2 * arrivals
}

/// One step alone and one with an arrival for each of `names`.
pub fn measure(engine: &Engine, vocab: usize, names: &[String]) -> Outcome<Steps> {
    let mut session = engine.session(&SessionOptions::default())?;
    let mut generation = session.generate(Request {
        tokens: random_tokens(5, PROMPT, vocab),
        max_new_tokens: 1 + 2 * names.len(),
        ignore_eos: true,
        sampler: SamplerOptions::greedy(),
        ..Request::default()
    })?;
    let mut step = || {
        let start = Instant::now();
        match generation.next() {
            Some(Ok(Event::Token { .. })) => Ok(start.elapsed().as_secs_f64() * 1e6),
            Some(Err(e)) => Err(e.into()),
            _ => Err(Failure::runtime("a generation ended before its time")),
        }
    };
    // The prompt's.
    step()?;
    let mut steps = Steps::default();
    let (arrive, arrivals) = mpsc::channel::<&String>();
    thread::scope(|scope| {
        let store = engine.adapters();
        let bringing =
            scope.spawn(move || arrivals.iter().try_for_each(|name| store.resolve(name).map(drop)));
        for name in names {
            steps.alone.push(step()?);
            // Whoever has ended has an error to tell.
            let _ = arrive.send(name);
            steps.arriving.push(step()?);
        }
        drop(arrive);
        match bringing.join() {
            Ok(brought) => Ok(brought?),
            Err(_) => Err(Failure::runtime("bringing in adapters panicked")),
        }
    })?;
    Ok(steps)
}
