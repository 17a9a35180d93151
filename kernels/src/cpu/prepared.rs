//! Activations in the forms that weights want.

use std::borrow::Cow;
use std::ops::{Deref, Range};

use super::activations::{Activations, Offset, Tiles};
use super::aligned::Aligned;
#[cfg(target_arch = "x86_64")]
use super::amx::Amx;
#[cfg(target_arch = "x86_64")]
use super::amx_bf16::{self, Paired, TileStrip};
#[cfg(target_arch = "x86_64")]
use super::avx512_bf16::{Bf16, Bf16Strip, Rounded};
use super::float_matmul::{self, FloatStrip};
use super::int_matmul::{IntKernel, ROW_BLOCK, Strip};
use super::matmul::Input;
use super::output::Output;
use super::panel::ROWS;
use super::repack::Repacked;
use super::{Isa, Level, ThreadPool};
use crate::QuantType;
use crate::quant::{FormatError, QMatrix};

/// An input in all the forms that some weights want.
pub(super) struct Prepared<'x> {
    rows: usize,
    quantized: Option<Activations<'x>>,
    floats: Option<Floats<'x>>,
    #[cfg(target_arch = "x86_64")]
    rounded: Option<Rounded>,
    #[cfg(target_arch = "x86_64")]
    paired: Option<Paired>,
    /// Of `quantized`, for the formats that occur.
    offsets: Vec<(Key, Cow<'x, [i32]>)>,
}

/// Columns of a group, and what its offsets are.
type Key = (usize, Offset);

impl<'x> Prepared<'x> {
    /// How many lines.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// For products with weights of these types.
    pub fn new(
        isa: Isa,
        pool: &ThreadPool,
        input: Input<'x>,
        types: impl Iterator<Item = QuantType> + Clone,
    ) -> Self {
        Prepared::with_tiles(isa, pool, input, types, isa.rows_of_tile(input.rows))
    }

    /// The same in integer tiles of at most `largest` rows. Lines that will be selected, most of them alone, want tiles of one, which then
    /// copies nothing.
    pub fn with_tiles(
        isa: Isa,
        pool: &ThreadPool,
        input: Input<'x>,
        types: impl Iterator<Item = QuantType> + Clone,
        largest: usize,
    ) -> Self {
        let Input { x, rows, columns } = input;
        let x = &x[..rows * columns];
        // Without columns there is nothing to prepare, and no product asks for it.
        let types = types.filter(|_| columns > 0);
        let kernels = || types.clone().filter_map(IntKernel::of);
        let mut floating = types.clone().filter(|ty| is_float(isa, *ty));
        let quantized =
            kernels().next().is_some().then(|| Activations::new(isa, pool, x, columns, rows, largest));
        let floats = floating.next().is_some().then(|| Floats::new(x, columns, rows));
        #[cfg(target_arch = "x86_64")]
        let rounding = types.clone().any(|ty| is_rounded(isa, ty));
        #[cfg(target_arch = "x86_64")]
        let rounded = Bf16::of(isa).filter(|_| rounding).map(|proof| Rounded::new(proof, x, columns));
        #[cfg(target_arch = "x86_64")]
        let paired =
            Amx::of(isa).filter(|_| rounding).map(|proof| Paired::new(proof, pool, x, columns, rows));
        let mut offsets: Vec<(Key, Cow<'_, [i32]>)> = Vec::new();
        for (kernel, q) in kernels().zip(quantized.iter().cycle()) {
            let key = (kernel.group, kernel.offset(isa));
            if offsets.iter().all(|(of, _)| *of != key) {
                offsets.push((key, q.offsets(key.0, key.1).into()));
            }
        }
        Prepared {
            rows,
            quantized,
            floats,
            #[cfg(target_arch = "x86_64")]
            rounded,
            #[cfg(target_arch = "x86_64")]
            paired,
            offsets,
        }
    }

    /// Some of the rows, in the forms that weights of some of the types want. A row's bits do not depend on its place.
    pub fn select<'a>(
        &'a self,
        isa: Isa,
        rows: &[u32],
        types: impl Iterator<Item = QuantType> + Clone,
    ) -> Prepared<'a> {
        let tile = isa.rows_of_tile(rows.len());
        let all = self.quantized.as_ref().filter(|_| types.clone().any(|ty| IntKernel::of(ty).is_some()));
        let quantized = all.map(|q| q.select(rows, tile));
        let floats = self.floats.as_ref().filter(|_| types.clone().any(|ty| is_float(isa, ty)));
        let floats = floats.map(|x| x.select(rows));
        #[cfg(target_arch = "x86_64")]
        let is_rounded = types.clone().any(|ty| is_rounded(isa, ty));
        let offsets = |(all, q): (&Activations<'_>, &Activations<'_>)| {
            let own = |(key, offsets): &'a (Key, Cow<'_, [i32]>)| match all.lone(rows) {
                Some(row) => (*key, offsets[row * q.columns / key.0..][..q.columns / key.0].into()),
                None => (*key, q.offsets(key.0, key.1).into()),
            };
            self.offsets.iter().map(own).collect()
        };
        Prepared {
            rows: rows.len(),
            offsets: all.zip(quantized.as_ref()).map(offsets).unwrap_or_default(),
            quantized,
            floats,
            #[cfg(target_arch = "x86_64")]
            rounded: self.rounded.as_ref().filter(|_| is_rounded).map(|x| x.select(rows)),
            #[cfg(target_arch = "x86_64")]
            paired: self.paired.as_ref().filter(|_| is_rounded).map(|x| x.select(rows)),
        }
    }

    /// The form that `weight`, one of those that this was prepared for, is multiplied with.
    pub fn form<'a>(&'a self, isa: Isa, weight: QMatrix<'_>, repacked: Option<&'a Repacked>) -> Form<'a> {
        #[cfg(target_arch = "x86_64")]
        if let Some(x) = self.rounded.as_ref().filter(|_| is_rounded(isa, weight.ty())) {
            return Form::Bf16 { x, rows: self.rows };
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(x) = self.paired.as_ref().filter(|_| is_rounded(isa, weight.ty())) {
            return Form::Tiles { x };
        }
        match (IntKernel::of(weight.ty()), &self.quantized, &self.floats) {
            (Some(kernel), Some(x), _) => {
                let key = (kernel.group, kernel.offset(isa));
                let offsets = self.offsets.iter().find(|(of, _)| *of == key).map_or(&[][..], |(_, o)| o);
                Form::Int { kernel, repacked, x, offsets }
            }
            (_, _, Some(Floats { x, stride })) => Form::Float { x, stride: *stride, rows: self.rows },
            _ => unreachable!("inputs are prepared for every weight"),
        }
    }
}

