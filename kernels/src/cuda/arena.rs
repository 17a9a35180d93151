//! Room of any size within slabs of memory, by first fit. Numbers only: whose memory it is, [`super::pool`] knows.

use std::collections::BTreeMap;

/// Rooms start at multiples of it, as allocations of the driver do.
const ALIGN: usize = 256;

/// Some bytes of a slab.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Room {
    pub slab: usize,
    pub offset: usize,
    bytes: usize,
}

/// Free bytes of all slabs: per slab, offset → length, no two of them adjacent.
#[derive(Default)]
pub(super) struct Arena {
    free: Vec<BTreeMap<usize, usize>>,
    bytes: usize,
    used: usize,
}

impl Arena {
    /// One more slab; whole multiples of 256 bytes of it are used.
    pub fn add_slab(&mut self, bytes: usize) {
        let bytes = bytes / ALIGN * ALIGN;
        self.free.push(BTreeMap::from([(0, bytes)]));
        self.bytes += bytes;
    }

    /// Bytes of all slabs.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes in rooms.
    pub fn used(&self) -> usize {
        self.used
    }

    /// The first free place that holds `bytes`.
    pub fn take(&mut self, bytes: usize) -> Option<Room> {
        let bytes = bytes.checked_next_multiple_of(ALIGN)?;
        let (slab, offset, len) = self.free.iter().enumerate().find_map(|(slab, free)| {
            free.iter().find(|(_, len)| **len >= bytes).map(|(offset, len)| (slab, *offset, *len))
        })?;
        let free = self.free.get_mut(slab)?;
        free.remove(&offset);
        if len > bytes {
            free.insert(offset + bytes, len - bytes);
        }
        self.used += bytes;
        Some(Room { slab, offset, bytes })
    }

    /// Takes a room back, and joins it with what is free beside it.
    pub fn give(&mut self, room: Room) {
        let Room { slab, mut offset, mut bytes } = room;
        self.used -= bytes;
        let Some(free) = self.free.get_mut(slab) else { return };
        if let Some(after) = free.remove(&(offset + bytes)) {
            bytes += after;
        }
        if let Some((before, len)) = free.range(..offset).next_back().map(|(o, l)| (*o, *l))
            && before + len == offset
        {
            (offset, bytes) = (before, bytes + len);
        }
        free.insert(offset, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In any order of taking and giving, rooms lie within their slabs, no two overlap, and in the end all is one piece again.
    #[test]
    fn rooms_do_not_overlap() {
        let mut arena = Arena::default();
        assert_eq!(arena.take(1), None);
        arena.add_slab(64 * ALIGN);
        arena.add_slab(16 * ALIGN + 100);
        assert_eq!(arena.bytes(), 80 * ALIGN);
        let (mut rooms, mut state) = (Vec::<Room>::new(), 1u64);
        let mut next = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        for _ in 0..4000 {
            if next(5) < 2 && !rooms.is_empty() {
                arena.give(rooms.swap_remove(next(rooms.len())));
            } else if let Some(room) = arena.take(1 + next(9 * ALIGN)) {
                let end = room.offset + room.bytes;
                assert!(room.offset % ALIGN == 0 && end <= [64, 16][room.slab] * ALIGN);
                let apart =
                    |r: &Room| r.slab != room.slab || r.offset >= end || r.offset + r.bytes <= room.offset;
                assert!(rooms.iter().all(apart), "{room:?} among {rooms:?}");
                rooms.push(room);
            }
            assert_eq!(arena.used(), rooms.iter().map(|r| r.bytes).sum());
        }
        rooms.into_iter().for_each(|room| arena.give(room));
        assert_eq!(arena.free, [BTreeMap::from([(0, 64 * ALIGN)]), BTreeMap::from([(0, 16 * ALIGN)])]);
        assert_eq!(arena.take(usize::MAX), None);
    }
}
