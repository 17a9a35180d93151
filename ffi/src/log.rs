//! The log of one engine: nothing, unless the host gives a function.

use std::{ffi::CString, fmt::Write};

use tracing::{
    Dispatch, Event, Level, Metadata, Subscriber,
    dispatcher::with_default,
    field::{Field, Visit},
    span,
};

use crate::callbacks::{User, lory_log_fn, lory_log_level};

/// Where an engine's log goes.
#[derive(Clone, Default)]
pub(crate) struct Log(Option<Dispatch>);

impl Log {
    /// A log of lines up to `level`.
    pub(crate) fn new(function: lory_log_fn, user: User, level: lory_log_level) -> Log {
        Log(function.is_some().then(|| Dispatch::new(Sink { function, user, level })))
    }

    /// Runs `body` with this log as the thread's; no other thread and no global state is touched.
    pub(crate) fn within<R>(&self, body: impl FnOnce() -> R) -> R {
        match &self.0 {
            None => body(),
            Some(dispatch) => with_default(dispatch, body),
        }
    }
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
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("lory") && level(metadata.level()) <= self.level
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
            // SAFETY: the host's function with the host's pointer; the text lives during the call.
            unsafe { function(self.user.0, level(event.metadata().level()), text.as_ptr(), len) };
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
