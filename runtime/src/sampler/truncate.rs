//! The steps that take candidates out of the running.

use super::{
    candidates::{Candidate, Candidates},
    options::XtcOptions,
};

/// So many candidates are sorted at most to find the nearest. More are dealt into buckets: half of a flat vocabulary may be needed.
const MANY: usize = 2048;

/// Probabilities are summed as integers of this unit, exact and thereby the same in any order.
const UNIT: f64 = (1u64 << 50) as f64;

/// Buckets of distances: by exponent and four bits of mantissa.
const BUCKET_SHIFT: u32 = 48;

/// Keeps the fewest candidates, the nearest first and equally near ones by id, whose probabilities are `enough`, in their present
/// order. `distance` is not negative and no NaN. Three passes over the candidates; only those of the last bucket are sorted.
fn keep_nearest(c: &mut Candidates, distance: impl Fn(&Candidate) -> f64, enough: impl Fn(f64) -> bool) {
    let weight = |i: &Candidate| (f64::from(i.p) * UNIT) as u64;
    let is_enough = |sum: u64| enough(sum as f64 / UNIT);
    // Zero has no other sign.
    let distances: Vec<f64> = c.items.iter().map(|i| distance(i) + 0.0).collect();
    let bucket = |d: &f64| (d.to_bits() >> BUCKET_SHIFT) as usize;
    let mut buckets = vec![0u64; 1 << (u64::BITS - 1 - BUCKET_SHIFT)];
    for (i, d) in c.items.iter().zip(&distances) {
        buckets[bucket(d)] += weight(i);
    }
    let mut sum = 0;
    let last = buckets.iter().position(|bucket| {
        let is_last = is_enough(sum + bucket);
        sum += if is_last { 0 } else { *bucket };
        is_last
    });
    let Some(last) = last else { return };
    let in_last = c.items.iter().zip(&distances).filter(|(_, d)| bucket(d) == last);
    let mut edge: Vec<(f64, u32, u64)> = in_last.map(|(i, d)| (*d, i.id, weight(i))).collect();
    edge.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let end = edge.iter().find(|(_, _, weight)| {
        sum += weight;
        is_enough(sum)
    });
    let Some(&(farthest, highest, _)) = end else { return };
    let mut distances = distances.iter();
    c.items.retain(|i| distances.next().is_some_and(|d| *d < farthest || *d == farthest && i.id <= highest));
    c.forget_order();
}

/// Locally typical sampling: the candidates whose surprise −ln p is nearest to the entropy, until
/// their probabilities exceed `p` (source: Meister et al. 2022, arXiv 2202.00666).
pub(super) fn typical(c: &mut Candidates, p: f32) {
    if p >= 1.0 {
        return;
    }
    c.softmax();
    // −p ln p tends to 0 with p; a candidate of probability 0 must not bring in a NaN.
    let surprise = |p: f32| f64::from(-libm::logf(p.max(f32::MIN_POSITIVE)));
    let entropy: f64 = c.items.iter().map(|i| f64::from(i.p) * surprise(i.p)).sum();
    let distance = |p: f32| (surprise(p) - entropy).abs();
    if c.items.len() > MANY {
        return keep_nearest(c, |i| distance(i.p), |sum| sum > f64::from(p));
    }
    c.items.sort_unstable_by(|a, b| distance(a.p).total_cmp(&distance(b.p)).then(a.id.cmp(&b.id)));
    c.forget_order();
    truncate_after(c, |sum| sum > f64::from(p));
}

/// Of the candidates in their present order keeps the first ones, until their probabilities are `enough`.
fn truncate_after(c: &mut Candidates, enough: impl Fn(f64) -> bool) {
    let mut sum = 0.0f64;
    let end = c.items.iter().position(|i| {
        sum += f64::from(i.p);
        enough(sum)
    });
    if let Some(end) = end {
        c.truncate(end + 1);
    }
}

