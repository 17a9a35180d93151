//! What templates expect of Python: how values print, and methods of strings, lists and dicts.

use std::sync::atomic::AtomicUsize;

use minijinja::{
    Error, ErrorKind, Output, State, Value,
    value::{ValueKind, from_args},
};
use minijinja_contrib::pycompat;

use super::{MAX_DEPTH, MAX_OUTPUT, bounds, charge, json};

/// Writes a printed expression as Python's `str` would, against the budget of the rendering.
pub(super) fn print(
    out: &mut Output,
    value: &Value,
    written: &AtomicUsize,
    limit: usize,
) -> Result<(), Error> {
    if value.is_undefined() {
        return Ok(());
    }
    let text;
    let text = match value.as_str() {
        Some(text) => text,
        None => {
            text = to_str(value)?;
            &text
        }
    };
    charge(written, text.len(), limit)?;
    out.write_str(text).map_err(|e| Error::new(ErrorKind::WriteFailure, e.to_string()))
}

/// Python's `str`; also the `string` filter.
pub(super) fn to_str(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let mut text = String::new();
    repr(&mut text, value, 0)?;
    Ok(text)
}

/// Python's `repr`.
fn repr(out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH || out.len() > MAX_OUTPUT {
        return Err(Error::new(ErrorKind::InvalidOperation, "the value is too large to print"));
    }
    match value.kind() {
        ValueKind::Undefined => {}
        ValueKind::Number => out.push_str(&json::number(value, ["nan", "inf", "-inf"])),
        ValueKind::String => quote(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            let [open, close] = if value.is_tuple() { ['(', ')'] } else { ['[', ']'] };
            out.push(open);
            let mut n = 0;
            for item in value.try_iter()? {
                if n > 0 {
                    out.push_str(", ");
                }
                repr(out, &item, depth + 1)?;
                n += 1;
            }
            if n == 1 && value.is_tuple() {
                out.push(',');
            }
            out.push(close);
        }
        ValueKind::Map if value.as_object().is_none_or(|o| o.repr() == minijinja::value::ObjectRepr::Map) => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                repr(out, &key, depth + 1)?;
                out.push_str(": ");
                repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

fn quote(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c < ' ' || c == '\u{7f}' => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// Jinja's `is sequence`: whatever has a length and items, strings and dicts included.
pub(super) fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String)
}

/// Methods that the engine's values lack.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        bounds::check_method(name, text, args)?;
        match name {
            "removeprefix" => {
                let (prefix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)));
            }
            "removesuffix" => {
                let (suffix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)));
            }
            "swapcase" => {
                let () = from_args(args)?;
                let swap = |c: char| {
                    if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() }
                };
                return Ok(Value::from(text.chars().map(swap).collect::<String>()));
            }
            "partition" | "rpartition" => {
                let (separator,): (&str,) = from_args(args)?;
                return partition(text, separator, name == "rpartition");
            }
            "rsplit" => {
                let (separator, most): (&str, Option<usize>) = from_args(args)?;
                return rsplit(text, separator, most);
            }
            _ => {}
        }
    }
    if value.kind() == ValueKind::Map && name == "copy" {
        let () = from_args(args)?;
        return Ok(value.clone());
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

fn not_empty(separator: &str) -> Result<(), Error> {
    if separator.is_empty() {
        return Err(Error::new(ErrorKind::InvalidOperation, "the separator is empty"));
    }
    Ok(())
}

fn partition(text: &str, separator: &str, last: bool) -> Result<Value, Error> {
    not_empty(separator)?;
    let found = if last { text.rsplit_once(separator) } else { text.split_once(separator) };
    let parts = match found {
        Some((left, right)) => [left, separator, right],
        None if last => ["", "", text],
        None => [text, "", ""],
    };
    Ok(parts.into_iter().map(Value::from).collect())
}

fn rsplit(text: &str, separator: &str, most: Option<usize>) -> Result<Value, Error> {
    not_empty(separator)?;
    let mut parts: Vec<&str> = match most {
        Some(most) => text.rsplitn(most.saturating_add(1), separator).collect(),
        None => text.rsplit(separator).collect(),
    };
    parts.reverse();
    Ok(parts.into_iter().map(Value::from).collect())
}
