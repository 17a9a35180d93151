//! The integer sum of one group, as a level makes it.

use super::lanes::Lanes;

/// Whether codes up to `most` are too large for pairs of products as they are: two times 127 · `most` must fit 16 bits.
pub(crate) const fn is_wide(most: u8) -> bool {
    2 * 127 * most as u32 > i16::MAX as u32
}

/// After how many steps of codes up to `most` a pair's 16 bits are full, as far as it counts: 1, 2, 4, or 8, which is a group. Wide codes are taken as
/// `code − 128`, and those fill them at once.
const fn steps_of_pairs(most: u8) -> usize {
    match i16::MAX as u32 / (2 * 127 * most as u32) {
        _ if is_wide(most) => 1,
        8.. => 8,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// `offset + Σ codes · q` over the steps of a group, for 16 rows. Where a level multiplies in pairs, these are added up in 16 bits as long
/// as they fit, since to widen them costs as much as to make them: 8 steps with codes of 4 bits, 4 with 5, 2 with 6.
#[derive(Clone, Copy)]
pub(crate) struct GroupSum<S: Lanes, const MOST: u8> {
    /// What the next products are added to; with [`Lanes::PAIRS`] the pairs that are not in `whole`.
    running: S::I,
    /// Used with [`Lanes::PAIRS`] alone, and only if a group's pairs do not fit 16 bits.
    whole: S::I,
}

impl<S: Lanes, const MOST: u8> GroupSum<S, MOST> {
    /// A sum without products. A level with [`Lanes::PAIRS`] adds `offset` in the end, so that it takes no register meanwhile.
    #[inline(always)]
    pub fn new(s: S, offset: i32) -> Self {
        let zero = s.splat_i(0);
        GroupSum { running: if S::PAIRS { zero } else { s.splat_i(offset) }, whole: zero }
    }

    /// Adds the products of four columns, the `step`-th of `STEPS`. Of `step`, only the remainder by four counts.
    #[inline(always)]
    pub fn add<const STEPS: usize>(&mut self, s: S, step: usize, codes: S::I, q: &[i8; 4]) {
        match const { is_wide(MOST) } {
            true => self.running = s.dot4::<true>(self.running, codes, q),
            false => self.running = s.dot4::<false>(self.running, codes, q),
        }
        let every = const { steps_of_pairs(MOST) };
        if S::PAIRS && every < STEPS && (step + 1).is_multiple_of(every) {
            self.whole = s.pin(s.add_i(self.whole, s.add_pairs(self.running)));
            self.running = s.splat_i(0);
        } else {
            self.running = s.pin(self.running);
        }
    }

    /// All of it.
    #[inline(always)]
    pub fn get<const STEPS: usize>(self, s: S, offset: i32) -> S::I {
        match const { steps_of_pairs(MOST) >= STEPS } {
            _ if !S::PAIRS => self.running,
            true => s.add_i(s.add_pairs(self.running), s.splat_i(offset)),
            false => s.add_i(self.whole, s.splat_i(offset)),
        }
    }
}
