//! Products with integer formats: panels are unpacked once and meet all activation rows.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::Isa;
use super::activations::{Activations, Offset};
use super::int_direct::{Direct, Walk};
use super::int_sum::is_wide;
use super::int_tile::{Lines, Outputs, Part, Sweep};
use super::lanes::Rows;
use super::output::Output;
use super::panel::{BESIDE, COLUMNS, Fill, Panel, PanelBlock, ROWS};
use super::repack::{Repacked, Weave};
use super::source::{Source, Woven};
use crate::quant::{
    IQ4_NL, IQ4_XS, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, QMatrix, QuantType,
};

/// Activation rows that one task takes at most: their accumulators (32 KiB for two panels)
/// stay close, and unpacking is repeated only once in so many rows.
pub(crate) const ROW_BLOCK: usize = 256;
/// The most panels of any level's tile.
const MAX_PANELS: usize = 2;
/// Sixteen sums each: what a strip has room for.
const ACCUMULATORS: usize = ROW_BLOCK * MAX_PANELS;
/// The same where a tile is all there is: 8 KiB, and a call for many panels.
const DIRECT_ACCUMULATORS: usize = 128;
/// Panels of fewer bytes follow each other so closely that the processor fetches them by itself.
const NEAR: usize = 4096;
/// Of lines so many bytes apart, a first-level cache of 32 KiB and eight ways keeps sixteen.
const SETS: usize = 2048;
/// The most bytes of [`COLUMNS`] weights: those of Q8_0.
const CHUNK_BYTES: usize = COLUMNS / 32 * size_of::<Q8_0>();

