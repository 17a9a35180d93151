//! The `tojson` filter as Hugging Face defines it: Python's `json.dumps` without HTML escapes.

use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, Rest, ValueKind},
};

use super::MAX_DEPTH;

/// Longest document that one call may write, in bytes.
const MAX_LEN: usize = 64 << 20;

/// How `json.dumps` was asked to write.
struct Style {
    ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sorted: bool,
}

/// `value | tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    // Positional arguments come in the order of Hugging Face's signature.
    let arg = |i: usize, name: &str| -> Result<Option<Value>, Error> {
        let positional = args.get(i).filter(|v| !v.is_kwargs()).cloned();
        let named = kwargs.get::<Option<Value>>(name)?;
        Ok(positional.or(named).filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let ascii = arg(0, "ensure_ascii")?.is_some_and(|v| v.is_true());
    let indent = arg(1, "indent")?.map(|v| indentation(&v)).transpose()?;
    let item = if indent.is_some() { "," } else { ", " };
    let (item, key) = match arg(2, "separators")? {
        None => (item.to_owned(), ": ".to_owned()),
        Some(pair) => (part(&pair, 0)?, part(&pair, 1)?),
    };
    let sorted = arg(3, "sort_keys")?.is_some_and(|v| v.is_true());
    kwargs.assert_all_used()?;
    let mut out = String::new();
    write(&mut out, value, &Style { ascii, indent, item, key, sorted }, 0)?;
    Ok(out)
}

fn indentation(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    match value.as_i64() {
        Some(n) if n <= 64 => Ok(" ".repeat(usize::try_from(n).unwrap_or(0))),
        _ => Err(fault("tojson: indent must be a string or a number up to 64")),
    }
}

fn part(pair: &Value, i: usize) -> Result<String, Error> {
    let item = pair.get_item_by_index(i)?;
    item.as_str().map(str::to_owned).ok_or_else(|| fault("tojson: separators must be two strings"))
}

fn fault(message: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_owned())
}

fn write(out: &mut String, value: &Value, style: &Style, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(fault("tojson: nested too deep"));
    }
    if out.len() > MAX_LEN {
        return Err(fault("tojson: the document is too long"));
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&number(value, ["NaN", "Infinity", "-Infinity"])),
        ValueKind::String => quote(out, value.as_str().unwrap_or_default(), style.ascii),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|v| (None, v)).collect();
            container(out, ['[', ']'], items, style, depth)?;
        }
        ValueKind::Map => {
            let mut items = Vec::new();
            for key in value.try_iter()? {
                let item = value.get_item(&key)?;
                items.push((Some(key_text(&key)?), item));
            }
            if style.sorted {
                items.sort_by(|a, b| a.0.cmp(&b.0));
            }
            container(out, ['{', '}'], items, style, depth)?;
        }
        kind => return Err(fault(&format!("tojson: {kind} is not JSON serializable"))),
    }
    Ok(())
}

fn container(
    out: &mut String,
    [open, close]: [char; 2],
    items: Vec<(Option<String>, Value)>,
    style: &Style,
    depth: usize,
) -> Result<(), Error> {
    out.push(open);
    let empty = items.is_empty();
    for (i, (key, item)) in items.into_iter().enumerate() {
        if i > 0 {
            out.push_str(&style.item);
        }
        newline(out, style, depth + 1);
        if let Some(key) = key {
            quote(out, &key, style.ascii);
            out.push_str(&style.key);
        }
        write(out, &item, style, depth + 1)?;
    }
    if !empty {
        newline(out, style, depth);
    }
    out.push(close);
    Ok(())
}

fn newline(out: &mut String, style: &Style, depth: usize) {
    if let Some(indent) = &style.indent {
        out.push('\n');
        (0..depth).for_each(|_| out.push_str(indent));
    }
}

/// Python turns the simple types of keys into strings.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Number => Ok(number(key, ["NaN", "Infinity", "-Infinity"])),
        kind => Err(fault(&format!("tojson: keys must be strings or numbers, not {kind}"))),
    }
}

/// A number as Python's `repr` writes it; `special` are its words for what is not finite.
pub(super) fn number(value: &Value, special: [&str; 3]) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else { return value.to_string() };
    if float.is_nan() {
        return special[0].to_owned();
    }
    if float.is_infinite() {
        return special[if float > 0.0 { 1 } else { 2 }].to_owned();
    }
    let text = format!("{float:?}");
    match text.split_once('e') {
        None => text,
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
            format!("{digits}e{sign}{exponent:0>2}")
        }
    }
}

fn quote(out: &mut String, text: &str, ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ascii && !c.is_ascii()) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}
