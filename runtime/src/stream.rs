//! The queue between the scheduler and whoever reads an answer.

use std::{
    collections::VecDeque,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
};

use crate::{Event, FinishReason, Result, Stats, lock};

/// Where the scheduler leaves the events of one request. Once it is full, the request is not run
/// until its reader has caught up.
pub(crate) struct Stream {
    state: Mutex<State>,
    cancelled: AtomicBool,
    limit: usize,
}

#[derive(Default)]
struct State {
    events: VecDeque<Event>,
    end: Option<Result<FinishReason>>,
    stats: Stats,
}

impl Stream {
    /// A queue for `limit` events, at least one.
    pub(crate) fn new(limit: usize) -> Stream {
        Stream { state: Mutex::default(), cancelled: AtomicBool::new(false), limit: limit.max(1) }
    }

    pub(crate) fn push(&self, event: Event) {
        lock(&self.state).events.push_back(event);
    }

    pub(crate) fn finish(&self, end: Result<FinishReason>) {
        lock(&self.state).end.get_or_insert(end);
    }

    pub(crate) fn set_stats(&self, stats: Stats) {
        lock(&self.state).stats = stats;
    }

    pub(crate) fn stats(&self) -> Stats {
        lock(&self.state).stats
    }

    /// How many more events may wait.
    pub(crate) fn room(&self) -> usize {
        self.limit.saturating_sub(lock(&self.state).events.len())
    }

    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    pub(crate) fn finish_reason(&self) -> Option<FinishReason> {
        match &lock(&self.state).end {
            Some(Ok(reason)) => Some(*reason),
            _ => None,
        }
    }

    /// The next event, or how it ended; pending while there is neither.
    pub(crate) fn poll(&self) -> Poll<Option<Result<Event>>> {
        let mut state = lock(&self.state);
        if let Some(event) = state.events.pop_front() {
            return Poll::Ready(Some(Ok(event)));
        }
        match &state.end {
            None => Poll::Pending,
            Some(Ok(_)) => Poll::Ready(None),
            Some(Err(e)) => Poll::Ready(Some(Err(e.clone()))),
        }
    }
}
