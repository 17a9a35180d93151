//! The vector operations that take sixteen weight rows apart and multiply them.

/// Repeats a block for constants: which shift or which register is meant must be known when this is compiled.
macro_rules! unroll {
    ($i:ident in [$($n:literal),+] $body:block) => {
        $({
            const $i: usize = $n;
            $body
        })+
    };
}
pub(crate) use unroll;

/// Sixteen rows at equal distances. Four pointers and the distance address them all, and stay in registers.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    every_fourth: [*const u8; 4],
    stride: usize,
}

impl Rows {
    /// Rows at `first`, `first + stride`, …
    pub fn new(first: *const u8, stride: usize) -> Rows {
        let at = |i| first.wrapping_add(i * stride);
        Rows { every_fourth: [at(0), at(4), at(8), at(12)], stride }
    }

    /// Byte `offset` of row `i`.
    #[inline(always)]
    pub fn at(&self, i: usize, offset: usize) -> *const u8 {
        self.every_fourth[i / 4].wrapping_add(i % 4 * self.stride + offset)
    }

    /// Rows 8 to 15, which take the place of 0 to 7.
    pub fn upper(self) -> Rows {
        let [_, _, eighth, twelfth] = self.every_fourth;
        Rows { every_fourth: [eighth, twelfth, eighth, twelfth], ..self }
    }

    /// Goes on by so many bytes in each row.
    #[inline(always)]
    pub fn advance(&mut self, bytes: usize) {
        for row in &mut self.every_fourth {
            *row = row.wrapping_add(bytes);
        }
    }
}

/// Vectors whose lanes are weight rows (in float products, columns): sixteen, or eight of them ([`Simd::Low`](super::simd::Simd::Low)). What belongs to the other
/// rows is neither read nor written then.
///
/// A value exists only where the processor has the instructions, so its methods are safe to call.
pub(crate) trait Lanes: Copy {
    /// A float for each row.
    type F: Copy;
    /// An integer of 32 bits for each row, or four bytes. Lanes of 16 bytes are those of four rows.
    type I: Copy;
    /// Whether [`Lanes::dot4`] has 16 bits for each pair of products, and takes codes that go beyond 63 as `code − 128`.
    const PAIRS: bool;
    /// Whether the registers hold so few vectors that weights which are multiplied as they are unpacked are taken in halves of eight rows, and products
    /// are added as soon as there are codes, not once a group's are there.
    const FEW_REGISTERS: bool;
    /// Whether the rows of a panel are neighbours, and memory is fetched ahead in its own order. Else they are far apart, and the processor
    /// follows each of them.
    const NEIGHBOURS: bool;
    /// Activation rows of a tile for which weights are not unpacked into panels, at most.
    const DIRECT_ROWS: usize;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// The floats of these rows.
    fn load(self, x: &[f32; 16]) -> Self::F;
    /// The same from half precision.
    fn load_f16(self, x: &[[u8; 2]; 16]) -> Self::F;
    /// The same from bfloat16.
    fn load_bf16(self, x: &[[u8; 2]; 16]) -> Self::F;
    /// Writes the floats of these rows.
    fn store(self, x: Self::F, out: &mut [f32; 16]);
    /// a − b.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b + c, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;

    /// Four bytes of each row.
    fn load_i(self, x: &[u8; 64]) -> Self::I;
    /// All lanes `x`.
    fn splat_i(self, x: i32) -> Self::I;
    /// The 16-bit number at `offset` of each row, zero-extended.
    ///
    /// # Safety
    /// Two bytes are readable there.
    unsafe fn gather_u16(self, rows: &Rows, offset: usize) -> Self::I;
    /// A number of 16 bits of each row, zero-extended.
    fn load_u16(self, x: &[u8; 32]) -> Self::I;
    /// 16 bytes from each pointer, one lane after the other, as far as lanes are of these rows.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_lanes(self, rows: [*const u8; 4]) -> Self::I;
    /// Transposes 4 × 4 words of 32 bits within each lane.
    fn transpose4(self, x: [Self::I; 4]) -> [Self::I; 4];
    /// a & b.
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    /// a | b.
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    /// a ^ b.
    fn xor(self, a: Self::I, b: Self::I) -> Self::I;
    /// 32-bit lanes, zeros enter.
    fn shl<const N: u32>(self, x: Self::I) -> Self::I;
    /// 32-bit lanes, zeros enter.
    fn shr<const N: u32>(self, x: Self::I) -> Self::I;
    /// 32-bit lanes, the sign enters.
    fn sra<const N: u32>(self, x: Self::I) -> Self::I;
    /// a + b in 32-bit lanes.
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// a − b in 32-bit lanes.
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Low 32 bits of the products of 32-bit lanes.
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// `table[byte]`; every byte is below 16.
    fn lookup(self, table: &[u8; 16], bytes: Self::I) -> Self::I;
    /// Exact up to 2²⁴.
    fn to_f(self, x: Self::I) -> Self::F;
    /// The low half of each 32-bit lane, a half-precision float.
    fn f16_low(self, x: Self::I) -> Self::F;
    /// Adds `Σ codes[4l + j] · q[j]` over j < 4 to lane l of `acc`, with unsigned codes and `q` in −127 ..= 127. A level with
    /// [`Lanes::PAIRS`] adds j < 2 to one half of the lane and the others to the other; where codes go beyond 63, it must be told so
    /// with `WIDE`.
    fn dot4<const WIDE: bool>(self, acc: Self::I, codes: Self::I, q: &[i8; 4]) -> Self::I;
    /// Nothing, but the compiler adds up, and loads what is loaded, in no other order than is written. With few registers, it would keep
    /// more sums than they hold.
    #[inline(always)]
    fn pin(self, x: Self::I) -> Self::I {
        x
    }
    /// The same for floats.
    #[inline(always)]
    fn pin_f(self, x: Self::F) -> Self::F {
        x
    }
    /// The sum of both halves of each lane, for a level with [`Lanes::PAIRS`]; elsewhere a lane has no halves.
    #[inline(always)]
    fn add_pairs(self, pairs: Self::I) -> Self::I {
        pairs
    }

    /// Fetches a line of cache ahead of its use, into the second level.
    fn prefetch(self, address: *const u8);
    /// The same long before its use, into the third level or the second.
    fn prefetch_early(self, address: *const u8);
    /// Fetches a line that is in the second level into the first, shortly before its use.
    fn prefetch_near(self, address: *const u8);
}
