//! Integer products on AMX tiles: 16 activation rows × 16 weight rows per instruction.
//!
//! `tdpbssd` multiplies a tile A of M rows × 4·STEPS bytes with a tile B of STEPS rows × 16 columns × 4 bytes and adds to M × 16
//! sums of 32 bits (source: Intel SDM, TDPBSSD). [`Panel`]s are such tiles B as they are, a group after the other, and
//! [`Activations::by_blocks`] are such tiles A. The sums of a group are exact, so they are those of every other level; they go through
//! memory to the vector unit, which scales and adds them in the canonical order.
//!
//! For each 16 × 16 sums of 32 columns the tile unit takes 16 cycles, the stores of the sums 16, and scaling 48 vector operations on two
//! units 24 (formats with minima 32), where the products alone take 64 on the vector units. The four work side by side: groups
//! are scaled [`LAG`] behind.

// Tiles index several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::sync::OnceLock;

use super::int_tile::Sweep;
use super::panel::{Panel, ROWS};
use super::simd::{Op, Simd};
use super::{Isa, Level, avx512};

/// Groups between a tile's product and its scaling: as many as hide the product's latency of 52 cycles and the way through memory.
const LAG: usize = 2;
/// Places for sums on their way: a power of two above [`LAG`].
const PLACES: usize = 4;

/// Whether the processor has int8 and BF16 tiles, and the system lets this process use them.
pub(super) fn detected() -> bool {
    static DETECTED: OnceLock<bool> = OnceLock::new();
    *DETECTED.get_or_init(|| has_tiles() && permitted())
}

fn has_tiles() -> bool {
    // CPUID.(7,0).EDX: 22 AMX-BF16, 24 AMX-TILE, 25 AMX-INT8; XCR0: 17 and 18 are the tiles' state.
    const NEEDED: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    const STATE: u64 = 1 << 17 | 1 << 18;
    let is_there = __cpuid_count(7, 0).edx & NEEDED == NEEDED && __cpuid_count(1, 0).ecx & (1 << 27) != 0;
    // SAFETY: OSXSAVE (bit 27 above) says that `xgetbv` is there.
    is_there && unsafe { _xgetbv(0) } & STATE == STATE
}

/// Asks the system for room for the tiles wherever it saves a thread's registers.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Proof that the processor has the tiles.
#[derive(Clone, Copy)]
pub(super) struct Amx(());

/// The shapes of the eight tiles, as `ldtilecfg` reads them (source: Intel SDM).
#[repr(C, align(64))]
pub(super) struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const _: () = assert!(size_of::<Shapes>() == 64);

impl Shapes {
    /// Tiles 0 to 3: sums of `m` activation rows; 4 and 5: their codes, `bytes` of each; 6 and 7: those of weights.
    pub fn new(m: usize, bytes: usize) -> Shapes {
        let mut shapes =
            Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for tile in 0..8 {
            let (rows, row_bytes) = match tile {
                0..4 => (m, 64),
                4..6 => (m, bytes),
                _ => (bytes / 4, 64),
            };
            (shapes.rows[tile], shapes.row_bytes[tile]) = (rows as u8, row_bytes as u16);
        }
        shapes
    }

    /// Tiles 0 to 3: sums of 16 weight rows × `m` activation rows in f32; 4 and 5: 32 columns of weights in BF16; 6 and 7: those of
    /// activations, in pairs.
    pub fn floats(m: usize) -> Shapes {
        let mut shapes = Shapes::new(ROWS, 64);
        for tile in [0, 1, 2, 3, 6, 7] {
            shapes.row_bytes[tile] = 4 * m as u16;
        }
        shapes
    }
}

impl Amx {
    /// At the level that has them.
    pub fn of(isa: Isa) -> Option<Amx> {
        (isa.level() == Level::Amx).then_some(Amx(()))
    }

    /// [`Sweep`] with tiles. `panels` are the sweep's, whose codes become signed; `zero` is the code of weight 0.
    ///
    /// # Safety
    /// As for the sweep. Nobody else uses the panels.
    pub unsafe fn sweep<const STEPS: usize, const MIN: bool, const WIDE: bool>(
        self,
        sweep: Sweep<'_, STEPS, MIN, WIDE>,
        panels: *mut Panel,
        zero: i32,
    ) {
        let work = TileSweep { sweep, panels, zero };
        // SAFETY: the proof: this level has all of `run_vnni`'s instructions, and tiles; the caller's promise.
        unsafe { avx512::run_vnni(work) };
    }
}

