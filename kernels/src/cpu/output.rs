//! Where the lines of a product go.

use std::marker::PhantomData;
use std::ops::Range;

use super::Isa;
use super::activations::Shared;
use super::panel::ROWS;
use super::simd::Fetch;

const TWO: usize = 2 * ROWS;

/// Where the lines of a product go.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a> {
    out: Shared<f32>,
    len: usize,
    /// Floats of a line.
    width: usize,
    /// The weight row whose output a line begins with.
    first: usize,
    /// Line `i` of the product is added to line `lines[i]`; `None`: it becomes line `i`.
    lines: Option<&'a [u32]>,
    borrow: PhantomData<&'a mut [f32]>,
}

impl<'a> Output<'a> {
    /// Line after line of `width`.
    pub fn set(out: &'a mut [f32], width: usize) -> Output<'a> {
        Output {
            out: Shared(out.as_mut_ptr()),
            len: out.len(),
            width,
            first: 0,
            lines: None,
            borrow: PhantomData,
        }
    }

    /// The same for the outputs of some weight rows, the first of which is `first`.
    pub fn set_from(out: &'a mut [f32], width: usize, first: usize) -> Output<'a> {
        Output { first, ..Output::set(out, width) }
    }

    /// Adds line `i` to line `lines[i]` of `len` floats at `out`.
    ///
    /// # Safety
    /// They stay valid for `'a`, the lines are distinct, and until the product is done nothing else
    /// uses them.
    pub unsafe fn add(out: Shared<f32>, len: usize, width: usize, lines: &'a [u32]) -> Output<'a> {
        Output { out, len, width, first: 0, lines: Some(lines), borrow: PhantomData }
    }

    /// The same place, where line `i` is added to line `lines[i]`.
    ///
    /// # Safety
    /// The lines exist and are distinct.
    pub unsafe fn added<'b>(&self, lines: &'b [u32]) -> Output<'b>
    where
        'a: 'b,
    {
        Output { lines: Some(lines), ..*self }
    }

    /// The same from a line on, of an output whose line `i` is the product's.
    pub fn skip_lines(&self, first: usize) -> Output<'a> {
        let skip = first * self.width;
        assert!(self.lines.is_none() && skip <= self.len);
        Output { out: Shared(self.out.0.wrapping_add(skip)), len: self.len - skip, ..*self }
    }

    /// All that was written.
    ///
    /// # Safety
    /// Nobody writes any more.
    pub unsafe fn written(&self) -> &'a [f32] {
        // SAFETY: the caller's promise.
        unsafe { self.out.view(0, self.len) }
    }

    /// Panics unless there is room for `rows` lines of `width`, or for the lines that are named.
    pub fn check(&self, rows: usize, width: usize) {
        assert!(self.width == width, "lines of {width} for a product of {}", self.width);
        let lines = match self.lines {
            None => rows,
            Some(lines) => {
                assert!(lines.len() == rows);
                lines.iter().max().map_or(0, |line| *line as usize + 1)
            }
        };
        assert!(lines * width <= self.len, "{lines} lines of {width} in {} floats", self.len);
    }

    /// Writes the outputs of weight rows `start ..` of line `row`.
    ///
    /// # Safety
    /// They lie within the output, and no other thread uses them.
    #[inline(always)]
    pub unsafe fn put(&self, row: usize, start: usize, values: &[f32]) {
        let line = self.lines.map_or(row, |lines| lines[row] as usize);
        // SAFETY: the caller's promise.
        let out = unsafe { self.out.slice(line * self.width + start - self.first, values.len()) };
        if self.lines.is_some() { write::<true>(values, out) } else { write::<false>(values, out) }
    }

    /// Asks for the outputs of some weight rows in the first `lines` lines, which will be written soon.
    pub fn fetch(&self, isa: Isa, lines: usize, rows: Range<usize>) {
        for line in 0..lines {
            let start = line * self.width + rows.start - self.first;
            isa.run(Fetch {
                from: self.out.0.wrapping_add(start).cast(),
                bytes: rows.len() * size_of::<f32>(),
            });
        }
    }

    /// Writes lines of `n` outputs each, those of weight rows `start ..`.
    ///
    /// # Safety
    /// As for [`Output::put`].
    pub unsafe fn put_lines(&self, start: usize, n: usize, lines: &[f32]) {
        for (row, values) in lines.chunks_exact(n).enumerate() {
            // SAFETY: the caller's promise.
            unsafe { self.put(row, start, values) };
        }
    }
}

/// Nearly always they are those of one panel or two; what has a known length is a few instructions and no call.
#[inline(always)]
fn write<const ADD: bool>(values: &[f32], out: &mut [f32]) {
    if let (Some(values), Some(out)) = (values.as_array::<TWO>(), out.as_mut_array::<TWO>()) {
        write_array::<ADD, TWO>(values, out);
    } else if let (Some(values), Some(out)) = (values.as_array::<ROWS>(), out.as_mut_array::<ROWS>()) {
        write_array::<ADD, ROWS>(values, out);
    } else if ADD {
        out.iter_mut().zip(values).for_each(|(out, v)| *out += v);
    } else {
        out.copy_from_slice(values);
    }
}

/// By way of a copy, which cannot be the memory that is written.
#[inline(always)]
fn write_array<const ADD: bool, const N: usize>(values: &[f32; N], out: &mut [f32; N]) {
    let mut sums = *values;
    if ADD {
        sums.iter_mut().zip(&*out).for_each(|(sum, out)| *sum += out);
    }
    *out = sums;
}
