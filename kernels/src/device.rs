//! The device that an engine runs on, chosen when it is opened.

use crate::backend::{
    Activation, AttentionParams, AttentionRow, Backend, BackendError, KvShape, Likeliest, LinearJob, LoraJob,
    LoraWeight, MatmulJob, Rope,
};
use crate::cpu::{Cpu, CpuKv, Isa, ThreadOptions};
use crate::{QMatrix, QuantType};
#[cfg(feature = "cuda")]
use crate::{
    Split,
    cpu::physical_cores,
    cuda::{Cuda, CudaBuffer, CudaKv},
    split::{SplitBuffer, SplitKv},
};

/// Which device to run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The best that is known to work: today the processor, because the CUDA backend has not been seen on hardware.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// The NVIDIA device with this number; an error where there is none.
    Cuda(u32),
}

/// One of the backends.
pub enum Device {
    /// The processor.
    Cpu(Box<Cpu>),
    /// An NVIDIA device.
    #[cfg(feature = "cuda")]
    Cuda(Box<Cuda>),
    /// The processor for the first layers, an NVIDIA device for the last ones.
    #[cfg(feature = "cuda")]
    Split(Box<Split<Cpu, Cuda>>),
}

/// A buffer of a [`Device`].
pub enum DeviceBuffer {
    /// In the host's memory.
    Cpu(Vec<f32>),
    /// In the device's.
    #[cfg(feature = "cuda")]
    Cuda(CudaBuffer),
    /// In both.
    #[cfg(feature = "cuda")]
    Split(SplitBuffer<CudaBuffer>),
}

/// A key-value cache of a [`Device`].
pub enum DeviceKv {
    /// In the host's memory.
    Cpu(CpuKv),
    /// In the device's.
    #[cfg(feature = "cuda")]
    Cuda(CudaKv),
    /// Some layers in each.
    #[cfg(feature = "cuda")]
    Split(SplitKv<CpuKv, CudaKv>),
}

impl Device {
    /// The chosen device; `isa` is for the processor, `threads` and `options` also for what the host of a device does
    /// ([`Backend::on_host`]).
    ///
    /// # Errors
    /// If it is not there, in one line that says what is missing.
    pub fn open(
        choice: DeviceChoice,
        threads: Option<usize>,
        options: &ThreadOptions,
        isa: Isa,
    ) -> Result<Device, BackendError> {
        match choice {
            DeviceChoice::Auto | DeviceChoice::Cpu => {
                Ok(Device::Cpu(Box::new(Cpu::with_options(threads, options, isa))))
            }
            #[cfg(feature = "cuda")]
            DeviceChoice::Cuda(number) => {
                let threads = threads.unwrap_or_else(physical_cores);
                Ok(Device::Cuda(Box::new(Cuda::open(number)?.with_host_threads(threads, *options))))
            }
            #[cfg(not(feature = "cuda"))]
            DeviceChoice::Cuda(_) => Err(BackendError::Device {
                device: "cuda".into(),
                message: "this build has no CUDA: build with the feature `cuda`, or run on the CPU".into(),
            }),
        }
    }

    /// (free, total) bytes of memory, of a device that has its own.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn memory(&self) -> Result<Option<(usize, usize)>, BackendError> {
        match self {
            Device::Cpu(_) => Ok(None),
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => cuda.memory().map(Some),
            #[cfg(feature = "cuda")]
            Device::Split(split) => split.device().memory().map(Some),
        }
    }

    /// Bytes that copies of adapters may have on a device with memory of its own; `None`, as it is at first, is all but 1/32 of
    /// that memory, as far as nothing else has it. Nothing on the processor.
    pub fn set_adapter_budget(&self, bytes: Option<usize>) {
        match self {
            Device::Cpu(_) => {
                let _ = bytes;
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => cuda.set_adapter_budget(bytes),
            #[cfg(feature = "cuda")]
            Device::Split(split) => split.device().set_adapter_budget(bytes),
        }
    }

    /// Bytes of weights that the processor has repacked ([`Cpu::with_repacking`]), also of a few layers.
    pub fn repacked_bytes(&self) -> usize {
        match self {
            Device::Cpu(cpu) => cpu.repacked_bytes(),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => 0,
            #[cfg(feature = "cuda")]
            Device::Split(split) => split.host().repacked_bytes(),
        }
    }

    /// The same for layers `first..`, with the processor for those before and for what is not loaded. Of a processor, the processor.
    pub fn behind(self, host: Cpu, first: usize) -> Device {
        match self {
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => Device::Split(Box::new(Split::new(host, *cuda, first))),
            other => {
                let _ = (host, first);
                other
            }
        }
    }
}

