//! Weights on the device: the base's for good, adapters' while there is room.
//!
//! The base's weights are named by their address ([`Backend::load`](crate::Backend::load)): they stay mapped as long as the
//! engine lives. Everything else may be freed and its address used again, so the content is hashed (XXH3, 128 bits) at each
//! use. That costs the CPU some 10 GB/s of reading; an identity in the trait would save it, see `README.md`.

use std::collections::HashMap;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_128;

use super::device::Device;
use super::memory::Memory;
use crate::QMatrix;
use crate::backend::BackendError;

/// Bytes of weights that were not loaded ahead: adapters.
const BUDGET: usize = 1 << 30;

type Key = (usize, usize);

struct Passing {
    hash: u128,
    memory: Arc<Memory>,
    last_used: u64,
}

/// The copies.
pub(super) struct Weights {
    device: Arc<Device>,
    loaded: HashMap<Key, Arc<Memory>>,
    passing: HashMap<Key, Passing>,
    passing_bytes: usize,
    uses: u64,
}

fn key(weight: QMatrix<'_>) -> Key {
    (weight.bytes().as_ptr() as usize, weight.bytes().len())
}

impl Weights {
    pub fn new(device: &Arc<Device>) -> Weights {
        Weights {
            device: device.clone(),
            loaded: HashMap::new(),
            passing: HashMap::new(),
            passing_bytes: 0,
            uses: 0,
        }
    }

    /// Copies a weight that stays where it is as long as the backend is used.
    pub fn load(&mut self, weight: QMatrix<'_>) -> Result<(), BackendError> {
        if !self.loaded.contains_key(&key(weight)) {
            let memory = Memory::holding(&self.device, "a weight", weight.bytes())?;
            self.loaded.insert(key(weight), Arc::new(memory));
        }
        Ok(())
    }

    /// The copy of a weight, made now if need be. It is kept at least until it is dropped by the caller.
    pub fn get(&mut self, weight: QMatrix<'_>) -> Result<Arc<Memory>, BackendError> {
        let key = key(weight);
        if let Some(memory) = self.loaded.get(&key) {
            return Ok(memory.clone());
        }
        self.uses += 1;
        let hash = xxh3_128(weight.bytes());
        if let Some(held) = self.passing.get_mut(&key) {
            if held.hash == hash {
                held.last_used = self.uses;
                return Ok(held.memory.clone());
            }
            self.passing_bytes -= held.memory.len();
            self.passing.remove(&key);
        }
        while self.passing_bytes + weight.bytes().len() > BUDGET && self.drop_oldest() {}
        let memory = loop {
            match Memory::holding(&self.device, "an adapter's weight", weight.bytes()) {
                Err(BackendError::OutOfMemory { .. }) if self.drop_oldest() => {}
                other => break Arc::new(other?),
            }
        };
        self.passing_bytes += memory.len();
        self.passing.insert(key, Passing { hash, memory: memory.clone(), last_used: self.uses });
        Ok(memory)
    }

    /// `false` if there is nothing left to drop.
    fn drop_oldest(&mut self) -> bool {
        let oldest = self.passing.iter().min_by_key(|(_, held)| held.last_used).map(|(key, _)| *key);
        match oldest.and_then(|key| self.passing.remove(&key)) {
            Some(held) => {
                self.passing_bytes -= held.memory.len();
                true
            }
            None => false,
        }
    }
}
