//! Slices that go backwards, as Python has them: `messages[::-1]`.
//!
//! The engine's own (minijinja 3.0.5) panics where there is nothing (`[][::-1]`), with overflow checks also where the end lies behind the start
//! (`'ab'[0:2:-1]`), and takes an end of 0 for none (`'abc'[2:0:-1]`).

use std::iter::successors;

use minijinja::{
    Value,
    value::{Tuple, ValueKind},
};

/// `value[start:stop:step]` of a text or a sequence for negative steps; `None` for everything else, which the engine knows how to do or to refuse.
pub(super) fn backwards(value: &Value, start: &Value, stop: &Value, step: &Value) -> Option<Value> {
    let step = i64::try_from(step.clone()).ok().filter(|step| *step < 0)?;
    let (start, stop) = (bound(start)?, bound(stop)?);
    if let Some(text) = value.as_str() {
        let chars: Vec<char> = text.chars().collect();
        let taken = indices(chars.len(), start, stop, step).filter_map(|i| chars.get(i));
        return Some(Value::from(taken.collect::<String>()));
    }
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        return None;
    }
    let values: Vec<Value> = value.try_iter().ok()?.collect();
    let taken = indices(values.len(), start, stop, step).filter_map(|i| values.get(i).cloned());
    let taken: Vec<Value> = taken.collect();
    Some(if value.is_tuple() { Value::from(Tuple::from(taken)) } else { Value::from(taken) })
}

/// A bound that may be left out; `None` for what is no number.
fn bound(value: &Value) -> Option<Option<i64>> {
    match value.is_none() || value.is_undefined() {
        true => Some(None),
        false => i64::try_from(value.clone()).ok().map(Some),
    }
}

/// The indices of `[start:stop:step]` for `step` < 0, in `0..len`: from `start` down to before `stop`; negative ones count from the end, and those beyond either
/// end are that end (Python's `slice.indices`).
fn indices(len: usize, start: Option<i64>, stop: Option<i64>, step: i64) -> impl Iterator<Item = usize> {
    let len = i64::try_from(len).unwrap_or(i64::MAX);
    let place = |bound: i64| {
        let from_front = if bound < 0 { bound.saturating_add(len) } else { bound };
        from_front.clamp(-1, len - 1)
    };
    let (start, stop) = (start.map_or(len - 1, place), stop.map_or(-1, place));
    let down = successors(Some(start), move |i| i.checked_add(step)).take_while(move |i| *i > stop);
    down.filter_map(|i| usize::try_from(i).ok())
}
