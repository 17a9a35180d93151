//! The one place where devices enter: the operations a transformer needs, on batches of rows.
//!
//! A *batch* is a list of rows, each a token of some sequence. Every activation is a
//! row-major matrix with one line per row. Weights stay where they are mapped and are named
//! by their [`QMatrix`]; a device with its own memory keeps copies, of the model's by address (see
//! [`Backend::load`]), of adapters' by address and owner ([`Backend::prefetch`]).
//!
//! What every implementation promises: the result of a row depends on that row alone, bit for
//! bit — not on the other rows of the batch, nor on the number of threads.

use crate::quant::{Block, Q8_0, QMatrix};

/// A device failed, or has no room.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BackendError {
    /// No memory left for an allocation.
    #[error("{device}: out of memory allocating {bytes} bytes for {what}")]
    OutOfMemory {
        /// Which device.
        device: String,
        /// What the memory was for.
        what: &'static str,
        /// How much was asked for.
        bytes: usize,
    },
    /// A weight format for which the device has no kernel.
    #[error("{device}: no kernel for {ty} weights; convert the file, or build with the feature `ggml`")]
    UnsupportedType {
        /// Which device.
        device: String,
        /// The format.
        ty: crate::QuantType,
    },
    /// Anything that the device's driver reports.
    #[error("{device}: {message}")]
    Device {
        /// Which device.
        device: String,
        /// The driver's words.
        message: String,
    },
}

/// One product of [`Backend::matmul`]: `out[row] = W · x[row]`.
pub struct MatmulJob<'a, B> {
    /// The weight, `out_features` × `in_features`.
    pub weight: QMatrix<'a>,
    /// Receives rows × `weight.rows()`.
    pub out: &'a mut B,
}

/// What an adapter adds between shrink and expand.
#[derive(Clone, Copy, Debug)]
pub enum Core<'a> {
    /// A full r × r matrix: `z' = C z`.
    Full(QMatrix<'a>),
    /// A diagonal, 1 × r: `z' = c ⊙ z`.
    Diagonal(QMatrix<'a>),
    /// A plain LoRA: `z' = z`.
    Identity,
}

/// One adapter's part in one row at one site.
#[derive(Clone, Copy, Debug)]
pub struct LoraTerm<'a> {
    /// The core between shrink and expand.
    pub core: Core<'a>,
    /// λ, the adapter's weight in this row (its own α/r is already inside `core` or `u`).
    pub scale: f32,
    /// g: scales the rows of the delta, 1 × out_features.
    pub delta_scale: Option<QMatrix<'a>>,
    /// s: scales the base's own output, 1 × out_features (DoRA, IA3).
    pub row_scale: Option<QMatrix<'a>>,
    /// b: added to the output, 1 × out_features.
    pub bias: Option<QMatrix<'a>>,
}

/// Outputs of one band of [`Expand::Bands`].
pub const BAND: usize = 32;

/// U, which expands: `y = U z'`.
#[derive(Clone, Copy, Debug)]
pub enum Expand<'a> {
    /// out_features × r (a plain LoRA's B).
    Rows(QMatrix<'a>),
    /// A row for every [`BAND`] outputs, out_features / 32 × 32 r: their coefficients in the first column of U, then those in the
    /// second, and so on. So a rank that is not whole blocks of a format needs no padding.
    Bands(QMatrix<'a>),
}

impl<'a> Expand<'a> {
    /// The weights as they are stored.
    pub fn matrix(&self) -> QMatrix<'a> {
        match self {
            Expand::Rows(u) | Expand::Bands(u) => *u,
        }
    }

    /// r.
    pub fn rank(&self) -> usize {
        match self {
            Expand::Rows(u) => u.cols(),
            Expand::Bands(u) => u.cols() / BAND,
        }
    }

    /// out_features.
    pub fn outputs(&self) -> usize {
        match self {
            Expand::Rows(u) => u.rows(),
            Expand::Bands(u) => u.rows() * BAND,
        }
    }
}

/// The rows of a batch that share one basis at one site.
#[derive(Clone, Debug)]
pub struct LoraGroup<'a> {
    /// Vᵀ: r × in_features (a plain LoRA's A). `None` with a `u`: the input already is `Vᵀ x`
    /// and `in_width` is r (embeddings, whose shrink is a look-up).
    pub v: Option<QMatrix<'a>>,
    /// U. `None` where no term has a delta.
    pub u: Option<Expand<'a>>,
    /// (row of the batch, its terms); a row may stand in several groups, once in each.
    pub rows: Vec<(u32, Vec<LoraTerm<'a>>)>,
}