/// Nucleus sampling: the fewest candidates whose probabilities reach `p` (source: Holtzman et al.
/// 2019, arXiv 1904.09751).
pub(super) fn top_p(c: &mut Candidates, p: f32) {
    if p >= 1.0 {
        return;
    }
    c.softmax();
    if c.items.len() > MANY {
        let max = f64::from(c.best().logit);
        return keep_nearest(c, |i| max - f64::from(i.logit), |sum| sum >= f64::from(p));
    }
    c.sort(c.items.len());
    truncate_after(c, |sum| sum >= f64::from(p));
}

/// Drops candidates less likely than `p` times the likeliest.
pub(super) fn min_p(c: &mut Candidates, p: f32) {
    if p <= 0.0 {
        return;
    }
    let floor = c.best().logit + libm::logf(p);
    c.retain(|i| i.logit >= floor);
}

/// Of the candidates at least as probable as the threshold only the least probable stays. `chance`
/// is this step's uniform random number.
pub(super) fn xtc(c: &mut Candidates, options: XtcOptions, chance: f64) {
    if options.probability <= 0.0
        || options.threshold > 0.5
        || c.items.len() < 2
        || chance > f64::from(options.probability)
    {
        return;
    }
    c.softmax();
    let top = c.items.iter().filter(|i| i.p >= options.threshold);
    let last = top.min_by(|a, b| a.logit.total_cmp(&b.logit).then(b.id.cmp(&a.id))).map(|i| i.id);
    c.retain(|i| i.p < options.threshold || Some(i.id) == last);
}

#[cfg(test)]
mod tests {
    use super::{super::candidates::of_probabilities, *};

    fn ids(c: &Candidates) -> Vec<u32> {
        let mut ids: Vec<u32> = c.items.iter().map(|c| c.id).collect();
        ids.sort();
        ids
    }

    #[test]
    fn top_p_keeps_the_fewest_that_reach_p() {
        for (p, want) in [
            (0.0, vec![3]),
            (0.39, vec![3]),
            (0.6, vec![2, 3]),
            (0.85, vec![1, 2, 3]),
            (1.0, vec![0, 1, 2, 3]),
        ] {
            let mut c = of_probabilities(&[0.1, 0.2, 0.3, 0.4]);
            top_p(&mut c, p);
            assert_eq!(ids(&c), want, "p = {p}");
        }
    }

    #[test]
    fn top_p_over_many_equal_tokens_takes_the_first_by_id() {
        let mut c = of_probabilities(&[1.0 / 4096.0; 4096]);
        top_p(&mut c, 0.5);
        assert_eq!(ids(&c), (0..2048).collect::<Vec<_>>());
    }

    /// What stays, by sorting everything.
    fn nearest(
        c: &Candidates,
        distance: impl Fn(&Candidate) -> f64,
        enough: impl Fn(f64) -> bool,
    ) -> Vec<u32> {
        let mut items: Vec<_> = c.items.iter().map(|i| (distance(i), i.id, f64::from(i.p))).collect();
        items.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let mut sum = 0.0;
        let n = items.iter().position(|i| {
            sum += i.2;
            enough(sum)
        });
        let mut ids: Vec<u32> = items[..n.map_or(items.len(), |n| n + 1)].iter().map(|i| i.1).collect();
        ids.sort();
        ids
    }

