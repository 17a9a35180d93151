//! The log of one engine: nothing, unless the host gives a function.

use std::{cell::Cell, ffi::CString, fmt::Write};

use tracing::{
    Dispatch, Event, Level, Metadata, Subscriber,
    dispatcher::with_default,
    field::{Field, Visit},
    span,
    subscriber::Interest,
};

use crate::callbacks::{User, lory_log_fn, lory_log_level};

/// Where an engine's log goes.
///
/// `tracing` keeps for every message of the source, for the whole process, whether anybody wants it. With
/// one subscriber in the process it asks only the thread that comes by first, and nobody at all inside of a
/// log function; so a silent engine could settle that a message is never wanted. With two it asks all of
/// them: each engine registers two, a silent one too, and they never say never.
#[derive(Clone)]
pub(crate) struct Log {
    sink: Dispatch,
    _second: Dispatch,
}

impl Log {
    /// A log of lines up to `level`; nowhere if there is no function.
    pub(crate) fn new(function: lory_log_fn, user: User, level: lory_log_level) -> Log {
        let sink = || Dispatch::new(Sink { function, user, level });
        Log { sink: sink(), _second: sink() }
    }

    /// Runs `body` with this log as the thread's; no other thread is touched.
    pub(crate) fn within<R>(&self, body: impl FnOnce() -> R) -> R {
        if IN_LOG_FUNCTION.get() { body() } else { with_default(&self.sink, body) }
    }
}

thread_local! {
    /// Whether the thread is in a host's log function. `tracing` cannot be given another subscriber there,
    /// and drops what is said.
    static IN_LOG_FUNCTION: Cell<bool> = const { Cell::new(false) };
}

struct Sink {
    function: lory_log_fn,
    user: User,
    level: lory_log_level,
}

fn level(level: &Level) -> lory_log_level {
    match *level {
        Level::ERROR => 1,
        Level::WARN => 2,
        Level::INFO => 3,
        _ => 4,
    }
}

impl Subscriber for Sink {
    fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
        Interest::sometimes()
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.function.is_some()
            && metadata.target().starts_with("lory")
            && level(metadata.level()) <= self.level
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        let text = CString::new(line.0.replace('\0', "\u{fffd}")).unwrap_or_default();
        if let Some(function) = self.function {
            let len = text.as_bytes().len();
            IN_LOG_FUNCTION.set(true);
            // SAFETY: the host's function with the host's pointer; the text lives during the call.
            unsafe { function(self.user.0, level(event.metadata().level()), text.as_ptr(), len) };
            IN_LOG_FUNCTION.set(false);
        }
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// The message, then `key=value` for every other field.
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let gap = if self.0.is_empty() { "" } else { " " };
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{gap}{value:?}"),
            name => write!(self.0, "{gap}{name}={value:?}"),
        };
    }
}
