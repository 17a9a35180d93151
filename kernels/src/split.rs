//! Two backends as one, for a model that a device has no room for: the first layers on the host, the last ones on the device.
//!
//! Products are made where the weight is: on the device if it was loaded there, else on the host. Keys and values of a layer lie where
//! its attention is computed. Everything else happens where its input was written last, so that between two layers
//! on the same side nothing moves; between the halves one state per row does, once or twice.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use crate::backend::{
    Activation, AttentionParams, AttentionRow, Backend, BackendError, KvShape, Likeliest, LinearJob, LoraJob,
    LoraWeight, MatmulJob, Rope,
};
use crate::host::wrong_page;
use crate::{QMatrix, QuantType};

/// A host and a device.
pub struct Split<H, D> {
    host: H,
    device: D,
    /// The first layer whose keys and values lie on the device.
    first: usize,
    /// Address and length of the weights that the device has.
    loaded: RwLock<HashSet<(usize, usize)>>,
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Host,
    Device,
}

/// Floats on either side.
pub struct SplitBuffer<B>(Mutex<Places<B>>);

/// What lies where.
struct Places<B> {
    host: Vec<f32>,
    device: B,
    /// Floats that were written.
    used: usize,
    /// Where they were written last, or are about to be used.
    side: Side,
    /// Whether the other side has the same.
    both: bool,
}

/// Keys and values; `None` where a side has no layers.
pub struct SplitKv<H, D> {
    host: Option<H>,
    device: Option<D>,
    /// Bytes of a page on the host and on the device, once somebody has asked.
    page_bytes: OnceLock<(usize, usize)>,
}

impl<B> SplitBuffer<B> {
    fn lock(&self) -> MutexGuard<'_, Places<B>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get_mut(&mut self) -> &mut Places<B> {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B> Places<B> {
    /// `len` floats are about to be written on a side.
    fn written(&mut self, side: Side, len: usize) {
        (self.side, self.used, self.both) = (side, len, false);
    }

    /// What is there will be changed where it lies.
    fn changed(&mut self) {
        self.both = false;
    }
}

impl<H: Backend<Buffer = Vec<f32>>, D: Backend> Split<H, D> {
    /// Layers `first..` on the device, those before on the host.
    pub fn new(host: H, device: D, first: usize) -> Split<H, D> {
        Split { host, device, first, loaded: RwLock::default() }
    }

    /// What computes the first layers.
    pub fn host(&self) -> &H {
        &self.host
    }

    /// What computes the last ones.
    pub fn device(&self) -> &D {
        &self.device
    }

    fn side_of(&self, weight: QMatrix<'_>) -> Side {
        let loaded = self.loaded.read().unwrap_or_else(PoisonError::into_inner);
        if loaded.contains(&key(weight)) { Side::Device } else { Side::Host }
    }

    /// Where a product is made; `out` is about to receive it.
    fn product_of(&self, weight: QMatrix<'_>, rows: usize, out: &mut SplitBuffer<D::Buffer>) -> Side {
        let side = self.side_of(weight);
        out.get_mut().written(side, rows * weight.rows());
        side
    }

    /// Has a buffer's floats on a side.
    fn bring(&self, buffer: &mut Places<D::Buffer>, side: Side) -> Result<(), BackendError> {
        if buffer.side != side {
            if !buffer.both {
                match side {
                    Side::Host => self.device.download(&buffer.device, 0, &mut buffer.host[..buffer.used])?,
                    Side::Device => self.device.upload(&buffer.host[..buffer.used], &mut buffer.device)?,
                }
            }
            (buffer.side, buffer.both) = (side, true);
        }
        Ok(())
    }

    /// A buffer with its floats on a side.
    fn on<'a>(
        &self,
        buffer: &'a SplitBuffer<D::Buffer>,
        side: Side,
    ) -> Result<MutexGuard<'a, Places<D::Buffer>>, BackendError> {
        let mut buffer = buffer.lock();
        self.bring(&mut buffer, side)?;
        Ok(buffer)
    }

    /// Splits the jobs of one input between the sides.
    fn divide<J>(
        &self,
        x: &SplitBuffer<D::Buffer>,
        jobs: &mut [J],
        side: impl Fn(&mut J) -> Side,
        host: impl FnOnce(&Vec<f32>, &mut [&mut J]) -> Result<(), BackendError>,
        device: impl FnOnce(&D::Buffer, &mut [&mut J]) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        let mut parts: [Vec<&mut J>; 2] = Default::default();
        for job in jobs {
            let side = side(job);
            parts[side as usize].push(job);
        }
        let [on_host, on_device] = &mut parts;
        if !on_host.is_empty() {
            host(&self.on(x, Side::Host)?.host, on_host)?;
        }
        if !on_device.is_empty() {
            device(&self.on(x, Side::Device)?.device, on_device)?;
        }
        Ok(())
    }

    /// The layer as its side counts it.
    fn place(&self, layer: usize) -> (Side, usize) {
        match layer.checked_sub(self.first) {
            Some(layer) => (Side::Device, layer),
            None => (Side::Host, layer),
        }
    }
}

