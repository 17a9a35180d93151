//! Small arrays of the host that come with every call: norms, biases, frequencies.

use std::collections::HashMap;
use std::sync::Arc;

use super::device::Device;
use super::memory::{Memory, floats_as_bytes};
use crate::backend::BackendError;

/// Arrays beyond which all are dropped: a model has a few per layer.
const MOST: usize = 8192;

/// Copies by address. The trait does not promise that an array stays what it was, so the host's copy is compared at
/// each use: 16 KiB take less than a microsecond.
pub(super) struct Constants {
    device: Arc<Device>,
    held: HashMap<(usize, usize), (Vec<f32>, Memory)>,
}

impl Constants {
    pub fn new(device: &Arc<Device>) -> Constants {
        Constants { device: device.clone(), held: HashMap::new() }
    }

    /// The address of a copy of `values`.
    pub fn address(&mut self, values: &[f32]) -> Result<u64, BackendError> {
        let key = (values.as_ptr() as usize, values.len());
        if let Some((copy, memory)) = self.held.get(&key)
            && floats_as_bytes(copy) == floats_as_bytes(values)
        {
            return Ok(memory.address());
        }
        if self.held.len() >= MOST {
            self.held.clear();
        }
        let memory = Memory::holding(&self.device, "a norm or bias", floats_as_bytes(values))?;
        let address = memory.address();
        self.held.insert(key, (values.to_vec(), memory));
        Ok(address)
    }
}
