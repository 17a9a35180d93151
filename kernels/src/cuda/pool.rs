//! The device's part of adapters: which pieces of which files lie where, and which give way.
//!
//! What travels together is a *parcel*: matrices of one owner that are neighbours in memory, such as a whole record of a
//! pack, so that an adapter arrives in one copy instead of one per site and projection. A copy is known by the address of its
//! bytes and a weak reference to their owner ([`QMatrix::keeper`]): while the owner lives, nothing else can be at that address;
//! once it is gone the copy is never looked at again. Nothing is hashed.
//!
//! No lock and no copying here; both are in [`super::weights`].

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use super::arena::{Arena, Room};
use super::device::Device;
use super::memory::Memory;
use crate::QMatrix;
use crate::backend::BackendError;
use crate::quant::Keeper;

/// Bytes that are asked of the driver at a time.
const SLAB: usize = 64 << 20;
/// Without a budget this part of the device's memory stays free: working memory may still grow. It is less than what a model that does not fit
/// leaves for adapters (`GpuLayers::Fit` in the runtime), or they would have none of that.
const SPARE: usize = 32;
/// Matrices travel together up to so many bytes …
const PARCEL: usize = 4 << 20;
/// … and across gaps up to so many: alignment, an index between records.
const GAP: usize = 4 << 10;
/// Kernels load up to so many bytes at once, from addresses that are multiples of it, as those of rooms are. A matrix that lies at no multiple of
/// it from a parcel's start is none of its.
const ALIGN: usize = 16;

/// What adapters occupy on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AdapterPool {
    /// Bytes that they may have; `None` is all but 1/32 of the device's memory, as far as nothing else has it.
    pub budget: Option<usize>,
    /// Bytes of what is there.
    pub bytes: usize,
    /// Parcels that are there.
    pub parcels: usize,
    /// Parcels that were brought ahead of their use.
    pub prefetched: u64,
    /// Parcels and single matrices that were copied when they were already needed.
    pub late: u64,
    /// Parcels that gave way.
    pub evicted: u64,
}

/// Bytes that travel together, with their owner.
#[derive(Clone, Copy)]
pub(super) struct Extent<'a> {
    pub keeper: &'a Keeper,
    pub bytes: &'a [u8],
}

impl Extent<'_> {
    pub fn start(&self) -> usize {
        self.bytes.as_ptr() as usize
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }
}

/// `len` bytes at address `start`, if they are the owner's.
fn part(keeper: &Keeper, start: usize, len: usize) -> Option<Extent<'_>> {
    let all = (**keeper).as_ref();
    let offset = start.checked_sub(all.as_ptr() as usize)?;
    let bytes = all.get(offset..offset.checked_add(len)?)?;
    Some(Extent { keeper, bytes })
}

