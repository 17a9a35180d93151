//! The backend that defines correct.

use super::attention::{first_visible, head};
use super::{glu, lora, norm, rope, top_k};
use crate::backend::{
    Activation, AttentionParams, AttentionRow, Backend, BackendError, KvShape, KvType, Likeliest, LoraJob,
    MatmulJob, Rope,
};
use crate::quant::{Block, FormatError, Half, Q8_0, QMatrix};
use crate::{QuantType, host};

/// Single-threaded scalar code: for comparisons, and for machines without anything better.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reference;

const LABEL: &str = "reference";

fn failed(error: FormatError) -> BackendError {
    match error {
        FormatError::Unsupported { ty } => BackendError::UnsupportedType { device: LABEL.into(), ty },
        other => BackendError::Device { device: LABEL.into(), message: other.to_string() },
    }
}

/// Keys and values as floats, already rounded to the cache's type:
/// `[layer][page][keys, values][offset][kv_head · head_dim]`.
#[derive(Clone, Debug)]
pub struct ReferenceKv {
    shape: KvShape,
    pages: usize,
    data: Vec<f32>,
}

impl ReferenceKv {
    fn width(&self) -> usize {
        self.shape.kv_heads * self.shape.head_dim
    }

    /// Floats of the keys, or of the values, of one page of one layer.
    fn half_page(&self) -> usize {
        self.shape.page_len * self.width()
    }

    fn page_start(&self, layer: usize, page: usize) -> usize {
        assert!(
            layer < self.shape.layers && page < self.pages,
            "layer {layer}, page {page} of {}",
            self.pages
        );
        (layer * self.pages + page) * 2 * self.half_page()
    }

    /// Where the line of a slot starts; `part` is 0 for keys and 1 for values.
    fn line(&self, layer: usize, slot: usize, part: usize) -> usize {
        let (page, offset) = (slot / self.shape.page_len, slot % self.shape.page_len);
        self.page_start(layer, page) + part * self.half_page() + offset * self.width()
    }
}

/// Rounds a line of head_dim multiples to the cache's type.
fn round_to(ty: KvType, head_dim: usize, line: &mut [f32]) {
    match ty {
        KvType::F32 => {}
        KvType::F16 => line.iter_mut().for_each(|v| *v = Half::from_f32(*v).to_f32()),
        KvType::Q8_0 => {
            for head in line.chunks_mut(head_dim) {
                for block in head.chunks_mut(Q8_0::LEN) {
                    let mut padded = [0f32; Q8_0::LEN];
                    padded[..block.len()].copy_from_slice(block);
                    let quantized = Q8_0::quantize(&padded);
                    quantized.dequantize(&mut padded);
                    block.copy_from_slice(&padded[..block.len()]);
                }
            }
        }
    }
}

impl Backend for Reference {
    type Buffer = Vec<f32>;
    type Kv = ReferenceKv;

    fn label(&self) -> String {
        LABEL.into()
    }

    fn supports(&self, ty: QuantType) -> bool {
        ty.is_readable()
    }

    fn load(&self, _weight: QMatrix<'_>) -> Result<(), BackendError> {
        Ok(())
    }

    fn alloc(&self, len: usize) -> Result<Vec<f32>, BackendError> {
        host::zeros(LABEL, "a buffer", len)
    }

    fn upload(&self, src: &[f32], dst: &mut Vec<f32>) -> Result<(), BackendError> {
        host::upload(src, dst);
        Ok(())
    }

    fn download(&self, src: &Vec<f32>, offset: usize, dst: &mut [f32]) -> Result<(), BackendError> {
        host::download(src, offset, dst);
        Ok(())
    }

    fn gather(
        &self,
        src: &Vec<f32>,
        width: usize,
        rows: &[u32],
        dst: &mut Vec<f32>,
    ) -> Result<(), BackendError> {
        host::gather(src, width, rows, dst);
        Ok(())
    }

