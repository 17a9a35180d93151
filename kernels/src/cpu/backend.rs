//! [`Cpu`]: all cores, the best instruction set.

use super::activations::Shared;
use super::adapted::{self, Layer, Workers, join};
use super::attention::attention;
use super::kv::CpuKv;
use super::lora::lora;
use super::matmul::{Input, Product, matmul};
use super::output::Output;
use super::pointwise::{Glu, RmsNorm, RopeTables, Softcap, split};
use super::repack::RepackedWeights;
use super::{Isa, ThreadOptions, ThreadPool, physical_cores};
use crate::backend::{
    Activation, AttentionParams, AttentionRow, Backend, BackendError, KvShape, LinearJob, LoraJob, MatmulJob,
    Rope, linear_in_two,
};
use crate::quant::{FormatError, QMatrix};
use crate::{QuantType, host};

/// The processor: vector kernels of one instruction set on a pool of threads.
pub struct Cpu {
    isa: Isa,
    pool: ThreadPool,
    /// For products inside tasks.
    serial: ThreadPool,
    rope_tables: RopeTables,
    /// `None`: weights are used where they are mapped.
    repacked: Option<RepackedWeights>,
}

impl Cpu {
    /// With `threads` threads (`None`: one per physical core) and the given instruction set.
    pub fn new(threads: Option<usize>, isa: Isa) -> Cpu {
        Cpu::with_options(threads, &ThreadOptions::default(), isa)
    }

    /// The same, with its threads where they are to be; see [`ThreadPool::with_options`].
    pub fn with_options(threads: Option<usize>, options: &ThreadOptions, isa: Isa) -> Cpu {
        let threads = threads.unwrap_or_else(physical_cores).clamp(1, 1024);
        let (pool, serial) = (ThreadPool::with_options(threads, options), ThreadPool::new(1));
        Cpu { isa, pool, serial, rope_tables: RopeTables::default(), repacked: None }
    }

    /// Copies every weight that [`Backend::load`] names, and whose format has a kernel for it, into an order in which 16 rows are read at
    /// once: faster to read and to take apart, for as many bytes of memory again.
    ///
    /// Loaded weights are found by their address: their bytes must stay where they are as long as this backend is used.
    pub fn with_repacking(mut self) -> Cpu {
        self.repacked = Some(RepackedWeights::default());
        self
    }

    /// Bytes of repacked weights.
    pub fn repacked_bytes(&self) -> usize {
        self.repacked.as_ref().map_or(0, RepackedWeights::bytes)
    }

    /// Threads that work at once.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Calls `work` with pieces of `x` that together are all of it, and where each starts; pieces are whole lines of
    /// `width`.
    fn pieces(&self, x: &mut [f32], width: usize, work: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        let shared = Shared(x.as_mut_ptr());
        split(&self.pool, x.len() / width, width, &|lines| {
            // SAFETY: the lines of `x`, and these belong to this range alone.
            work(lines.start * width, unsafe { shared.slice(lines.start * width, lines.len() * width) });
        });
    }

    /// [`adapted::linear`] with the groups of those jobs that can be joined.
    fn linear_in_one(
        &self,
        input: Input<'_>,
        jobs: &mut [LinearJob<'_, Vec<f32>>],
        joined: &[bool],
    ) -> Result<bool, BackendError> {
        let repacked = self.repacked.as_ref().map(RepackedWeights::read);
        let layers: Vec<_> = jobs
            .iter_mut()
            .zip(joined)
            .map(|(job, joined)| Layer {
                weight: job.weight,
                repacked: repacked.as_ref().and_then(|repacked| repacked.of(job.weight)),
                out: Output::set(job.out, job.weight.rows()),
                groups: if *joined { job.groups } else { &[] },
            })
            .collect();
        let workers = Workers { isa: self.isa, pool: &self.pool, serial: &self.serial };
        adapted::linear(workers, input, &layers).map_err(failed)
    }
}

const LABEL: &str = "cpu";

fn failed(error: FormatError) -> BackendError {
    match error {
        FormatError::Unsupported { ty } => BackendError::UnsupportedType { device: LABEL.into(), ty },
        other => BackendError::Device { device: LABEL.into(), message: other.to_string() },
    }
}

/// Elements that pointwise operations deal out at a time.
const PIECE: usize = 1024;

/// `len` rounded to whole pieces, and the rest.
fn whole(x: &mut [f32], len: usize) -> (&mut [f32], &mut [f32]) {
    x[..len].split_at_mut(len / PIECE * PIECE)
}

impl Backend for Cpu {
    type Buffer = Vec<f32>;
    type Kv = CpuKv;

    fn label(&self) -> String {
        format!("cpu ({}, {} threads)", self.isa.level(), self.pool.threads())
    }

    fn supports(&self, ty: QuantType) -> bool {
        ty.is_readable()
    }

    fn load(&self, weight: QMatrix<'_>) -> Result<(), BackendError> {
        self.repacked.as_ref().map_or(Ok(()), |repacked| repacked.add(&self.pool, weight))
    }

    fn alloc(&self, len: usize) -> Result<Vec<f32>, BackendError> {
        let mut buffer: Vec<f32> = host::zeros(LABEL, "a buffer", len)?;
        host::huge_pages(buffer.as_mut_ptr().cast(), size_of_val(&buffer[..]));
        Ok(buffer)
    }

    fn upload(&self, src: &[f32], dst: &mut Vec<f32>) -> Result<(), BackendError> {
        host::upload(src, dst);
        Ok(())
    }

    fn download(&self, src: &Vec<f32>, offset: usize, dst: &mut [f32]) -> Result<(), BackendError> {
        host::download(src, offset, dst);
        Ok(())
    }