/// The functions of one format.
pub(crate) struct IntKernel {
    /// Weights that share a scale.
    pub group: usize,
    offset: Offset,
    most: u8,
    fill: unsafe fn(Isa, Rows, Filled),
    direct: unsafe fn(Isa, Ways<'_, Rows>, Range<usize>, Sums),
    /// Of formats that can be repacked.
    woven: Option<WovenKernel>,
    block_len: usize,
    block_bytes: usize,
    sweep: unsafe fn(Isa, Chunk<'_>),
}

/// The same from [`Woven`] blocks.
struct WovenKernel {
    /// See [`Weave::HALVES`].
    halves: &'static [usize],
    fill: unsafe fn(Isa, Woven, Filled),
    direct: unsafe fn(Isa, Ways<'_, Woven>, Range<usize>, Sums),
}

impl IntKernel {
    const fn new<B: PanelBlock, const STEPS: usize, const MIN: bool, const MOST: u8>() -> IntKernel {
        assert!(
            B::GROUP == 4 * STEPS
                && B::HAS_MIN == MIN
                && B::MOST == MOST
                && size_of::<B>() * (COLUMNS / B::LEN) <= CHUNK_BYTES
        );
        assert!(COLUMNS.is_multiple_of(B::LEN));
        IntKernel {
            group: B::GROUP,
            offset: if MIN { Offset::Min } else { Offset::Zero(B::ZERO) },
            most: MOST,
            fill: fill::<B, Rows>,
            direct: direct::<B, Rows, MIN, MOST>,
            woven: None,
            block_len: B::LEN,
            block_bytes: size_of::<B>(),
            sweep: sweep::<STEPS, MIN, MOST>,
        }
    }

    /// The same for a format that can be repacked.
    const fn weaving<B: Weave, const STEPS: usize, const MIN: bool, const MOST: u8>() -> IntKernel {
        let woven =
            WovenKernel { halves: B::HALVES, fill: fill::<B, Woven>, direct: direct::<B, Woven, MIN, MOST> };
        IntKernel { woven: Some(woven), ..IntKernel::new::<B, STEPS, MIN, MOST>() }
    }

    /// [`Weave::HALVES`] of a format that can be repacked.
    pub fn halves(&self) -> Option<&'static [usize]> {
        self.woven.as_ref().map(|woven| woven.halves)
    }

    /// The kernel of a format; `None` for float formats and those without code here.
    pub fn of(ty: QuantType) -> Option<&'static IntKernel> {
        const KERNELS: &[(QuantType, IntKernel)] = &[
            (QuantType::Q8_0, IntKernel::weaving::<Q8_0, 8, false, 255>()),
            (QuantType::Q4_0, IntKernel::weaving::<Q4_0, 8, false, 15>()),
            (QuantType::Q4_1, IntKernel::new::<Q4_1, 8, true, 15>()),
            (QuantType::Q5_0, IntKernel::new::<Q5_0, 8, false, 31>()),
            (QuantType::Q5_1, IntKernel::new::<Q5_1, 8, true, 31>()),
            (QuantType::Q2_K, IntKernel::new::<Q2_K, 4, true, 3>()),
            (QuantType::Q3_K, IntKernel::new::<Q3_K, 4, false, 7>()),
            (QuantType::Q4_K, IntKernel::weaving::<Q4_K, 8, true, 15>()),
            (QuantType::Q5_K, IntKernel::weaving::<Q5_K, 8, true, 31>()),
            (QuantType::Q6_K, IntKernel::weaving::<Q6_K, 4, false, 63>()),
            (QuantType::IQ4_NL, IntKernel::new::<IQ4_NL, 8, false, 255>()),
            (QuantType::IQ4_XS, IntKernel::new::<IQ4_XS, 8, false, 255>()),
        ];
        KERNELS.iter().find(|(of, _)| *of == ty).map(|(_, kernel)| kernel)
    }

    /// What to ask [`Activations::offsets`] for.
    pub fn offset(&self, isa: Isa) -> Offset {
        // Where the dot product takes signed codes, nothing is left to correct.
        if is_wide(self.most) && isa.has_pairs() { Offset::Zero(0) } else { self.offset }
    }
}

/// What becomes of some blocks.
#[derive(Clone, Copy)]
struct Filled {
    blocks: usize,
    /// The first column in the panel.
    column: usize,
    panel: *mut Panel,
}

/// # Safety
/// Each row has so many blocks of B.
unsafe fn fill<B: PanelBlock, R: Source>(isa: Isa, from: R, Filled { blocks, column, panel }: Filled) {
    isa.run(Fill::<B, R> { from, blocks, column, panel, block: PhantomData });
}

/// Accumulators of a strip.
#[derive(Clone, Copy)]
struct Sums {
    acc: *mut [f32; ROWS],
    /// From one activation row's to the next one's.
    stride: usize,
    /// Whether what is there goes on.
    onto: bool,
}

/// Some panels of a weight, and of another that the same sums go on with.
#[derive(Clone, Copy)]
struct Ways<'a, R> {
    panels: usize,
    walk: Walk<'a, R>,
    then: Option<Walk<'a, R>>,
}

/// # Safety
/// Each row of each panel has `x.columns / B::LEN` blocks of B; accumulators for all rows of the
/// tiles, which are no more than [`Direct`] takes.
unsafe fn direct<B: PanelBlock, R: Source, const MIN: bool, const MOST: u8>(
    isa: Isa,
    Ways { panels, walk, then }: Ways<'_, R>,
    tiles: Range<usize>,
    Sums { acc, stride: acc_stride, onto }: Sums,
) {
    let rows = rows_of(walk.x, &tiles);
    macro_rules! rows {
        ($m:literal) => {
            isa.run(Direct::<B, R, $m, MIN, MOST> {
                walk,
                then,
                panels,
                tiles,
                acc,
                acc_stride,
                onto,
                block: PhantomData,
            })
        };
    }
    match rows {
        1 => rows!(1),
        2 => rows!(2),
        3 => rows!(3),
        4 => rows!(4),
        5 => rows!(5),
        6 => rows!(6),
        7 => rows!(7),
        8 => rows!(8),
        rows => unreachable!("{rows} rows"),
    }
}

