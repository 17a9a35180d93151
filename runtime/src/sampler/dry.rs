//! DRY: the longer the earlier passage that a token would continue word for word, the higher its
//! penalty.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use super::{history::History, options::DryOptions};
use crate::lock;

/// Longest breaker considered, in bytes; longer ones are cut (as llama.cpp does).
const MAX_BREAKER: usize = 40;
/// Longest tail of a breaker, in tokens.
const MAX_TAIL: usize = 20;

/// Sequence breakers in terms of tokens: each token in which a breaker begins, with the tokens
/// that must follow it for the breaker to be complete (none, if it ends in the same token).
#[derive(Debug, Clone, Default)]
pub struct DryBreakers {
    tails: Arc<HashMap<u32, Vec<Vec<u32>>>>,
}

/// Breakers of one vocabulary by their strings: finding them looks at every token.
#[derive(Debug, Default)]
pub(crate) struct BreakerCache(Mutex<Vec<(Vec<String>, DryBreakers)>>);

impl BreakerCache {
    /// Sets of strings that are remembered.
    const ROOM: usize = 8;

    /// The breakers for `strings`, from `make` the first time.
    pub fn get(&self, strings: &[String], make: impl FnOnce() -> DryBreakers) -> DryBreakers {
        let mut known = lock(&self.0);
        if let Some((_, breakers)) = known.iter().find(|(s, _)| s == strings) {
            return breakers.clone();
        }
        let breakers = make();
        if known.len() == Self::ROOM {
            known.remove(0);
        }
        known.push((strings.to_vec(), breakers.clone()));
        breakers
    }
}

impl DryBreakers {
    /// Looks for `strings` in every token of a vocabulary. `piece` gives a token's bytes, `encode`
    /// the tokens of a text without any special token.
    pub fn new(
        strings: &[String],
        vocab_size: u32,
        piece: impl Fn(u32) -> Vec<u8>,
        encode: impl Fn(&str) -> Vec<u32>,
    ) -> Self {
        let mut tails: HashMap<u32, Vec<Vec<u32>>> = HashMap::new();
        let breakers: Vec<&str> =
            strings.iter().map(|s| cut(s, MAX_BREAKER)).filter(|s| !s.is_empty()).collect();
        for id in 0..if breakers.is_empty() { 0 } else { vocab_size } {
            let word = piece(id);
            for breaker in &breakers {
                for rest in unfinished(&word, breaker) {
                    let mut tail = encode(rest);
                    tail.truncate(MAX_TAIL);
                    let known = tails.entry(id).or_default();
                    if !known.contains(&tail) {
                        known.push(tail);
                    }
                }
            }
        }
        DryBreakers { tails: Arc::new(tails) }
    }

    /// Breakers given as tokens: a head and its tail.
    pub fn from_tokens(sequences: &[Vec<u32>]) -> Self {
        let mut tails: HashMap<u32, Vec<Vec<u32>>> = HashMap::new();
        for sequence in sequences {
            if let Some((&head, tail)) = sequence.split_first() {
                tails.entry(head).or_default().push(tail.to_vec());
            }
        }
        DryBreakers { tails: Arc::new(tails) }
    }

    /// Whether the token contains or is a whole breaker.
    fn breaks_alone(&self, token: u32) -> bool {
        self.tails.get(&token).is_some_and(|tails| tails.iter().any(Vec::is_empty))
    }

    /// The length of the longest tail that follows the token `i` steps back.
    fn longest_tail(&self, history: &History, i: usize) -> Option<usize> {
        let follows = |tail: &&Vec<u32>| {
            tail.len() <= i && tail.iter().enumerate().all(|(n, &t)| history.back(i - n - 1) == t)
        };
        self.tails.get(&history.back(i))?.iter().filter(follows).map(Vec::len).max()
    }
}

/// At most `max` bytes of `s`, in whole characters.
fn cut(s: &str, max: usize) -> &str {
    let end = (0..=max.min(s.len())).rev().find(|&i| s.is_char_boundary(i)).unwrap_or(0);
    &s[..end]
}

