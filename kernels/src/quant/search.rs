//! Finding scales: what the quantizers of several formats share.
//!
//! The measure is the plain sum of squared errors. For a given inverse scale the codes are the
//! nearest ones; for given codes the best scale (and minimum) solves a least-squares problem in
//! closed form. So each search tries a range of inverse scales around the one that just
//! covers the range, keeps the best fit, and only then rounds scales to what the block can hold.
//! Inputs come from [`super::block::finite`], whose bound keeps every sum here finite.

use super::Half;
use super::iq4_nl::{VALUES, nearest};

/// `1 / d`, or 0 where there is none.
pub(super) fn inverse(d: f32) -> f32 {
    let inverse = 1.0 / d;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// A step as the block holds it, with the inverse of the unrounded step, saturated alike.
pub(super) fn step(d: f32) -> (Half, f32) {
    (Half::saturating(d), inverse(d.clamp(-65504.0, 65504.0)))
}

/// The value of largest magnitude, the first of equals.
fn extreme(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |m: f32, v| if v.abs() > m.abs() { *v } else { m })
}

/// The [`step`] that takes the extreme value to `−n`.
pub(super) fn extreme_step(x: &[f32], n: f32) -> (Half, f32) {
    step(extreme(x) / -n)
}

/// The [`step`] of `n` equal ones from the smallest to the largest value, and the smallest value,
/// within half precision.
pub(super) fn range_step(x: &[f32], n: f32) -> (Half, f32, f32) {
    let (low, high) = range(x);
    let low = low.clamp(-65504.0, 65504.0);
    let (d, inverse) = step((high - low) / n);
    (d, inverse, low)
}

fn range(x: &[f32]) -> (f32, f32) {
    x.iter().fold((f32::MAX, f32::MIN), |(low, high), v| (low.min(*v), high.max(*v)))
}

/// The best scale of those that least squares gives for codes taken with each inverse scale.
///
/// With codes `q`, the error `Σ (x − s q)²` is smallest at `s = Σ x q / Σ q²`, where it has
/// fallen by `(Σ x q)² / Σ q²`: the search maximises that.
fn best_scale(x: &[f32], inverses: impl Iterator<Item = f32>, code: impl Fn(f32) -> f32) -> f32 {
    let (mut scale, mut best) = (0.0, 0.0);
    for inverse in inverses {
        let (mut xq, mut qq) = (0f32, 0f32);
        for x in x {
            let q = code(x * inverse);
            xq += x * q;
            qq += q * q;
        }
        if qq > 0.0 && xq * xq > best * qq {
            (scale, best) = (xq / qq, xq * xq / qq);
        }
    }
    scale
}

/// Scale for codes `−n .. n`; of either sign, as the range is wider by one below zero.
fn symmetric_scale(x: &[f32], n: f32) -> f32 {
    let inverse = inverse(extreme(x));
    let targets = (-9..=9).flat_map(|i| [-n + 0.1 * i as f32, n - 1.0 + 0.1 * i as f32]);
    best_scale(x, targets.map(|t| t * inverse), |v| v.round_ties_even().clamp(-n, n - 1.0))
}

/// Scale for the table of IQ4_NL; of either sign, as the table is not symmetric.
pub(super) fn table_scale(x: &[f32]) -> f32 {
    let inverse = inverse(extreme(x));
    let ends = [f32::from(VALUES[0]), f32::from(VALUES[15])];
    let targets = (-8..=8).flat_map(|i| ends.map(|end| end + 1.5 * i as f32));
    best_scale(x, targets.map(|t| t * inverse), |v| f32::from(VALUES[usize::from(nearest(v))]))
}

/// Rounds scales to integers `−n .. n` times one half-precision factor.
pub(super) fn signed_scales<const G: usize>(wanted: &[f32; G], n: i16) -> (Half, [i8; G]) {
    signed_scales_to(wanted, n, f32::from(n))
}

/// [`signed_scales`] with the extreme one at `−target`.
fn signed_scales_to<const G: usize>(wanted: &[f32; G], n: i16, target: f32) -> (Half, [i8; G]) {
    let n = f32::from(n);
    let d = Half::saturating(extreme(wanted) / -target);
    let inverse = inverse(d.to_f32());
    (d, wanted.map(|s| (s * inverse).round_ties_even().clamp(-n, n - 1.0) as i8))
}

/// 16 groups of 16 with signed scales: Q3_K and Q6_K.
pub(super) struct Symmetric {
    pub(super) d: Half,
    pub(super) scales: [i8; 16],
    /// Codes with their zero added.
    pub(super) codes: [u8; 256],
}

/// Fits codes `0 .. 2n` with zero `n`, and scales `−s .. s`.
///
/// The factor on the scales is itself rounded, to half precision, so several are tried; and
/// for each, the integers beside every rounded scale.
pub(super) fn symmetric_super_block(x: &[f32; 256], n: u8, s: i16) -> Symmetric {
    let zero = f32::from(n);
    let wanted: [f32; 16] = std::array::from_fn(|g| symmetric_scale(&x[g * 16..][..16], zero));
    let code = |v: f32, inverse: f32| (v * inverse).round_ties_even().clamp(-zero, zero - 1.0);
    let error = |x: &[f32], scale: f32| -> f32 {
        let inverse = inverse(scale);
        x.iter().map(|v| (scale * code(*v, inverse) - v).powi(2)).sum()
    };
    let (mut d, mut scales, mut best) = (Half::default(), [0; 16], f32::INFINITY);
    for less in 0..4 {
        let (candidate, mut rounded) = signed_scales_to(&wanted, s, f32::from(s - less));
        let factor = candidate.to_f32();
        let mut total = 0.0;
        for (scale, x) in rounded.iter_mut().zip(x.chunks_exact(16)) {
            let beside = [-1, 1].map(|i| (i16::from(*scale) + i).clamp(-s, s - 1) as i8);
            let (e, best) = least(*scale, beside.into_iter(), |sc| error(x, factor * f32::from(sc)));
            *scale = best;
            total += e;
        }
        if total < best {
            (d, scales, best) = (candidate, rounded, total);
        }
    }
    let inverses = scales.map(|sc| inverse(d.to_f32() * f32::from(sc)));
    let codes = std::array::from_fn(|k| (code(x[k], inverses[k / 16]) + zero) as u8);
    Symmetric { d, scales, codes }
}

