//! The integer sum of one group, as a level makes it.

use super::simd::Simd;

/// Whether codes up to `most` are too large for pairs of products as they are: two times 127 · `most` must fit 16 bits.
pub(crate) const fn is_wide(most: u8) -> bool {
    2 * 127 * most as u32 > i16::MAX as u32
}

/// How many steps of codes up to `most` a pair's 16 bits hold. Wide codes are taken as `code − 128`, and those fill them at once.
const fn steps_of_pairs(most: u8) -> usize {
    if is_wide(most) { 1 } else { (i16::MAX as u32 / (2 * 127 * most as u32)) as usize }
}

/// `offset + Σ codes · q` for 16 rows. Where a level multiplies in pairs, these are added up in 16 bits as long as they fit, since to widen
/// them costs as much as to make them: 8 steps with codes of 4 bits, 4 with 5, 2 with 6.
#[derive(Clone, Copy)]
pub(crate) struct GroupSum<S: Simd, const MOST: u8> {
    /// What the next products are added to; with [`Simd::PAIRS`] the pairs that are not in `whole`.
    running: S::I,
    /// Used with [`Simd::PAIRS`] alone.
    whole: S::I,
}

impl<S: Simd, const MOST: u8> GroupSum<S, MOST> {
    /// A sum without products.
    #[inline(always)]
    pub fn new(s: S, offset: i32) -> Self {
        let (zero, offset) = (s.splat_i(0), s.splat_i(offset));
        if S::PAIRS {
            GroupSum { running: zero, whole: offset }
        } else {
            GroupSum { running: offset, whole: zero }
        }
    }

    /// Adds the products of four columns, the `step`-th of a group of `STEPS`.
    #[inline(always)]
    pub fn add<const STEPS: usize>(&mut self, s: S, step: usize, codes: S::I, q: &[i8; 4]) {
        match const { is_wide(MOST) } {
            true => self.running = s.dot4::<true>(self.running, codes, q),
            false => self.running = s.dot4::<false>(self.running, codes, q),
        }
        if S::PAIRS && ((step + 1).is_multiple_of(const { steps_of_pairs(MOST) }) || step + 1 == STEPS) {
            self.whole = s.add_i(self.whole, s.add_pairs(self.running));
            self.running = s.splat_i(0);
        }
    }

    /// All of it.
    #[inline(always)]
    pub fn get(self) -> S::I {
        if S::PAIRS { self.whole } else { self.running }
    }
}