/// What is still missing of `breaker` after each place of `word` where it may have begun; "" where
/// it is complete. Only ends at character boundaries can be tokenized.
fn unfinished<'a>(word: &[u8], breaker: &'a str) -> Vec<&'a str> {
    let bytes = breaker.as_bytes();
    if word.windows(bytes.len()).any(|w| w == bytes) {
        return vec![""];
    }
    let mut rests = Vec::new();
    for start in 0..word.len() {
        let n = word.len() - start;
        if n < bytes.len() && word[start..] == bytes[..n] && breaker.is_char_boundary(n) {
            rests.push(&breaker[n..]);
        }
    }
    rests
}

/// The working memory of one sampler.
#[derive(Debug, Clone, Default)]
pub(super) struct Dry {
    pub breakers: DryBreakers,
    /// z[k]: how many of the last tokens also end `k` steps back.
    z: Vec<usize>,
    longest: HashMap<u32, usize>,
}

impl Dry {
    pub fn new(breakers: DryBreakers) -> Self {
        Dry { breakers, ..Default::default() }
    }

    /// Subtracts `multiplier · base^(length − allowed_length)` from the logit of each token that
    /// would continue a repetition of that length.
    pub fn penalize(&mut self, options: &DryOptions, history: &History, logits: &mut [f32]) {
        let window = usize::try_from(options.penalty_last_n).unwrap_or(usize::MAX).min(history.len());
        let allowed = options.allowed_length as usize;
        if window <= allowed {
            return;
        }
        let limit = self.limit(history, window);
        if limit < allowed {
            return;
        }
        self.match_suffixes(history, window);
        self.longest.clear();
        for k in 1..window {
            let length = self.z[k].min(limit);
            if length >= allowed {
                let next = history.back(k - 1);
                let longest = self.longest.entry(next).or_default();
                *longest = (*longest).max(length);
            }
        }
        for (&token, &length) in &self.longest {
            if self.breakers.breaks_alone(token) {
                continue;
            }
            if let Some(logit) = logits.get_mut(token as usize) {
                let penalty = options.multiplier * libm::powf(options.base, (length - allowed) as f32);
                *logit -= penalty.min(f32::MAX);
            }
        }
    }

    /// How many of the last tokens stand after the last breaker: no repetition is longer.
    fn limit(&self, history: &History, window: usize) -> usize {
        for i in 0..window {
            if let Some(tail) = self.breakers.longest_tail(history, i) {
                return i - tail;
            }
        }
        window
    }