/// Activation rows of some tiles.
fn rows_of(x: &Activations<'_>, tiles: &Range<usize>) -> usize {
    x.tiles.start(tiles.end) - x.tiles.start(tiles.start)
}

/// Some columns of a strip, or of two weights.
struct Chunk<'a> {
    panels: *const Panel,
    part: Part<'a>,
    then: Option<Part<'a>>,
    tiles: Range<usize>,
    sums: Sums,
    ahead: Lines,
    outputs: Option<Outputs<'a>>,
}

/// # Safety
/// The level's number of panels, filled with the chunk's columns; accumulators for all rows of the tiles. If there are
/// outputs, they are the strip's.
unsafe fn sweep<const STEPS: usize, const MIN: bool, const MOST: u8>(isa: Isa, chunk: Chunk<'_>) {
    let Chunk { panels, part, then, tiles, sums: Sums { acc, onto, .. }, ahead, outputs } = chunk;
    isa.run(Sweep::<STEPS, MIN, MOST> { panels, part, then, tiles, acc, onto, ahead, outputs });
}

/// Whether sixteen rows lie close together.
fn is_near(weight: QMatrix<'_>) -> bool {
    weight.row_bytes() * ROWS < NEAR
}

/// How many of some panels to take at once, and how many rows the sixteen rows of a panel are apart.
///
/// Sixteen rows are sixteen places to read from. Neighbours, two or three in a page of memory, are read at half of the speed that memory has, since
/// the processor does not see that each goes on. If panel `p` of `n` has rows `p`, `n + p`, `2 n + p` …, each place is a page of its own
/// and goes on for `n` rows. A level may have neighbours all the same ([`Lanes::NEIGHBOURS`](super::lanes::Lanes::NEIGHBOURS)).
fn spread(isa: Isa, panels: usize, weight: QMatrix<'_>) -> (usize, usize) {
    if isa.neighbours() || is_near(weight) {
        return (panels, 1);
    }
    // Not where all rows would meet in one or two sets of a cache.
    let meet = (panels * weight.row_bytes()).is_multiple_of(SETS);
    let these = if meet { (panels - 1).max(1) } else { panels };
    (these, these)
}

/// Brings outputs into the order of weight rows: lane `l` of panel `p` of `n` is that of row `l · n + p`.
fn gather(acc: &mut [[f32; ROWS]]) {
    let n = acc.len();
    let mut lanes = [const { MaybeUninit::<f32>::uninit() }; DIRECT_ACCUMULATORS * ROWS];
    for (p, panel) in acc.iter().enumerate() {
        for (lane, value) in lanes[p..].iter_mut().step_by(n).zip(panel) {
            lane.write(*value);
        }
    }
    for (to, from) in acc.as_flattened_mut().iter_mut().zip(&lanes) {
        // SAFETY: `n · ROWS` of them were written.
        *to = unsafe { from.assume_init() };
    }
}

/// Whether blocks are multiplied as they are unpacked, for each tile of activations anew.
fn is_direct(isa: Isa, kernel: &IntKernel, weight: QMatrix<'_>, x: &Activations<'_>) -> bool {
    let (far, near) = (isa.direct_rows() * isa.direct_tiles(kernel.group), isa.direct_rows_near());
    x.tiles.rows() <= if is_near(weight) { near } else { far }
}

/// What a strip needs besides its operands. On the stack these 56 KiB would be touched page by page with every strip, which takes as long as
/// the rest of it that is not in a kernel.
#[repr(C, align(64))]
struct Scratch {
    acc: [MaybeUninit<[f32; ROWS]>; ACCUMULATORS],
    panels: [MaybeUninit<Panel>; MAX_PANELS],
}

impl Scratch {
    fn new() -> Box<Scratch> {
        // SAFETY: nothing in it has to be initialized.
        unsafe { Box::<Scratch>::new_uninit().assume_init() }
    }
}

