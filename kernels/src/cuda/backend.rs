//! [`Cuda`], and the operations that are one launch each.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::attention::PARTIAL;
use super::constants::Constants;
use super::device::Device;
use super::kv::CudaKv;
use super::launches::LaunchCounts;
use super::memory::{CudaBuffer, Memory, floats_as_bytes, floats_as_bytes_mut};
use super::pool::AdapterPool;
use super::products::{Input, flat, supports, word};
use super::scratch::Scratch;
use super::tables::{Kind, TableCopies, Tables};
use super::weights::Weights;
use crate::backend::{
    Activation, AttentionParams, AttentionRow, Backend, BackendError, KvShape, Likeliest, LoraJob,
    LoraWeight, MatmulJob, Rope, RopeStyle,
};
use crate::cpu::{ThreadOptions, ThreadPool};
use crate::{QMatrix, QuantType};

/// Rotations whose angles are kept: a model has one, or two where layers differ (Gemma).
const ROTATIONS: usize = 4;

/// An NVIDIA device.
pub struct Cuda {
    device: Arc<Device>,
    weights: Arc<Weights>,
    state: Mutex<State>,
    host_threads: (usize, ThreadOptions),
    /// Started when there is something to do for more than one.
    host: OnceLock<ThreadPool>,
}

/// What operations share, one at a time.
pub(super) struct State {
    pub device: Arc<Device>,
    pub weights: Arc<Weights>,
    pub scratch: Scratch,
    pub tables: Tables,
    /// Bytes of attention's partial sums at a time.
    pub partial_bytes: usize,
    constants: Constants,
    angles: Vec<Angles>,
}

/// The angles of a rotation at the positions of the last batch.
struct Angles {
    inv_freq: Vec<f32>,
    magnitude: f32,
    positions: Vec<u32>,
    /// [`Device::failures`] when they were asked for: after another one they may not have been computed.
    failures: u64,
    memory: Memory,
}

impl Cuda {
    /// The device with this number (0 is the first), if there are a driver and a device that can run the kernels.
    ///
    /// # Errors
    /// One line that says what is missing: the driver, a device, a newer driver, a newer device.
    pub fn open(number: u32) -> Result<Cuda, BackendError> {
        let device = Arc::new(Device::open(number)?);
        let weights = Arc::new(Weights::new(&device));
        let state = State {
            weights: weights.clone(),
            scratch: Scratch::new(&device),
            tables: Tables::new(&device),
            partial_bytes: PARTIAL,
            constants: Constants::new(&device),
            angles: Vec::new(),
            device: device.clone(),
        };
        Ok(Cuda {
            device,
            weights,
            state: Mutex::new(state),
            host_threads: (1, ThreadOptions::default()),
            host: OnceLock::new(),
        })
    }

    /// With so many threads of the host for [`Backend::on_host`], the caller among them, and these where they are to be; without this, the
    /// caller alone.
    pub fn with_host_threads(self, threads: usize, options: ThreadOptions) -> Cuda {
        Cuda { host_threads: (threads.clamp(1, 1024), options), host: OnceLock::new(), ..self }
    }

    /// (free, total) bytes of the device's memory.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn memory(&self) -> Result<(usize, usize), BackendError> {
        self.device.enter()?;
        self.device.memory()
    }

    /// Bytes that adapters may have on the device from now on (what they have stays); `None`, as it is at first, is all but
    /// 1/32 of the device's memory, as far as nothing else has it.
    pub fn set_adapter_budget(&self, bytes: Option<usize>) {
        self.weights.set_budget(bytes);
    }

    /// What adapters occupy, and what was copied for them.
    pub fn adapter_pool(&self) -> AdapterPool {
        self.weights.usage()
    }

    /// How many of the small tables that operations send from the host were on the device already.
    pub fn table_copies(&self) -> TableCopies {
        self.state().tables.usage()
    }

    /// Bytes that attention may have for partial sums, 64 MiB at first: rows for which there are not enough go one part after the
    /// other, of a row at least. Results have the same bits; for tests.
    pub fn set_partial_bytes(&self, bytes: usize) {
        self.state().partial_bytes = bytes;
    }

    /// Whether launches that repeat themselves go to the driver as graphs (as they do at first, if it is of CUDA 12.0 at least), or each kernel
    /// alone and at once. Results have the same bits; for measuring.
    ///
    /// # Errors
    /// That of the driver if the device cannot be entered.
    pub fn set_graphs(&self, on: bool) -> Result<(), BackendError> {
        self.device.enter()?;
        self.device.set_graphs(on);
        Ok(())
    }

    /// How kernels were launched so far; without those that wait to be launched together.
    pub fn launch_counts(&self) -> LaunchCounts {
        self.device.launch_counts()
    }

    /// Waits until everything that was asked for has been done; for measuring.
    ///
    /// # Errors
    /// What a kernel did wrong since the last error.
    pub fn wait(&self) -> Result<(), BackendError> {
        self.device.enter()?;
        self.device.wait()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> Result<MutexGuard<'_, State>, BackendError> {
        self.device.enter()?;
        let mut state = self.state();
        state.tables.trim();
        Ok(state)
    }
}