/// What a weight is multiplied with.
#[derive(Clone, Copy)]
pub(super) enum Form<'a> {
    /// Quantized, for integer formats.
    Int {
        kernel: &'static IntKernel,
        repacked: Option<&'a Repacked>,
        x: &'a Activations<'a>,
        offsets: &'a [i32],
    },
    /// As they are, for the others.
    Float { x: &'a [f32], stride: usize, rows: usize },
    /// Rounded, where there are instructions for that.
    #[cfg(target_arch = "x86_64")]
    Bf16 { x: &'a Rounded, rows: usize },
    /// The same in tiles.
    #[cfg(target_arch = "x86_64")]
    Tiles { x: &'a Paired },
}

impl Form<'_> {
    /// Weight rows of a strip.
    pub fn strip(&self, isa: Isa) -> usize {
        match self {
            Form::Int { .. } => isa.tile_panels() * ROWS,
            #[cfg(target_arch = "x86_64")]
            Form::Tiles { .. } => amx_bf16::STRIP,
            _ => float_matmul::STRIP,
        }
    }

    /// Activation rows.
    pub fn rows(&self) -> usize {
        match self {
            Form::Int { x, .. } => x.tiles.rows(),
            Form::Float { rows, .. } => *rows,
            #[cfg(target_arch = "x86_64")]
            Form::Bf16 { rows, .. } => *rows,
            #[cfg(target_arch = "x86_64")]
            Form::Tiles { x } => x.rows(),
        }
    }

    /// The most weight rows that one strip takes with so many units.
    pub fn most_rows(&self, isa: Isa, weight: QMatrix<'_>, units: usize) -> usize {
        match self {
            Form::Int { kernel, x, .. } => Strip::most_rows(isa, kernel, weight, x),
            Form::Float { .. } => FloatStrip::most_rows(weight, units),
            #[cfg(target_arch = "x86_64")]
            Form::Bf16 { .. } | Form::Tiles { .. } => self.strip(isa),
        }
    }

    /// Some units, as many as [`units_of`] allows, of any number of weight rows, which begin where a strip does. The thread goes on with
    /// row `next`.
    ///
    /// # Safety
    /// `out` holds all rows, and no one else uses the outputs of these rows and units.
    pub unsafe fn run(
        &self,
        isa: Isa,
        weight: QMatrix<'_>,
        rows: Range<usize>,
        units: Range<usize>,
        next: Option<usize>,
        out: Output<'_>,
    ) -> Result<(), FormatError> {
        let step = self.most_rows(isa, weight, units.len());
        for start in rows.clone().step_by(step) {
            let next = if start + step < rows.end { Some(start + step) } else { next };
            let (rows, units) = (start..rows.end.min(start + step), units.clone());
            // SAFETY: the caller's promise.
            unsafe {
                match *self {
                    Form::Int { kernel, repacked, x, offsets } => {
                        Strip { weight, repacked, rows, x, offsets, tiles: units, next }.run(isa, kernel, out)
                    }
                    #[cfg(target_arch = "x86_64")]
                    Form::Bf16 { x, .. } => Bf16Strip { weight, rows, x, x_rows: units }.run(isa, out),
                    #[cfg(target_arch = "x86_64")]
                    Form::Tiles { x } => TileStrip { weight, rows, x, tiles: units }.run(out),
                    Form::Float { x, stride, .. } => {
                        FloatStrip { weight, rows, x, x_stride: stride, x_rows: units }.run(isa, out)?
                    }
                }
            }
        }
        Ok(())
    }

    /// All units.
    ///
    /// # Safety
    /// As for [`Form::run`].
    pub unsafe fn run_all(
        &self,
        isa: Isa,
        weight: QMatrix<'_>,
        rows: Range<usize>,
        out: Output<'_>,
    ) -> Result<(), FormatError> {
        let (units, most) = units_of(isa, weight.ty(), self.rows());
        for first in (0..units).step_by(most) {
            // SAFETY: the caller's promise.
            unsafe { self.run(isa, weight, rows.clone(), first..(first + most).min(units), None, out)? };
        }
        Ok(())
    }
}

/// How many units, rows or tiles of them, some activation rows are for weights of a type, and how many of them [`Form::run`] takes
/// at most.
pub(super) fn units_of(isa: Isa, ty: QuantType, rows: usize) -> (usize, usize) {
    match IntKernel::of(ty) {
        Some(_) => (Tiles::new(rows, isa.rows_of_tile(rows)).count(), ROW_BLOCK / isa.tile_rows()),
        #[cfg(target_arch = "x86_64")]
        None if Amx::of(isa).is_some() && is_rounded(isa, ty) => {
            (Tiles::new(rows, ROWS).count(), amx_bf16::TILES)
        }
        None => (rows, float_matmul::ROW_BLOCK),
    }
}

/// Whether products with this type take activations as they are.
fn is_float(isa: Isa, ty: QuantType) -> bool {
    IntKernel::of(ty).is_none() && !is_rounded(isa, ty)
}

/// Whether products with this type take activations rounded to it.
fn is_rounded(isa: Isa, ty: QuantType) -> bool {
    ty == QuantType::BF16 && isa.level() >= Level::Avx512Bf16
}

/// Lines of `stride` floats, which is a multiple of 16; zeros behind the columns.
struct Floats<'x> {
    x: Lines<'x>,
    stride: usize,
}

