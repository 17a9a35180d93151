//! Rotary position embedding.

use crate::backend::{Rope, RopeStyle};

/// (cos, sin) of each pair at `position`, times the magnitude.
///
/// The angle is formed and reduced in double precision, because at position 10⁵ a float's
/// step is already 2⁻⁷ of a radian; the results are rounded once.
pub fn table(position: u32, rope: &Rope, out: &mut Vec<[f32; 2]>) {
    let magnitude = f64::from(rope.magnitude);
    out.clear();
    out.extend(rope.inv_freq.iter().map(|f| {
        let (sin, cos) = (f64::from(position) * f64::from(*f)).sin_cos();
        [(cos * magnitude) as f32, (sin * magnitude) as f32]
    }));
}

/// Rotates the pairs of one head: `(a, b) ← (a cos − b sin, a sin + b cos)` (source: Su et al., arXiv 2104.09864).
#[inline(always)]
pub fn rotate(head: &mut [f32], style: RopeStyle, table: &[[f32; 2]]) {
    for (i, [cos, sin]) in table.iter().enumerate() {
        let (ia, ib) = match style {
            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
            RopeStyle::Neox => (i, i + table.len()),
        };
        let (a, b) = (head[ia], head[ib]);
        head[ia] = a.mul_add(*cos, -(b * sin));
        head[ib] = a.mul_add(*sin, b * cos);
    }
}
