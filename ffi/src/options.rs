//! How an engine is opened.

use std::ffi::c_void;

use lory_kernels::{DeviceChoice, backend::KvType, cpu::ThreadOptions};
use lory_runtime::{EngineOptions, GpuLayers, KvPolicy, Repacking, mapping::Loading};

use crate::{
    callbacks::{LORY_LOG_INFO, User, lory_log_fn, lory_log_level, lory_progress_fn},
    log::Log,
    status::{Failure, Result, guard, lory_status, lory_status::*},
    structs::{init, versioned},
};

/// How files come into memory.
pub type lory_loading = u32;
/// Mapped: pages are read when they are touched. The file must not be written to or cut short.
pub const LORY_LOADING_MAP: lory_loading = 0;
/// Copied into memory; later changes of the file do not matter.
pub const LORY_LOADING_READ: lory_loading = 1;

/// Whether weights are copied into an order that is faster to read, for their size in memory again. Answers are the same.
pub type lory_repacking = u32;
/// Never: weights are used where they are mapped, and processes share them.
pub const LORY_REPACK_OFF: lory_repacking = 0;
/// Always.
pub const LORY_REPACK_ON: lory_repacking = 1;
/// If the system has three times the weights' bytes available.
pub const LORY_REPACK_AUTO: lory_repacking = 2;

/// Element type of cached keys and values.
pub type lory_kv_type = u32;
/// Half precision.
pub const LORY_KV_F16: lory_kv_type = 0;
/// 32-bit floats.
pub const LORY_KV_F32: lory_kv_type = 1;
/// Blocks of 8-bit integers.
pub const LORY_KV_Q8_0: lory_kv_type = 2;

/// What happens when the KV cache has no room for a request to go on.
pub type lory_kv_policy = u32;
/// Idle sessions lose their keys and values, then requests that come last; they are computed again.
pub const LORY_KV_EVICT: lory_kv_policy = 0;
/// Requests wait for each other; when there is nothing left to wait for, they end with an error.
pub const LORY_KV_QUEUE: lory_kv_policy = 1;
/// Nobody loses anything: a request that finds no room ends with an error at once.
pub const LORY_KV_REFUSE: lory_kv_policy = 2;

/// Where the model is computed.
pub type lory_device = u32;
/// The processor, until the CUDA backend has been verified on hardware.
pub const LORY_DEVICE_AUTO: lory_device = 0;
/// The processor.
pub const LORY_DEVICE_CPU: lory_device = 1;
/// The first CUDA device, and `LORY_DEVICE_CUDA + n` the one with number n (below 64); `LORY_E_DEVICE` where there is none that
/// can be used. Not yet verified on hardware.
pub const LORY_DEVICE_CUDA: lory_device = 2;

/// Numbers that CUDA devices may have: far more than machines have, few enough that a stray value is noticed.
const CUDA_DEVICES: u32 = 64;

/// How an engine is opened. Initialise it with `lory_engine_options_init`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lory_engine_options {
    /// Set by `lory_engine_options_init`.
    pub struct_size: usize,
    /// Threads; 0 takes the physical cores.
    pub threads: u32,
    /// Longest sequence in tokens; 0 takes the trained context, at most 4096.
    pub n_ctx: u32,
    /// Rows of one step at most: prompt tokens and generating sessions together; never more than the KV
    /// cache holds tokens. Default 512.
    pub n_batch: u32,
    /// Element type of cached keys and values. Default `LORY_KV_F16`.
    pub kv_type: lory_kv_type,
    /// Tokens that the KV cache holds for all sessions together; 0 takes four contexts.
    pub kv_tokens: u64,
    /// How files come into memory. Default `LORY_LOADING_MAP`.
    pub loading: lory_loading,
    /// Where the model is computed. Default `LORY_DEVICE_AUTO`.
    pub device: lory_device,
    /// Takes log lines; NULL, the default, is silence.
    pub log: lory_log_fn,
    /// First argument of `log`. It must stay valid until the engine and all that came from it are freed.
    pub log_user: *mut c_void,
    /// The least severe lines that `log` gets. Default `LORY_LOG_INFO`.
    pub log_level: lory_log_level,
    /// What happens when the KV cache is full. Default `LORY_KV_EVICT`.
    pub kv_policy: lory_kv_policy,
    /// Bytes that the KV cache may have; 0, the default, sets no limit but `kv_tokens`.
    pub kv_bytes: u64,
    /// Bytes that adapters may have for themselves; 0, the default, sets no limit.
    pub adapter_bytes: u64,
    /// 1, the default, lets sessions with the same beginning and adapters share its keys and values.
    pub prefix_sharing: u32,
    /// Whether weights are copied into an order that is faster to read. Default `LORY_REPACK_OFF`.
    pub repacking: lory_repacking,
    /// Told how much has been read; may be NULL. Not called after opening has returned.
    pub progress: lory_progress_fn,
    /// First argument of `progress`.
    pub progress_user: *mut c_void,
    /// How many layers a device with memory of its own gets, from the last one on, the output counting as one more; the processor computes
    /// the others. 0, the default, is as many as there is room for.
    pub gpu_layers: u32,
    /// Bytes that adapters and their bases may have on a device with memory of its own, where they are copied; 0, the default, is what the model
    /// leaves of that memory, all but 1/32. With less than a batch needs they are copied again where they are used, which takes time and changes no
    /// answer. On the processor it has no effect.
    pub device_adapter_bytes: u64,
}