/// Where they are.
enum Lines<'x> {
    There(&'x [f32]),
    Copied(Aligned<f32>),
}

impl Deref for Lines<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Lines::There(x) => x,
            Lines::Copied(x) => x,
        }
    }
}

impl<'x> Floats<'x> {
    /// Few lines are read where they are, if they can be. Many, each of which meets all weights, are copied to where lines of the cache
    /// begin; those of whole half-pages move apart by another half, so that the rows of a tile do not share cache sets.
    fn new(x: &'x [f32], columns: usize, rows: usize) -> Self {
        let many = rows >= 4;
        if columns.is_multiple_of(16) && !many {
            return Floats { x: Lines::There(x), stride: columns };
        }
        let apart = many && columns.is_multiple_of(512);
        let stride = if apart { columns.next_multiple_of(1024) + 512 } else { columns.next_multiple_of(16) };
        let mut out = Aligned::zeros(rows * stride);
        for (out, x) in out.chunks_exact_mut(stride).zip(x.chunks_exact(columns)) {
            out[..columns].copy_from_slice(x);
        }
        Floats { x: Lines::Copied(out), stride }
    }

    /// Some of the lines.
    fn select(&self, rows: &[u32]) -> Floats<'_> {
        let (x, stride) = (&*self.x, self.stride);
        let first = rows.first().map_or(0, |row| *row as usize);
        if rows.iter().enumerate().all(|(i, row)| first + i == *row as usize) {
            return Floats { x: Lines::There(&x[first * stride..][..rows.len() * stride]), stride };
        }
        let mut out = Aligned::zeros(rows.len() * stride);
        for (out, row) in out.chunks_exact_mut(stride).zip(rows) {
            out.copy_from_slice(&x[*row as usize * stride..][..stride]);
        }
        Floats { x: Lines::Copied(out), stride }
    }
}
