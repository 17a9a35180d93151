//! Small arrays of numbers that kernels read: tokens, slots, pages, descriptors of adapters.
//!
//! All layers of a step ask for the same ones, and a step of decoding asks for most of those of the step before. So what is on
//! the device already is known by its contents and not copied again, and what replaces it lies where it lay: from step
//! to step the same kernel gets the same address.

use std::collections::HashMap;
use std::sync::Arc;

use super::device::Device;
use super::memory::{Memory, words_as_bytes};
use crate::backend::BackendError;

/// Bytes that a table has room for at least: a batch may grow by a few rows without its tables moving.
const LEAST: usize = 256;
/// Bytes of all tables up to which another one is kept rather than the oldest overwritten: a step with 256 rows on as many
/// adapters needs 8 MiB in a model of 32 layers.
const MOST: usize = 64 << 20;

/// What a table is for. An operation names one table of a kind at most before it asks for the launches that read it: the next of that
/// kind may take the place of the last.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// Rows of the embedding.
    Tokens,
    /// Lines to gather.
    Lines,
    /// Positions to rotate to.
    Positions,
    /// Where keys and values go.
    Slots,
    /// Rows of attention.
    Places,
    /// Their pages.
    Pages,
    /// Rows of attention that go together.
    Tiles,
    /// Rows of an adapter's group.
    GroupRows,
    /// `CoreLine`s.
    CoreLines,
    /// `CoreTerm`s.
    CoreTerms,
    /// `ApplyRow`s.
    ApplyRows,
    /// `ApplyStep`s.
    ApplySteps,
    /// Lines whose likeliest tokens are wanted.
    Ranked,
}

/// What operations asked for of the small tables that they send from the host: rows, positions, descriptors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TableCopies {
    /// Tables that were asked for.
    pub asked: u64,
    /// Those that were not on the device and had to be copied.
    pub copied: u64,
    /// Bytes of device memory that tables have.
    pub bytes: usize,
}

struct Table {
    /// What was copied last.
    words: Vec<u32>,
    memory: Memory,
    /// The round in which it was last asked for.
    round: u64,
}

/// Tables of one kind and capacity, in the order in which a round asks for them.
#[derive(Default)]
struct Group {
    tables: Vec<Table>,
    /// The one asked for last: layers ask for the same.
    last: usize,
    /// The one behind it, which came next in the round before.
    next: usize,
    round: u64,
}

impl Group {
    fn find(&self, words: &[u32]) -> Option<usize> {
        let same = |table: &Table| table.words == words;
        let guess = [self.last, self.next].into_iter().find(|at| self.tables.get(*at).is_some_and(same));
        guess.or_else(|| self.tables.iter().position(same))
    }

    /// The next one that this round has not asked for.
    fn idle(&self) -> Option<usize> {
        let (before, after) = self.tables.split_at(self.next.min(self.tables.len()));
        let idle = |table: &Table| table.round != self.round;
        let later = after.iter().position(idle).map(|at| before.len() + at);
        later.or_else(|| before.iter().position(idle))
    }
}

/// The tables.
pub(super) struct Tables {
    device: Arc<Device>,
    groups: HashMap<(Kind, usize), Group>,
    usage: TableCopies,
}

impl Tables {
    pub fn new(device: &Arc<Device>) -> Tables {
        Tables { device: device.clone(), groups: HashMap::new(), usage: TableCopies::default() }
    }

    pub fn usage(&self) -> TableCopies {
        self.usage
    }

    /// Forgets all if they are too many. Between operations only: the next one's tables may lie where this one's did.
    pub fn trim(&mut self) {
        if self.usage.bytes > MOST {
            self.groups.clear();
            self.usage.bytes = 0;
        }
    }

    /// The address of these words.
    pub fn address(&mut self, kind: Kind, words: &[u32]) -> Result<u64, BackendError> {
        let bytes = words_as_bytes(words);
        let capacity = bytes.len().next_power_of_two().max(LEAST);
        let round = self.device.round();
        let group = self.groups.entry((kind, capacity)).or_default();
        if group.round != round {
            (group.round, group.next) = (round, 0);
        }
        self.usage.asked += 1;
        let (at, here) = match group.find(words) {
            Some(at) => (at, true),
            None => match group.idle() {
                Some(at) => (at, false),
                // All are of this round, so the next one is the oldest. What reads it was asked for before.
                None if !group.tables.is_empty() && self.usage.bytes + capacity > MOST => {
                    (group.next % group.tables.len(), false)
                }
                None => {
                    let memory = Memory::new(&self.device, "working memory", capacity)?;
                    group.tables.push(Table { words: Vec::new(), memory, round });
                    self.usage.bytes += capacity;
                    (group.tables.len() - 1, false)
                }
            },
        };
        (group.last, group.next) = (at, at + 1);
        let table = &mut group.tables[at];
        table.round = round;
        if !here && !words.is_empty() {
            // Nothing is known of it if the copy fails.
            table.words.clear();
            table.memory.replace(bytes)?;
            table.words.extend_from_slice(words);
            self.usage.copied += 1;
        }
        Ok(table.memory.address())
    }
}