/// The extent of one matrix, if its owner is known and has it.
pub(super) fn extent_of(weight: QMatrix<'_>) -> Option<Extent<'_>> {
    let bytes = weight.bytes();
    if bytes.is_empty() { None } else { part(weight.keeper()?, bytes.as_ptr() as usize, bytes.len()) }
}

enum Place {
    /// It was here, or is about to come.
    Away,
    /// Somebody copies it; the number tells which copying.
    Coming(u64),
    Here(Room),
}

struct Parcel {
    bytes: usize,
    keeper: Weak<dyn AsRef<[u8]> + Send + Sync>,
    place: Place,
    /// The turn in which it was last named.
    last_used: u64,
}

impl Parcel {
    fn holds(&self) -> bool {
        self.keeper.strong_count() > 0
    }
}

/// What is known about some bytes.
pub(super) enum Found<'a> {
    /// They are on the device, at this address.
    Here(u64),
    /// Somebody is copying them.
    Coming,
    /// They are not there; this is what to copy.
    Away(Extent<'a>),
}

/// Parcels and their places.
pub(super) struct Pool {
    device: Arc<Device>,
    budget: Option<usize>,
    slabs: Vec<Memory>,
    arena: Arena,
    /// By the address of the first byte on the host.
    parcels: BTreeMap<usize, Parcel>,
    turn: u64,
    copies: u64,
    pub prefetched: u64,
    pub late: u64,
    evicted: u64,
}

impl Pool {
    pub fn new(device: &Arc<Device>) -> Pool {
        Pool {
            device: device.clone(),
            budget: None,
            slabs: Vec::new(),
            arena: Arena::default(),
            parcels: BTreeMap::new(),
            turn: 0,
            copies: 0,
            prefetched: 0,
            late: 0,
            evicted: 0,
        }
    }

    /// Bytes that may be asked of the driver from now on, with those that were.
    pub fn set_budget(&mut self, bytes: Option<usize>) {
        self.budget = bytes;
    }

    pub fn usage(&self) -> AdapterPool {
        let Pool { budget, prefetched, late, evicted, .. } = *self;
        let parcels = self.parcels.values().filter(|p| matches!(p.place, Place::Here(_))).count();
        AdapterPool { budget, bytes: self.arena.used(), parcels, prefetched, late, evicted }
    }

    /// A new turn: what is named in it gives way to nothing else that is named in it.
    pub fn next_turn(&mut self) -> u64 {
        self.turn += 1;
        self.turn
    }

    fn address(&self, room: &Room) -> u64 {
        self.slabs.get(room.slab).map_or(0, |slab| slab.address() + room.offset as u64)
    }

    /// Where an extent is. One that is not there is widened to the parcel that it is known to belong to.
    pub fn find<'a>(&mut self, wanted: Extent<'a>, turn: u64) -> Result<Found<'a>, BackendError> {
        let (start, len) = (wanted.start(), wanted.len());
        let Some((first, parcel)) = self.parcels.range_mut(..=start).next_back() else {
            return Ok(Found::Away(wanted));
        };
        let (first, offset) = (*first, start - *first);
        if !parcel.holds() {
            self.forget(first)?;
            return Ok(Found::Away(wanted));
        }
        let covered = offset + len <= parcel.bytes && offset.is_multiple_of(ALIGN);
        match &parcel.place {
            // Also where it starts at the same place and is shorter: it is replaced once it has come.
            Place::Coming(_) if covered || offset == 0 => Ok(Found::Coming),
            Place::Here(room) if covered => {
                parcel.last_used = turn;
                let slab = self.slabs.get(room.slab).map_or(0, Memory::address);
                Ok(Found::Here(slab + (room.offset + offset) as u64))
            }
            Place::Away if covered => {
                Ok(Found::Away(part(wanted.keeper, first, parcel.bytes).unwrap_or(wanted)))
            }
            _ => Ok(Found::Away(wanted)),
        }
    }

    /// What has to be copied so that all of these matrices are here: neighbours together.
    pub fn missing<'a>(
        &mut self,
        mut wanted: Vec<Extent<'a>>,
        turn: u64,
    ) -> Result<Vec<Extent<'a>>, BackendError> {
        wanted.sort_unstable_by_key(|extent| (extent.start(), extent.len()));
        let mut missing: Vec<Extent<'a>> = Vec::new();
        // Whether the last one may grow.
        let mut open = false;
        for extent in wanted {
            let found = match self.find(extent, turn)? {
                Found::Here(_) => {
                    open = false;
                    continue;
                }
                Found::Coming => extent,
                Found::Away(found) => found,
            };
            let known = found.len() != extent.len();
            let start = found.start();
            if let Some(last) = missing.last_mut() {
                let (first, end) = (last.start(), last.start() + last.len());
                let aligned = (start - first).is_multiple_of(ALIGN);
                if aligned && start + found.len() <= end {
                    continue;
                }
                let together = start + found.len() - first;
                let near = open && !known && aligned && start <= end + GAP && together <= PARCEL;
                if let Some(both) = part(last.keeper, first, together).filter(|_| near) {
                    *last = both;
                    continue;
                }
            }
            missing.push(found);
            open = !known;
        }
        Ok(missing)
    }

    /// Room for a copy, and its address; `None` if too little can be had without what is named in this turn or later.
    pub fn room(&mut self, bytes: usize, turn: u64) -> Result<Option<(Room, u64)>, BackendError> {
        let mut swept = false;
        loop {
            if let Some(room) = self.arena.take(bytes) {
                let address = self.address(&room);
                return Ok(Some((room, address)));
            }
            if !swept {
                self.sweep()?;
                swept = true;
            } else if !self.grow(bytes)? && !self.evict(turn)? {
                return Ok(None);
            }
        }
    }

    /// Gives room back that no parcel has.
    pub fn give(&mut self, room: Room) -> Result<(), BackendError> {
        self.arena.give(room);
        // Whatever still reads or writes it was launched by now, or is noted and sent by this: copies from elsewhere begin after it.
        self.device.arrivals_follow_work()
    }

    /// Notes that somebody copies an extent. The number is for [`Pool::arrived`].
    pub fn coming(&mut self, extent: Extent<'_>, turn: u64) -> Result<u64, BackendError> {
        self.copies += 1;
        self.put(extent, Place::Coming(self.copies), turn)?;
        Ok(self.copies)
    }

    /// The end of a copying that began with [`Pool::coming`], at this room; `None` if it failed.
    pub fn arrived(&mut self, start: usize, copying: u64, room: Option<Room>) {
        let parcel = self.parcels.get_mut(&start);
        match parcel.filter(|p| matches!(p.place, Place::Coming(which) if which == copying)) {
            Some(parcel) => parcel.place = room.map_or(Place::Away, Place::Here),
            // Its entry has gone in the meantime; nobody has seen the room yet.
            None => room.into_iter().for_each(|room| self.arena.give(room)),
        }
    }

    /// Notes where an extent lies.
    pub fn here(&mut self, extent: Extent<'_>, room: Room, turn: u64) -> Result<(), BackendError> {
        self.put(extent, Place::Here(room), turn)
    }

    fn put(&mut self, extent: Extent<'_>, place: Place, turn: u64) -> Result<(), BackendError> {
        let (start, end) = (extent.start(), extent.start() + extent.len());
        // What it takes in is not looked up any more.
        let within = self.parcels.range(start..end).filter(|(first, parcel)| {
            let idle = parcel.last_used < turn && !matches!(parcel.place, Place::Coming(_));
            **first == start || idle && **first + parcel.bytes <= end
        });
        let within: Vec<usize> = within.map(|(first, _)| *first).collect();
        within.into_iter().try_for_each(|first| self.forget(first))?;
        let keeper = Arc::downgrade(extent.keeper);
        let parcel = Parcel { bytes: extent.len(), keeper, place, last_used: turn };
        self.parcels.insert(start, parcel);
        Ok(())
    }

    /// Whether a parcel that begins here is named in this turn, so that none may take its place.
    pub fn is_named(&self, start: usize, turn: u64) -> bool {
        self.parcels.get(&start).is_some_and(|p| p.last_used >= turn && matches!(p.place, Place::Here(_)))
    }

    fn forget(&mut self, start: usize) -> Result<(), BackendError> {
        match self.parcels.remove(&start).map(|parcel| parcel.place) {
            Some(Place::Here(room)) => self.give(room),
            _ => Ok(()),
        }
    }

    /// Forgets everything whose owner is gone.
    fn sweep(&mut self) -> Result<(), BackendError> {
        let gone: Vec<usize> =
            self.parcels.iter().filter(|(_, p)| !p.holds()).map(|(start, _)| *start).collect();
        gone.into_iter().try_for_each(|start| self.forget(start))
    }

    /// The parcel that was used longest ago gives way; `false` if there is none but those of this turn and later.
    fn evict(&mut self, turn: u64) -> Result<bool, BackendError> {
        let here = self.parcels.iter_mut().filter(|(_, p)| matches!(p.place, Place::Here(_)));
        let oldest = here.filter(|(_, p)| p.last_used < turn).min_by_key(|(_, p)| p.last_used);
        let Some((_, parcel)) = oldest else { return Ok(false) };
        if let Place::Here(room) = std::mem::replace(&mut parcel.place, Place::Away) {
            self.evicted += 1;
            self.give(room)?;
        }
        Ok(true)
    }

    /// One more slab, if it holds `bytes` and may be had.
    fn grow(&mut self, bytes: usize) -> Result<bool, BackendError> {
        let most = match self.budget {
            Some(budget) => budget.saturating_sub(self.arena.bytes()),
            None => {
                let (free, total) = self.device.memory()?;
                free.saturating_sub(total / SPARE)
            }
        };
        let slab = bytes.next_multiple_of(256).max(SLAB).min(most);
        if slab < bytes.next_multiple_of(256) {
            return Ok(false);
        }
        match Memory::new(&self.device, "adapters", slab) {
            Ok(memory) => {
                self.slabs.push(memory);
                self.arena.add_slab(slab);
                Ok(true)
            }
            Err(BackendError::OutOfMemory { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