thread_local! {
    static SCRATCH: RefCell<Option<Box<Scratch>>> = const { RefCell::new(None) };
}

/// A weight and what it is multiplied with.
#[derive(Clone, Copy)]
pub(crate) struct Factors<'a> {
    /// The format's functions.
    pub kernel: &'static IntKernel,
    /// The weights.
    pub weight: QMatrix<'a>,
    /// The same repacked, if they were.
    pub repacked: Option<&'a Repacked>,
    /// The right-hand side.
    pub x: &'a Activations<'a>,
    /// For the weight's format.
    pub offsets: &'a [i32],
}

impl<'a> Factors<'a> {
    /// A way through some rows, which are so many rows apart in a panel.
    fn walk(&self, row: usize, apart: usize) -> Walk<'a, Rows> {
        let Factors { weight, x, offsets, .. } = *self;
        let stride = weight.row_bytes();
        // From a panel on to the next: its sixteen rows, or one that all rows move by.
        let bytes = if apart == 1 { stride * ROWS } else { stride };
        let from = Rows::new(weight.row(row).as_ptr(), stride * apart);
        Walk { from, bytes, end: weight.bytes().as_ptr_range().end, x, offsets }
    }

    /// Sixteen rows in a copy, the last of them again for those that are missing.
    fn copied(&self, first: usize, copies: &mut Vec<u8>) -> Walk<'a, Rows> {
        let last = self.weight.rows() - 1;
        copies.extend((first..first + ROWS).flat_map(|row| self.weight.row(row.min(last))));
        let from = Rows::new(copies.as_ptr(), self.weight.row_bytes());
        Walk { from, bytes: 0, end: copies.as_ptr_range().end, x: self.x, offsets: self.offsets }
    }

    /// Some columns.
    fn part(&self, column: usize, columns: usize) -> Part<'a> {
        Part { column, columns, x: self.x, offsets: self.offsets }
    }

    /// Whether sums of these can go on with `then`: as many weight rows, and as many activation rows in tiles that both formats take.
    pub fn go_on_with(&self, isa: Isa, then: &Factors<'_>) -> bool {
        let at_once = |factors: &Factors<'_>| isa.direct_tiles(factors.kernel.group);
        self.weight.rows() == then.weight.rows()
            && self.x.tiles == then.x.tiles
            && at_once(self) <= at_once(then)
    }
}

/// Some weight rows times some tiles of activations.
pub(crate) struct Strip<'a> {
    /// What is multiplied.
    pub factors: Factors<'a>,
    /// What the sums go on with ([`Factors::go_on_with`]).
    pub then: Option<Factors<'a>>,
    /// First of the weight rows, and one past the last: at most [`Strip::most_rows`].
    pub rows: Range<usize>,
    /// Which tiles; at most [`ROW_BLOCK`] rows.
    pub tiles: Range<usize>,
    /// The weight row that this thread goes on with, as far as can be told, so that it is fetched.
    pub next: Option<usize>,
}

