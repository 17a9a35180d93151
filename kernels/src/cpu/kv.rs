//! The key-value cache in main memory, laid out for vectors.
//!
//! `[layer][page][kv_head]`, and in it the keys transposed, `[dim][position]`, so that scores of 16 positions come
//! from one vector without sums across lanes; then the values, `[position][dim]`. Positions of a page
//! are rounded up to 16, dimensions to 16 (Q8_0: 32), with zeros. Q8_0 keeps the scales
//! behind the codes, one per 32 dimensions and position, in the same order and widened to floats, which costs a twentieth
//! of the cache and saves a conversion at every use.

use super::activations::Shared;
use std::marker::PhantomData;

use super::simd::{Op, Simd};
use super::{Isa, ThreadPool};
use crate::backend::{BackendError, KvShape, KvType};
use crate::host::{wrong_page, zeros};
use crate::quant::{Block, Q8_0};

/// Bytes of a scale.
const SCALE: usize = size_of::<f32>();

/// Keys and values of all layers, in pages.
pub struct CpuKv {
    shape: KvShape,
    pages: usize,
    data: Vec<u8>,
}

/// Sizes of one head's part of a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadLayout {
    pub ty: KvType,
    /// Positions and dimensions with padding.
    pub positions: usize,
    pub dims: usize,
    /// Bytes of the keys; as many of values follow.
    pub half: usize,
}

impl HeadLayout {
    fn new(shape: KvShape) -> HeadLayout {
        let positions = shape.page_len.next_multiple_of(16);
        let (dims, scales, element) = match shape.ty {
            KvType::F32 => (shape.head_dim.next_multiple_of(16), 0, 4),
            KvType::F16 => (shape.head_dim.next_multiple_of(16), 0, 2),
            KvType::Q8_0 => {
                let dims = shape.head_dim.next_multiple_of(Q8_0::LEN);
                (dims, dims / Q8_0::LEN * SCALE, 1)
            }
        };
        HeadLayout { ty: shape.ty, positions, dims, half: positions * (dims * element + scales) }
    }
}

impl CpuKv {
    pub(crate) fn new(shape: KvShape, pages: usize) -> Result<CpuKv, BackendError> {
        let page = HeadLayout::new(shape).half.saturating_mul(2 * shape.kv_heads);
        let bytes = page.saturating_mul(shape.layers).saturating_mul(pages);
        Ok(CpuKv { shape, pages, data: zeros("cpu", "the key-value cache", bytes)? })
    }

    pub(crate) fn shape(&self) -> KvShape {
        self.shape
    }

    pub(crate) fn layout(&self) -> HeadLayout {
        HeadLayout::new(self.shape)
    }

    /// Bytes of one page in one layer.
    fn page_bytes(&self) -> usize {
        self.layout().half * 2 * self.shape.kv_heads
    }

    fn page_start(&self, layer: usize, page: usize) -> usize {
        assert!(
            layer < self.shape.layers && page < self.pages,
            "layer {layer}, page {page} of {}",
            self.pages
        );
        (layer * self.pages + page) * self.page_bytes()
    }

    /// Keys, then values, of one head in one page.
    pub(crate) fn head(&self, layer: usize, page: usize, head: usize) -> (&[u8], &[u8]) {
        let half = self.layout().half;
        let start = self.page_start(layer, page) + head * 2 * half;
        self.data[start..start + 2 * half].split_at(half)
    }

    pub(crate) fn copy_page(&mut self, from: usize, to: usize) {
        let len = self.page_bytes();
        for layer in 0..self.shape.layers {
            let (from, to) = (self.page_start(layer, from), self.page_start(layer, to));
            self.data.copy_within(from..from + len, to);
        }
    }

    pub(crate) fn read_page(&self, page: usize) -> Vec<u8> {
        let starts = (0..self.shape.layers).map(|layer| self.page_start(layer, page));
        starts.flat_map(|start| &self.data[start..start + self.page_bytes()]).copied().collect()
    }

    pub(crate) fn write_page(&mut self, page: usize, bytes: &[u8]) -> Result<(), BackendError> {
        let len = self.page_bytes();
        if bytes.len() != len * self.shape.layers {
            return Err(wrong_page("cpu", len * self.shape.layers, bytes.len()));
        }
        for layer in 0..self.shape.layers {
            let start = self.page_start(layer, page);
            self.data[start..start + len].copy_from_slice(&bytes[layer * len..][..len]);
        }
        Ok(())
    }