struct TileSweep<'a, const STEPS: usize, const MIN: bool, const WIDE: bool> {
    sweep: Sweep<'a, STEPS, MIN, WIDE>,
    panels: *mut Panel,
    zero: i32,
}

impl<const STEPS: usize, const MIN: bool, const WIDE: bool> Op for TileSweep<'_, STEPS, MIN, WIDE> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Sweep { column, columns, x, offsets, tiles, acc, mut ahead, outputs, .. } = self.sweep;
        assert!(x.by_blocks && S::TILE_PANELS == 2);
        let group = 4 * STEPS;
        if !MIN {
            for p in 0..2 {
                // SAFETY: the caller's panels, which hold `columns`.
                unsafe { make_signed::<S, WIDE>(s, self.panels.add(p), columns / 4, self.zero) };
            }
        }
        let fetch = ahead.count().div_ceil((2 * columns / group * tiles.len()).max(1));
        let first_row = x.tiles.start(tiles.start);
        let mut sums = Sums([[[0; ROWS]; ROWS]; PLACES]);
        let mut shaped = 0;
        for t in tiles {
            let (start, m) = (x.tiles.start(t), x.tiles.start(t + 1) - x.tiles.start(t));
            assert!(m <= ROWS);
            if m != shaped {
                shaped = m;
                // SAFETY: shapes within the palette's limits.
                unsafe { shape(&Shapes::new(m, group)) };
            }
            let at = |unit: usize| start * x.columns / unit + column / unit * m;
            // As many as are read: tiles of less than 16 rows are scaled as if they had 16.
            let beyond = ROWS - m;
            let q = x.q[at(4)..][..columns / 4 * m].as_ptr();
            let scales = x.scales[at(32)..][..columns / 32 * m + beyond].as_ptr();
            let offsets = offsets[at(group)..][..columns / group * m + beyond].as_ptr();
            for p in 0..2 {
                // SAFETY: the caller's accumulators hold all rows of the tiles, and its panels `columns`; the slices above have
                // the lengths that the tile reads.
                unsafe {
                    let acc = acc.add(2 * (start - first_row) + p);
                    let panel = &*self.panels.add(p);
                    let mut tile = Tile { panel, m, q, scales, offsets, sums: &mut sums };
                    let mut rows = tile.begin(s, acc, column == 0);
                    let groups = columns / group;
                    for g in 0..groups + LAG {
                        if g < groups {
                            tile.multiply::<STEPS, MIN>(g);
                            ahead.fetch(s, fetch);
                        }
                        if g >= LAG {
                            tile.scale::<S, STEPS, MIN>(s, g - LAG, &mut rows);
                        }
                    }
                    for r in 0..m {
                        s.store(rows[r], &mut *acc.add(2 * r));
                    }
                }
            }
            if let Some(outputs) = &outputs {
                for row in 0..m {
                    // SAFETY: two accumulators of each of the tile's rows have just been written.
                    unsafe { outputs.put(start + row, acc.add(2 * (start - first_row + row))) };
                }
            }
        }
        // SAFETY: nothing is left in the tiles.
        unsafe { release() };
    }
}

/// Codes become `code − zero`, by bytes.
///
/// # Safety
/// The panel has so many vectors of codes, below 64 and with a `zero` below 64, or any with a `zero` of 128 if WIDE.
#[inline(always)]
unsafe fn make_signed<S: Simd, const WIDE: bool>(s: S, panel: *mut Panel, vectors: usize, zero: i32) {
    debug_assert!(zero == 128 || !WIDE);
    let tops = s.splat_i(i32::from_ne_bytes([0x80; 4]));
    let zeros = s.splat_i(zero * 0x0101_0101);
    for i in 0..vectors {
        // SAFETY: the caller's vectors.
        let codes = unsafe { &mut (*panel).codes[i] };
        let x = s.load_i(codes);
        // With the top bits set no byte borrows from the next one.
        let x = if WIDE { x } else { s.sub_i(s.or(x, tops), zeros) };
        s.store_i(s.xor(x, tops), codes);
    }
}

/// # Safety
/// The processor has tiles, and the shapes are within their limits.
#[inline(always)]
pub(super) unsafe fn shape(shapes: &Shapes) {
    // SAFETY: 64 bytes are read; the caller's promise.
    unsafe { asm!("ldtilecfg [{}]", in(reg) shapes, options(nostack, readonly)) };
}

/// Empties the tiles, so that the system need not save them.
///
/// # Safety
/// The processor has tiles, and nothing in them is wanted any more.
#[inline(always)]
pub(super) unsafe fn release() {
    // SAFETY: the caller's promise.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// The sums of some groups, in turns.
#[repr(align(64))]
struct Sums([[[i32; ROWS]; ROWS]; PLACES]);

/// The operands of one tile of activations and one panel.
struct Tile<'a> {
    panel: &'a Panel,
    m: usize,
    q: *const [i8; 4],
    scales: *const f32,
    offsets: *const i32,
    sums: &'a mut Sums,
}

