//! Weights on the device: the model's for good, adapters' while there is room.
//!
//! The model's weights are named by their address ([`Backend::load`](crate::Backend::load)): they stay where they are as long
//! as the backend is used. Adapters' come and go in a [`Pool`], mostly ahead of their use and on a stream of their own: whoever
//! asks for that waits for the copy, while operations go on. A weight whose owner nobody named is copied for one operation.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::device::Device;
use super::memory::Memory;
use super::pool::{AdapterPool, Extent, Found, Pool, extent_of};
use crate::QMatrix;
use crate::backend::{BackendError, LoraWeight};

type Key = (usize, usize);

/// The copies.
pub(super) struct Weights {
    device: Arc<Device>,
    held: Mutex<Held>,
    arrived: Condvar,
}

struct Held {
    loaded: HashMap<Key, Memory>,
    pool: Pool,
}

/// The weights during one operation: what it has named stays until its kernels are launched. They are asked for before this ends, and
/// sent before anything takes the place of what they read: room is given away by [`Pool`] alone, which sends them, and memory freed by
/// [`Memory`], which does.
pub(super) struct Turn<'a> {
    device: &'a Arc<Device>,
    held: MutexGuard<'a, Held>,
    turn: u64,
    /// Copies for this operation alone.
    passing: Vec<Memory>,
}

fn key(weight: QMatrix<'_>) -> Key {
    (weight.bytes().as_ptr() as usize, weight.bytes().len())
}

impl Weights {
    pub fn new(device: &Arc<Device>) -> Weights {
        let held = Held { loaded: HashMap::new(), pool: Pool::new(device) };
        Weights { device: device.clone(), held: Mutex::new(held), arrived: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies a weight that stays where it is as long as the backend is used.
    pub fn load(&self, weight: QMatrix<'_>) -> Result<(), BackendError> {
        let mut held = self.lock();
        if let Entry::Vacant(entry) = held.loaded.entry(key(weight)) {
            entry.insert(Memory::holding(&self.device, "a weight", weight.bytes())?);
        }
        Ok(())
    }

    pub fn set_budget(&self, bytes: Option<usize>) {
        self.lock().pool.set_budget(bytes);
    }

    pub fn usage(&self) -> AdapterPool {
        self.lock().pool.usage()
    }

    /// Begins an operation.
    pub fn turn(&self) -> Turn<'_> {
        let mut held = self.lock();
        let turn = held.pool.next_turn();
        Turn { device: &self.device, held, turn, passing: Vec::new() }
    }

    /// [`Backend::prefetch`](crate::Backend::prefetch).
    pub fn prefetch(&self, weights: &mut dyn Iterator<Item = LoraWeight<'_>>) -> Result<(), BackendError> {
        let wanted: Vec<_> = weights.filter_map(|added| extent_of(added.weight)).collect();
        let mut held = self.lock();
        let turn = held.pool.next_turn();
        let missing = held.pool.missing(wanted, turn)?;
        drop(held);
        missing.into_iter().try_for_each(|extent| self.bring(extent, turn))
    }

    /// Waits until an extent is here, or there is no room for it. The lock is free while it is copied.
    fn bring(&self, extent: Extent<'_>, turn: u64) -> Result<(), BackendError> {
        let mut held = self.lock();
        let (extent, room, address, copying) = loop {
            match held.pool.find(extent, turn)? {
                Found::Here(_) => return Ok(()),
                Found::Coming => held = self.arrived.wait(held).unwrap_or_else(PoisonError::into_inner),
                Found::Away(extent) => {
                    let Some((room, address)) = held.pool.room(extent.len(), turn)? else { return Ok(()) };
                    break (extent, room, address, held.pool.coming(extent, turn)?);
                }
            }
        };
        drop(held);
        // SAFETY: the room is as long as the extent, and nobody else's until it is given back below or has arrived.
        let copied = unsafe { self.device.bring(address, extent.bytes) };
        let mut held = self.lock();
        if copied.is_ok() {
            held.pool.prefetched += 1;
            held.pool.arrived(extent.start(), copying, Some(room));
        } else {
            held.pool.arrived(extent.start(), copying, None);
            held.pool.give(room)?;
        }
        self.arrived.notify_all();
        copied
    }
}

impl Turn<'_> {
    /// The address of a weight's copy, made now if need be.
    pub fn address(&mut self, weight: QMatrix<'_>) -> Result<u64, BackendError> {
        let Some(wanted) = extent_of(weight) else { return self.loaded_or_passing(weight) };
        let Held { loaded, pool } = &mut *self.held;
        let (extent, room, address) = match pool.find(wanted, self.turn)? {
            Found::Here(address) => return Ok(address),
            Found::Coming => return self.loaded_or_passing(weight),
            Found::Away(_) if loaded.contains_key(&key(weight)) => return self.loaded_or_passing(weight),
            Found::Away(extent) if pool.is_named(extent.start(), self.turn) => {
                return self.loaded_or_passing(weight);
            }
            Found::Away(extent) => match pool.room(extent.len(), self.turn)? {
                Some((room, address)) => (extent, room, address),
                None => return self.loaded_or_passing(weight),
            },
        };
        // On the working stream: in order with whatever read the room before and with the kernel that is to come.
        // SAFETY: the room is as long as the extent.
        if let Err(error) = unsafe { self.device.write(address, extent.bytes) } {
            self.held.pool.give(room)?;
            return Err(error);
        }
        self.held.pool.late += 1;
        self.held.pool.here(extent, room, self.turn)?;
        Ok(address + (wanted.start() - extent.start()) as u64)
    }

    fn loaded_or_passing(&mut self, weight: QMatrix<'_>) -> Result<u64, BackendError> {
        if let Some(memory) = self.held.loaded.get(&key(weight)) {
            return Ok(memory.address());
        }
        let memory = Memory::holding(self.device, "an adapter's weight", weight.bytes())?;
        self.held.pool.late += 1;
        let address = memory.address();
        self.passing.push(memory);
        Ok(address)
    }
}