fn key(weight: QMatrix<'_>) -> (usize, usize) {
    (weight.bytes().as_ptr().addr(), weight.bytes().len())
}

/// The jobs with what lies behind their outputs on one side.
macro_rules! jobs {
    ($jobs:ident, $side:ident, $job:ident { $($field:ident),* }) => {
        &mut $jobs
            .iter_mut()
            .map(|job| $job { out: &mut job.out.get_mut().$side, $($field: job.$field),* })
            .collect::<Vec<_>>()
    };
}

/// A layer was asked for on a side that has none.
fn no_layers() -> BackendError {
    BackendError::Device { device: "split".into(), message: "a layer that the cache was not made for".into() }
}

impl<H: Backend<Buffer = Vec<f32>>, D: Backend> Backend for Split<H, D> {
    type Buffer = SplitBuffer<D::Buffer>;
    type Kv = SplitKv<H::Kv, D::Kv>;

    fn label(&self) -> String {
        let before = self.first;
        format!("{}, layers before {before} on {}", self.device.label(), self.host.label())
    }

    fn supports(&self, ty: QuantType) -> bool {
        self.host.supports(ty)
    }

    /// On the device; what it has no kernel for is left to the host.
    fn load(&self, weight: QMatrix<'_>) -> Result<(), BackendError> {
        if !self.device.supports(weight.ty()) {
            return self.host.load(weight);
        }
        self.device.load(weight)?;
        self.loaded.write().unwrap_or_else(PoisonError::into_inner).insert(key(weight));
        Ok(())
    }

    fn prefetch(&self, weights: &mut dyn Iterator<Item = LoraWeight<'_>>) -> Result<(), BackendError> {
        self.device.prefetch(&mut weights.filter(|weight| self.side_of(weight.layer) == Side::Device))
    }

    fn alloc(&self, len: usize) -> Result<Self::Buffer, BackendError> {
        let (host, device) = (self.host.alloc(len)?, self.device.alloc(len)?);
        Ok(SplitBuffer(Mutex::new(Places { host, device, used: len, side: Side::Host, both: true })))
    }

    fn upload(&self, src: &[f32], dst: &mut Self::Buffer) -> Result<(), BackendError> {
        let dst = dst.get_mut();
        dst.written(Side::Host, src.len());
        self.host.upload(src, &mut dst.host)
    }

    fn download(&self, src: &Self::Buffer, offset: usize, dst: &mut [f32]) -> Result<(), BackendError> {
        let src = src.lock();
        match src.side {
            Side::Host => self.host.download(&src.host, offset, dst),
            Side::Device => self.device.download(&src.device, offset, dst),
        }
    }

    fn gather(
        &self,
        src: &Self::Buffer,
        width: usize,
        rows: &[u32],
        dst: &mut Self::Buffer,
    ) -> Result<(), BackendError> {
        let (src, dst) = (src.lock(), dst.get_mut());
        dst.written(src.side, rows.len() * width);
        match src.side {
            Side::Host => self.host.gather(&src.host, width, rows, &mut dst.host),
            Side::Device => self.device.gather(&src.device, width, rows, &mut dst.device),
        }
    }

