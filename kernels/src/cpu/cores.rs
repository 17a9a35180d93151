//! Cores: what adapters do between shrink and expand, row by row.

use super::matmul::Input;
use super::output::Output;
use super::prepared::Prepared;
use super::simd::{Op, Simd};
use super::{Isa, ThreadPool};
use crate::backend::{Core, LoraGroup, LoraTerm};
use crate::ops::lora::line;
use crate::quant::{FormatError, QMatrix};

/// One line of what is expanded: the weighted sum of a row's plain terms, or one term with a scale of its own.
pub(super) struct Line<'a> {
    /// Which row of the group.
    pub index: usize,
    /// What it is made of.
    pub terms: Terms<'a>,
}

/// The terms of a line.
#[derive(Clone, Copy)]
pub(super) enum Terms<'a> {
    /// Those without a scale.
    Plain(&'a [LoraTerm<'a>]),
    /// One with a scale.
    Scaled(&'a LoraTerm<'a>),
}

impl<'a> Line<'a> {
    /// Appends all lines of a group; equal cores stand side by side.
    pub fn all(group: &'a LoraGroup<'a>, lines: &mut Vec<Line<'a>>) {
        let first = lines.len();
        for (index, (_, terms)) in group.rows.iter().enumerate() {
            if terms.iter().any(|t| t.delta_scale.is_none()) {
                lines.push(Line { index, terms: Terms::Plain(terms) });
            }
            let scaled = terms.iter().filter(|t| t.delta_scale.is_some());
            lines.extend(scaled.map(|t| Line { index, terms: Terms::Scaled(t) }));
        }
        lines[first..].sort_by_key(Line::core_address);
    }

    /// The first line and the number of those that [`run_cores`] takes together: equal cores become one product.
    pub fn runs(lines: &[Line<'a>]) -> impl Iterator<Item = (usize, usize)> {
        let together =
            |a: &Line<'_>, b: &Line<'_>| a.single().is_some() && a.core_address() == b.core_address();
        lines.chunk_by(together).scan(0, |next, run| {
            let first = *next;
            *next += run.len();
            Some((first, run.len()))
        })
    }

    /// Its full cores.
    pub fn cores(&self) -> impl Iterator<Item = QMatrix<'a>> + Clone {
        let terms = match self.terms {
            Terms::Plain(terms) => terms,
            Terms::Scaled(term) => std::slice::from_ref(term),
        };
        terms.iter().filter_map(|term| match term.core {
            Core::Full(core) => Some(core),
            _ => None,
        })
    }

    /// The one full core of the line, if it is all there is, and λ.
    pub fn single(&self) -> Option<(QMatrix<'a>, f32)> {
        let (term, scale) = match self.terms {
            Terms::Plain([term]) => (term, Some(term.scale)),
            Terms::Plain(_) => return None,
            Terms::Scaled(term) => (term, None),
        };
        match term.core {
            Core::Full(c) => Some((c, scale.unwrap_or(1.0))),
            _ => None,
        }
    }

    fn core_address(&self) -> usize {
        self.single().map_or(0, |(c, _)| c.bytes().as_ptr().addr())
    }
}

/// V x of the rows of a group.
#[derive(Clone, Copy)]
pub(super) struct Shrunk<'a> {
    /// Lines of `width`.
    pub z: &'a [f32],
    /// The same prepared for the cores.
    pub x: &'a Prepared<'a>,
    /// Which of them each row of the group has.
    pub places: &'a [usize],
    /// The rank.
    pub width: usize,
}

impl<'a> Shrunk<'a> {
    fn place(&self, line: &Line<'_>) -> usize {
        self.places[line.index]
    }

    fn of(&self, line: &Line<'_>) -> &'a [f32] {
        &self.z[self.place(line) * self.width..][..self.width]
    }
}

/// V x of some rows, quantized or whatever the cores want, once for all of them.
pub(super) fn prepare_shrunk<'a>(
    isa: Isa,
    serial: &ThreadPool,
    z: &'a [f32],
    width: usize,
    cores: impl Iterator<Item = QMatrix<'a>> + Clone,
) -> Prepared<'a> {
    let rows = z.len().checked_div(width).unwrap_or(0);
    Prepared::with_tiles(isa, serial, Input { x: z, rows, columns: width }, cores.map(|core| core.ty()), 1)
}

/// The lines of a run, in this thread.
pub(super) fn run_cores(
    isa: Isa,
    shrunk: Shrunk<'_>,
    lines: &[Line<'_>],
    out: &mut [f32],
) -> Result<(), FormatError> {
    let width = shrunk.width;
    if let Some((core, _)) = lines.first().and_then(Line::single) {
        let place = |line: &Line<'_>| shrunk.place(line) as u32;
        match lines {
            [line] => core_product(isa, core, shrunk.x, &[place(line)], out)?,
            _ => core_product(isa, core, shrunk.x, &lines.iter().map(place).collect::<Vec<_>>(), out)?,
        }
        for (line, out) in lines.iter().zip(out.chunks_exact_mut(width)) {
            if let (Terms::Plain(_), Some((_, scale))) = (line.terms, line.single()) {
                isa.run(Scale { scale, values: out });
            }
        }
        return Ok(());
    }
    let mut full = vec![0.0; width];
    for (line, out) in lines.iter().zip(out.chunks_exact_mut(width)) {
        let (terms, scaled) = match line.terms {
            Terms::Plain(terms) => (terms, false),
            Terms::Scaled(term) => (std::slice::from_ref(term), true),
        };
        for term in terms.iter().filter(|t| scaled || t.delta_scale.is_none()) {
            let diagonal;
            let z = shrunk.of(line);
            let cz: &[f32] = match term.core {
                Core::Full(c) => {
                    core_product(isa, c, shrunk.x, &[shrunk.place(line) as u32], &mut full)?;
                    &full
                }
                Core::Diagonal(c) => {
                    diagonal = self::line(c)?.iter().zip(z).map(|(c, z)| c * z).collect::<Vec<_>>();
                    &diagonal
                }
                Core::Identity => z,
            };
            match scaled {
                true => out.copy_from_slice(cz),
                false => isa.run(Weigh { scale: term.scale, values: cz, sum: out }),
            }
        }
    }
    Ok(())
}

/// `sum ← λ values + sum`, rounded once.
struct Weigh<'a> {
    scale: f32,
    values: &'a [f32],
    sum: &'a mut [f32],
}

impl Op for Weigh<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (sum, value) in self.sum.iter_mut().zip(self.values) {
            *sum = self.scale.mul_add(*value, *sum);
        }
    }
}

/// The same onto zeros, in place.
struct Scale<'a> {
    scale: f32,
    values: &'a mut [f32],
}

impl Op for Scale<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for value in self.values {
            *value = self.scale.mul_add(*value, 0.0);
        }
    }
}

/// `C z` of some rows, in this thread. A step multiplies thousands of cores; planning each as a product for all threads would
/// take longer than multiplying it.
fn core_product(
    isa: Isa,
    core: QMatrix<'_>,
    z: &Prepared<'_>,
    rows: &[u32],
    out: &mut [f32],
) -> Result<(), FormatError> {
    let n = core.rows();
    let out = &mut out[..rows.len() * n];
    if core.cols() == 0 {
        out.fill(0.0);
        return Ok(());
    }
    let z = z.select(isa, rows, std::iter::once(core.ty()));
    // SAFETY: `out` has lines of `n` for all rows, and is this call's alone.
    unsafe { z.form(isa, core, None).run_all(isa, core, 0..n, Output::set(out, n)) }
}
