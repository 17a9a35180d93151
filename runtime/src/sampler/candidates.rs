//! The tokens still in the running, kept only as sorted as the steps need.

use std::cmp::Ordering;

use super::{
    SamplerError,
    exp::{LANES, exp},
};

/// A token that may be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub id: u32,
    pub logit: f32,
    /// Probability among the candidates, valid after [`Candidates::softmax`].
    pub p: f32,
}

/// Likelier first; equal logits by id, so that the order is total and never up to the algorithm.
fn likelier(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// An integer that orders logits as [`f32::total_cmp`] does.
fn rank(logit: f32) -> i32 {
    let bits = logit.to_bits() as i32;
    bits ^ ((bits >> 31) as u32 >> 1) as i32
}

/// Moves the `to` first elements of the order to the front and sorts them, where the first `from`
/// are so already.
fn sort_prefix<T>(items: &mut [T], from: usize, to: usize, cmp: impl Fn(&T, &T) -> Ordering) {
    let to = to.min(items.len());
    if from >= to {
        return;
    }
    let rest = &mut items[from..];
    if to - from < rest.len() {
        rest.select_nth_unstable_by(to - from, &cmp);
    }
    rest[..to - from].sort_unstable_by(&cmp);
}

/// The candidates of one step. The buffer is reused from step to step.
#[derive(Debug, Clone, Default)]
pub(super) struct Candidates {
    pub items: Vec<Candidate>,
    /// The first so many items are the likeliest, in order.
    sorted: usize,
}

impl Candidates {
    /// Takes the `k` likeliest of `logits` (0: all that are possible). Tokens of logit −inf never
    /// take part. One pass with a rising threshold: of a vocabulary of 128k few elements are
    /// looked at twice.
    pub fn fill(&mut self, logits: &[f32], k: usize) -> Result<(), SamplerError> {
        let all = k == 0 || k >= logits.len();
        let room = if all { logits.len() } else { (4 * k).max(1024) };
        self.items.clear();
        self.items.reserve(room);
        self.sorted = 0;
        let mut floor = f32::NEG_INFINITY;
        for (id, &logit) in logits.iter().enumerate() {
            // False for NaN as well, which check_numbers has excluded.
            if logit > floor {
                self.items.push(Candidate { id: id as u32, logit, p: 0.0 });
                if !all && self.items.len() == room {
                    self.items.select_nth_unstable_by(k - 1, likelier);
                    self.items.truncate(k);
                    // Later tokens of this very logit rank behind by their id; but of zeros the positive one is the likelier.
                    let last = self.items[k - 1].logit;
                    floor = if last == 0.0 { last.abs().next_down() } else { last };
                }
            }
        }
        if self.items.is_empty() {
            return Err(SamplerError::NothingLeft);
        }
        if !all {
            self.sort(k);
            self.items.truncate(k);
            self.sorted = self.items.len();
        }
        Ok(())
    }

    /// Takes the likeliest tokens and their logits, in order, as [`Candidates::fill`] would have chosen them.
    pub fn take(&mut self, likeliest: &[(u32, f32)]) -> Result<(), SamplerError> {
        self.items.clear();
        self.items.extend(likeliest.iter().map(|&(id, logit)| Candidate { id, logit, p: 0.0 }));
        self.sorted = self.items.len();
        if self.items.is_empty() { Err(SamplerError::NothingLeft) } else { Ok(()) }
    }

    /// Sorts the `n` likeliest to the front.
    pub fn sort(&mut self, n: usize) {
        sort_prefix(&mut self.items, self.sorted, n, likelier);
        self.sorted = self.sorted.max(n.min(self.items.len()));
    }

    /// Keeps the first `n`.
    pub fn truncate(&mut self, n: usize) {
        self.items.truncate(n);
        self.sorted = self.sorted.min(self.items.len());
    }

    /// Keeps what `keep` accepts, in the present order. `keep` may drop likely ones: the remaining
    /// order is still that of likelihood where it was.
    pub fn retain(&mut self, keep: impl Fn(&Candidate) -> bool) {
        let prefix = self.items.iter().take(self.sorted).filter(|c| keep(c)).count();
        self.items.retain(keep);
        self.sorted = prefix;
    }

    /// The order was changed to something else.
    pub fn forget_order(&mut self) {
        self.sorted = 0;
    }

    /// The likeliest candidate; there is always one.
    pub fn best(&self) -> Candidate {
        if self.sorted > 0 {
            return self.items[0];
        }
        // In two passes, neither with a branch that the numbers decide.
        let most = self.items.iter().map(|c| rank(c.logit)).fold(i32::MIN, i32::max);
        let best = self.items.iter().filter(|c| rank(c.logit) == most).min_by_key(|c| c.id);
        *best.expect("candidates are never empty after fill")
    }

    /// Fills `p`. Sums in f64: 128k terms of f32 would lose the third digit.
    pub fn softmax(&mut self) {
        let max = self.best().logit;
        let mut sums = [0.0f64; LANES];
        for items in self.items.chunks_mut(LANES) {
            let mut p = [0.0; LANES];
            for (p, c) in p.iter_mut().zip(&*items) {
                *p = c.logit - max;
            }
            // Those behind the last candidate are counted by nobody.
            p.iter_mut().for_each(|p| *p = exp(*p));
            for ((c, p), sum) in items.iter_mut().zip(p).zip(&mut sums) {
                c.p = p;
                *sum += f64::from(p);
            }
        }
        let norm = (1.0 / sums.iter().sum::<f64>()) as f32;
        for c in &mut self.items {
            c.p *= norm;
        }
    }
}

#[cfg(test)]
pub(super) fn of_probabilities(p: &[f32]) -> Candidates {
    let logits: Vec<f32> = p.iter().map(|p| p.ln()).collect();
    let mut c = Candidates::default();
    c.fill(&logits, 0).unwrap();
    c
}

#[cfg(test)]
mod tests {
    use super::{super::rng::Rng, *};

    #[test]
    fn top_k_equals_a_full_sort_over_a_large_vocabulary() {
        let mut rng = Rng::new(3);
        // Coarse values, so that there are many ties.
        let logits: Vec<f32> = (0..50_000).map(|_| (rng.uniform() * 300.0).floor() as f32).collect();
        let mut order: Vec<u32> = (0..50_000).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        for k in [1, 2, 40, 1024, 5000, 49_999] {
            let mut c = Candidates::default();
            c.fill(&logits, k).unwrap();
            let got: Vec<u32> = c.items.iter().map(|c| c.id).collect();
            assert_eq!(got, order[..k], "k = {k}");
        }
        // More zeros than the buffer holds, and then likelier ones.
        let mut zeros = vec![-0.0f32; 3000];
        zeros[2500] = 0.0;
        let mut c = Candidates::default();
        c.fill(&zeros, 2).unwrap();
        assert_eq!(c.items.iter().map(|c| c.id).collect::<Vec<_>>(), [2500, 0]);
        let mut rising: Vec<f32> = (0..20_000).map(|i| i as f32).collect();
        let mut c = Candidates::default();
        c.fill(&rising, 3).unwrap();
        assert_eq!(c.items.iter().map(|c| c.id).collect::<Vec<_>>(), [19_999, 19_998, 19_997]);
        rising.fill(f32::NEG_INFINITY);
        assert_eq!(c.fill(&rising, 3), Err(SamplerError::NothingLeft));
    }

    #[test]
    fn partial_sorting_extends() {
        let mut c = of_probabilities(&[0.1, 0.05, 0.4, 0.25, 0.2]);
        c.sort(2);
        assert_eq!(c.items[..2].iter().map(|c| c.id).collect::<Vec<_>>(), [2, 3]);
        c.sort(5);
        assert_eq!(c.items.iter().map(|c| c.id).collect::<Vec<_>>(), [2, 3, 4, 0, 1]);
    }

    #[test]
    fn the_best_is_the_first_of_the_order() {
        let mut rng = Rng::new(5);
        for logits in [vec![-0.0, 0.0, 0.0], vec![-3.0, -1.5, -1.5, -2.0], vec![f32::MIN, f32::MIN, f32::MIN]]
        {
            let mut c = Candidates::default();
            c.fill(&logits, 0).unwrap();
            for _ in 0..10 {
                // In any order.
                let (a, b) = (rng.uniform(), rng.uniform());
                let at = |x: f64| (x * logits.len() as f64) as usize;
                c.items.swap(at(a), at(b));
                c.forget_order();
                assert_eq!(Some(c.best()), c.items.iter().copied().min_by(likelier), "{logits:?}");
            }
        }
    }

    #[test]
    fn softmax_survives_large_logits() {
        let mut c = Candidates::default();
        c.fill(&[1e30, 1e30, -1e30, f32::NEG_INFINITY], 0).unwrap();
        c.softmax();
        assert_eq!(c.items.iter().map(|c| c.p).collect::<Vec<_>>(), [0.5, 0.5, 0.0]);
    }
}
