//! Where the lines of a product go.

use super::activations::Shared;
use super::panel::ROWS;
use super::simd::Simd;

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
    onto: Onto<'a>,
}

/// What a product's lines are added to.
#[derive(Clone, Copy)]
enum Onto<'a> {
    Nothing,
    /// What is there.
    Itself,
    /// These, and written where they go.
    Others(Addends<'a>),
}

/// Values for some of a product's lines and some of its weight rows.
#[derive(Clone, Copy)]
pub(crate) struct Addends<'a> {
    /// Line after line, also for those without.
    pub values: &'a [f32],
    /// Floats of a line.
    pub width: usize,
    /// The weight row whose output a line begins with.
    pub first: usize,
    /// Which lines have any.
    pub lines: &'a [bool],
}

impl<'a> Addends<'a> {
    /// Those of some weight rows in a line.
    #[inline(always)]
    fn of(&self, line: usize, start: usize, len: usize) -> Option<&'a [f32]> {
        self.lines[line].then(|| &self.values[line * self.width + start - self.first..][..len])
    }
}

impl<'a> Output<'a> {
    /// Line after line of `width`.
    pub fn set(out: &'a mut [f32], width: usize) -> Output<'a> {
        let len = out.len();
        Output { out: Shared(out.as_mut_ptr()), len, width, first: 0, lines: None, onto: Onto::Nothing }
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
        Output { out, len, width, first: 0, lines: Some(lines), onto: Onto::Itself }
    }

    /// The same place, where line `i` is added to line `lines[i]`.
    ///
    /// # Safety
    /// The lines exist and are distinct.
    pub unsafe fn added<'b>(&self, lines: &'b [u32]) -> Output<'b>
    where
        'a: 'b,
    {
        Output { lines: Some(lines), onto: Onto::Itself, ..*self }
    }

    /// The same place, where line `i` becomes line `lines[i]`.
    ///
    /// # Safety
    /// The lines exist and are distinct.
    pub unsafe fn placed<'b>(&self, lines: &'b [u32]) -> Output<'b>
    where
        'a: 'b,
    {
        Output { lines: Some(lines), ..*self }
    }

    /// The same place, where each line becomes the sum of the product's and of these.
    pub fn plus<'b>(&self, addends: Addends<'b>) -> Output<'b>
    where
        'a: 'b,
    {
        Output { onto: Onto::Others(addends), ..*self }
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
        match self.onto {
            Onto::Nothing => write(values, out, |_, value, _| value),
            Onto::Itself => write(values, out, |_, value, out| out + value),
            Onto::Others(addends) => match addends.of(line, start, values.len()) {
                None => write(values, out, |_, value, _| value),
                Some(addends) => write(values, out, |i, value, _| value + addends[i]),
            },
        }
    }

    /// The same for as many as two registers hold.
    ///
    /// # Safety
    /// As for [`Output::put`].
    #[inline(always)]
    pub unsafe fn put_two<S: Simd>(&self, s: S, row: usize, start: usize, values: [S::F; 2]) {
        let line = self.lines.map_or(row, |lines| lines[row] as usize);
        // SAFETY: the caller's promise.
        let out = unsafe { self.out.slice(line * self.width + start - self.first, TWO) };
        let values = match self.onto {
            Onto::Nothing => values,
            Onto::Itself => plus(s, values, out),
            Onto::Others(addends) => match addends.of(line, start, TWO) {
                None => values,
                Some(addends) => plus(s, values, addends),
            },
        };
        let (halves, _) = out.as_chunks_mut::<ROWS>();
        s.store(values[0], &mut halves[0]);
        s.store(values[1], &mut halves[1]);
    }
}

/// `values + to`, as many.
#[inline(always)]
fn plus<S: Simd>(s: S, values: [S::F; 2], to: &[f32]) -> [S::F; 2] {
    let (halves, _) = to.as_chunks::<ROWS>();
    [s.add(values[0], s.load(&halves[0])), s.add(values[1], s.load(&halves[1]))]
}

/// What becomes of an output: from its number in the line, the product's and what is there.
trait Become: Fn(usize, f32, f32) -> f32 {}
impl<F: Fn(usize, f32, f32) -> f32> Become for F {}

/// Nearly always they are those of one panel or two; what has a known length is a few instructions and no call.
#[inline(always)]
fn write(values: &[f32], out: &mut [f32], of: impl Become) {
    if let (Some(values), Some(out)) = (values.as_array::<TWO>(), out.as_mut_array::<TWO>()) {
        write_array(values, out, of);
    } else if let (Some(values), Some(out)) = (values.as_array::<ROWS>(), out.as_mut_array::<ROWS>()) {
        write_array(values, out, of);
    } else {
        out.iter_mut().zip(values).enumerate().for_each(|(i, (out, value))| *out = of(i, *value, *out));
    }
}

/// By way of a copy, which cannot be the memory that is written.
#[inline(always)]
fn write_array<const N: usize>(values: &[f32; N], out: &mut [f32; N], of: impl Become) {
    let mut sums = *values;
    sums.iter_mut().zip(&*out).enumerate().for_each(|(i, (sum, out))| *sum = of(i, *sum, *out));
    *out = sums;
}
