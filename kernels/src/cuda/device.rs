//! The driver's side: finding a device, its memory, copies and launches.
//!
//! All work is on one stream, which means one order: a buffer may be written again, or an upload follow a kernel that reads
//! the same place, without anything to wait for. Launches are noted and sent together ([`super::launches`]): whatever else goes
//! on the stream, and whatever waits for it, sends them first, so that the order is that of the calls. Only reading back and
//! freeing wait. What is brought ahead of its use travels on a second stream, whose copies are waited for before anybody is
//! told where they lie.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::{self, DriverError, ctx, device, event, module, primary_ctx, stream};
use cudarc::driver::sys;

use super::launches::{Failure, Kernel, LaunchCounts, Launches};
use super::ptx::MODULES;
use crate::backend::BackendError;

/// Oldest driver that reads the PTX (version 7.0), as the driver counts: CUDA 11.0.
const OLDEST_DRIVER: i32 = 11_000;
/// Lowest compute capability: tensor cores with BF16 and TF32.
const LOWEST_CAPABILITY: (i32, i32) = (8, 0);
/// Bytes of each of the two pinned buffers through which everything travels to the device.
const STAGING: usize = 8 << 20;

/// One argument of a launch.
#[derive(Clone, Copy)]
pub(super) enum Argument {
    /// An address or a 64-bit number.
    Long(u64),
    /// A 32-bit number.
    Word(u32),
    /// A float.
    Float(f32),
}

impl From<u64> for Argument {
    fn from(value: u64) -> Self {
        Argument::Long(value)
    }
}

impl From<u32> for Argument {
    fn from(value: u32) -> Self {
        Argument::Word(value)
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Argument::Float(value)
    }
}

/// Two pinned buffers that are filled in turns, copy behind copy, and for each an event after the last copy out of it.
struct Staging {
    buffers: [*mut c_void; 2],
    events: [sys::CUevent; 2],
    /// The buffer whose turn it is, and how many bytes of it copies have had.
    turn: usize,
    filled: usize,
}

/// A stream, and how copies reach it.
struct Lane {
    stream: sys::CUstream,
    staging: Mutex<Option<Staging>>,
}

impl Lane {
    /// Before the driver has made the stream.
    fn unopened() -> Lane {
        Lane { stream: std::ptr::null_mut(), staging: Mutex::new(None) }
    }
}

/// A device with its context, streams and kernels.
pub(super) struct Device {
    ordinal: sys::CUdevice,
    label: String,
    context: sys::CUcontext,
    work: Lane,
    arrivals: Lane,
    /// For one stream to wait for another.
    mark: sys::CUevent,
    /// How often something was read back.
    round: AtomicU64,
    modules: Vec<sys::CUmodule>,
    functions: HashMap<&'static str, Kernel>,
    /// The last lock to be taken.
    launches: Mutex<Launches>,
}

// SAFETY: the driver's handles may be used from any thread whose current context is theirs, which `enter` sees to; the
// staging buffers are behind a lock.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

fn error(device: &str, message: impl Into<String>) -> BackendError {
    BackendError::Device { device: device.into(), message: message.into() }
}

/// The driver's own words.
fn words(e: DriverError) -> String {
    match e.error_string() {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => format!("error {}", e.0 as u32),
    }
}