    #[test]
    fn many_candidates_are_cut_as_by_sorting() {
        let mut rng = super::super::rng::Rng::new(11);
        // Flat, usual, and coarse with many ties.
        for (width, step) in [(0.01, 0.0), (12.0, 0.0), (20.0, 0.5), (0.0, 0.0)] {
            let logits: Vec<f32> = (0..20_000)
                .map(|_| {
                    let x = rng.uniform() * width;
                    (if step > 0.0 { (x / step).floor() * step } else { x }) as f32
                })
                .collect();
            let all = || {
                let mut c = Candidates::default();
                c.fill(&logits, 0).unwrap();
                c.softmax();
                c
            };
            let check = |name: &str, p: f32, got: &Candidates, want: Vec<u32>| {
                let got = ids(got);
                // Of equal tokens one more or less may be within the rounding of the sums.
                let n = got.len().min(want.len());
                let both = got.iter().filter(|id| want.binary_search(id).is_ok()).count();
                assert!(
                    got.len().abs_diff(want.len()) <= 1 && both == n,
                    "{name} {p}, {width}: {both} of {} and {}",
                    got.len(),
                    want.len()
                );
            };
            let max = f64::from(all().best().logit);
            let surprise = |p: f32| f64::from(-libm::logf(p.max(f32::MIN_POSITIVE)));
            let entropy: f64 = all().items.iter().map(|i| f64::from(i.p) * surprise(i.p)).sum();
            for p in [0.0f32, 1e-5, 0.3, 0.9, 0.999] {
                let mut c = all();
                top_p(&mut c, p);
                let want = nearest(&all(), |i| max - f64::from(i.logit), |sum| sum >= f64::from(p));
                check("top-p", p, &c, want);
                let mut c = all();
                typical(&mut c, p);
                let want = nearest(&all(), |i| (surprise(i.p) - entropy).abs(), |sum| sum > f64::from(p));
                check("typical", p, &c, want);
            }
        }
    }

    #[test]
    fn min_p_is_relative_to_the_best() {
        for (p, want) in [(0.0, vec![0, 1, 2, 3]), (0.26, vec![1, 2, 3]), (0.74, vec![2, 3]), (1.0, vec![3])]
        {
            let mut c = of_probabilities(&[0.1, 0.2, 0.3, 0.4]);
            min_p(&mut c, p);
            assert_eq!(ids(&c), want, "p = {p}");
            // The same when the order is known.
            let mut c = of_probabilities(&[0.1, 0.2, 0.3, 0.4]);
            c.sort(4);
            min_p(&mut c, p);
            assert_eq!(ids(&c), want, "p = {p}, sorted");
        }
    }

    #[test]
    fn typical_prefers_the_usual_surprise() {
        // Entropy 0.943 nats; surprises 0.511, 1.386, 1.897: the distances are 0.43, 0.44, 0.95.
        let p = [0.6, 0.25, 0.15];
        for (limit, want) in [(0.5, vec![0]), (0.7, vec![0, 1]), (0.9, vec![0, 1, 2]), (1.0, vec![0, 1, 2])] {
            let mut c = of_probabilities(&p);
            typical(&mut c, limit);
            assert_eq!(ids(&c), want, "typical_p = {limit}");
        }
        // The likeliest need not be typical: the entropy is 1.75 nats, the surprise of the first
        // is 0.92, that of the others 2.30.
        let mut c = of_probabilities(&[0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]);
        typical(&mut c, 0.35);
        assert_eq!(ids(&c), [1, 2, 3, 4]);
    }

    #[test]
    fn typical_survives_zero_probability() {
        let mut c = Candidates::default();
        c.fill(&[0.0, -1000.0, 0.0], 0).unwrap();
        typical(&mut c, 0.9);
        assert_eq!(ids(&c), [0, 2]);
    }

    #[test]
    fn xtc_leaves_the_least_of_the_top_choices() {
        let on = XtcOptions { probability: 0.5, threshold: 0.15 };
        let run = |options, chance| {
            let mut c = of_probabilities(&[0.4, 0.1, 0.3, 0.2]);
            xtc(&mut c, options, chance);
            ids(&c)
        };
        assert_eq!(run(on, 0.5), [1, 3]);
        assert_eq!(run(on, 0.51), [0, 1, 2, 3]);
        assert_eq!(run(XtcOptions { probability: 0.0, ..on }, 0.0), [0, 1, 2, 3]);
        assert_eq!(run(XtcOptions { threshold: 0.51, ..on }, 0.0), [0, 1, 2, 3]);
        assert_eq!(run(XtcOptions { threshold: 0.35, ..on }, 0.0), [0, 1, 2, 3], "one top choice stays");
        assert_eq!(run(XtcOptions { threshold: 0.0, ..on }, 0.0), [1], "all are top choices");
    }
}
