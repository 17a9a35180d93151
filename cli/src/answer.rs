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

/// Follows two generations in step, as one batch; Ctrl+C ends both.
pub fn follow_both(mut a: Generation, mut b: Generation) -> Outcome<[Answer; 2]> {
    let cancellers = [a.canceller(), b.canceller()];
    let _guard = interrupt::catch(move || cancellers.iter().for_each(|c| c.cancel()));
    let mut texts = [String::new(), String::new()];
    let mut open = [true, true];
    while open != [false, false] {
        for (side, generation) in [&mut a, &mut b].into_iter().enumerate() {
            match generation.next().transpose()? {
                Some(Event::Token { text, .. } | Event::Text(text)) => texts[side] += &text,
                Some(_) => {}
                None => open[side] = false,
            }
        }
    }
    let [first, second] = texts;
    let finish = |g: &Generation| g.finish_reason().unwrap_or(FinishReason::Cancelled);
    Ok([
        Answer { text: first, stats: a.stats(), finish: finish(&a) },
        Answer { text: second, stats: b.stats(), finish: finish(&b) },
    ])
}
