//! [`Cpu`]: all cores, the best instruction set.

use super::matmul::{Product, matmul};
use super::{Isa, ThreadPool, physical_cores};
use crate::QuantType;
use crate::backend::{
    Activation, AttentionParams, AttentionRow, Backend, BackendError, KvShape, LoraJob, MatmulJob, Rope,
};
use crate::ops::{Reference, ReferenceKv};
use crate::quant::{FormatError, QMatrix};

/// The processor: vector kernels of one instruction set on a pool of threads.
pub struct Cpu {
    isa: Isa,
    pool: ThreadPool,
    reference: Reference,
}

/// Keys and values in main memory.
pub struct CpuKv(ReferenceKv);

impl Cpu {
    /// With `threads` threads (`None`: one per physical core) and the given instruction set.
    pub fn new(threads: Option<usize>, isa: Isa) -> Cpu {
        let threads = threads.unwrap_or_else(physical_cores).clamp(1, 1024);
        Cpu { isa, pool: ThreadPool::new(threads), reference: Reference }
    }

    /// Threads that work at once.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

fn failed(error: FormatError) -> BackendError {
    match error {
        FormatError::Unsupported { ty } => BackendError::UnsupportedType { device: "cpu".into(), ty },
        other => BackendError::Device { device: "cpu".into(), message: other.to_string() },
    }
}

impl Backend for Cpu {
    type Buffer = Vec<f32>;
    type Kv = CpuKv;

    fn label(&self) -> String {
        format!("cpu ({}, {} threads)", self.isa.level(), self.pool.threads())
    }

    fn supports(&self, ty: QuantType) -> bool {
        self.reference.supports(ty)
    }

    fn load(&self, weight: QMatrix<'_>) -> Result<(), BackendError> {
        self.reference.load(weight)
    }

    fn alloc(&self, len: usize) -> Result<Vec<f32>, BackendError> {
        self.reference.alloc(len)
    }

    fn upload(&self, src: &[f32], dst: &mut Vec<f32>) -> Result<(), BackendError> {
        self.reference.upload(src, dst)
    }

    fn download(&self, src: &Vec<f32>, offset: usize, dst: &mut [f32]) -> Result<(), BackendError> {
        self.reference.download(src, offset, dst)
    }

    fn gather(
        &self,
        src: &Vec<f32>,
        width: usize,
        rows: &[u32],
        dst: &mut Vec<f32>,
    ) -> Result<(), BackendError> {
        self.reference.gather(src, width, rows, dst)
    }

    fn embed(
        &self,
        table: QMatrix<'_>,
        tokens: &[u32],
        scale: f32,
        out: &mut Vec<f32>,
    ) -> Result<(), BackendError> {
        self.reference.embed(table, tokens, scale, out)
    }

    fn matmul(
        &self,
        x: &Vec<f32>,
        rows: usize,
        jobs: &mut [MatmulJob<'_, Vec<f32>>],
    ) -> Result<(), BackendError> {
        let mut products: Vec<_> =
            jobs.iter_mut().map(|job| Product { weight: job.weight, out: job.out.as_mut_slice() }).collect();
        matmul(self.isa, &self.pool, x, rows, &mut products).map_err(failed)
    }

    fn lora(
        &self,
        x: &Vec<f32>,
        in_width: usize,
        jobs: &mut [LoraJob<'_, Vec<f32>>],
    ) -> Result<(), BackendError> {
        self.reference.lora(x, in_width, jobs)
    }

    fn add_bias(&self, x: &mut Vec<f32>, rows: usize, bias: &[f32]) -> Result<(), BackendError> {
        self.reference.add_bias(x, rows, bias)
    }

    fn add(&self, x: &mut Vec<f32>, y: &Vec<f32>, len: usize) -> Result<(), BackendError> {
        self.reference.add(x, y, len)
    }

    fn rms_norm(
        &self,
        x: &Vec<f32>,
        rows: usize,
        weight: &[f32],
        eps: f32,
        out: &mut Vec<f32>,
    ) -> Result<(), BackendError> {
        self.reference.rms_norm(x, rows, weight, eps, out)
    }

    fn rms_norm_inplace(
        &self,
        x: &mut Vec<f32>,
        rows: usize,
        weight: &[f32],
        eps: f32,
    ) -> Result<(), BackendError> {
        self.reference.rms_norm_inplace(x, rows, weight, eps)
    }

    fn rope(
        &self,
        x: &mut Vec<f32>,
        heads: usize,
        head_dim: usize,
        positions: &[u32],
        rope: &Rope,
    ) -> Result<(), BackendError> {
        self.reference.rope(x, heads, head_dim, positions, rope)
    }

    fn glu(
        &self,
        act: Activation,
        gate: &mut Vec<f32>,
        up: &Vec<f32>,
        len: usize,
    ) -> Result<(), BackendError> {
        self.reference.glu(act, gate, up, len)
    }

    fn softcap(&self, x: &mut Vec<f32>, len: usize, cap: f32) -> Result<(), BackendError> {
        self.reference.softcap(x, len, cap)
    }

    fn kv_alloc(&self, shape: KvShape, pages: usize) -> Result<CpuKv, BackendError> {
        self.reference.kv_alloc(shape, pages).map(CpuKv)
    }

    fn kv_write(
        &self,
        kv: &mut CpuKv,
        layer: usize,
        k: &Vec<f32>,
        v: &Vec<f32>,
        slots: &[u32],
    ) -> Result<(), BackendError> {
        self.reference.kv_write(&mut kv.0, layer, k, v, slots)
    }

    fn kv_copy_page(&self, kv: &mut CpuKv, from: u32, to: u32) -> Result<(), BackendError> {
        self.reference.kv_copy_page(&mut kv.0, from, to)
    }

    fn kv_read_page(&self, kv: &CpuKv, page: u32) -> Result<Vec<u8>, BackendError> {
        self.reference.kv_read_page(&kv.0, page)
    }

    fn kv_write_page(&self, kv: &mut CpuKv, page: u32, bytes: &[u8]) -> Result<(), BackendError> {
        self.reference.kv_write_page(&mut kv.0, page, bytes)
    }

    fn attention(
        &self,
        kv: &CpuKv,
        layer: usize,
        q: &Vec<f32>,
        rows: &[AttentionRow<'_>],
        params: &AttentionParams,
        out: &mut Vec<f32>,
    ) -> Result<(), BackendError> {
        self.reference.attention(&kv.0, layer, q, rows, params, out)
    }
}
