//! Memory of the device, freed when it is dropped, and every access within its bounds.

use std::sync::Arc;

use super::device::Device;
use crate::backend::BackendError;

/// Some bytes.
pub(super) struct Memory {
    device: Arc<Device>,
    address: u64,
    bytes: usize,
}

impl Memory {
    /// Undefined bytes.
    pub fn new(device: &Arc<Device>, what: &'static str, bytes: usize) -> Result<Memory, BackendError> {
        Ok(Memory { address: device.allocate(what, bytes)?, device: device.clone(), bytes })
    }

    /// Zeros.
    pub fn zeros(device: &Arc<Device>, what: &'static str, bytes: usize) -> Result<Memory, BackendError> {
        let memory = Memory::new(device, what, bytes)?;
        // SAFETY: all of the allocation, which nobody else knows yet.
        unsafe { device.clear(memory.address, bytes) }?;
        Ok(memory)
    }

    /// A copy of `from`.
    pub fn holding(device: &Arc<Device>, what: &'static str, from: &[u8]) -> Result<Memory, BackendError> {
        let mut memory = Memory::new(device, what, from.len())?;
        memory.replace(from)?;
        Ok(memory)
    }

    /// Where it starts.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How long it is.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// The address of `offset`.
    ///
    /// # Panics
    /// If fewer than `bytes` follow it.
    pub fn at(&self, offset: usize, bytes: usize) -> u64 {
        let end = offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.bytes), "{bytes} bytes at {offset} of {}", self.bytes);
        self.address + offset as u64
    }

    /// Copies in.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn write(&mut self, offset: usize, from: &[u8]) -> Result<(), BackendError> {
        // SAFETY: `at` has checked the range.
        unsafe { self.device.write(self.at(offset, from.len()), from) }
    }

    /// Copies in from the start on, for memory that kernels get the first byte's address of, and no other.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn replace(&mut self, from: &[u8]) -> Result<(), BackendError> {
        // SAFETY: `at` has checked the range; launches that reach it name its start.
        unsafe { self.device.replace(self.at(0, from.len()), from) }
    }

    /// Copies out.
    ///
    /// # Panics
    /// If it is too short.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), BackendError> {
        // SAFETY: `at` has checked the range.
        unsafe { self.device.read(self.at(offset, to.len()), to) }
    }

    /// Copies within, between ranges that do not overlap.
    ///
    /// # Panics
    /// If they do, or leave the memory.
    pub fn copy_within(&mut self, from: usize, to: usize, bytes: usize) -> Result<(), BackendError> {
        assert!(from.abs_diff(to) >= bytes, "{bytes} bytes from {from} to {to}");
        // SAFETY: `at` has checked both ranges.
        unsafe { self.device.copy(self.at(from, bytes), self.at(to, bytes), bytes) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`, and nobody has it any more.
        unsafe { self.device.free(self.address) }
    }
}

/// 32-bit floats in the device's memory: what [`super::Cuda`] works on.
pub struct CudaBuffer {
    pub(super) memory: Memory,
}

impl CudaBuffer {
    /// How many floats.
    pub fn len(&self) -> usize {
        self.memory.len() / 4
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The address of the first of `len` floats.
    ///
    /// # Panics
    /// If there are fewer.
    pub(super) fn first(&self, len: usize) -> u64 {
        self.memory.at(0, len * 4)
    }
}

/// Floats as the device reads them.
pub(super) fn floats_as_bytes(values: &[f32]) -> &[u8] {
    // SAFETY: a float is four initialised bytes, and bytes have no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Floats to be filled with bytes.
pub(super) fn floats_as_bytes_mut(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: as above, and any four bytes are a float.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// Words as the device reads them.
pub(super) fn words_as_bytes(values: &[u32]) -> &[u8] {
    // SAFETY: a word is four initialised bytes, and bytes have no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}