/// One linear site of [`Backend::lora`]: what its adapters add to `out`.
pub struct LoraJob<'a, B> {
    /// Holds `W x` for all rows of the batch, rows × out_features; receives the sum.
    pub out: &'a mut B,
    /// out_features.
    pub width: usize,
    /// Rows by basis. Applied in order, so that sums are reproducible.
    pub groups: &'a [LoraGroup<'a>],
}

/// A weight of an adapter, and the layer that it is for.
#[derive(Clone, Copy, Debug)]
pub struct LoraWeight<'a> {
    /// The layer's own weight.
    pub layer: QMatrix<'a>,
    /// A factor, a core, scales or a bias.
    pub weight: QMatrix<'a>,
}

/// One layer of [`Backend::linear`]: `out[row] = W · x[row]`, and what adapters add to it.
pub struct LinearJob<'a, B> {
    /// The weight, `out_features` × `in_features`.
    pub weight: QMatrix<'a>,
    /// Receives rows × `weight.rows()`.
    pub out: &'a mut B,
    /// As those of a [`LoraJob`].
    pub groups: &'a [LoraGroup<'a>],
}

/// [`Backend::linear`] as products first, then what is added.
pub fn linear_in_two<B: Backend + ?Sized>(
    backend: &B,
    x: &B::Buffer,
    rows: usize,
    jobs: &mut [LinearJob<'_, B::Buffer>],
) -> Result<(), BackendError> {
    let mut products: Vec<_> =
        jobs.iter_mut().map(|job| MatmulJob { weight: job.weight, out: &mut *job.out }).collect();
    backend.matmul(x, rows, &mut products)?;
    let in_width = jobs.first().map_or(0, |job| job.weight.cols());
    let mut added: Vec<_> = jobs
        .iter_mut()
        .filter(|job| !job.groups.is_empty())
        .map(|job| LoraJob { out: &mut *job.out, width: job.weight.rows(), groups: job.groups })
        .collect();
    if added.is_empty() { Ok(()) } else { backend.lora(x, in_width, &mut added) }
}

/// Which pairs of a head rotate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// (0, 1), (2, 3) …: files of the `llama` family, whose q and k rows are permuted for it.
    Interleaved,
    /// (0, n/2), (1, n/2 + 1) …: as GPT-NeoX, and most newer families.
    Neox,
}

/// Rotary position embedding of one layer.
#[derive(Clone, Debug)]
pub struct Rope {
    /// Which pairs rotate.
    pub style: RopeStyle,
    /// Angle per position of each pair; twice its length are the rotated dimensions of a head,
    /// the dimensions after them pass unchanged.
    pub inv_freq: Vec<f32>,
    /// Factor on cosine and sine (YaRN's and LongRoPE's attention factor; otherwise 1).
    pub magnitude: f32,
}

/// The nonlinearity of a gated unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x · σ(x).
    Silu,
    /// GELU in its tanh approximation.
    GeluTanh,
}

/// Element type of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvType {
    /// 32-bit floats: for comparisons.
    F32,
    /// Half precision: the default.
    F16,
    /// Blocks of 32 8-bit integers with one half-precision scale.
    Q8_0,
}

/// Shape of a paged key-value cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers.
    pub layers: usize,
    /// Key-value heads per layer.
    pub kv_heads: usize,
    /// Elements per head, the same for keys and values.
    pub head_dim: usize,
    /// Tokens per page.
    pub page_len: usize,
    /// Element type.
    pub ty: KvType,
}

impl KvShape {
    /// Bytes of one page in one layer, as devices other than the processor lay it out: every head's keys and values begin at a
    /// multiple of 16.
    pub fn page_bytes(&self) -> usize {
        let position = match self.ty {
            KvType::F32 => 4 * self.head_dim,
            KvType::F16 => 2 * self.head_dim,
            KvType::Q8_0 => self.head_dim.div_ceil(Q8_0::LEN) * size_of::<Q8_0>(),
        };
        (self.page_len * position).next_multiple_of(16) * 2 * self.kv_heads
    }
}