/// Buffers belong to the engine that made them, so this is a mistake in the program.
#[cfg(feature = "cuda")]
fn mixed() -> ! {
    panic!("a buffer or cache of another device")
}

/// Calls the backend that there is with what lies behind its buffers.
macro_rules! on {
    ($self:ident, |$b:ident $(, $buffer:ident: $ty:ident)*| $call:expr) => {
        match ($self, $($buffer),*) {
            (Device::Cpu($b), $($ty::Cpu($buffer)),*) => $call,
            #[cfg(feature = "cuda")]
            (Device::Cuda($b), $($ty::Cuda($buffer)),*) => $call,
            #[cfg(feature = "cuda")]
            (Device::Split($b), $($ty::Split($buffer)),*) => $call,
            #[cfg(feature = "cuda")]
            #[allow(unreachable_patterns)]
            _ => mixed(),
        }
    };
}

/// The jobs of one device.
macro_rules! jobs {
    ($jobs:ident, $variant:ident, $job:ident { $($field:ident),* }) => {
        $jobs
            .iter_mut()
            .map(|job| match &mut *job.out {
                DeviceBuffer::$variant(out) => $job { out, $($field: job.$field),* },
                #[cfg(feature = "cuda")]
                _ => mixed(),
            })
            .collect::<Vec<_>>()
    };
}

impl Backend for Device {
    type Buffer = DeviceBuffer;
    type Kv = DeviceKv;

    fn label(&self) -> String {
        on!(self, |b| b.label())
    }

    fn supports(&self, ty: QuantType) -> bool {
        on!(self, |b| b.supports(ty))
    }

    fn load(&self, weight: QMatrix<'_>) -> Result<(), BackendError> {
        on!(self, |b| b.load(weight))
    }

    fn prefetch(&self, weights: &mut dyn Iterator<Item = LoraWeight<'_>>) -> Result<(), BackendError> {
        on!(self, |b| b.prefetch(weights))
    }

    fn alloc(&self, len: usize) -> Result<DeviceBuffer, BackendError> {
        match self {
            Device::Cpu(b) => b.alloc(len).map(DeviceBuffer::Cpu),
            #[cfg(feature = "cuda")]
            Device::Cuda(b) => b.alloc(len).map(DeviceBuffer::Cuda),
            #[cfg(feature = "cuda")]
            Device::Split(b) => b.alloc(len).map(DeviceBuffer::Split),
        }
    }

    fn upload(&self, src: &[f32], dst: &mut DeviceBuffer) -> Result<(), BackendError> {
        on!(self, |b, dst: DeviceBuffer| b.upload(src, dst))
    }

    fn download(&self, src: &DeviceBuffer, offset: usize, dst: &mut [f32]) -> Result<(), BackendError> {
        on!(self, |b, src: DeviceBuffer| b.download(src, offset, dst))
    }