impl Tile<'_> {
    /// What the rows' accumulators begin with.
    ///
    /// # Safety
    /// Unless `first`, `acc` has been written, every second for a row.
    #[inline(always)]
    unsafe fn begin<S: Simd>(&self, s: S, acc: *const [f32; ROWS], first: bool) -> [S::F; ROWS] {
        let mut rows = [s.splat(0.0); ROWS];
        if !first {
            for r in 0..ROWS {
                if r < self.m {
                    // SAFETY: the caller's accumulators.
                    rows[r] = s.load(unsafe { &*acc.add(2 * r) });
                }
            }
        }
        rows
    }

    /// Puts the sums of group `g` to their place. Sums have four tiles in turns, operands two.
    ///
    /// # Safety
    /// The tiles are shaped for the rows and the group, and the operands have it.
    #[inline(always)]
    unsafe fn multiply<const STEPS: usize, const MIN: bool>(&mut self, g: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match g % 4 {
                0 => self.multiply_on::<STEPS, MIN, 0, 4, 6>(g),
                1 => self.multiply_on::<STEPS, MIN, 1, 5, 7>(g),
                2 => self.multiply_on::<STEPS, MIN, 2, 4, 6>(g),
                _ => self.multiply_on::<STEPS, MIN, 3, 5, 7>(g),
            }
        }
    }

    /// # Safety
    /// As for `multiply`.
    #[inline(always)]
    unsafe fn multiply_on<const STEPS: usize, const MIN: bool, const SUM: u8, const A: u8, const B: u8>(
        &mut self,
        g: usize,
    ) {
        // A block of 32 columns has 8 words of each row.
        let a = self.q.wrapping_add(g * STEPS / 8 * 8 * self.m + g * STEPS % 8);
        let b = &raw const self.panel.codes[g * STEPS];
        let sums = &raw mut self.sums.0[g % PLACES];
        // SAFETY: the shapes and operands that the caller promises; the compiler uses no tiles of its own.
        unsafe {
            asm!(
                "tileloadd tmm{b}, [{from_b} + {bytes_b}]",
                "tileloadd tmm{a}, [{from_a} + {bytes_a}]",
                "tilezero tmm{sum}",
                b = const B,
                a = const A,
                sum = const SUM,
                from_a = in(reg) a,
                bytes_a = in(reg) 32usize,
                from_b = in(reg) b,
                bytes_b = in(reg) 64usize,
                options(nostack, readonly),
            );
            if MIN {
                asm!("tdpbsud tmm{sum}, tmm{a}, tmm{b}", b = const B, a = const A, sum = const SUM, options(nostack));
            } else {
                asm!("tdpbssd tmm{sum}, tmm{a}, tmm{b}", b = const B, a = const A, sum = const SUM, options(nostack));
            }
            asm!(
                "tilestored [{to} + {bytes}], tmm{sum}",
                sum = const SUM,
                to = in(reg) sums,
                bytes = in(reg) 64usize,
                options(nostack),
            );
        }
    }

    /// Adds group `g` to the accumulators.
    ///
    /// # Safety
    /// Its sums have been stored, and the scales and offsets go on for 16 rows.
    #[inline(always)]
    unsafe fn scale<S: Simd, const STEPS: usize, const MIN: bool>(
        &self,
        s: S,
        g: usize,
        rows: &mut [S::F; ROWS],
    ) {
        let scale = s.load(&self.panel.scales[g]);
        let x = self.scales.wrapping_add(g * STEPS / 8 * self.m);
        let sums = (&raw const self.sums.0[g % PLACES]).cast::<[u8; 64]>();
        for r in 0..ROWS {
            // SAFETY: 16 scales, and 16 lines of sums.
            let (x, sums) = unsafe { (*x.add(r), &*sums.add(r)) };
            rows[r] = s.fma(s.to_f(s.load_i(sums)), s.mul(scale, s.splat(x)), rows[r]);
        }
        if MIN {
            let min = s.load(&self.panel.mins[g]);
            let offsets = self.offsets.wrapping_add(g * self.m);
            for r in 0..ROWS {
                // SAFETY: 16 offsets.
                let offset = f32::from_bits(unsafe { *offsets.add(r) } as u32);
                rows[r] = s.fma(min, s.splat(offset), rows[r]);
            }
        }
    }
}
