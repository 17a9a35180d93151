//! Running requests and their events.

use std::{ffi::c_void, sync::Mutex, task::Poll};

use lory_runtime::{Canceller, Event, FinishReason, Generation};

use crate::{
    args::{exclusive, free, handle, object, out, slice},
    callbacks::lory_event_fn,
    event::{LORY_EVENT_END, Shown, lory_event, lory_finish_reason},
    log::Log,
    memory::lory_text,
    status::{Failure, Result, guard, guard_free, lory_status, lory_status::*},
    structs::{Place, place},
};

/// A running request. Exclusive, except for `lory_generation_cancel`. Whichever thread asks for the
/// next event runs a step for all sessions of the engine if nobody else is doing so; there is no
/// thread in the background. It keeps what it needs of its engine alive.
pub struct lory_generation {
    pub(crate) reader: Mutex<Reader>,
    canceller: Canceller,
    log: Log,
}

/// A generation, and what its last event points to.
pub(crate) struct Reader {
    pub(crate) generation: Generation,
    shown: Shown,
}

impl Reader {
    fn take(&mut self, next: Option<lory_runtime::Result<Event>>) -> Result<lory_event> {
        match next.transpose()? {
            Some(event) => self.shown.show(event),
            None => Ok(lory_event::end(self.ended()?)),
        }
    }

    fn ended(&self) -> Result<FinishReason> {
        let text = "the generation has ended with an error, which was reported before";
        self.generation.finish_reason().ok_or_else(|| Failure::new(LORY_E_REQUEST, text))
    }

    fn next(&mut self) -> Result<lory_event> {
        let next = self.generation.next();
        self.take(next)
    }
}

impl lory_generation {
    pub(crate) fn new(generation: Generation, log: Log) -> lory_generation {
        let canceller = generation.canceller();
        lory_generation { reader: Mutex::new(Reader { generation, shown: Shown::default() }), canceller, log }
    }
}

/// Waits for the next event, running steps as needed. After an error, the generation has ended.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generation_next(
    generation: *mut lory_generation,
    event: *mut lory_event,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (generation, event) = (object(generation, "generation")?, place(event)?);
        let mut reader = exclusive(&generation.reader, "generation")?;
        event.set(&generation.log.within(|| reader.next())?);
        Ok(())
    })
}

/// The next event if it is there already, otherwise one of kind `LORY_EVENT_NONE`. Runs nothing.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generation_poll(
    generation: *mut lory_generation,
    event: *mut lory_event,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (generation, event) = (object(generation, "generation")?, place(event)?);
        let mut reader = exclusive(&generation.reader, "generation")?;
        match reader.generation.poll_next() {
            Poll::Ready(next) => event.set(&reader.take(next)?),
            Poll::Pending => event.set(&lory_event::none()),
        }
        Ok(())
    })
}

/// Waits until one of several generations of one engine has an event, running steps as needed;
/// `index` says which. Generations that have ended are passed over; if all have, `index` becomes
/// `n_generations` and the event is of kind `LORY_EVENT_NONE`. On an error of one generation,
/// `index` is written too.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generations_next(
    generations: *const *mut lory_generation,
    n_generations: usize,
    index: *mut usize,
    event: *mut lory_event,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let handles = slice(generations, n_generations, "generations")?;
        let (index, event) = (out(index, "index")?, place(event)?);
        let objects = handles.iter().map(|g| object(*g, "a generation")).collect::<Result<Vec<_>>>()?;
        let readers = objects.iter().map(|g| exclusive(&g.reader, "a generation"));
        let mut readers = readers.collect::<Result<Vec<_>>>()?;
        next_of(&mut readers.iter_mut().map(|r| &mut **r).collect::<Vec<_>>(), index, &event)
    })
}

fn next_of(
    readers: &mut [&mut Reader],
    index: crate::args::Out<'_, usize>,
    event: &Place<'_, lory_event>,
) -> Result<()> {
    let mut generations: Vec<_> = readers.iter_mut().map(|r| &mut r.generation).collect();
    match Generation::next_of(&mut generations) {
        None => {
            index.set(readers.len());
            event.set(&lory_event::none());
        }
        Some((i, next)) => {
            index.set(i);
            event.set(&readers[i].take(next)?);
        }
    }
    Ok(())
}

/// Runs to the end and hands every event, the end included, to `on_event(user, event)`; if that
/// returns something other than 0, the generation is cancelled and no more events are handed out.
/// `finish_reason` may be NULL.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generation_run(
    generation: *mut lory_generation,
    on_event: lory_event_fn,
    user: *mut c_void,
    finish_reason: *mut lory_finish_reason,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let generation = object(generation, "generation")?;
        let on_event = on_event.ok_or_else(|| Failure::new(LORY_E_NULL, "on_event is NULL"))?;
        let mut reader = exclusive(&generation.reader, "generation")?;
        let reason = generation.log.within(|| run(&mut reader, |event| on_event(user, event) == 0))?;
        if let Ok(place) = out(finish_reason, "finish_reason") {
            place.set(reason);
        }
        Ok(())
    })
}

fn run(reader: &mut Reader, mut go_on: impl FnMut(&lory_event) -> bool) -> Result<lory_finish_reason> {
    let mut listening = true;
    loop {
        let event = reader.next()?;
        if listening && !go_on(&event) {
            listening = false;
            reader.generation.cancel();
        }
        if event.kind == LORY_EVENT_END {
            return Ok(event.finish_reason);
        }
    }
}

/// Runs to the end and gives the whole text, without what was read before. Of a generation that has ended
/// with an error, it gives that error, also again.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generation_text(
    generation: *mut lory_generation,
    text: *mut lory_text,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (generation, text) = (object(generation, "generation")?, out(text, "text")?);
        let mut reader = exclusive(&generation.reader, "generation")?;
        text.set(lory_text::new(generation.log.within(|| reader.generation.text())?));
        Ok(())
    })
}

/// Ends a generation before its next step. From any thread, also while another one waits for an
/// event; the generation must not have been freed (`lory_canceller` has no such condition).
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generation_cancel(generation: *const lory_generation) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        object(generation, "generation")?.canceller.cancel();
        Ok(())
    })
}

/// Frees a generation and ends it; NULL is a no-op.
///
/// # Safety
/// `generation` is NULL or not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generation_free(generation: *mut lory_generation) {
    // SAFETY: the caller's word.
    guard_free(|| unsafe { free(generation) });
}

/// Ends a generation from anywhere, whether it has been freed or not. Shareable.
pub struct lory_canceller(Canceller);

/// A handle that ends the generation.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generation_canceller(
    generation: *const lory_generation,
    canceller: *mut *mut lory_canceller,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (generation, canceller) = (object(generation, "generation")?, out(canceller, "canceller")?);
        canceller.set(handle(lory_canceller(generation.canceller.clone())));
        Ok(())
    })
}

/// Ends the generation before its next step; a no-op if it has ended or was freed.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_canceller_cancel(canceller: *const lory_canceller) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        object(canceller, "canceller")?.0.cancel();
        Ok(())
    })
}

/// Frees a canceller, not the generation; NULL is a no-op.
///
/// # Safety
/// `canceller` is NULL or not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_canceller_free(canceller: *mut lory_canceller) {
    // SAFETY: the caller's word.
    guard_free(|| unsafe { free(canceller) });
}
