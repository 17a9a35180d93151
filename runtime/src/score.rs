//! How probable given continuations are.

use crate::{Error, Event, Request, Result, Session};

/// What the model thinks of one continuation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Score {
    /// Natural log-probability of each token after all before it.
    pub logprobs: Vec<f32>,
    /// Their sum.
    pub total: f64,
}

impl Session {
    /// Scores continuations of `prompt`, which is read after the session's own tokens; the session
    /// does not change. The prompt is run once for all, the continuations together in one batch.
    ///
    /// # Errors
    /// [`Error::Request`] if nothing comes before the continuations.
    pub fn score(&self, prompt: &[u32], continuations: &[Vec<u32>]) -> Result<Vec<Score>> {
        let mut before = self.fork();
        if before.tokens().is_empty() && prompt.is_empty() {
            let message = "continuations are scored after a prompt: give one, such as the model's BOS";
            return Err(Error::Request(message.into()));
        }
        let read = Request { tokens: prompt.to_vec(), max_new_tokens: 0, ..Request::default() };
        before.generate(read)?.try_for_each(|event| event.map(drop))?;
        let mut readers: Vec<_> = continuations.iter().map(|_| before.fork()).collect();
        let mut running = Vec::with_capacity(readers.len());
        for (reader, tokens) in readers.iter_mut().zip(continuations) {
            let request = Request {
                tokens: tokens.clone(),
                max_new_tokens: 0,
                prompt_logprobs: Some(0),
                // All run together; nobody reads the last one before the first has ended.
                max_queued: usize::MAX,
                ..Request::default()
            };
            running.push(reader.generate(request)?);
        }
        running.into_iter().map(collect).collect()
    }
}

fn collect(events: impl Iterator<Item = Result<Event>>) -> Result<Score> {
    let mut score = Score::default();
    for event in events {
        if let Event::Prompt { logprob, .. } = event? {
            score.logprobs.push(logprob);
        }
    }
    score.total = score.logprobs.iter().map(|p| f64::from(*p)).sum();
    Ok(score)
}
