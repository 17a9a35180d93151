//! Whose turn it is.
//!
//! Requests of higher priority go first, but nobody waits for ever: every [`AGING`] steps that a
//! request could have run and did not, count as one more level of priority until it runs. Within a
//! level, generating sequences go before prompts, so that a long prompt delays nobody's next token
//! by more than a step; among generating ones the one that ran longest ago, among prompts the one
//! that came first.

use std::cmp::Reverse;

use lory_kernels::Backend;

use crate::{
    scheduler::{Scheduler, SequenceId},
    sequence::Sequence,
};

/// Steps of waiting that make up for one level of priority.
pub(crate) const AGING: u32 = 16;

/// Steps without room in the cache after which a request may take it from any other.
pub(crate) const STARVING: u32 = 64;

/// Who may take the cache from whom: smaller ranks from larger ones. It does not change while a
/// request runs, save once when it starves, so that two cannot take it from each other in turn.
pub(crate) type Rank = (bool, Reverse<i64>, u64);

impl<B: Backend> Scheduler<B> {
    /// Sequences that could run, first come first.
    pub(crate) fn runnable(&self) -> Vec<SequenceId> {
        let mut order: Vec<_> = self
            .sequences
            .iter()
            .filter_map(|(id, s)| {
                let active = s.active.as_ref().filter(|a| !a.is_paused())?;
                let turn = active.turn;
                let level = i64::from(s.priority) + i64::from(turn.waited / AGING);
                let is_prompt = s.pending() > 1;
                let since = if is_prompt { turn.arrival } else { turn.last_run };
                Some((Reverse(level), is_prompt, since, turn.arrival, *id))
            })
            .collect();
        order.sort_unstable();
        order.into_iter().map(|(.., id)| id).collect()
    }

    /// Notes who ran and who had to wait.
    pub(crate) fn count_turns(&mut self, runnable: &[SequenceId], ran: impl Fn(SequenceId) -> bool) {
        for id in runnable {
            let Some(active) = self.sequences.get_mut(id).and_then(|s| s.active.as_mut()) else { continue };
            let turn = &mut active.turn;
            match ran(*id) {
                true => (turn.last_run, turn.waited) = (self.clock, 0),
                false => turn.waited = turn.waited.saturating_add(1),
            }
        }
    }
}

impl Sequence {
    /// The rank of its request.
    pub(crate) fn rank(&self) -> Option<Rank> {
        let turn = self.active.as_ref()?.turn;
        Some((turn.starved < STARVING, Reverse(self.priority.into()), turn.arrival))
    }
}