    /// Writes keys and values of one layer, line `i` to slot `slots[i]`.
    pub(crate) fn write(
        &mut self,
        isa: Isa,
        pool: &ThreadPool,
        layer: usize,
        k: &[f32],
        v: &[f32],
        slots: &[u32],
    ) {
        let KvShape { kv_heads, head_dim, page_len, .. } = self.shape;
        let layout = self.layout();
        let starts: Vec<_> = slots.iter().map(|s| self.page_start(layer, *s as usize / page_len)).collect();
        let data = Shared(self.data.as_mut_ptr());
        let tasks = if slots.len() < 8 { 1 } else { kv_heads };
        pool.run(tasks, &|task| {
            let data = &data;
            for head in kv_heads * task / tasks..kv_heads * (task + 1) / tasks {
                for (i, (slot, start)) in slots.iter().zip(&starts).enumerate() {
                    // SAFETY: `page_start` checked that the page lies in the data; heads are disjoint parts of it, and
                    // each belongs to one task.
                    let out = unsafe { data.slice(start + head * 2 * layout.half, 2 * layout.half) };
                    let (keys, values) = out.split_at_mut(layout.half);
                    let position = *slot as usize % page_len;
                    let line = i * kv_heads * head_dim + head * head_dim;
                    let (k, v) = (&k[line..][..head_dim], &v[line..][..head_dim]);
                    isa.run(Put { layout, position, stride: layout.positions, step: 1, x: k, out: keys });
                    isa.run(Put { layout, position, stride: 1, step: layout.dims, x: v, out: values });
                }
            }
        });
    }
}

/// Writes one line: dimension `d` of position `p` becomes element `d · stride + p · step`.
struct Put<'a> {
    layout: HeadLayout,
    position: usize,
    stride: usize,
    step: usize,
    x: &'a [f32],
    out: &'a mut [u8],
}

impl Op for Put<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Put { layout, position, stride, step, x, out } = self;
        let first = position * step;
        match layout.ty {
            KvType::F32 => {
                for (d, x) in x.iter().enumerate() {
                    out[4 * (first + d * stride)..][..4].copy_from_slice(&x.to_ne_bytes());
                }
            }
            KvType::F16 => {
                for (i, x) in x.chunks(16).enumerate() {
                    let mut sixteen = [0.0; 16];
                    sixteen[..x.len()].copy_from_slice(x);
                    let mut halves = [[0; 2]; 16];
                    s.store_f16(s.load(&sixteen), &mut halves);
                    for (d, half) in halves[..x.len()].iter().enumerate() {
                        out[2 * (first + (16 * i + d) * stride)..][..2].copy_from_slice(half);
                    }
                }
            }
            KvType::Q8_0 => {
                let (codes, scales) = out.split_at_mut(layout.positions * layout.dims);
                for (b, x) in x.chunks(Q8_0::LEN).enumerate() {
                    let mut padded = [0.0; Q8_0::LEN];
                    padded[..x.len()].copy_from_slice(x);
                    let block = Q8_0::quantize(&padded);
                    for (d, q) in block.qs.iter().enumerate() {
                        codes[first + (b * Q8_0::LEN + d) * stride] = *q as u8;
                    }
                    let at = if stride == 1 {
                        position * (layout.dims / Q8_0::LEN) + b
                    } else {
                        b * stride + position
                    };
                    scales[SCALE * at..][..SCALE].copy_from_slice(&block.d.to_f32().to_ne_bytes());
                }
            }
        }
    }
}

/// How one number is stored.
pub(crate) trait Element {
    /// Bytes of one.
    const BYTES: usize;
    /// Whether a scale belongs to every [`Q8_0::LEN`] dimensions.
    const SCALED: bool = false;

    /// 16 of them.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load<S: Simd>(s: S, from: *const u8) -> S::F;
}

/// [`KvType::F32`].
pub(crate) struct Single;
/// [`KvType::F16`].
pub(crate) struct Halved;
/// [`KvType::Q8_0`].
pub(crate) struct Byte;

impl Element for Single {
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const u8) -> S::F {
        // SAFETY: the caller's promise.
        s.load(&unsafe { from.cast::<[f32; 16]>().read_unaligned() })
    }
}

impl Element for Halved {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const u8) -> S::F {
        // SAFETY: the caller's promise; pairs of bytes have align 1.
        s.load_f16(unsafe { &*from.cast() })
    }
}

impl Element for Byte {
    const BYTES: usize = 1;
    const SCALED: bool = true;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const u8) -> S::F {
        // SAFETY: the caller's promise.
        s.load_i8(unsafe { &*from.cast() })
    }
}

/// Lines of vectors of 16 floats.
pub(crate) trait Source {
    /// Vector `n` of line `line`.
    ///
    /// # Safety
    /// Both are within what the source was made for.
    unsafe fn vector<S: Simd>(&self, s: S, line: usize, n: usize) -> S::F;
}