impl Strip<'_> {
    /// The most weight rows of a strip with these activations: many where no panel is stored, since short rows' ends would cost as much as the
    /// rows, and long ones are read faster ([`spread`]).
    pub fn most_rows(isa: Isa, kernel: &IntKernel, weight: QMatrix<'_>, x: &Activations<'_>) -> usize {
        if is_direct(isa, kernel, weight, x) {
            let at_once = isa.rows_of_tile(x.tiles.rows()) * isa.direct_tiles(kernel.group);
            DIRECT_ACCUMULATORS / x.tiles.rows().min(at_once).max(1) * ROWS
        } else {
            isa.tile_panels() * ROWS
        }
    }

    /// Computes and writes `out[row · weight.rows() + n]`.
    ///
    /// # Safety
    /// `out` holds all rows of `x`, and no one else uses the outputs of these rows and tiles.
    pub unsafe fn run(&self, isa: Isa, out: Output<'_>) {
        let Factors { kernel, weight, x, .. } = self.factors;
        for factors in [Some(self.factors), self.then].into_iter().flatten() {
            assert!(factors.x.columns == factors.weight.cols() && self.rows.end <= factors.weight.rows());
        }
        assert!(self.then.is_none_or(|then| self.factors.go_on_with(isa, &then)));
        let outputs = Outputs { out, rows: self.rows.clone() };
        // SAFETY: the caller's promise.
        unsafe {
            if is_direct(isa, kernel, weight, x) {
                let at_once = isa.direct_tiles(kernel.group);
                let mut first = self.tiles.start;
                while first < self.tiles.end {
                    let last = (first + at_once).min(self.tiles.end);
                    // Two tiles of what would fit one are none that the kernel knows.
                    let fit = x.tiles.start(last) - x.tiles.start(first) <= isa.direct_rows();
                    let tiles = first..if fit { first + 1 } else { last };
                    first = tiles.end;
                    self.directly(isa, tiles, &outputs);
                }
            } else {
                self.through_panels(isa, outputs);
            }
        }
    }

    /// Every block is unpacked into registers and multiplied there.
    ///
    /// # Safety
    /// The tiles are as many as are multiplied at once; no one else uses the outputs.
    unsafe fn directly(&self, isa: Isa, tiles: Range<usize>, outputs: &Outputs<'_>) {
        let first = self.factors.x.tiles.start(tiles.start);
        let (n_rows, panels) = (rows_of(self.factors.x, &tiles), self.rows.len().div_ceil(ROWS));
        assert!(n_rows * panels <= DIRECT_ACCUMULATORS);
        let mut acc = [const { MaybeUninit::<[f32; ROWS]>::uninit() }; DIRECT_ACCUMULATORS];
        let acc: *mut [f32; ROWS] = acc.as_mut_ptr().cast();
        let sums = Sums { acc, stride: panels, onto: outputs.out.is_onto() };
        // At once, if both are read alike.
        let alike = self.factors.repacked.is_none();
        let then = self.then.as_ref().filter(|then| alike && std::ptr::eq(self.factors.kernel, then.kernel));
        // SAFETY: accumulators for all rows and panels, of which each is written; the caller vouches for the outputs.
        unsafe {
            if sums.onto {
                for row in 0..n_rows {
                    outputs.get(first + row, panels, acc.add(row * panels));
                }
            }
            self.accumulate(isa, (&self.factors, then), &tiles, sums);
            if let Some(apart) = self.then.as_ref().filter(|_| then.is_none()) {
                self.accumulate(isa, (apart, None), &tiles, Sums { onto: true, ..sums });
            }
            for row in 0..n_rows {
                outputs.put(first + row, acc.add(row * panels));
            }
        }
    }

    /// The products of all panels, as `acc[row][panel]`, and what they go on with.
    ///
    /// # Safety
    /// The same; `acc` has room.
    unsafe fn accumulate(
        &self,
        isa: Isa,
        (factors, then): (&Factors<'_>, Option<&Factors<'_>>),
        tiles: &Range<usize>,
        sums: Sums,
    ) {
        let Factors { kernel, weight, x, offsets, .. } = *factors;
        if let (Some(repacked), Some(woven)) = (factors.repacked, &kernel.woven) {
            let from = repacked.panel(self.rows.start / ROWS);
            let end = repacked.panel(weight.rows().div_ceil(ROWS)).first();
            let walk = Walk { from, bytes: weight.row_bytes(), end, x, offsets };
            let ways = Ways { panels: self.rows.len().div_ceil(ROWS), walk, then: None };
            // SAFETY: the caller vouches for `acc`, `Repacked` for the blocks.
            unsafe { (woven.direct)(isa, ways, tiles.clone(), sums) };
            return;
        }
        // SAFETY: there are so many.
        let from = |panel| Sums { acc: unsafe { sums.acc.add(panel) }, ..sums };
        let panels = self.rows.len() / ROWS;
        let mut done = 0;
        while done < panels {
            let first = self.rows.start + done * ROWS;
            // What goes on is in the order of the outputs.
            let (these, apart) = if sums.onto { (panels, 1) } else { spread(isa, panels - done, weight) };
            let walk = factors.walk(first, apart);
            let ways = Ways { panels: these, walk, then: then.map(|then| then.walk(first, apart)) };
            // SAFETY: these are whole panels of the weights' rows; the caller vouches for `acc`.
            unsafe {
                (kernel.direct)(isa, ways, tiles.clone(), from(done));
                if apart > 1 {
                    for row in 0..rows_of(x, tiles) {
                        gather(std::slice::from_raw_parts_mut(from(done + row * sums.stride).acc, these));
                    }
                }
            }
            done += these;
        }
        if panels * ROWS < self.rows.len() {
            // Missing rows repeat the last one; their results are not written.
            let (first, mut copies) = (self.rows.start + panels * ROWS, [Vec::new(), Vec::new()]);
            let [own, others] = &mut copies;
            let walk = factors.copied(first, own);
            let ways = Ways { panels: 1, walk, then: then.map(|then| then.copied(first, others)) };
            // SAFETY: 16 rows of the weights' length; the caller vouches for `acc`.
            unsafe { (kernel.direct)(isa, ways, tiles.clone(), from(panels)) };
        }
    }

    /// Blocks are unpacked into panels, which all tiles pass.
    ///
    /// # Safety
    /// No one else uses the outputs.
    unsafe fn through_panels(&self, isa: Isa, outputs: Outputs<'_>) {
        SCRATCH.with_borrow_mut(|scratch| {
            let scratch = scratch.get_or_insert_with(Scratch::new);
            let first = self.factors.x.tiles.start(self.tiles.start);
            let n_rows = rows_of(self.factors.x, &self.tiles);
            let panels = isa.tile_panels();
            assert!(n_rows <= ROW_BLOCK && self.rows.len() <= panels * ROWS);
            let onto = outputs.out.is_onto();
            // SAFETY: accumulators for all rows; and the caller's promise.
            unsafe {
                if onto {
                    let acc: *mut [f32; ROWS] = scratch.acc.as_mut_ptr().cast();
                    for row in 0..n_rows {
                        outputs.get(first + row, panels, acc.add(row * panels));
                    }
                }
                let beside = self.then.as_ref().filter(|then| self.has_beside(then));
                let apart = self.then.as_ref().filter(|_| beside.is_none());
                self.sweep_columns(
                    scratch,
                    isa,
                    (&self.factors, beside),
                    onto,
                    apart.is_none().then_some(&outputs),
                );
                if let Some(then) = apart {
                    self.sweep_columns(scratch, isa, (then, None), true, Some(&outputs));
                }
            }
        });
    }

    /// Whether the columns of what the sums go on with fit behind the last ones in the same panels.
    fn has_beside(&self, then: &Factors<'_>) -> bool {
        std::ptr::eq(self.factors.kernel, then.kernel) && then.x.columns <= BESIDE
    }

    /// Unpacks some columns of all panels.
    ///
    /// # Safety
    /// The weight has these columns, and the panels room for them.
    unsafe fn fill_panels(
        &self,
        isa: Isa,
        storage: &mut [MaybeUninit<Panel>; MAX_PANELS],
        factors: &Factors<'_>,
        columns: Range<usize>,
        column: usize,
    ) {
        let Factors { kernel, weight, repacked, .. } = *factors;
        let (blocks, stride) = (columns.len() / kernel.block_len, weight.row_bytes());
        let (skip, bytes) =
            (columns.start / kernel.block_len * kernel.block_bytes, blocks * kernel.block_bytes);
        let mut copies = Vec::new();
        for (p, panel) in storage.iter_mut().enumerate().take(isa.tile_panels()) {
            let first = self.rows.start + p * ROWS;
            let filled = Filled { blocks, column, panel: panel.as_mut_ptr() };
            if let (Some(repacked), Some(woven)) = (repacked, &kernel.woven) {
                let mut from = repacked.panel(first.min(self.rows.end - 1) / ROWS);
                from.advance(skip);
                // SAFETY: `Repacked` has so many blocks from here on.
                unsafe { (woven.fill)(isa, from, filled) };
                continue;
            }
            let rows = if first + ROWS <= self.rows.end {
                Rows::new(weight.row(first)[skip..].as_ptr(), stride)
            } else {
                // Missing rows repeat the last one; their results are not written.
                copies.resize(CHUNK_BYTES * ROWS, 0);
                for (i, copy) in copies.chunks_exact_mut(CHUNK_BYTES).enumerate() {
                    let row = weight.row((first + i).min(self.rows.end - 1));
                    copy[..bytes].copy_from_slice(&row[skip..][..bytes]);
                }
                Rows::new(copies.as_ptr(), CHUNK_BYTES)
            };
            // SAFETY: the rows have so many blocks from here on.
            unsafe { (kernel.fill)(isa, rows, filled) };
        }
    }

    /// All columns of one product, and behind the last ones, in the same panels, those of another.
    ///
    /// # Safety
    /// No one else uses the outputs; if sums go on, they are there.
    unsafe fn sweep_columns(
        &self,
        scratch: &mut Scratch,
        isa: Isa,
        (factors, beside): (&Factors<'_>, Option<&Factors<'_>>),
        onto: bool,
        outputs: Option<&Outputs<'_>>,
    ) {
        let Factors { kernel, weight, repacked, x, .. } = *factors;
        let (panels, stride) = (isa.tile_panels(), weight.row_bytes());
        let Scratch { acc, panels: storage } = scratch;
        let acc: *mut [f32; ROWS] = acc.as_mut_ptr().cast();
        for column in (0..x.columns).step_by(COLUMNS) {
            let columns = COLUMNS.min(x.columns - column);
            let is_last = column + columns == x.columns;
            // SAFETY: these are some of its columns; and there is room for those that fit beside them.
            let then = unsafe {
                self.fill_panels(isa, storage, factors, column..column + columns, 0);
                beside.filter(|_| is_last).map(|then| {
                    self.fill_panels(isa, storage, then, 0..then.x.columns, columns);
                    then.part(0, then.x.columns)
                })
            };
            let skip = column / kernel.block_len * kernel.block_bytes;
            let bytes = columns / kernel.block_len * kernel.block_bytes;
            // What is unpacked next: the columns that follow, or the first ones of another strip.
            let (row, skip) = match self.next {
                _ if !is_last => (self.rows.start, skip + bytes),
                Some(next) => (next, 0),
                None => (self.rows.start + panels * ROWS, 0),
            };
            let ahead = match repacked {
                None => {
                    let from = weight.bytes().as_ptr().wrapping_add(row * stride + skip);
                    // Whole rows are one piece.
                    let (rows, bytes) =
                        if bytes == stride { (1, panels * ROWS * bytes) } else { (panels * ROWS, bytes) };
                    Lines::new(from, stride, rows, bytes)
                }
                Some(repacked) => {
                    let from = repacked.panel(row / ROWS).first().wrapping_add(ROWS * skip);
                    Lines::new(from, ROWS * stride, panels, ROWS * bytes)
                }
            };
            let chunk = Chunk {
                panels: storage.as_ptr().cast(),
                part: factors.part(column, columns),
                then,
                tiles: self.tiles.clone(),
                sums: Sums { acc, stride: panels, onto: onto || column > 0 },
                ahead,
                outputs: outputs.filter(|_| is_last).cloned(),
            };
            // SAFETY: the panels have just been filled; accumulators are written before they are read, and the caller vouches
            // for those that were there and for the outputs.
            unsafe { (kernel.sweep)(isa, chunk) };
        }
    }
}