impl Backend for Cuda {
    type Buffer = CudaBuffer;
    type Kv = CudaKv;

    fn label(&self) -> String {
        self.device.label().into()
    }

    fn supports(&self, ty: QuantType) -> bool {
        supports(ty)
    }

    fn load(&self, weight: QMatrix<'_>) -> Result<(), BackendError> {
        self.device.enter()?;
        self.weights.load(weight)
    }

    fn prefetch(&self, weights: &mut dyn Iterator<Item = LoraWeight<'_>>) -> Result<(), BackendError> {
        self.device.enter()?;
        self.weights.prefetch(weights)
    }

    fn alloc(&self, len: usize) -> Result<CudaBuffer, BackendError> {
        self.device.enter()?;
        Ok(CudaBuffer { memory: Memory::zeros(&self.device, "a buffer", len.saturating_mul(4))? })
    }

    fn upload(&self, src: &[f32], dst: &mut CudaBuffer) -> Result<(), BackendError> {
        self.device.enter()?;
        dst.memory.write(0, floats_as_bytes(src))
    }

    fn download(&self, src: &CudaBuffer, offset: usize, dst: &mut [f32]) -> Result<(), BackendError> {
        self.device.enter()?;
        src.memory.read(offset * 4, floats_as_bytes_mut(dst))
    }

    fn gather(
        &self,
        src: &CudaBuffer,
        width: usize,
        rows: &[u32],
        dst: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        let mut state = self.lock()?;
        let lines = rows.iter().max().map_or(0, |row| *row as usize + 1);
        let (from, to) = (src.first(lines * width), dst.first(rows.len() * width));
        let numbers = state.tables.address(Kind::Lines, rows)?;
        let arguments = [from.into(), numbers.into(), word(rows.len()).into(), word(width).into(), to.into()];
        // SAFETY: the parameters of `gather`; `first` has checked that every line is there.
        unsafe { self.device.launch("gather", flat(rows.len() * width), &arguments) }
    }

    fn embed(
        &self,
        table: QMatrix<'_>,
        tokens: &[u32],
        scale: f32,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        let mut state = self.lock()?;
        state.check_type(table.ty())?;
        let width = table.cols();
        assert!(tokens.iter().all(|t| (*t as usize) < table.rows()), "a token beyond {}", table.rows());
        let mut turn = self.weights.turn();
        let weights = turn.address(table)?;
        let numbers = state.tables.address(Kind::Tokens, tokens)?;
        let arguments = [
            weights.into(),
            (table.ty() as u32).into(),
            word(width).into(),
            numbers.into(),
            word(tokens.len()).into(),
            scale.into(),
            out.first(tokens.len() * width).into(),
        ];
        // SAFETY: the parameters of `embed`; every token is a row of the table, and `out` has the lines.
        unsafe { self.device.launch("embed", flat(tokens.len() * width), &arguments) }
    }

