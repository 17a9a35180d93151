//! The key-value cache in main memory, laid out for vectors.
//!
//! `[layer][page][kv_head]`, and in it the keys transposed, `[dim][position]`, so that scores of 16 positions come
//! from one vector without sums across lanes; then the values, `[position][dim]`. Positions of a page
//! are rounded up to 16, dimensions to 16 (Q8_0: 32), with zeros. Q8_0 keeps the scales
//! behind the codes, one per 32 dimensions and position, in the same order.

use super::activations::Shared;
use super::memory::{wrong_page, zeros};
use super::simd::{Op, Simd};
use super::{Isa, ThreadPool};
use crate::backend::{BackendError, KvShape, KvType};
use crate::quant::{Block, Half, Q8_0};

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
                (dims, dims / Q8_0::LEN * 2, 1)
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
                    scales[2 * at..2 * at + 2].copy_from_slice(&Half::to_bits(block.d).to_le_bytes());
                }
            }
        }
    }
}

impl HeadLayout {
    /// Positions `first..first + 16 · N` of the keys as floats, `out[d][n]`.
    #[inline(always)]
    pub fn keys<S: Simd>(self, s: S, keys: &[u8], first: usize, vectors: usize, out: &mut [[[f32; 16]; 2]]) {
        let (codes, scales) = keys.split_at(self.positions * self.dims * self.element());
        let mut scale = [s.splat(1.0); 2];
        for (d, out) in out[..self.dims].iter_mut().enumerate() {
            for n in 0..vectors {
                let at = d * self.positions + first + 16 * n;
                let x = match self.ty {
                    KvType::F32 => s.load(&floats(codes, at)),
                    KvType::F16 => s.load_f16(halves(codes, at)),
                    KvType::Q8_0 => {
                        if d % Q8_0::LEN == 0 {
                            let at = d / Q8_0::LEN * self.positions + first + 16 * n;
                            scale[n] = s.load_f16(halves(scales, at));
                        }
                        s.mul(s.load_i8(bytes(codes, at)), scale[n])
                    }
                };
                s.store(x, &mut out[n]);
            }
        }
    }

    /// Position `first + i` of the values as floats, `out[i · dims / 16 ..]`, for as many as `out` has lines.
    #[inline(always)]
    pub fn values<S: Simd>(self, s: S, values: &[u8], first: usize, out: &mut [[f32; 16]]) {
        let (codes, scales) = values.split_at(self.positions * self.dims * self.element());
        let per_line = self.dims / 16;
        for (i, line) in out.chunks_exact_mut(per_line).enumerate() {
            for (n, out) in line.iter_mut().enumerate() {
                let at = (first + i) * self.dims + 16 * n;
                let x = match self.ty {
                    KvType::F32 => s.load(&floats(codes, at)),
                    KvType::F16 => s.load_f16(halves(codes, at)),
                    KvType::Q8_0 => {
                        let at_scale = (first + i) * (self.dims / Q8_0::LEN) + n / 2;
                        let scale = Half::from_bits(u16::from_le_bytes([
                            scales[2 * at_scale],
                            scales[2 * at_scale + 1],
                        ]));
                        s.mul(s.load_i8(bytes(codes, at)), s.splat(scale.to_f32()))
                    }
                };
                s.store(x, out);
            }
        }
    }

    #[inline(always)]
    fn element(self) -> usize {
        match self.ty {
            KvType::F32 => 4,
            KvType::F16 => 2,
            KvType::Q8_0 => 1,
        }
    }
}

#[inline(always)]
fn floats(data: &[u8], at: usize) -> [f32; 16] {
    let mut out = [0.0; 16];
    for (out, bytes) in out.iter_mut().zip(data[4 * at..][..64].as_chunks::<4>().0) {
        *out = f32::from_ne_bytes(*bytes);
    }
    out
}

#[inline(always)]
fn halves(data: &[u8], at: usize) -> &[[u8; 2]; 16] {
    match data[2 * at..][..32].as_chunks::<2>().0.first_chunk() {
        Some(halves) => halves,
        None => unreachable!("32 bytes are 16 halves"),
    }
}

#[inline(always)]
fn bytes(data: &[u8], at: usize) -> &[i8; 16] {
    // SAFETY: 16 bytes, checked; i8 has the layout of u8.
    unsafe { &*data[at..][..16].as_ptr().cast() }
}
