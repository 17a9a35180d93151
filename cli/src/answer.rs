//! Follows a generation to its end: text as it comes, Ctrl+C in between.

use lory_runtime::{Event, FinishReason, Generation, Stats};

use crate::{failure::Outcome, interrupt, progress};

/// How an answer ended.
#[derive(Debug)]
pub struct Answer {
    /// All of its text.
    pub text: String,
    /// What it cost.
    pub stats: Stats,
    /// Why it ended.
    pub finish: FinishReason,
}

impl Answer {
    /// Whether Ctrl+C ended it.
    pub fn was_interrupted(&self) -> bool {
        self.finish == FinishReason::Cancelled
    }
}

/// Hands every piece of text to `sink`. The first Ctrl+C ends the answer, a second the program.
/// `prompt` is the session's length in tokens before the answer.
pub fn follow(
    mut generation: Generation,
    prompt: usize,
    mut sink: impl FnMut(&str) -> Outcome,
) -> Outcome<Answer> {
    let mut reading = Some(progress::Prompt::watch(generation.watch(), prompt));
    let canceller = generation.canceller();
    let _guard = interrupt::catch(move || canceller.cancel());
    let mut text = String::new();
    for event in &mut generation {
        reading = None;
        if let Event::Token { text: piece, .. } | Event::Text(piece) = event?
            && !piece.is_empty()
        {
            text.push_str(&piece);
            sink(&piece)?;
        }
    }
    drop(reading);
    let finish = generation.finish_reason().unwrap_or(FinishReason::Cancelled);
    Ok(Answer { text, stats: generation.stats(), finish })
}

/// Follows generations in step, as one batch, and counts their tokens for who waits; Ctrl+C ends all of them.
pub fn follow_all(mut generations: Vec<Generation>) -> Outcome<Vec<Answer>> {
    let cancellers: Vec<_> = generations.iter().map(Generation::canceller).collect();
    let _guard = interrupt::catch(move || cancellers.iter().for_each(|c| c.cancel()));
    let mut texts = vec![String::new(); generations.len()];
    let mut open = vec![true; generations.len()];
    let counter = progress::counter("tokens");
    while open.contains(&true) {
        for ((generation, text), open) in generations.iter_mut().zip(&mut texts).zip(&mut open) {
            match generation.next().transpose()? {
                Some(Event::Token { text: piece, .. }) => {
                    *text += &piece;
                    counter.inc(1);
                }
                Some(Event::Text(piece)) => *text += &piece,
                Some(_) => {}
                None => *open = false,
            }
        }
    }
    counter.finish_and_clear();
    let answer = |(text, g): (String, &Generation)| {
        let finish = g.finish_reason().unwrap_or(FinishReason::Cancelled);
        Answer { text, stats: g.stats(), finish }
    };
    Ok(texts.into_iter().zip(&generations).map(answer).collect())
}