/// Where one row looks back.
#[derive(Clone, Copy, Debug)]
pub struct AttentionRow<'a> {
    /// The sequence's pages in order: position `p` lies in `pages[p / page_len]`, at offset
    /// `p % page_len`.
    pub pages: &'a [u32],
    /// The row's own position; it attends to positions `0..=position` (or the window's).
    pub position: u32,
}

/// What the heads of one layer do.
#[derive(Clone, Copy, Debug)]
pub struct AttentionParams {
    /// Query heads.
    pub n_heads: usize,
    /// Factor on q·k before the softmax.
    pub scale: f32,
    /// `cap · tanh(score / cap)` on scores (Gemma 2).
    pub softcap: Option<f32>,
    /// Sliding window: a row at position `p` sees positions greater than `p - window`.
    pub window: Option<u32>,
}

/// The most likely tokens of a row and their logits, the likeliest first.
pub type Likeliest = Vec<(u32, f32)>;

/// The operations of a transformer on one device.
///
/// Shapes: `rows` lines; a width is that of one line. Buffers are at least `rows × width` long.
pub trait Backend: Send + Sync {
    /// 32-bit floats on the device.
    type Buffer: Send + Sync;
    /// A paged key-value cache on the device.
    type Kv: Send + Sync;

    /// The device in words, for logs and benchmark rows.
    fn label(&self) -> String;

    /// Whether products with this weight format work here.
    fn supports(&self, ty: crate::QuantType) -> bool;