    fn in_place<'a>(&self, buffer: &'a mut DeviceBuffer) -> Option<&'a mut [f32]> {
        on!(self, |b, buffer: DeviceBuffer| b.in_place(buffer))
    }

    fn gather(
        &self,
        src: &DeviceBuffer,
        width: usize,
        rows: &[u32],
        dst: &mut DeviceBuffer,
    ) -> Result<(), BackendError> {
        on!(self, |b, src: DeviceBuffer, dst: DeviceBuffer| b.gather(src, width, rows, dst))
    }

    fn embed(
        &self,
        table: QMatrix<'_>,
        tokens: &[u32],
        scale: f32,
        out: &mut DeviceBuffer,
    ) -> Result<(), BackendError> {
        on!(self, |b, out: DeviceBuffer| b.embed(table, tokens, scale, out))
    }

    fn matmul(
        &self,
        x: &DeviceBuffer,
        rows: usize,
        jobs: &mut [MatmulJob<'_, DeviceBuffer>],
    ) -> Result<(), BackendError> {
        match (self, x) {
            (Device::Cpu(b), DeviceBuffer::Cpu(x)) => {
                b.matmul(x, rows, &mut jobs!(jobs, Cpu, MatmulJob { weight }))
            }
            #[cfg(feature = "cuda")]
            (Device::Cuda(b), DeviceBuffer::Cuda(x)) => {
                b.matmul(x, rows, &mut jobs!(jobs, Cuda, MatmulJob { weight }))
            }
            #[cfg(feature = "cuda")]
            (Device::Split(b), DeviceBuffer::Split(x)) => {
                b.matmul(x, rows, &mut jobs!(jobs, Split, MatmulJob { weight }))
            }
            #[cfg(feature = "cuda")]
            _ => mixed(),
        }
    }

    fn lora(
        &self,
        x: &DeviceBuffer,
        in_width: usize,
        jobs: &mut [LoraJob<'_, DeviceBuffer>],
    ) -> Result<(), BackendError> {
        match (self, x) {
            (Device::Cpu(b), DeviceBuffer::Cpu(x)) => {
                b.lora(x, in_width, &mut jobs!(jobs, Cpu, LoraJob { width, groups }))
            }
            #[cfg(feature = "cuda")]
            (Device::Cuda(b), DeviceBuffer::Cuda(x)) => {
                b.lora(x, in_width, &mut jobs!(jobs, Cuda, LoraJob { width, groups }))
            }
            #[cfg(feature = "cuda")]
            (Device::Split(b), DeviceBuffer::Split(x)) => {
                b.lora(x, in_width, &mut jobs!(jobs, Split, LoraJob { width, groups }))
            }
            #[cfg(feature = "cuda")]
            _ => mixed(),
        }
    }

    fn linear(
        &self,
        x: &DeviceBuffer,
        rows: usize,
        jobs: &mut [LinearJob<'_, DeviceBuffer>],
    ) -> Result<(), BackendError> {
        match (self, x) {
            (Device::Cpu(b), DeviceBuffer::Cpu(x)) => {
                b.linear(x, rows, &mut jobs!(jobs, Cpu, LinearJob { weight, groups }))
            }
            #[cfg(feature = "cuda")]
            (Device::Cuda(b), DeviceBuffer::Cuda(x)) => {
                b.linear(x, rows, &mut jobs!(jobs, Cuda, LinearJob { weight, groups }))
            }
            #[cfg(feature = "cuda")]
            (Device::Split(b), DeviceBuffer::Split(x)) => {
                b.linear(x, rows, &mut jobs!(jobs, Split, LinearJob { weight, groups }))
            }
            #[cfg(feature = "cuda")]
            _ => mixed(),
        }
    }

    fn add_bias(&self, x: &mut DeviceBuffer, rows: usize, bias: &[f32]) -> Result<(), BackendError> {
        on!(self, |b, x: DeviceBuffer| b.add_bias(x, rows, bias))
    }

    fn add(&self, x: &mut DeviceBuffer, y: &DeviceBuffer, len: usize) -> Result<(), BackendError> {
        on!(self, |b, x: DeviceBuffer, y: DeviceBuffer| b.add(x, y, len))
    }

    fn rms_norm(
        &self,
        x: &DeviceBuffer,
        rows: usize,
        weight: &[f32],
        eps: f32,
        out: &mut DeviceBuffer,
    ) -> Result<(), BackendError> {
        on!(self, |b, x: DeviceBuffer, out: DeviceBuffer| b.rms_norm(x, rows, weight, eps, out))
    }

    fn rms_norm_inplace(
        &self,
        x: &mut DeviceBuffer,
        rows: usize,
        weight: &[f32],
        eps: f32,
    ) -> Result<(), BackendError> {
        on!(self, |b, x: DeviceBuffer| b.rms_norm_inplace(x, rows, weight, eps))
    }

    fn rope(
        &self,
        x: &mut DeviceBuffer,
        heads: usize,
        head_dim: usize,
        positions: &[u32],
        rope: &Rope,
    ) -> Result<(), BackendError> {
        on!(self, |b, x: DeviceBuffer| b.rope(x, heads, head_dim, positions, rope))
    }

    fn glu(
        &self,
        act: Activation,
        gate: &mut DeviceBuffer,
        up: &DeviceBuffer,
        len: usize,
    ) -> Result<(), BackendError> {
        on!(self, |b, gate: DeviceBuffer, up: DeviceBuffer| b.glu(act, gate, up, len))
    }

    fn softcap(&self, x: &mut DeviceBuffer, len: usize, cap: f32) -> Result<(), BackendError> {
        on!(self, |b, x: DeviceBuffer| b.softcap(x, len, cap))
    }

    fn top_k(
        &self,
        logits: &DeviceBuffer,
        width: usize,
        real: usize,
        rows: &[u32],
        k: usize,
    ) -> Result<Option<Vec<Likeliest>>, BackendError> {
        on!(self, |b, logits: DeviceBuffer| b.top_k(logits, width, real, rows, k))
    }

    fn kv_alloc(&self, shape: KvShape, pages: usize) -> Result<DeviceKv, BackendError> {
        match self {
            Device::Cpu(b) => b.kv_alloc(shape, pages).map(DeviceKv::Cpu),
            #[cfg(feature = "cuda")]
            Device::Cuda(b) => b.kv_alloc(shape, pages).map(DeviceKv::Cuda),
            #[cfg(feature = "cuda")]
            Device::Split(b) => b.kv_alloc(shape, pages).map(DeviceKv::Split),
        }
    }

    fn kv_write(
        &self,
        kv: &mut DeviceKv,
        layer: usize,
        k: &DeviceBuffer,
        v: &DeviceBuffer,
        slots: &[u32],
    ) -> Result<(), BackendError> {
        on!(self, |b, kv: DeviceKv, k: DeviceBuffer, v: DeviceBuffer| b.kv_write(kv, layer, k, v, slots))
    }

    fn kv_copy_page(&self, kv: &mut DeviceKv, from: u32, to: u32) -> Result<(), BackendError> {
        on!(self, |b, kv: DeviceKv| b.kv_copy_page(kv, from, to))
    }

    fn kv_read_page(&self, kv: &DeviceKv, page: u32) -> Result<Vec<u8>, BackendError> {
        on!(self, |b, kv: DeviceKv| b.kv_read_page(kv, page))
    }

    fn kv_write_page(&self, kv: &mut DeviceKv, page: u32, bytes: &[u8]) -> Result<(), BackendError> {
        on!(self, |b, kv: DeviceKv| b.kv_write_page(kv, page, bytes))
    }

    fn attention(
        &self,
        kv: &DeviceKv,
        layer: usize,
        q: &DeviceBuffer,
        rows: &[AttentionRow<'_>],
        params: &AttentionParams,
        out: &mut DeviceBuffer,
    ) -> Result<(), BackendError> {
        on!(self, |b, kv: DeviceKv, q: DeviceBuffer, out: DeviceBuffer| b
            .attention(kv, layer, q, rows, params, out))
    }

    fn flush(&self) -> Result<(), BackendError> {
        on!(self, |b| b.flush())
    }

    fn on_host(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        on!(self, |b| b.on_host(tasks, task))
    }
}