    fn in_place<'a>(&self, buffer: &'a mut Vec<f32>) -> Option<&'a mut [f32]> {
        Some(buffer)
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
        let Some(columns) = jobs.first().map(|job| job.weight.cols()) else { return Ok(()) };
        let repacked = self.repacked.as_ref().map(RepackedWeights::read);
        let products: Vec<_> = jobs
            .iter_mut()
            .map(|job| {
                let repacked = repacked.as_ref().and_then(|repacked| repacked.of(job.weight));
                Product {
                    input: 0,
                    weight: job.weight,
                    repacked,
                    out: Output::set(job.out, job.weight.rows()),
                }
            })
            .collect();
        matmul(self.isa, &self.pool, &[Input { x, rows, columns }], &products).map_err(failed)
    }

    fn lora(
        &self,
        x: &Vec<f32>,
        in_width: usize,
        jobs: &mut [LoraJob<'_, Vec<f32>>],
    ) -> Result<(), BackendError> {
        lora(self.isa, &self.pool, &self.serial, x, in_width, jobs).map_err(failed)
    }

    fn linear(
        &self,
        x: &Vec<f32>,
        rows: usize,
        jobs: &mut [LinearJob<'_, Vec<f32>>],
    ) -> Result<(), BackendError> {
        let columns = jobs.first().map_or(0, |job| job.weight.cols());
        let joined: Vec<bool> = jobs.iter().map(|job| join(job.groups)).collect();
        let any = jobs.iter().zip(&joined).any(|(job, joined)| *joined && !job.groups.is_empty());
        if !any || columns == 0 || !self.linear_in_one(Input { x, rows, columns }, jobs, &joined)? {
            return linear_in_two(self, x, rows, jobs);
        }
        let mut rest: Vec<_> = jobs
            .iter_mut()
            .zip(&joined)
            .filter(|(_, joined)| !**joined)
            .map(|(job, _)| LoraJob { out: &mut *job.out, width: job.weight.rows(), groups: job.groups })
            .collect();
        if rest.is_empty() { Ok(()) } else { self.lora(x, columns, &mut rest) }
    }

    fn add_bias(&self, x: &mut Vec<f32>, rows: usize, bias: &[f32]) -> Result<(), BackendError> {
        self.pieces(&mut x[..rows * bias.len()], bias.len(), &|_, x| {
            for line in x.chunks_exact_mut(bias.len()) {
                line.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
            }
        });
        Ok(())
    }

    fn add(&self, x: &mut Vec<f32>, y: &Vec<f32>, len: usize) -> Result<(), BackendError> {
        let add = |start: usize, x: &mut [f32]| x.iter_mut().zip(&y[start..]).for_each(|(x, y)| *x += y);
        let (x, rest) = whole(x, len);
        add(x.len(), rest);
        self.pieces(x, PIECE, &add);
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
        self.pieces(&mut out[..len], weight.len(), &|start, out| {
            out.copy_from_slice(&x[start..start + out.len()]);
            self.isa.run(RmsNorm { x: out, weight, eps });
        });
        Ok(())
    }

    fn rms_norm_inplace(
        &self,
        x: &mut Vec<f32>,
        rows: usize,
        weight: &[f32],
        eps: f32,
    ) -> Result<(), BackendError> {
        self.pieces(&mut x[..rows * weight.len()], weight.len(), &|_, x| {
            self.isa.run(RmsNorm { x, weight, eps });
        });
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
        self.rope_tables.rotate(self.isa, &self.pool, x, (heads, head_dim), positions, rope);
        Ok(())
    }

    fn glu(
        &self,
        act: Activation,
        gate: &mut Vec<f32>,
        up: &Vec<f32>,
        len: usize,
    ) -> Result<(), BackendError> {
        let up = &up[..len];
        let (gate, rest) = whole(gate, len);
        self.isa.run(Glu { act, up: &up[gate.len()..], gate: rest });
        self.pieces(gate, PIECE, &|start, gate| {
            self.isa.run(Glu { act, up: &up[start..start + gate.len()], gate });
        });
        Ok(())
    }

    fn softcap(&self, x: &mut Vec<f32>, len: usize, cap: f32) -> Result<(), BackendError> {
        let (x, rest) = whole(x, len);
        self.isa.run(Softcap { x: rest, cap });
        self.pieces(x, PIECE, &|_, x| self.isa.run(Softcap { x, cap }));
        Ok(())
    }

    fn kv_alloc(&self, shape: KvShape, pages: usize) -> Result<CpuKv, BackendError> {
        CpuKv::new(shape, pages)
    }

    fn kv_write(
        &self,
        kv: &mut CpuKv,
        layer: usize,
        k: &Vec<f32>,
        v: &Vec<f32>,
        slots: &[u32],
    ) -> Result<(), BackendError> {
        kv.write(self.isa, &self.pool, layer, k, v, slots);
        Ok(())
    }

    fn kv_copy_page(&self, kv: &mut CpuKv, from: u32, to: u32) -> Result<(), BackendError> {
        kv.copy_page(from as usize, to as usize);
        Ok(())
    }

    fn kv_read_page(&self, kv: &CpuKv, page: u32) -> Result<Vec<u8>, BackendError> {
        Ok(kv.read_page(page as usize))
    }

    fn kv_write_page(&self, kv: &mut CpuKv, page: u32, bytes: &[u8]) -> Result<(), BackendError> {
        kv.write_page(page as usize, bytes)
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
        attention(self.isa, &self.pool, kv, layer, q, rows, params, out);
        Ok(())
    }

    fn on_host(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.pool.run(tasks, task);
    }
}