    /// Brings a weight to the device ahead of its first use, where it is kept by its address: the bytes must stay where they are
    /// as long as the backend is used. On the CPU, nothing unless weights are to be repacked.
    fn load(&self, weight: QMatrix<'_>) -> Result<(), BackendError>;

    /// Brings weights of adapters, which come and go, to where their layers are computed, ahead of their first use; they are kept as
    /// long as their [`QMatrix::keeper`] lives and there is room. The caller waits for the copies, operations of other threads do not.
    /// What finds no room is copied where it is used. On the CPU, nothing.
    fn prefetch(&self, weights: &mut dyn Iterator<Item = LoraWeight<'_>>) -> Result<(), BackendError> {
        let _ = weights;
        Ok(())
    }

    /// `len` zeros.
    fn alloc(&self, len: usize) -> Result<Self::Buffer, BackendError>;
    /// Copies to the start of a buffer.
    fn upload(&self, src: &[f32], dst: &mut Self::Buffer) -> Result<(), BackendError>;
    /// Copies from `offset` of a buffer.
    fn download(&self, src: &Self::Buffer, offset: usize, dst: &mut [f32]) -> Result<(), BackendError>;
    /// A buffer's floats, to look at and to change without a copy, where they lie in the memory of the host; `None` elsewhere.
    fn in_place<'a>(&self, buffer: &'a mut Self::Buffer) -> Option<&'a mut [f32]> {
        let _ = buffer;
        None
    }
    /// `dst[i] = src[rows[i]]` for lines of `width`.
    fn gather(
        &self,
        src: &Self::Buffer,
        width: usize,
        rows: &[u32],
        dst: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// `out[i] = scale · table[tokens[i]]`.
    fn embed(
        &self,
        table: QMatrix<'_>,
        tokens: &[u32],
        scale: f32,
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// Several products of the same input: `job.out = x · job.weightᵀ`.
    fn matmul(
        &self,
        x: &Self::Buffer,
        rows: usize,
        jobs: &mut [MatmulJob<'_, Self::Buffer>],
    ) -> Result<(), BackendError>;

    /// What adapters add to several sites with the same input `x` (rows × `in_width`):
    /// per row and term, `y ← y + λ((s − 1) ⊙ y₀ + g ⊙ (U · C · Vᵀ x) + b)` with `y₀` the
    /// value of `y` on entry.
    fn lora(
        &self,
        x: &Self::Buffer,
        in_width: usize,
        jobs: &mut [LoraJob<'_, Self::Buffer>],
    ) -> Result<(), BackendError>;

    /// Several layers of the same input, each with what adapters add to it: the bits of [`Backend::matmul`] followed by
    /// [`Backend::lora`].
    fn linear(
        &self,
        x: &Self::Buffer,
        rows: usize,
        jobs: &mut [LinearJob<'_, Self::Buffer>],
    ) -> Result<(), BackendError> {
        linear_in_two(self, x, rows, jobs)
    }

    /// `x[i] += bias` for each of `rows` lines of `bias.len()`.
    fn add_bias(&self, x: &mut Self::Buffer, rows: usize, bias: &[f32]) -> Result<(), BackendError>;
    /// `x += y` over `len` elements.
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer, len: usize) -> Result<(), BackendError>;

    /// `out = x / sqrt(mean(x²) + eps) ⊙ weight` over `rows` lines of `weight.len()`.
    fn rms_norm(
        &self,
        x: &Self::Buffer,
        rows: usize,
        weight: &[f32],
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;
    /// The same in place; with `rows` = tokens × heads it is the per-head norm of q and k.
    fn rms_norm_inplace(
        &self,
        x: &mut Self::Buffer,
        rows: usize,
        weight: &[f32],
        eps: f32,
    ) -> Result<(), BackendError>;

    /// Rotates `heads` heads of `head_dim` in each line; `positions` has one entry per line.
    fn rope(
        &self,
        x: &mut Self::Buffer,
        heads: usize,
        head_dim: usize,
        positions: &[u32],
        rope: &Rope,
    ) -> Result<(), BackendError>;

    /// `gate = act(gate) ⊙ up` over `len` elements.
    fn glu(
        &self,
        act: Activation,
        gate: &mut Self::Buffer,
        up: &Self::Buffer,
        len: usize,
    ) -> Result<(), BackendError>;

    /// `x = cap · tanh(x / cap)` over `len` elements.
    fn softcap(&self, x: &mut Self::Buffer, len: usize, cap: f32) -> Result<(), BackendError>;

    /// The `k` most likely tokens of some rows of logits: of each line of `width` that `rows` names, the largest of the first
    /// `real` values in the order of [`f32::total_cmp`], equal ones by token. −∞ is never among them, so there may be fewer. NaN
    /// and +∞ come before all others, as equals: if there are any, the first of them is the first token.
    ///
    /// `None` where the caller does better with whole rows: they lie in the host's memory, or `k` is more than the device selects.
    fn top_k(
        &self,
        logits: &Self::Buffer,
        width: usize,
        real: usize,
        rows: &[u32],
        k: usize,
    ) -> Result<Option<Vec<Likeliest>>, BackendError> {
        let _ = (logits, width, real, rows, k);
        Ok(None)
    }

    /// An empty cache of `pages` pages.
    fn kv_alloc(&self, shape: KvShape, pages: usize) -> Result<Self::Kv, BackendError>;
    /// Writes keys and values (rows × kv_heads·head_dim) of one layer; row `i` goes to slot
    /// `slots[i]` = page · page_len + offset.
    fn kv_write(
        &self,
        kv: &mut Self::Kv,
        layer: usize,
        k: &Self::Buffer,
        v: &Self::Buffer,
        slots: &[u32],
    ) -> Result<(), BackendError>;
    /// Copies a whole page in all layers: copy on write.
    fn kv_copy_page(&self, kv: &mut Self::Kv, from: u32, to: u32) -> Result<(), BackendError>;
    /// One page of all layers as bytes, to save; the layout is this backend's own.
    fn kv_read_page(&self, kv: &Self::Kv, page: u32) -> Result<Vec<u8>, BackendError>;
    /// The reverse of [`Backend::kv_read_page`]; the length must be that of a page.
    fn kv_write_page(&self, kv: &mut Self::Kv, page: u32, bytes: &[u8]) -> Result<(), BackendError>;

    /// `out[i] = softmax(scale · q[i] · Kᵀ) V` per head; query head `h` reads key-value head
    /// `h / (n_heads / kv_heads)`.
    fn attention(
        &self,
        kv: &Self::Kv,
        layer: usize,
        q: &Self::Buffer,
        rows: &[AttentionRow<'_>],
        params: &AttentionParams,
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// Begins what was asked for so far, where a device may have put it off, and waits for nothing: if part of it cannot be begun, this call
    /// or one before it says so. On the CPU, nothing.
    fn flush(&self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Runs `task(0)`, …, `task(tasks - 1)`, each once and in any order, on the threads of the host that this backend has, and returns when all
    /// are done: for what the host makes of results, such as tokens of logits. A task must not call the backend. Here, one after the other.
    ///
    /// # Panics
    /// With a panic of a task; other tasks may then not have been run.
    fn on_host(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}