    fn matmul(
        &self,
        x: &CudaBuffer,
        rows: usize,
        jobs: &mut [MatmulJob<'_, CudaBuffer>],
    ) -> Result<(), BackendError> {
        let mut state = self.lock()?;
        let Some(width) = jobs.first().map(|job| job.weight.cols()) else { return Ok(()) };
        let mut input = Input::lines(x.first(rows * width), rows, width);
        let mut turn = self.weights.turn();
        for job in jobs {
            let out = job.out.first(rows * job.weight.rows());
            // SAFETY: `first` has checked input and output.
            unsafe { state.product(&mut turn, job.weight, &mut input, out) }?;
        }
        Ok(())
    }

    fn lora(
        &self,
        x: &CudaBuffer,
        in_width: usize,
        jobs: &mut [LoraJob<'_, CudaBuffer>],
    ) -> Result<(), BackendError> {
        self.lock()?.lora(x, in_width, jobs)
    }

    fn add_bias(&self, x: &mut CudaBuffer, rows: usize, bias: &[f32]) -> Result<(), BackendError> {
        let mut state = self.lock()?;
        let len = rows * bias.len();
        let arguments = [
            x.first(len).into(),
            state.constants.address(bias)?.into(),
            word(bias.len()).into(),
            (len as u64).into(),
        ];
        // SAFETY: the parameters of `add_bias`; x has the lines.
        unsafe { self.device.launch("add_bias", flat(len), &arguments) }
    }

    fn add(&self, x: &mut CudaBuffer, y: &CudaBuffer, len: usize) -> Result<(), BackendError> {
        let _state = self.lock()?;
        let arguments = [x.first(len).into(), y.first(len).into(), (len as u64).into()];
        // SAFETY: the parameters of `add`; both have the values.
        unsafe { self.device.launch("add", flat(len), &arguments) }
    }

    fn rms_norm(
        &self,
        x: &CudaBuffer,
        rows: usize,
        weight: &[f32],
        eps: f32,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        let len = rows * weight.len();
        self.norm(x.first(len), rows, weight, eps, out.first(len))
    }

    fn rms_norm_inplace(
        &self,
        x: &mut CudaBuffer,
        rows: usize,
        weight: &[f32],
        eps: f32,
    ) -> Result<(), BackendError> {
        let x = x.first(rows * weight.len());
        self.norm(x, rows, weight, eps, x)
    }

    fn rope(
        &self,
        x: &mut CudaBuffer,
        heads: usize,
        head_dim: usize,
        positions: &[u32],
        rope: &Rope,
    ) -> Result<(), BackendError> {
        let mut state = self.lock()?;
        let (rows, pairs) = (positions.len(), rope.inv_freq.len());
        assert!(2 * pairs <= head_dim, "{pairs} pairs in heads of {head_dim}");
        let arguments = [
            x.first(rows * heads * head_dim).into(),
            state.angles(positions, rope)?.into(),
            word(rows).into(),
            word(heads).into(),
            word(head_dim).into(),
            word(pairs).into(),
            u32::from(rope.style == RopeStyle::Neox).into(),
        ];
        // SAFETY: the parameters of `rope`; x has the heads, and the table a line for each row.
        unsafe { self.device.launch("rope", flat(rows * heads * pairs), &arguments) }
    }

    fn glu(
        &self,
        act: Activation,
        gate: &mut CudaBuffer,
        up: &CudaBuffer,
        len: usize,
    ) -> Result<(), BackendError> {
        let _state = self.lock()?;
        let gelu = u32::from(act == Activation::GeluTanh);
        let arguments = [gate.first(len).into(), up.first(len).into(), (len as u64).into(), gelu.into()];
        // SAFETY: the parameters of `glu`; both have the values.
        unsafe { self.device.launch("glu", flat(len), &arguments) }
    }

    fn softcap(&self, x: &mut CudaBuffer, len: usize, cap: f32) -> Result<(), BackendError> {
        let _state = self.lock()?;
        let arguments = [x.first(len).into(), (len as u64).into(), cap.into()];
        // SAFETY: the parameters of `softcap`; x has the values.
        unsafe { self.device.launch("softcap", flat(len), &arguments) }
    }

    fn top_k(
        &self,
        logits: &CudaBuffer,
        width: usize,
        real: usize,
        rows: &[u32],
        k: usize,
    ) -> Result<Option<Vec<Likeliest>>, BackendError> {
        self.lock()?.top_k(logits, width, real, rows, k)
    }

    fn kv_alloc(&self, shape: KvShape, pages: usize) -> Result<CudaKv, BackendError> {
        self.lock()?.kv_alloc(shape, pages)
    }

    fn kv_write(
        &self,
        kv: &mut CudaKv,
        layer: usize,
        k: &CudaBuffer,
        v: &CudaBuffer,
        slots: &[u32],
    ) -> Result<(), BackendError> {
        self.lock()?.kv_write(kv, layer, k, v, slots)
    }

    fn kv_copy_page(&self, kv: &mut CudaKv, from: u32, to: u32) -> Result<(), BackendError> {
        let _state = self.lock()?;
        kv.copy_page(from as usize, to as usize)
    }

    fn kv_read_page(&self, kv: &CudaKv, page: u32) -> Result<Vec<u8>, BackendError> {
        let _state = self.lock()?;
        kv.read_page(page as usize)
    }

    fn kv_write_page(&self, kv: &mut CudaKv, page: u32, bytes: &[u8]) -> Result<(), BackendError> {
        let _state = self.lock()?;
        kv.write_page(self.device.label(), page as usize, bytes)
    }

    fn attention(
        &self,
        kv: &CudaKv,
        layer: usize,
        q: &CudaBuffer,
        rows: &[AttentionRow<'_>],
        params: &AttentionParams,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        self.lock()?.attention(kv, layer, q, rows, params, out)
    }

    fn flush(&self) -> Result<(), BackendError> {
        self.device.enter()?;
        self.device.send()
    }

    fn on_host(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 {
            return (0..tasks).for_each(task);
        }
        let (threads, options) = &self.host_threads;
        self.host.get_or_init(|| ThreadPool::with_options(*threads, options)).run(tasks, task);
    }
}

impl Cuda {
    /// `x` and `out`, which may be the same, are addresses of `rows` lines.
    fn norm(&self, x: u64, rows: usize, weight: &[f32], eps: f32, out: u64) -> Result<(), BackendError> {
        let mut state = self.lock()?;
        let weights = state.constants.address(weight)?;
        let arguments = [x.into(), weights.into(), word(weight.len()).into(), eps.into(), out.into()];
        // SAFETY: the parameters of `rms_norm`; the callers have checked that the lines are there.
        unsafe { self.device.launch("rms_norm", [word(rows), 1, 1], &arguments) }
    }
}

impl State {
    /// The address of a table of (cos, sin), positions × pairs. It stays where it is as long as it does not grow.
    fn angles(&mut self, positions: &[u32], rope: &Rope) -> Result<u64, BackendError> {
        let (rows, pairs) = (positions.len(), rope.inv_freq.len());
        let (bytes, failures) = (rows * pairs * 8, self.device.failures());
        let same = |a: &Angles| a.inv_freq == rope.inv_freq && a.magnitude == rope.magnitude;
        let at = self.angles.iter().position(|a| same(a) && a.memory.len() >= bytes);
        let at = match at {
            Some(at) if self.angles[at].positions == positions && self.angles[at].failures == failures => {
                return Ok(self.angles[at].memory.address());
            }
            Some(at) => at,
            None => {
                // One that has become too short, or the oldest.
                self.angles.retain(|a| !same(a));
                if self.angles.len() >= ROTATIONS {
                    self.angles.remove(0);
                }
                let memory = Memory::new(&self.device, "a table of angles", bytes.next_power_of_two())?;
                let Rope { inv_freq, magnitude, .. } = rope.clone();
                self.angles.push(Angles { inv_freq, magnitude, positions: Vec::new(), failures, memory });
                self.angles.len() - 1
            }
        };
        let held = &mut self.angles[at];
        // Nothing is known of them if this ends with an error.
        held.positions.clear();
        let address = held.memory.at(0, bytes);
        let arguments = [
            self.tables.address(Kind::Positions, positions)?.into(),
            self.constants.address(&rope.inv_freq)?.into(),
            word(rows).into(),
            word(pairs).into(),
            rope.magnitude.into(),
            address.into(),
        ];
        // SAFETY: the parameters of `rope_table`, with room for every row and pair.
        unsafe { self.device.launch("rope_table", flat(rows * pairs), &arguments) }?;
        held.positions.extend_from_slice(positions);
        held.failures = failures;
        Ok(address)
    }
}