impl Device {
    /// The device with this number, with all kernels compiled for it.
    pub fn open(number: u32) -> Result<Device, BackendError> {
        let none = |message: &str| error("cuda", message);
        // SAFETY: loads the driver's library, whose initializers are its own.
        if !unsafe { sys::is_culib_present() } {
            return Err(none(
                "no NVIDIA driver: libcuda cannot be loaded; install the driver, or run on the CPU",
            ));
        }
        result::init().map_err(|e| none(&format!("the driver found no usable device: {}", words(e))))?;
        let mut version = 0;
        // SAFETY: writes one number.
        unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(|e| none(&words(e)))?;
        if version < OLDEST_DRIVER {
            let (major, minor) = (version / 1000, version % 1000 / 10);
            return Err(none(&format!(
                "the driver is of CUDA {major}.{minor}; it must be of 11.0 at least: update it"
            )));
        }
        let count = device::get_count().map_err(|e| none(&words(e)))?;
        let number = i32::try_from(number).unwrap_or(i32::MAX);
        if number >= count {
            return Err(none(&format!("there is no device {number}: the driver has {count}")));
        }
        let ordinal = device::get(number).map_err(|e| none(&words(e)))?;
        let name = device::get_name(ordinal).map_err(|e| none(&words(e)))?;
        let label = format!("cuda ({name})");
        let failed = |e: DriverError| error(&label, words(e));
        let attribute = |which| {
            // SAFETY: the device comes from the driver.
            unsafe { device::get_attribute(ordinal, which) }.map_err(failed)
        };
        use sys::CUdevice_attribute_enum as Attribute;
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < LOWEST_CAPABILITY {
            let (major, minor) = capability;
            return Err(error(
                &label,
                format!("compute capability {major}.{minor}; the kernels need 8.0 at least"),
            ));
        }
        // SAFETY: the device comes from the driver; the context is released when `Device` is dropped.
        let context = unsafe { primary_ctx::retain(ordinal) }.map_err(failed)?;
        let mut device = Device {
            ordinal,
            context,
            work: Lane::unopened(),
            arrivals: Lane::unopened(),
            mark: std::ptr::null_mut(),
            round: AtomicU64::new(0),
            modules: Vec::new(),
            functions: HashMap::new(),
            launches: Mutex::new(Launches::new(version)),
            label: label.clone(),
        };
        device.enter()?;
        device.work.stream = stream::create(stream::StreamKind::NonBlocking).map_err(failed)?;
        device.arrivals.stream = stream::create(stream::StreamKind::NonBlocking).map_err(failed)?;
        device.mark = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed)?;
        for of_module in MODULES {
            // SAFETY: a text that ends with a zero.
            let loaded = unsafe { module::load_data(of_module.ptx.as_ptr().cast()) }
                .map_err(|e| error(&label, format!("the driver cannot compile the kernels: {}", words(e))))?;
            device.modules.push(loaded);
            for &(name, threads) in of_module.kernels {
                let symbol = CString::new(name).map_err(|e| error(&label, e.to_string()))?;
                // SAFETY: the module was loaded above and lives as long as the device.
                let function = unsafe { module::get_function(loaded, symbol) }
                    .map_err(|e| error(&label, format!("kernel {name}: {}", words(e))))?;
                device.functions.insert(name, Kernel { name, function, threads });
            }
        }
        Ok(device)
    }

    /// The device in words.
    pub fn label(&self) -> &str {
        &self.label
    }

    fn failed(&self, e: DriverError) -> BackendError {
        error(&self.label, words(e))
    }

    /// Makes the context that of the calling thread. Before every other call.
    pub fn enter(&self) -> Result<(), BackendError> {
        // SAFETY: the context is retained until `self` is dropped.
        unsafe { ctx::set_current(self.context) }.map_err(|e| self.failed(e))
    }

    /// (free, total) bytes of memory.
    pub fn memory(&self) -> Result<(usize, usize), BackendError> {
        result::mem_get_info().map_err(|e| self.failed(e))
    }

    /// Undefined bytes, aligned to 256.
    pub fn allocate(&self, what: &'static str, bytes: usize) -> Result<u64, BackendError> {
        // SAFETY: the result is used through `Memory` alone, which frees it.
        unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|e| match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                BackendError::OutOfMemory { device: self.label.clone(), what, bytes }
            }
            _ => self.failed(e),
        })
    }

    fn launches(&self) -> MutexGuard<'_, Launches> {
        self.launches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn not_launched(&self, Failure { kernel, cause }: Failure) -> BackendError {
        error(&self.label, format!("{kernel}: {}", words(cause)))
    }

    /// Sends the launches that are noted. The error is that of one of them, or of one that nobody could be told.
    pub fn send(&self) -> Result<(), BackendError> {
        // SAFETY: the stream is the device's. What `launch` was promised holds: addresses are freed by `free` alone, which
        // sends first.
        unsafe { self.launches().send(self.work.stream) }.map_err(|e| self.not_launched(e))
    }

    /// Whether launches go as graphs where the driver has them, or each alone and at once.
    pub fn set_graphs(&self, on: bool) {
        let mut launches = self.launches();
        // SAFETY: as in `send`.
        unsafe { launches.send_silently(self.work.stream) };
        launches.want(on);
    }

    /// A number that is another one once launches were lost: what was noted or sent before may not have been computed.
    pub fn failures(&self) -> u64 {
        self.launches().failures()
    }

    /// How kernels were launched.
    pub fn launch_counts(&self) -> LaunchCounts {
        self.launches().counts()
    }

    /// Sends the launches that are noted, waits for everything that was launched, then frees.
    ///
    /// # Safety
    /// The address comes from [`Device::allocate`] and is not used again, by launches after this one.
    pub unsafe fn free(&self, address: u64) {
        if self.enter().is_ok() {
            // SAFETY: the stream is the device's; the address is the caller's promise. An error here would be an earlier one
            // of a kernel, which the next call reports.
            unsafe {
                self.launches().send_silently(self.work.stream);
                let _ = stream::synchronize(self.work.stream);
                let _ = result::free_sync(address);
            }
        }
    }

    /// Waits for everything that was launched.
    pub fn wait(&self) -> Result<(), BackendError> {
        let sent = self.send();
        self.launches().settle();
        // SAFETY: the stream is the device's.
        let waited = unsafe { stream::synchronize(self.work.stream) }.map_err(|e| self.failed(e));
        sent.and(waited)
    }

    /// Sets bytes to zero, before the launches that are noted.
    ///
    /// # Safety
    /// They are allocated, and no launch that is noted reads or writes them.
    pub unsafe fn clear(&self, address: u64, bytes: usize) -> Result<(), BackendError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { result::memset_d8_async(address, 0, bytes, self.work.stream) }.map_err(|e| self.failed(e))
    }

    /// Copies to the device, in order with all other work.
    ///
    /// # Safety
    /// The destination is allocated.
    pub unsafe fn write(&self, to: u64, from: &[u8]) -> Result<(), BackendError> {
        self.send()?;
        // SAFETY: the caller's promise.
        unsafe { self.copy_in(&self.work, to, from) }
    }

    /// As [`Device::write`], but launches that are noted go before it only if one of them has the destination among its
    /// arguments.
    ///
    /// # Safety
    /// As there; a launch that is noted reads or writes these bytes only if it does so through that argument.
    pub unsafe fn replace(&self, to: u64, from: &[u8]) -> Result<(), BackendError> {
        let named = self.launches().names(to);
        if named {
            self.send()?;
        }
        // SAFETY: the caller's promise.
        unsafe { self.copy_in(&self.work, to, from) }
    }

    /// Copies to the device beside whatever is running there, and waits for the copy: what is launched after this sees it.
    ///
    /// # Safety
    /// The destination is allocated; what was launched and may still use it was so before the last
    /// [`Device::arrivals_follow_work`].
    pub unsafe fn bring(&self, to: u64, from: &[u8]) -> Result<(), BackendError> {
        // SAFETY: the caller's promise.
        let copied = unsafe { self.copy_in(&self.arrivals, to, from) };
        // SAFETY: the stream is the device's.
        let waited = unsafe { stream::synchronize(self.arrivals.stream) }.map_err(|e| self.failed(e));
        copied.and(waited)
    }

    /// Lets later [`Device::bring`]s begin after everything that has been launched by now. Waits for nothing itself. The error of a
    /// launch is not that of who asks for this, often another session: the next operation has it.
    pub fn arrivals_follow_work(&self) -> Result<(), BackendError> {
        // SAFETY: as in `send`; streams and event are the device's. A wait is for what the event marked when the wait was asked for.
        unsafe {
            self.launches().send_silently(self.work.stream);
            event::record(self.mark, self.work.stream)
                .and_then(|()| {
                    let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
                    stream::wait_event(self.arrivals.stream, self.mark, flags)
                })
                .map_err(|e| self.failed(e))
        }
    }

    /// Copies on a stream through pinned memory: the source may change or go as soon as this returns, which the driver does not promise of
    /// an asynchronous copy from pageable memory, and reading a large one (a mapped file, often) and its transfer overlap.
    ///
    /// # Safety
    /// The destination is allocated.
    unsafe fn copy_in(&self, lane: &Lane, mut to: u64, mut from: &[u8]) -> Result<(), BackendError> {
        let mut staging = lane.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let staging = match &mut *staging {
            Some(staging) => staging,
            empty => empty.insert(self.new_staging()?),
        };
        while !from.is_empty() {
            if staging.filled == STAGING {
                let other = 1 - staging.turn;
                // SAFETY: the events and the stream are the device's.
                unsafe {
                    event::record(staging.events[staging.turn], lane.stream)
                        .and_then(|()| event::synchronize(staging.events[other]))
                        .map_err(|e| self.failed(e))?;
                }
                (staging.turn, staging.filled) = (other, 0);
            }
            let (piece, rest) = from.split_at(from.len().min(STAGING - staging.filled));
            // SAFETY: the buffer has room for the piece behind what is filled, and no copy reads that: since the last one that did, its event
            // was waited for. The destination is the caller's promise.
            unsafe {
                let room = staging.buffers[staging.turn].cast::<u8>().add(staging.filled);
                staging.filled += piece.len();
                std::ptr::copy_nonoverlapping(piece.as_ptr(), room, piece.len());
                let staged = std::slice::from_raw_parts(room, piece.len());
                result::memcpy_htod_async(to, staged, lane.stream).map_err(|e| self.failed(e))?;
            }
            to += piece.len() as u64;
            from = rest;
        }
        Ok(())
    }

    fn new_staging(&self) -> Result<Staging, BackendError> {
        let buffer = || {
            // SAFETY: freed when the device is dropped.
            unsafe { result::malloc_host(STAGING, 0) }.map_err(|e| self.failed(e))
        };
        let event = || event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(|e| self.failed(e));
        Ok(Staging { buffers: [buffer()?, buffer()?], events: [event()?, event()?], turn: 0, filled: 0 })
    }

    /// A number that is another one once something has been read back: what a step reads, it reads at its end.
    pub fn round(&self) -> u64 {
        self.round.load(Ordering::Relaxed)
    }

    /// Copies from the device, and waits.
    ///
    /// # Safety
    /// The source is allocated.
    pub unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<(), BackendError> {
        if to.is_empty() {
            return Ok(());
        }
        self.round.fetch_add(1, Ordering::Relaxed);
        self.send()?;
        // SAFETY: the caller's promise; the copy has ended before the borrow of `to` does.
        let copied = unsafe { result::memcpy_dtoh_async(to, from, self.work.stream) };
        self.wait()?;
        copied.map_err(|e| self.failed(e))
    }

    /// Copies on the device; the ranges do not overlap.
    ///
    /// # Safety
    /// Both are allocated.
    pub unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), BackendError> {
        if bytes == 0 {
            return Ok(());
        }
        self.send()?;
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.work.stream) }.map_err(|e| self.failed(e))
    }

    /// Launches a kernel on a grid of blocks, after everything that was asked for before; a grid without blocks is nothing. The launch may
    /// be noted only, and then what the driver says to it is the error of a later call.
    ///
    /// # Safety
    /// The arguments are those of the kernel's parameters, in number and size, and every address it computes from
    /// them is allocated; also those that it reads from memory. Memory that is freed ([`Device::free`]) or that another stream writes from
    /// now on ([`Device::arrivals_follow_work`]) is taken care of.
    pub unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: [u32; 3],
        arguments: &[Argument],
    ) -> Result<(), BackendError> {
        if grid.contains(&0) {
            return Ok(());
        }
        const { assert!(cfg!(target_endian = "little"), "a word is read from the first bytes of its slot") };
        let slots = arguments.iter().map(|argument| match argument {
            Argument::Long(value) => *value,
            Argument::Word(value) => u64::from(*value),
            Argument::Float(value) => u64::from(value.to_bits()),
        });
        let Some(kernel) = self.functions.get(kernel).copied() else {
            return Err(error(&self.label, format!("there is no kernel {kernel}")));
        };
        // SAFETY: the function's module is loaded; the rest is the caller's promise.
        unsafe { self.launches().note(kernel, grid, slots, self.work.stream) }
            .map_err(|e| self.not_launched(e))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        // Every `Memory` holds the device alive and sends before it frees: there is nothing left to launch.
        self.launches.get_mut().unwrap_or_else(PoisonError::into_inner).end();
        // SAFETY: everything was made by this device and is not used after, and no allocation is left. Errors while ending
        // have nobody to tell.
        unsafe {
            for lane in [&mut self.work, &mut self.arrivals] {
                if lane.stream.is_null() {
                    continue;
                }
                let _ = stream::synchronize(lane.stream);
                let staging = lane.staging.get_mut().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(Staging { buffers, events, .. }) = staging {
                    for (buffer, event) in buffers.into_iter().zip(events) {
                        let _ = result::free_host(buffer);
                        let _ = event::destroy(event);
                    }
                }
                let _ = stream::destroy(lane.stream);
            }
            if !self.mark.is_null() {
                let _ = event::destroy(self.mark);
            }
            for module in self.modules.drain(..) {
                let _ = module::unload(module);
            }
            let _ = primary_ctx::release(self.ordinal);
        }
    }
}