/// Of `start` and `others` the one of smallest error, the first of equals, after its error.
fn least<T: Copy>(start: T, others: impl Iterator<Item = T>, error: impl Fn(T) -> f32) -> (f32, T) {
    others.fold((error(start), start), |best, candidate| {
        let e = error(candidate);
        if e < best.0 { (e, candidate) } else { best }
    })
}

/// `G` groups with unsigned scales and minima: Q2_K, Q4_K and Q5_K.
pub(super) struct Affine<const G: usize> {
    pub(super) d: Half,
    pub(super) dmin: Half,
    pub(super) scales: [u8; G],
    pub(super) mins: [u8; G],
    pub(super) codes: [u8; 256],
}

/// Fits codes `0 ..= n` with scales and minima `0 ..= s`.
///
/// A group's scale and minimum are rounded together: the best of the integers around both.
pub(super) fn affine_super_block<const G: usize>(x: &[f32; 256], n: u8, s: u8) -> Affine<G> {
    let (len, top) = (256 / G, f32::from(n));
    let fits: [(f32, f32); G] = std::array::from_fn(|g| affine_fit(&x[g * len..][..len], top));
    let (d, mut scales) = unsigned_scales(&fits.map(|fit| fit.0), s);
    let (dmin, mut mins) = unsigned_scales(&fits.map(|fit| fit.1), s);
    let (scale_of, min_of) = (|sc: u8| d.to_f32() * f32::from(sc), |m: u8| dmin.to_f32() * f32::from(m));
    let mut codes = [0; 256];
    for (g, (codes, x)) in codes.chunks_exact_mut(len).zip(x.chunks_exact(len)).enumerate() {
        let beside = |v: u8| [v, v.saturating_sub(1), (v + 1).min(s)];
        let around = beside(scales[g]).into_iter().flat_map(|sc| beside(mins[g]).map(|m| (sc, m)));
        let (_, best) = least((scales[g], mins[g]), around, |(sc, m)| {
            let (scale, low) = (scale_of(sc), -min_of(m));
            let inverse = inverse(scale);
            x.iter().map(|v| (scale * code(*v, low, inverse, top) + low - v).powi(2)).sum()
        });
        (scales[g], mins[g]) = best;
        let (inverse, low) = (inverse(scale_of(best.0)), -min_of(best.1));
        for (code_out, x) in codes.iter_mut().zip(x) {
            *code_out = code(*x, low, inverse, top) as u8;
        }
    }
    Affine { d, dmin, scales, mins, codes }
}

/// Rounds scales, none negative, to integers `0 ..= n` times one half-precision factor.
fn unsigned_scales<const G: usize>(wanted: &[f32; G], n: u8) -> (Half, [u8; G]) {
    let n = f32::from(n);
    let d = Half::saturating(extreme(wanted) / n);
    let inverse = inverse(d.to_f32());
    (d, wanted.map(|s| (s * inverse).round_ties_even().clamp(0.0, n) as u8))
}

/// Scale and minimum, neither negative, for `x ≈ scale · code − min` with codes `0 ..= n`.
///
/// For given codes the normal equations of (scale, −min) have a closed solution; where it would
/// put the minimum above zero, which the block cannot hold, the best is the line through zero.
fn affine_fit(x: &[f32], n: f32) -> (f32, f32) {
    let (low, high) = range(x);
    let low = low.min(0.0);
    let inverse = inverse(high - low);
    if inverse == 0.0 {
        return (0.0, -low);
    }
    let error = |scale: f32, min: f32, inverse: f32| -> f32 {
        let square = |v: &f32| (scale * code(*v, low, inverse, n) - min - v).powi(2);
        x.iter().map(square).sum()
    };
    let mut fit = ((high - low) / n, -low);
    let mut best = error(fit.0, fit.1, n * inverse);
    for i in -10..=10 {
        let inverse = (n + 0.1 * i as f32) * inverse;
        let (scale, min) = least_squares(x, |v| code(v, low, inverse, n));
        let error = error(scale, min, inverse);
        if scale > 0.0 && error < best {
            (fit, best) = ((scale, min), error);
        }
    }
    fit
}

fn code(v: f32, low: f32, inverse: f32, n: f32) -> f32 {
    ((v - low) * inverse).round_ties_even().clamp(0.0, n)
}

/// (scale, min) with `min ≥ 0` of smallest `Σ (scale · q(x) − min − x)²`; scale 0 if the codes
/// do not tell.
fn least_squares(x: &[f32], q: impl Fn(f32) -> f32) -> (f32, f32) {
    let (mut sq, mut sqq, mut sx, mut sxq) = (0f32, 0f32, 0f32, 0f32);
    for x in x {
        let q = q(*x);
        sq += q;
        sqq += q * q;
        sx += x;
        sxq += x * q;
    }
    let n = x.len() as f32;
    let determinant = n * sqq - sq * sq;
    if determinant <= 0.0 {
        return (0.0, 0.0);
    }
    let min = (sq * sxq - sqq * sx) / determinant;
    if min < 0.0 {
        return (sxq / sqq, 0.0);
    }
    ((n * sxq - sq * sx) / determinant, min)
}