versioned!(lory_engine_options, last_of_first = progress_user, |zeroed| lory_engine_options {
    n_batch: 512,
    log_level: LORY_LOG_INFO,
    prefix_sharing: 1,
    ..zeroed
});

/// Fills in the defaults; `struct_size` is `sizeof(lory_engine_options)`.
///
/// # Safety
/// `struct_size` bytes at `options` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_options_init(
    options: *mut lory_engine_options,
    struct_size: usize,
) -> lory_status {
    // SAFETY: the caller's word.
    guard(|| unsafe { init(options, struct_size) })
}

pub(crate) fn unknown(field: &str, value: u32) -> Failure {
    Failure::new(LORY_E_ARGUMENT, format!("{field} is {value}, which is none of its constants"))
}

/// 0 is none.
pub(crate) fn limit(n: u64) -> Option<usize> {
    (n > 0).then(|| usize::try_from(n).unwrap_or(usize::MAX))
}

/// Threads that can be asked for; more would only exhaust the process.
const MAX_THREADS: u32 = 1024;

impl lory_engine_options {
    pub(crate) fn to_rust(self) -> Result<EngineOptions> {
        let n = self.threads;
        if n > MAX_THREADS {
            return Err(Failure::new(LORY_E_ARGUMENT, format!("threads is {n}, more than {MAX_THREADS}")));
        }
        Ok(EngineOptions {
            device: match self.device {
                LORY_DEVICE_AUTO => DeviceChoice::Auto,
                LORY_DEVICE_CPU => DeviceChoice::Cpu,
                cuda @ LORY_DEVICE_CUDA.. if cuda - LORY_DEVICE_CUDA < CUDA_DEVICES => {
                    DeviceChoice::Cuda(cuda - LORY_DEVICE_CUDA)
                }
                other => return Err(unknown("device", other)),
            },
            gpu_layers: match self.gpu_layers {
                0 => GpuLayers::Fit,
                n => GpuLayers::Last(n as usize),
            },
            threads: (n > 0).then_some(n as usize),
            // A host that binds the thread that opens the engine binds those that it starts.
            thread_options: ThreadOptions::default(),
            n_ctx: (self.n_ctx > 0).then_some(self.n_ctx),
            n_batch: self.n_batch as usize,
            kv_type: match self.kv_type {
                LORY_KV_F16 => KvType::F16,
                LORY_KV_F32 => KvType::F32,
                LORY_KV_Q8_0 => KvType::Q8_0,
                other => return Err(unknown("kv_type", other)),
            },
            kv_tokens: limit(self.kv_tokens),
            kv_bytes: limit(self.kv_bytes),
            kv_policy: match self.kv_policy {
                LORY_KV_EVICT => KvPolicy::Evict,
                LORY_KV_QUEUE => KvPolicy::Queue,
                LORY_KV_REFUSE => KvPolicy::Refuse,
                other => return Err(unknown("kv_policy", other)),
            },
            adapter_bytes: limit(self.adapter_bytes),
            device_adapter_bytes: limit(self.device_adapter_bytes),
            prefix_sharing: self.prefix_sharing != 0,
            loading: match self.loading {
                LORY_LOADING_MAP => Loading::Map,
                LORY_LOADING_READ => Loading::Read,
                other => return Err(unknown("loading", other)),
            },
            repacking: match self.repacking {
                LORY_REPACK_OFF => Repacking::Off,
                LORY_REPACK_ON => Repacking::On,
                LORY_REPACK_AUTO => Repacking::Auto,
                other => return Err(unknown("repacking", other)),
            },
        })
    }

    pub(crate) fn log(&self) -> Log {
        Log::new(self.log, User(self.log_user), self.log_level)
    }

    /// Whether to go on after `done` of `total` bytes.
    pub(crate) fn report(&self, done: u64, total: u64) -> bool {
        // SAFETY: the host's function with the host's pointer.
        self.progress.is_none_or(|f| unsafe { f(self.progress_user, done, total) } == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::structs::Versioned;

    fn device(device: lory_device) -> Result<DeviceChoice> {
        lory_engine_options { device, ..lory_engine_options::defaults() }.to_rust().map(|o| o.device)
    }

    #[test]
    fn cuda_devices_are_numbered_from_the_constant() {
        assert!(matches!(device(LORY_DEVICE_CUDA), Ok(DeviceChoice::Cuda(0))));
        assert!(matches!(device(LORY_DEVICE_CUDA + 3), Ok(DeviceChoice::Cuda(3))));
        assert!(matches!(device(LORY_DEVICE_CUDA + 63), Ok(DeviceChoice::Cuda(63))));
        assert!(device(LORY_DEVICE_CUDA + 64).is_err() && device(u32::MAX).is_err());
    }

    #[test]
    fn budgets_of_nothing_are_none() {
        let of = |adapter_bytes, device_adapter_bytes| {
            let defaults = lory_engine_options::defaults();
            let options = lory_engine_options { adapter_bytes, device_adapter_bytes, ..defaults }.to_rust();
            options.map(|o| (o.adapter_bytes, o.device_adapter_bytes))
        };
        assert!(matches!(of(0, 0), Ok((None, None))));
        assert!(matches!(of(7, 5), Ok((Some(7), Some(5)))));
    }
}