    /// The Z-algorithm on the reversed history: linear in the window, whatever it repeats.
    fn match_suffixes(&mut self, history: &History, window: usize) {
        self.z.clear();
        self.z.resize(window, 0);
        let (mut left, mut right) = (0, 0);
        for k in 1..window {
            let mut n = if k < right { self.z[k - left].min(right - k) } else { 0 };
            while k + n < window && history.back(n) == history.back(k + n) {
                n += 1;
            }
            self.z[k] = n;
            if k + n > right {
                (left, right) = (k, k + n);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{SamplerOptions, rng::Rng},
        *,
    };

    fn penalties(tokens: &[u32], breakers: &[Vec<u32>], allowed: u32, last_n: i32) -> Vec<f32> {
        let dry = DryOptions {
            multiplier: 1.0,
            base: 2.0,
            allowed_length: allowed,
            penalty_last_n: last_n,
            ..Default::default()
        };
        let options = SamplerOptions { dry: dry.clone(), ..Default::default() };
        let mut history = History::new(&options);
        tokens.iter().for_each(|&t| history.push(t));
        let mut logits = vec![0.0; 8];
        Dry::new(DryBreakers::from_tokens(breakers)).penalize(&dry, &history, &mut logits);
        logits.iter().map(|l| -l).collect()
    }

    #[test]
    fn penalty_grows_with_the_length_of_the_repetition() {
        // After 0 1 2 3 … 0 1 2 the token 3 would make a repetition of 3 + 1.
        let text = [0, 1, 2, 3, 4, 0, 1, 2];
        assert_eq!(penalties(&text, &[], 2, -1)[3], 2.0);
        assert_eq!(penalties(&text, &[], 3, -1)[3], 1.0);
        assert_eq!(penalties(&text, &[], 4, -1)[3], 0.0);
        assert_eq!(penalties(&text, &[], 1, -1)[3], 4.0);
    }

    #[test]
    fn the_longest_repetition_of_several_counts() {
        // 3 follows "2" and "1 2"; 5 follows "2".
        assert_eq!(penalties(&[1, 2, 3, 2, 5, 2, 3, 1, 2], &[], 1, -1)[3], 2.0);
        assert_eq!(penalties(&[1, 2, 3, 2, 5, 2, 3, 1, 2], &[], 1, -1)[5], 1.0);
    }

    #[test]
    fn breakers_end_a_repetition() {
        let text = [0, 1, 2, 3, 4, 0, 1, 2];
        // After the breaker 1 only "2" repeats.
        assert_eq!(penalties(&text, &[vec![1]], 1, -1)[3], 1.0);
        assert_eq!(penalties(&text, &[vec![1]], 2, -1)[3], 0.0);
        // As the two tokens 0 1.
        assert_eq!(penalties(&text, &[vec![0, 1]], 1, -1)[3], 1.0);
        assert_eq!(penalties(&text, &[vec![0, 2]], 1, -1)[3], 4.0);
        // The breaker itself is never penalized.
        assert_eq!(penalties(&text, &[vec![3]], 1, -1)[3], 0.0);
    }

    #[test]
    fn the_window_limits_the_search() {
        let text = [0, 1, 2, 3, 4, 0, 1, 2];
        assert_eq!(penalties(&text, &[], 1, 8)[3], 4.0);
        assert_eq!(penalties(&text, &[], 1, 7)[3], 2.0);
        assert_eq!(penalties(&text, &[], 1, 4)[3], 0.0);
        assert_eq!(penalties(&text, &[], 1, 0)[3], 0.0);
    }

    #[test]
    fn suffixes_equal_the_naive_search() {
        let mut rng = Rng::new(11);
        let options = SamplerOptions {
            dry: DryOptions { multiplier: 1.0, ..Default::default() },
            ..Default::default()
        };
        for _ in 0..50 {
            let mut history = History::new(&options);
            let n = 1 + (rng.uniform() * 60.0) as usize;
            (0..n).for_each(|_| history.push((rng.uniform() * 2.0) as u32));
            let mut dry = Dry::default();
            dry.match_suffixes(&history, n);
            for k in 1..n {
                let naive = (0..n - k).take_while(|&i| history.back(i) == history.back(k + i)).count();
                assert_eq!(dry.z[k], naive);
            }
        }
    }

    #[test]
    fn a_very_long_repetition_stays_finite() {
        let p = penalties(&[1; 5000], &[], 2, -1);
        assert!(p[1].is_finite() && p[1] > 1e30, "{}", p[1]);
    }

    #[test]
    fn breakers_are_found_inside_and_across_tokens() {
        let words = ["x", "a\nb", "foo", "fo", "o", "\n", "of"];
        let breakers = DryBreakers::new(
            &["\n".into(), "foo".into(), String::new()],
            words.len() as u32,
            |id| words[id as usize].as_bytes().to_vec(),
            |s| s.bytes().map(u32::from).collect(),
        );
        let tails = |id: u32| breakers.tails.get(&id).cloned().unwrap_or_default();
        assert_eq!(tails(1), [Vec::<u32>::new()]);
        assert_eq!(tails(2), [Vec::<u32>::new()]);
        assert_eq!(tails(3), [vec![u32::from(b'o')]]);
        assert_eq!(tails(5), [Vec::<u32>::new()]);
        assert_eq!(tails(6), [vec![u32::from(b'o'); 2]]);
        assert!(tails(0).is_empty() && tails(4).is_empty());
    }

    #[test]
    fn breakers_are_found_once_per_set_of_strings() {
        let cache = BreakerCache::default();
        let strings = |n: usize| vec![n.to_string()];
        let made = |n: usize| DryBreakers::from_tokens(&[vec![n as u32]]);
        let first = cache.get(&strings(0), || made(0));
        let again = cache.get(&strings(0), || panic!("known"));
        assert!(Arc::ptr_eq(&first.tails, &again.tails) && again.breaks_alone(0));
        for n in 1..=BreakerCache::ROOM {
            assert!(cache.get(&strings(n), || made(n)).breaks_alone(n as u32));
        }
        assert!(cache.get(&strings(0), || made(7)).breaks_alone(7), "the oldest was forgotten");
    }
}
