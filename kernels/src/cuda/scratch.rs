//! Working memory that operations leave to the next one.
//!
//! All work is on one stream, so what a slot held is no longer needed when the next operation writes it.

use std::sync::Arc;

use super::device::Device;
use super::memory::Memory;
use crate::backend::BackendError;

/// What a piece of scratch memory is for.
#[derive(Clone, Copy)]
pub(super) enum Slot {
    /// Activations as a product wants them.
    Activations,
    /// Vᵀ x.
    Shrunk,
    /// C Vᵀ x.
    Cored,
    /// U C Vᵀ x.
    Expanded,
    /// y before any adapter.
    Before,
    /// Spans of attention.
    Partial,
    /// Logits with their tokens.
    Keys,
    /// The likeliest tokens.
    Ranked,
}

const SLOTS: usize = Slot::Ranked as usize + 1;

/// One buffer per slot, as long as the longest use so far.
pub(super) struct Scratch {
    device: Arc<Device>,
    slots: [Option<Memory>; SLOTS],
}

impl Scratch {
    pub fn new(device: &Arc<Device>) -> Scratch {
        Scratch { device: device.clone(), slots: [const { None }; SLOTS] }
    }

    fn memory(&mut self, slot: Slot, bytes: usize) -> Result<&mut Memory, BackendError> {
        let held = &mut self.slots[slot as usize];
        if held.as_ref().is_none_or(|held| held.len() < bytes) {
            // The old one first: both may not fit.
            *held = None;
            *held = Some(Memory::new(&self.device, "working memory", bytes.next_power_of_two().max(4096))?);
        }
        // The branch above has filled it.
        held.as_mut().ok_or(BackendError::OutOfMemory {
            device: self.device.label().into(),
            what: "working memory",
            bytes,
        })
    }

    /// The address of `bytes` undefined bytes.
    pub fn room(&mut self, slot: Slot, bytes: usize) -> Result<u64, BackendError> {
        Ok(self.memory(slot, bytes)?.address())
    }

    /// Copies out what the last use of a slot left at its start, once it has been done.
    ///
    /// # Panics
    /// If the slot has less.
    pub fn read(&self, slot: Slot, to: &mut [u8]) -> Result<(), BackendError> {
        self.slots[slot as usize].as_ref().map_or(Ok(()), |memory| memory.read(0, to))
    }
}
