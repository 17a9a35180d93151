//! Who waits for steps, and what they are told.

use std::{
    sync::{Condvar, Mutex, PoisonError},
    task::Waker,
};

use crate::lock;

/// How far the steps of an engine have come.
#[derive(Default)]
pub(crate) struct Progress {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    seen: Seen,
    /// Threads that sleep. Telling nobody costs a call of the system all the same, a third of what a switch of adapters takes.
    sleeping: usize,
    wakers: Vec<Waker>,
}

/// How far they were when somebody looked.
#[derive(Clone, Copy, Default)]
pub(crate) struct Seen {
    /// Steps that have ended, whether they ran something or not.
    steps: u64,
    /// Steps that ran something, and announcements: what may follow a step that ran nothing with one
    /// that does, or with an event.
    changes: u64,
}

impl Progress {
    /// How far the steps are; to be read before looking for what may be there already.
    pub(crate) fn seen(&self) -> Seen {
        lock(&self.state).seen
    }

    /// A step has ended, or the thread has left that ran the steps for others.
    pub(crate) fn end_turn(&self, ran: bool) {
        let wakers = self.tell(|state| {
            state.seen.steps += 1;
            state.seen.changes += u64::from(ran);
            std::mem::take(&mut state.wakers)
        });
        wakers.into_iter().for_each(Waker::wake);
    }

    /// There is something new to run or to give up, new room in the cache, or a request has ended.
    pub(crate) fn announce(&self) {
        self.tell(|state| state.seen.changes += 1);
    }

    fn tell<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = lock(&self.state);
        let changed = change(&mut state);
        let sleeping = state.sleeping;
        drop(state);
        if sleeping > 0 {
            self.changed.notify_all();
        }
        changed
    }

    /// Sleeps until a step has ended.
    pub(crate) fn wait_for_step(&self, seen: Seen) {
        self.sleep(|now| now.steps == seen.steps);
    }

    /// Sleeps, after a step that ran nothing, until another one might.
    pub(crate) fn wait_for_change(&self, seen: Seen) {
        self.sleep(|now| now.changes == seen.changes);
    }

    fn sleep(&self, still: impl Fn(&Seen) -> bool) {
        let mut state = lock(&self.state);
        state.sleeping += 1;
        let woken = self.changed.wait_while(state, |s| still(&s.seen));
        woken.unwrap_or_else(PoisonError::into_inner).sleeping -= 1;
    }

    /// Wakes a task once a step has ended.
    pub(crate) fn wake_after_step(&self, seen: Seen, waker: &Waker) {
        let mut state = lock(&self.state);
        if state.seen.steps != seen.steps {
            drop(state);
            waker.wake_by_ref();
        } else if !state.wakers.iter().any(|w| w.will_wake(waker)) {
            state.wakers.push(waker.clone());
        }
    }
}