    fn embed(
        &self,
        table: QMatrix<'_>,
        tokens: &[u32],
        scale: f32,
        out: &mut Vec<f32>,
    ) -> Result<(), BackendError> {
        host::embed(table, tokens, scale, out).map_err(failed)
    }

    fn matmul(
        &self,
        x: &Vec<f32>,
        rows: usize,
        jobs: &mut [MatmulJob<'_, Vec<f32>>],
    ) -> Result<(), BackendError> {
        for job in jobs {
            let (n, k) = (job.weight.rows(), job.weight.cols());
            for row in 0..rows {
                let y = lora::matvec(job.weight, &x[row * k..][..k]).map_err(failed)?;
                job.out[row * n..][..n].copy_from_slice(&y);
            }
        }
        Ok(())
    }

    fn lora(
        &self,
        x: &Vec<f32>,
        in_width: usize,
        jobs: &mut [LoraJob<'_, Vec<f32>>],
    ) -> Result<(), BackendError> {
        for job in jobs {
            let y0 = job.out.clone();
            for group in job.groups {
                for (row, terms) in &group.rows {
                    let row = *row as usize;
                    let span = row * job.width..(row + 1) * job.width;
                    let x = &x[row * in_width..][..in_width];
                    lora::apply(group, terms, x, &y0[span.clone()], &mut job.out[span]).map_err(failed)?;
                }
            }
        }
        Ok(())
    }

    fn add_bias(&self, x: &mut Vec<f32>, rows: usize, bias: &[f32]) -> Result<(), BackendError> {
        for line in x.chunks_exact_mut(bias.len()).take(rows) {
            line.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
        Ok(())
    }

    fn add(&self, x: &mut Vec<f32>, y: &Vec<f32>, len: usize) -> Result<(), BackendError> {
        x[..len].iter_mut().zip(&y[..len]).for_each(|(x, y)| *x += y);
        Ok(())
    }

    fn rms_norm(
        &self,
        x: &Vec<f32>,
        rows: usize,
        weight: &[f32],
        eps: f32,
        out: &mut Vec<f32>,
    ) -> Result<(), BackendError> {
        let len = rows * weight.len();
        out[..len].copy_from_slice(&x[..len]);
        self.rms_norm_inplace(out, rows, weight, eps)
    }

    fn rms_norm_inplace(
        &self,
        x: &mut Vec<f32>,
        rows: usize,
        weight: &[f32],
        eps: f32,
    ) -> Result<(), BackendError> {
        for line in x.chunks_exact_mut(weight.len()).take(rows) {
            norm::rms_norm(line, weight, eps);
        }
        Ok(())
    }

    fn rope(
        &self,
        x: &mut Vec<f32>,
        heads: usize,
        head_dim: usize,
        positions: &[u32],
        rope: &Rope,
    ) -> Result<(), BackendError> {
        let mut table = Vec::new();
        for (line, position) in x.chunks_exact_mut(heads * head_dim).zip(positions) {
            rope::table(*position, rope, &mut table);
            line.chunks_exact_mut(head_dim).for_each(|head| rope::rotate(head, rope.style, &table));
        }
        Ok(())
    }

    fn glu(
        &self,
        act: Activation,
        gate: &mut Vec<f32>,
        up: &Vec<f32>,
        len: usize,
    ) -> Result<(), BackendError> {
        for (gate, up) in gate[..len].iter_mut().zip(&up[..len]) {
            *gate = glu::activate(act, *gate) * up;
        }
        Ok(())
    }

    fn softcap(&self, x: &mut Vec<f32>, len: usize, cap: f32) -> Result<(), BackendError> {
        x[..len].iter_mut().for_each(|x| *x = glu::softcap(*x, cap));
        Ok(())
    }

    fn top_k(
        &self,
        logits: &Vec<f32>,
        width: usize,
        real: usize,
        rows: &[u32],
        k: usize,
    ) -> Result<Option<Vec<Likeliest>>, BackendError> {
        let line = |row: &u32| &logits[*row as usize * width..][..width][..real];
        Ok(Some(rows.iter().map(|row| top_k::top_k(line(row), k)).collect()))
    }

    fn kv_alloc(&self, shape: KvShape, pages: usize) -> Result<ReferenceKv, BackendError> {
        let mut kv = ReferenceKv { shape, pages, data: Vec::new() };
        kv.data = host::zeros(LABEL, "the key-value cache", shape.layers * pages * 2 * kv.half_page())?;
        Ok(kv)
    }

    fn kv_write(
        &self,
        kv: &mut ReferenceKv,
        layer: usize,
        k: &Vec<f32>,
        v: &Vec<f32>,
        slots: &[u32],
    ) -> Result<(), BackendError> {
        let width = kv.width();
        for (i, slot) in slots.iter().enumerate() {
            for (part, src) in [k, v].into_iter().enumerate() {
                let start = kv.line(layer, *slot as usize, part);
                let line = &mut kv.data[start..start + width];
                line.copy_from_slice(&src[i * width..][..width]);
                round_to(kv.shape.ty, kv.shape.head_dim, line);
            }
        }
        Ok(())
    }

    fn kv_copy_page(&self, kv: &mut ReferenceKv, from: u32, to: u32) -> Result<(), BackendError> {
        let len = 2 * kv.half_page();
        for layer in 0..kv.shape.layers {
            let (from, to) = (kv.page_start(layer, from as usize), kv.page_start(layer, to as usize));
            kv.data.copy_within(from..from + len, to);
        }
        Ok(())
    }

    fn kv_read_page(&self, kv: &ReferenceKv, page: u32) -> Result<Vec<u8>, BackendError> {
        let pages = (0..kv.shape.layers).flat_map(|layer| {
            let start = kv.page_start(layer, page as usize);
            &kv.data[start..start + 2 * kv.half_page()]
        });
        Ok(pages.flat_map(|v| v.to_le_bytes()).collect())
    }

    fn kv_write_page(&self, kv: &mut ReferenceKv, page: u32, bytes: &[u8]) -> Result<(), BackendError> {
        let len = 2 * kv.half_page();
        if bytes.len() != kv.shape.layers * len * 4 {
            return Err(host::wrong_page(LABEL, kv.shape.layers * len * 4, bytes.len()));
        }
        let (values, _) = bytes.as_chunks::<4>();
        for (layer, values) in values.chunks_exact(len).enumerate() {
            let start = kv.page_start(layer, page as usize);
            for (dst, src) in kv.data[start..start + len].iter_mut().zip(values) {
                *dst = f32::from_le_bytes(*src);
            }
        }
        Ok(())
    }

    fn attention(
        &self,
        kv: &ReferenceKv,
        layer: usize,
        q: &Vec<f32>,
        rows: &[AttentionRow<'_>],
        params: &AttentionParams,
        out: &mut Vec<f32>,
    ) -> Result<(), BackendError> {
        let KvShape { head_dim, page_len, kv_heads, .. } = kv.shape;
        let group = params.n_heads / kv_heads;
        for (i, row) in rows.iter().enumerate() {
            let line = |p: u32, part, kv_head| {
                let slot = row.pages[p as usize / page_len] as usize * page_len + p as usize % page_len;
                let start = kv.line(layer, slot, part) + kv_head * head_dim;
                &kv.data[start..start + head_dim]
            };
            let seen = first_visible(row.position, params.window)..=row.position;
            for h in 0..params.n_heads {
                let span = (i * params.n_heads + h) * head_dim..(i * params.n_heads + h + 1) * head_dim;
                let (key, value) = (|p| line(p, 0, h / group), |p| line(p, 1, h / group));
                head(&q[span.clone()], params, seen.clone(), key, value, &mut out[span]);
            }
        }
        Ok(())
    }
}
