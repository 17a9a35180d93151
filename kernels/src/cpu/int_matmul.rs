//! Products with integer formats: panels are unpacked once and meet all activation rows.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::Isa;
use super::activations::{Activations, Offset};
use super::int_direct::{Direct, Walk};
use super::int_sum::is_wide;
use super::int_tile::{Lines, Outputs, Sweep};
use super::lanes::Rows;
use super::output::Output;
use super::panel::{COLUMNS, Fill, Panel, PanelBlock, ROWS};
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
    fill: unsafe fn(Isa, Rows, usize, *mut Panel),
    direct: unsafe fn(Isa, &Strip<'_>, Rows, Walk, *mut [f32; ROWS]),
    /// Of formats that can be repacked.
    woven: Option<WovenKernel>,
    block_len: usize,
    block_bytes: usize,
    sweep: unsafe fn(Isa, &Strip<'_>, Chunk<'_>),
}

/// The same from [`Woven`] blocks.
struct WovenKernel {
    /// See [`Weave::HALVES`].
    halves: &'static [usize],
    fill: unsafe fn(Isa, Woven, usize, *mut Panel),
    direct: unsafe fn(Isa, &Strip<'_>, Woven, Walk, *mut [f32; ROWS]),
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

/// # Safety
/// Each row has `blocks` blocks of B, at most [`COLUMNS`] columns.
unsafe fn fill<B: PanelBlock, R: Source>(isa: Isa, from: R, blocks: usize, panel: *mut Panel) {
    isa.run(Fill::<B, R> { from, blocks, panel, block: PhantomData });
}

/// # Safety
/// Each row of each panel has `x.columns / B::LEN` blocks of B; accumulators for all rows of the strip's
/// tiles, which are no more than [`Direct`] takes.
unsafe fn direct<B: PanelBlock, R: Source, const MIN: bool, const MOST: u8>(
    isa: Isa,
    strip: &Strip<'_>,
    from: R,
    walk: Walk,
    acc: *mut [f32; ROWS],
) {
    let (x, offsets, tiles) = (strip.x, strip.offsets, strip.tiles.clone());
    macro_rules! rows {
        ($m:literal) => {
            isa.run(Direct::<B, R, $m, MIN, MOST> { from, walk, x, offsets, tiles, acc, block: PhantomData })
        };
    }
    match strip.x_rows() {
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

/// Some columns of a strip.
struct Chunk<'a> {
    panels: *const Panel,
    column: usize,
    columns: usize,
    acc: *mut [f32; ROWS],
    ahead: Lines,
    outputs: Option<Outputs<'a>>,
}

/// # Safety
/// The level's number of panels, filled with the chunk's columns; accumulators for all rows of the strip. If there are
/// outputs, they are the strip's.
unsafe fn sweep<const STEPS: usize, const MIN: bool, const MOST: u8>(
    isa: Isa,
    strip: &Strip<'_>,
    chunk: Chunk<'_>,
) {
    let (x, offsets, tiles) = (strip.x, strip.offsets, strip.tiles.clone());
    let Chunk { panels, column, columns, acc, ahead, outputs } = chunk;
    isa.run(Sweep::<STEPS, MIN, MOST> { panels, column, columns, x, offsets, tiles, acc, ahead, outputs });
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

/// Some weight rows times some tiles of activations.
pub(crate) struct Strip<'a> {
    /// The weights.
    pub weight: QMatrix<'a>,
    /// The same repacked, if they were.
    pub repacked: Option<&'a Repacked>,
    /// First of the weight rows, and one past the last: at most [`Strip::most_rows`].
    pub rows: std::ops::Range<usize>,
    /// The right-hand side.
    pub x: &'a Activations<'a>,
    /// For the weight's format.
    pub offsets: &'a [i32],
    /// Which tiles; at most [`ROW_BLOCK`] rows.
    pub tiles: std::ops::Range<usize>,
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

    /// Activation rows of its tiles.
    fn x_rows(&self) -> usize {
        self.x.tiles.start(self.tiles.end) - self.x.tiles.start(self.tiles.start)
    }

    /// Computes and writes `out[row · weight.rows() + n]`.
    ///
    /// # Safety
    /// `out` holds all rows of `x`, and no one else uses the outputs of these rows and tiles.
    pub unsafe fn run(&self, isa: Isa, kernel: &IntKernel, out: Output<'_>) {
        assert!(self.x.columns == self.weight.cols());
        let outputs = Outputs { out, rows: self.rows.clone() };
        // SAFETY: the caller's promise.
        unsafe {
            if is_direct(isa, kernel, self.weight, self.x) {
                let at_once = isa.direct_tiles(kernel.group);
                let mut first = self.tiles.start;
                while first < self.tiles.end {
                    let last = (first + at_once).min(self.tiles.end);
                    // Two tiles of what would fit one are none that the kernel knows.
                    let fit = self.x.tiles.start(last) - self.x.tiles.start(first) <= isa.direct_rows();
                    let tiles = first..if fit { first + 1 } else { last };
                    first = tiles.end;
                    Strip { rows: self.rows.clone(), tiles, ..*self }.directly(isa, kernel, &outputs);
                }
            } else {
                self.through_panels(isa, kernel, outputs);
            }
        }
    }

    /// Every block is unpacked into registers and multiplied there.
    ///
    /// # Safety
    /// The tiles are as many as are multiplied at once; no one else uses the outputs.
    unsafe fn directly(&self, isa: Isa, kernel: &IntKernel, outputs: &Outputs<'_>) {
        let first = self.x.tiles.start(self.tiles.start);
        let (n_rows, panels) = (self.x_rows(), self.rows.len().div_ceil(ROWS));
        assert!(n_rows * panels <= DIRECT_ACCUMULATORS);
        let mut acc = [const { MaybeUninit::<[f32; ROWS]>::uninit() }; DIRECT_ACCUMULATORS];
        let acc: *mut [f32; ROWS] = acc.as_mut_ptr().cast();
        // SAFETY: accumulators for all rows and panels, of which each is written; the caller vouches for the outputs.
        unsafe {
            self.accumulate(isa, kernel, acc);
            for row in 0..n_rows {
                outputs.put(first + row, acc.add(row * panels));
            }
        }
    }

    /// The products of all panels, as `acc[row][panel]`.
    ///
    /// # Safety
    /// The same; `acc` has room.
    unsafe fn accumulate(&self, isa: Isa, kernel: &IntKernel, acc: *mut [f32; ROWS]) {
        let stride = self.weight.row_bytes();
        let acc_stride = self.rows.len().div_ceil(ROWS);
        if let (Some(repacked), Some(woven)) = (self.repacked, &kernel.woven) {
            let end = repacked.panel(self.weight.rows().div_ceil(ROWS)).first();
            let walk = Walk { panels: acc_stride, bytes: stride, acc_stride, end };
            // SAFETY: the caller vouches for `acc`, `Repacked` for the blocks.
            unsafe { (woven.direct)(isa, self, repacked.panel(self.rows.start / ROWS), walk, acc) };
            return;
        }
        let panels = self.rows.len() / ROWS;
        let mut done = 0;
        while done < panels {
            let first = self.weight.row(self.rows.start + done * ROWS).as_ptr();
            let (these, apart) = spread(isa, panels - done, self.weight);
            // From a panel on to the next: its sixteen rows, or one that all rows move by.
            let bytes = if apart == 1 { stride * ROWS } else { stride };
            let walk = Walk { panels: these, bytes, acc_stride, end: self.weight.bytes().as_ptr_range().end };
            // SAFETY: these are whole panels of the weight's rows; the caller vouches for `acc`.
            unsafe {
                (kernel.direct)(isa, self, Rows::new(first, stride * apart), walk, acc.add(done));
                if apart > 1 {
                    for row in 0..self.x_rows() {
                        gather(std::slice::from_raw_parts_mut(acc.add(row * acc_stride + done), these));
                    }
                }
            }
            done += these;
        }
        if panels < acc_stride {
            // Missing rows repeat the last one; their results are not written.
            let (first, last) = (self.rows.start + panels * ROWS, self.rows.end - 1);
            let copies: Vec<u8> =
                (first..first + ROWS).flat_map(|r| self.weight.row(r.min(last))).copied().collect();
            let rows = Rows::new(copies.as_ptr(), stride);
            let walk = Walk { panels: 1, bytes: 0, acc_stride, end: copies.as_ptr_range().end };
            // SAFETY: 16 rows of the weight's length; the caller vouches for `acc`.
            unsafe { (kernel.direct)(isa, self, rows, walk, acc.add(panels)) };
        }
    }

    /// Blocks are unpacked into panels, which all tiles pass.
    ///
    /// # Safety
    /// No one else uses the outputs.
    unsafe fn through_panels(&self, isa: Isa, kernel: &IntKernel, outputs: Outputs<'_>) {
        SCRATCH.with_borrow_mut(|scratch| {
            let scratch = scratch.get_or_insert_with(Scratch::new);
            // SAFETY: the caller's promise.
            unsafe { self.through_panels_in(scratch, isa, kernel, outputs) }
        });
    }

    /// # Safety
    /// No one else uses the outputs.
    unsafe fn through_panels_in(
        &self,
        scratch: &mut Scratch,
        isa: Isa,
        kernel: &IntKernel,
        outputs: Outputs<'_>,
    ) {
        let (panels, stride) = (isa.tile_panels(), self.weight.row_bytes());
        let n_rows = self.x_rows();
        assert!(n_rows <= ROW_BLOCK && self.rows.len() <= panels * ROWS);
        let Scratch { acc, panels: storage } = scratch;
        let acc: *mut [f32; ROWS] = acc.as_mut_ptr().cast();
        let mut copies = Vec::new();
        for column in (0..self.x.columns).step_by(COLUMNS) {
            let columns = COLUMNS.min(self.x.columns - column);
            let blocks = columns / kernel.block_len;
            let (skip, bytes) = (column / kernel.block_len * kernel.block_bytes, blocks * kernel.block_bytes);
            for (p, panel) in storage.iter_mut().enumerate().take(panels) {
                let first = self.rows.start + p * ROWS;
                if let (Some(repacked), Some(woven)) = (self.repacked, &kernel.woven) {
                    let mut from = repacked.panel(first.min(self.rows.end - 1) / ROWS);
                    from.advance(skip);
                    // SAFETY: `Repacked` has so many blocks from here on.
                    unsafe { (woven.fill)(isa, from, blocks, panel.as_mut_ptr()) };
                    continue;
                }
                let rows = if first + ROWS <= self.rows.end {
                    Rows::new(self.weight.row(first)[skip..].as_ptr(), stride)
                } else {
                    // Missing rows repeat the last one; their results are not written.
                    copies.resize(CHUNK_BYTES * ROWS, 0);
                    for (i, copy) in copies.chunks_exact_mut(CHUNK_BYTES).enumerate() {
                        let row = self.weight.row((first + i).min(self.rows.end - 1));
                        copy[..bytes].copy_from_slice(&row[skip..][..bytes]);
                    }
                    Rows::new(copies.as_ptr(), CHUNK_BYTES)
                };
                // SAFETY: the rows have so many blocks from here on.
                unsafe { (kernel.fill)(isa, rows, blocks, panel.as_mut_ptr()) };
            }
            // What is unpacked next: the columns that follow, or the first ones of another strip.
            let (row, skip) = match self.next {
                _ if column + columns < self.x.columns => (self.rows.start, skip + bytes),
                Some(next) => (next, 0),
                None => (self.rows.start + panels * ROWS, 0),
            };
            let ahead = match self.repacked {
                None => {
                    let from = self.weight.bytes().as_ptr().wrapping_add(row * stride + skip);
                    Lines::new(from, stride, panels * ROWS, bytes)
                }
                Some(repacked) => {
                    let from = repacked.panel(row / ROWS).first().wrapping_add(ROWS * skip);
                    Lines::new(from, ROWS * stride, panels, ROWS * bytes)
                }
            };
            let outputs = (column + columns == self.x.columns).then(|| outputs.clone());
            let panels = storage.as_ptr().cast();
            // SAFETY: the panels have just been filled; accumulators are written at column 0
            // before they are read; the caller vouches for the outputs.
            unsafe { (kernel.sweep)(isa, self, Chunk { panels, column, columns, acc, ahead, outputs }) };
        }
    }
}