    fn embed(
        &self,
        table: QMatrix<'_>,
        tokens: &[u32],
        scale: f32,
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError> {
        let (side, out) = (self.side_of(table), out.get_mut());
        out.written(side, tokens.len() * table.cols());
        match side {
            Side::Host => self.host.embed(table, tokens, scale, &mut out.host),
            Side::Device => self.device.embed(table, tokens, scale, &mut out.device),
        }
    }

    fn matmul(
        &self,
        x: &Self::Buffer,
        rows: usize,
        jobs: &mut [MatmulJob<'_, Self::Buffer>],
    ) -> Result<(), BackendError> {
        self.divide(
            x,
            jobs,
            |job| self.product_of(job.weight, rows, job.out),
            |x, jobs| self.host.matmul(x, rows, jobs!(jobs, host, MatmulJob { weight })),
            |x, jobs| self.device.matmul(x, rows, jobs!(jobs, device, MatmulJob { weight })),
        )
    }

    fn lora(
        &self,
        x: &Self::Buffer,
        in_width: usize,
        jobs: &mut [LoraJob<'_, Self::Buffer>],
    ) -> Result<(), BackendError> {
        // Where the layer itself was.
        let out = |job: &mut LoraJob<'_, Self::Buffer>| {
            let out = job.out.get_mut();
            out.changed();
            out.side
        };
        self.divide(
            x,
            jobs,
            out,
            |x, jobs| self.host.lora(x, in_width, jobs!(jobs, host, LoraJob { width, groups })),
            |x, jobs| self.device.lora(x, in_width, jobs!(jobs, device, LoraJob { width, groups })),
        )
    }

    fn linear(
        &self,
        x: &Self::Buffer,
        rows: usize,
        jobs: &mut [LinearJob<'_, Self::Buffer>],
    ) -> Result<(), BackendError> {
        self.divide(
            x,
            jobs,
            |job| self.product_of(job.weight, rows, job.out),
            |x, jobs| self.host.linear(x, rows, jobs!(jobs, host, LinearJob { weight, groups })),
            |x, jobs| self.device.linear(x, rows, jobs!(jobs, device, LinearJob { weight, groups })),
        )
    }

    fn add_bias(&self, x: &mut Self::Buffer, rows: usize, bias: &[f32]) -> Result<(), BackendError> {
        let x = x.get_mut();
        x.changed();
        match x.side {
            Side::Host => self.host.add_bias(&mut x.host, rows, bias),
            Side::Device => self.device.add_bias(&mut x.device, rows, bias),
        }
    }

    /// Where `y` is: it is what was computed last, and with it the state that rows carry from layer to layer moves to the device.
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer, len: usize) -> Result<(), BackendError> {
        let (x, y) = (x.get_mut(), y.lock());
        self.bring(x, y.side)?;
        x.changed();
        match y.side {
            Side::Host => self.host.add(&mut x.host, &y.host, len),
            Side::Device => self.device.add(&mut x.device, &y.device, len),
        }
    }

    fn rms_norm(
        &self,
        x: &Self::Buffer,
        rows: usize,
        weight: &[f32],
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError> {
        let (x, out) = (x.lock(), out.get_mut());
        out.written(x.side, rows * weight.len());
        match x.side {
            Side::Host => self.host.rms_norm(&x.host, rows, weight, eps, &mut out.host),
            Side::Device => self.device.rms_norm(&x.device, rows, weight, eps, &mut out.device),
        }
    }

    fn rms_norm_inplace(
        &self,
        x: &mut Self::Buffer,
        rows: usize,
        weight: &[f32],
        eps: f32,
    ) -> Result<(), BackendError> {
        let x = x.get_mut();
        x.changed();
        match x.side {
            Side::Host => self.host.rms_norm_inplace(&mut x.host, rows, weight, eps),
            Side::Device => self.device.rms_norm_inplace(&mut x.device, rows, weight, eps),
        }
    }

    fn rope(
        &self,
        x: &mut Self::Buffer,
        heads: usize,
        head_dim: usize,
        positions: &[u32],
        rope: &Rope,
    ) -> Result<(), BackendError> {
        let x = x.get_mut();
        x.changed();
        match x.side {
            Side::Host => self.host.rope(&mut x.host, heads, head_dim, positions, rope),
            Side::Device => self.device.rope(&mut x.device, heads, head_dim, positions, rope),
        }
    }

    fn glu(
        &self,
        act: Activation,
        gate: &mut Self::Buffer,
        up: &Self::Buffer,
        len: usize,
    ) -> Result<(), BackendError> {
        let gate = gate.get_mut();
        gate.changed();
        let up = self.on(up, gate.side)?;
        match gate.side {
            Side::Host => self.host.glu(act, &mut gate.host, &up.host, len),
            Side::Device => self.device.glu(act, &mut gate.device, &up.device, len),
        }
    }

    fn softcap(&self, x: &mut Self::Buffer, len: usize, cap: f32) -> Result<(), BackendError> {
        let x = x.get_mut();
        x.changed();
        match x.side {
            Side::Host => self.host.softcap(&mut x.host, len, cap),
            Side::Device => self.device.softcap(&mut x.device, len, cap),
        }
    }

    fn top_k(
        &self,
        logits: &Self::Buffer,
        width: usize,
        real: usize,
        rows: &[u32],
        k: usize,
    ) -> Result<Option<Vec<Likeliest>>, BackendError> {
        let logits = logits.lock();
        match logits.side {
            Side::Host => self.host.top_k(&logits.host, width, real, rows, k),
            Side::Device => self.device.top_k(&logits.device, width, real, rows, k),
        }
    }

    fn kv_alloc(&self, shape: KvShape, pages: usize) -> Result<Self::Kv, BackendError> {
        let on_host = self.first.min(shape.layers);
        let of = |layers| (layers > 0).then_some(KvShape { layers, ..shape });
        let host = of(on_host).map(|shape| self.host.kv_alloc(shape, pages)).transpose()?;
        let device =
            of(shape.layers - on_host).map(|shape| self.device.kv_alloc(shape, pages)).transpose()?;
        Ok(SplitKv { host, device, page_bytes: OnceLock::new() })
    }

    fn kv_write(
        &self,
        kv: &mut Self::Kv,
        layer: usize,
        k: &Self::Buffer,
        v: &Self::Buffer,
        slots: &[u32],
    ) -> Result<(), BackendError> {
        let (side, layer) = self.place(layer);
        // One buffer may be both, and is locked once.
        let other = if std::ptr::eq(k, v) { None } else { Some(self.on(v, side)?) };
        let k = self.on(k, side)?;
        let v = other.as_ref().unwrap_or(&k);
        match side {
            Side::Host => {
                let kv = kv.host.as_mut().ok_or_else(no_layers)?;
                self.host.kv_write(kv, layer, &k.host, &v.host, slots)
            }
            Side::Device => {
                let kv = kv.device.as_mut().ok_or_else(no_layers)?;
                self.device.kv_write(kv, layer, &k.device, &v.device, slots)
            }
        }
    }

    fn kv_copy_page(&self, kv: &mut Self::Kv, from: u32, to: u32) -> Result<(), BackendError> {
        if let Some(kv) = &mut kv.host {
            self.host.kv_copy_page(kv, from, to)?;
        }
        kv.device.as_mut().map_or(Ok(()), |kv| self.device.kv_copy_page(kv, from, to))
    }

    /// The host's layers and then the device's.
    fn kv_read_page(&self, kv: &Self::Kv, page: u32) -> Result<Vec<u8>, BackendError> {
        let mut bytes = match &kv.host {
            Some(kv) => self.host.kv_read_page(kv, page)?,
            None => Vec::new(),
        };
        let of_host = bytes.len();
        if let Some(kv) = &kv.device {
            bytes.extend(self.device.kv_read_page(kv, page)?);
        }
        kv.page_bytes.get_or_init(|| (of_host, bytes.len() - of_host));
        Ok(bytes)
    }

    fn kv_write_page(&self, kv: &mut Self::Kv, page: u32, bytes: &[u8]) -> Result<(), BackendError> {
        let (of_host, of_device) = match kv.page_bytes.get() {
            Some(known) => *known,
            None => {
                self.kv_read_page(kv, page)?;
                *kv.page_bytes.get().ok_or_else(no_layers)?
            }
        };
        if bytes.len() != of_host + of_device {
            return Err(wrong_page(&self.label(), of_host + of_device, bytes.len()));
        }
        let (of_host, of_device) = bytes.split_at(of_host);
        if let Some(kv) = &mut kv.host {
            self.host.kv_write_page(kv, page, of_host)?;
        }
        kv.device.as_mut().map_or(Ok(()), |kv| self.device.kv_write_page(kv, page, of_device))
    }

    fn attention(
        &self,
        kv: &Self::Kv,
        layer: usize,
        q: &Self::Buffer,
        rows: &[AttentionRow<'_>],
        params: &AttentionParams,
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError> {
        let (side, layer) = self.place(layer);
        let (q, out) = (self.on(q, side)?, out.get_mut());
        out.written(side, q.used);
        match side {
            Side::Host => {
                let kv = kv.host.as_ref().ok_or_else(no_layers)?;
                self.host.attention(kv, layer, &q.host, rows, params, &mut out.host)
            }
            Side::Device => {
                let kv = kv.device.as_ref().ok_or_else(no_layers)?;
                self.device.attention(kv, layer, &q.device, rows, params, &mut out.device)
            }
        }
    }

    fn flush(&self) -> Result<(), BackendError> {
        self.host.flush()?;
        self.device.flush()
    }

    fn on_host(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.host.on_host(tasks, task);
    }
}