/// Keys of some positions of one head and page; a line is a dimension, a vector 16 positions.
pub(crate) struct Keys<'a, E> {
    codes: &'a [u8],
    scales: &'a [u8],
    positions: usize,
    first: usize,
    element: PhantomData<E>,
}

impl<'a, E: Element> Keys<'a, E> {
    /// Of positions `first .. first + 16 · vectors` of `keys`.
    ///
    /// # Panics
    /// If `keys` do not have the layout, or it has fewer positions.
    #[inline(always)]
    pub fn new(layout: HeadLayout, keys: &'a [u8], first: usize, vectors: usize) -> Self {
        assert!(keys.len() == layout.half && first + 16 * vectors <= layout.positions);
        let (codes, scales) = keys.split_at(layout.positions * layout.dims * E::BYTES);
        assert!(!E::SCALED || scales.len() == layout.positions * (layout.dims / Q8_0::LEN) * SCALE);
        Keys { codes, scales, positions: layout.positions, first, element: PhantomData }
    }
}

impl<E: Element> Source for Keys<'_, E> {
    #[inline(always)]
    unsafe fn vector<S: Simd>(&self, s: S, line: usize, n: usize) -> S::F {
        let at = line * self.positions + self.first + 16 * n;
        // SAFETY: `new` checked the sizes, and the caller stays within them.
        unsafe {
            let x = E::load(s, self.codes.as_ptr().add(at * E::BYTES));
            if !E::SCALED {
                return x;
            }
            let at = line / Q8_0::LEN * self.positions + self.first + 16 * n;
            s.mul(x, Single::load(s, self.scales.as_ptr().add(SCALE * at)))
        }
    }
}

/// Values of some positions of one head and page; a line is a position, a vector 16 dimensions.
pub(crate) struct Values<'a, E> {
    codes: &'a [u8],
    scales: &'a [u8],
    dims: usize,
    first: usize,
    element: PhantomData<E>,
}

impl<'a, E: Element> Values<'a, E> {
    /// Of positions `first .. first + len` of `values`.
    ///
    /// # Panics
    /// If `values` do not have the layout, or it has fewer positions.
    #[inline(always)]
    pub fn new(layout: HeadLayout, values: &'a [u8], first: usize, len: usize) -> Self {
        assert!(values.len() == layout.half && first + len <= layout.positions);
        let (codes, scales) = values.split_at(layout.positions * layout.dims * E::BYTES);
        assert!(!E::SCALED || scales.len() == layout.positions * (layout.dims / Q8_0::LEN) * SCALE);
        Values { codes, scales, dims: layout.dims, first, element: PhantomData }
    }
}

impl<E: Element> Source for Values<'_, E> {
    #[inline(always)]
    unsafe fn vector<S: Simd>(&self, s: S, line: usize, n: usize) -> S::F {
        let at = (self.first + line) * self.dims + 16 * n;
        // SAFETY: `new` checked the sizes, and the caller stays within them.
        unsafe {
            let x = E::load(s, self.codes.as_ptr().add(at * E::BYTES));
            if !E::SCALED {
                return x;
            }
            let at = (self.first + line) * (self.dims / Q8_0::LEN) + n / 2;
            s.mul(x, s.splat(self.scales.as_ptr().add(SCALE * at).cast::<f32>().read_unaligned()))
        }
    }
}

/// Vectors that were widened before.
pub(crate) struct Widened<'a> {
    vectors: &'a [[f32; 16]],
    per_line: usize,
}

impl<'a> Widened<'a> {
    /// Fills `out` from a source.
    ///
    /// # Safety
    /// The source was made for so many lines and vectors in each.
    #[inline(always)]
    pub unsafe fn fill<S: Simd>(
        s: S,
        source: &impl Source,
        lines: usize,
        per_line: usize,
        out: &'a mut [[f32; 16]],
    ) -> Widened<'a> {
        for (line, out) in out[..lines * per_line].chunks_exact_mut(per_line).enumerate() {
            for (n, out) in out.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                s.store(unsafe { source.vector(s, line, n) }, out);
            }
        }
        Widened { vectors: &out[..lines * per_line], per_line }
    }
}

impl Source for Widened<'_> {
    #[inline(always)]
    unsafe fn vector<S: Simd>(&self, s: S, line: usize, n: usize) -> S::F {
        // SAFETY: the caller stays within the lines and vectors of `fill`.
        s.load(unsafe { self.vectors.get_unchecked(line * self.per_line + n) })
    }
}
