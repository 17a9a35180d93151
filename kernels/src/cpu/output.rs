//! Where the lines of a product go.

use super::activations::Shared;
use super::panel::ROWS;

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
    /// Line `i` of the product goes to line `lines[i]`; `None`: to line `i`.
    lines: Option<&'a [u32]>,
    /// Whether lines are added to what is there.
    onto: bool,
}

impl<'a> Output<'a> {
    /// Line after line of `width`.
    pub fn set(out: &'a mut [f32], width: usize) -> Output<'a> {
        let len = out.len();
        Output { out: Shared(out.as_mut_ptr()), len, width, first: 0, lines: None, onto: false }
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
        Output { out, len, width, first: 0, lines: Some(lines), onto: true }
    }

    /// The same place, where line `i` is added to line `lines[i]`.
    ///
    /// # Safety
    /// The lines exist and are distinct.
    pub unsafe fn added<'b>(&self, lines: &'b [u32]) -> Output<'b>
    where
        'a: 'b,
    {
        Output { lines: Some(lines), onto: true, ..*self }
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

    /// Whether a product that is computed as one chain must begin with [`Output::get`].
    pub fn is_onto(&self) -> bool {
        self.onto
    }

    /// # Safety
    /// The outputs lie within, and no other thread uses them.
    #[inline(always)]
    unsafe fn slice(&self, row: usize, start: usize, len: usize) -> &mut [f32] {
        let line = self.lines.map_or(row, |lines| lines[row] as usize);
        // SAFETY: the caller's promise.
        unsafe { self.out.slice(line * self.width + start - self.first, len) }
    }

    /// What is there for weight rows `start ..` of line `row`.
    ///
    /// # Safety
    /// They lie within the output, and no other thread uses them.
    #[inline(always)]
    pub unsafe fn get(&self, row: usize, start: usize, values: &mut [f32]) {
        // SAFETY: the caller's promise.
        copy(unsafe { self.slice(row, start, values.len()) }, values);
    }

    /// Writes the outputs of weight rows `start ..` of line `row`, which began with what was there if that is wanted.
    ///
    /// # Safety
    /// As for [`Output::get`].
    #[inline(always)]
    pub unsafe fn put(&self, row: usize, start: usize, values: &[f32]) {
        // SAFETY: the caller's promise.
        copy(values, unsafe { self.slice(row, start, values.len()) });
    }

    /// Writes or adds outputs whose sum began with nothing.
    ///
    /// # Safety
    /// As for [`Output::get`].
    #[inline(always)]
    pub unsafe fn put_sum(&self, row: usize, start: usize, values: &[f32]) {
        if self.onto {
            // SAFETY: the caller's promise.
            add(values, unsafe { self.slice(row, start, values.len()) });
        } else {
            // SAFETY: the same.
            unsafe { self.put(row, start, values) };
        }
    }
}

/// Nearly always these are the values of one panel or two; what has a known length is a few instructions and no call.
#[inline(always)]
fn copy(from: &[f32], to: &mut [f32]) {
    if let (Some(from), Some(to)) = (from.as_array::<TWO>(), to.as_mut_array::<TWO>()) {
        *to = *from;
    } else if let (Some(from), Some(to)) = (from.as_array::<ROWS>(), to.as_mut_array::<ROWS>()) {
        *to = *from;
    } else {
        to.copy_from_slice(from);
    }
}

/// The same with sums.
#[inline(always)]
fn add(from: &[f32], to: &mut [f32]) {
    if let (Some(from), Some(to)) = (from.as_array::<TWO>(), to.as_mut_array::<TWO>()) {
        add_array(from, to);
    } else if let (Some(from), Some(to)) = (from.as_array::<ROWS>(), to.as_mut_array::<ROWS>()) {
        add_array(from, to);
    } else {
        to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
    }
}

/// By way of a copy, which cannot be the memory that is written.
#[inline(always)]
fn add_array<const N: usize>(from: &[f32; N], to: &mut [f32; N]) {
    let mut sums = *from;
    sums.iter_mut().zip(&*to).for_each(|(sum, to)| *sum += to);
    *to = sums;
}
