//! Typed reading of a JSON object's keys.

use serde_json::{Map, Value};

use crate::{Error, Result};

/// The keys of `adapter_config.json`; a key that is absent or `null` is not set.
pub(super) struct Settings<'a> {
    file: &'a str,
    map: Map<String, Value>,
}

impl<'a> Settings<'a> {
    /// # Errors
    /// Text that is not UTF-8, not JSON, or not an object.
    pub fn parse(file: &'a str, text: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(text)
            .map_err(|e| Error::container(file, format!("is not UTF-8 after byte {}", e.valid_up_to())))?;
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Settings { file, map }),
            Ok(_) => Err(Error::container(file, "is not a JSON object")),
            Err(e) => Err(Error::container(file, format!("is not valid JSON: {e}"))),
        }
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Every key whose value switches something on: not `null`, `false`, or empty.
    pub fn switched_on(&self) -> impl Iterator<Item = &str> {
        self.map.iter().filter(|(_, v)| on(v)).map(|(k, _)| k.as_str())
    }

    pub fn error(&self, key: &str, message: impl Into<String>) -> Error {
        Error::key(self.file, key, message)
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        self.error(key, format!("is {}, expected {expected}", short(value)))
    }

    pub fn flag(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(self.wrong(key, other, "true or false")),
        }
    }

    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.wrong(key, other, "a string")),
        }
    }

    /// A number of at least 1.
    pub fn count(&self, key: &str) -> Result<usize> {
        let value = self.get(key).ok_or_else(|| self.error(key, "is missing"))?;
        self.as_count(key, value)
    }

    pub fn as_count(&self, key: &str, value: &Value) -> Result<usize> {
        let count = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
        count.ok_or_else(|| self.wrong(key, value, "a whole number of at least 1"))
    }

    pub fn number(&self, key: &str) -> Result<f64> {
        let value = self.get(key).ok_or_else(|| self.error(key, "is missing"))?;
        self.as_number(key, value)
    }

    pub fn as_number(&self, key: &str, value: &Value) -> Result<f64> {
        let finite = value.as_f64().filter(|n| (*n as f32).is_finite());
        finite.ok_or_else(|| self.wrong(key, value, "a number"))
    }

    /// A list of whole numbers, or one alone.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<u64>>> {
        let wrong = |v: &Value| self.wrong(key, v, "a list of whole numbers");
        let one = |v: &Value| v.as_u64().ok_or_else(|| wrong(v));
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(items)) => items.iter().map(one).collect::<Result<_>>().map(Some),
            Some(v) => Ok(Some(vec![one(v)?])),
        }
    }

    /// A list of strings, or one alone; whether it was one alone is told.
    pub fn strings(&self, key: &str) -> Result<Option<(bool, Vec<&str>)>> {
        let one = |v: &'_ Value| v.as_str().map(str::len).ok_or_else(|| self.wrong(key, v, "strings"));
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some((true, vec![s]))),
            Some(Value::Array(items)) => {
                items.iter().try_for_each(|v| one(v).map(drop))?;
                Ok(Some((false, items.iter().filter_map(Value::as_str).collect())))
            }
            Some(v) => Err(self.wrong(key, v, "a string or a list of strings")),
        }
    }

    /// The pairs of an object, in the order of the file.
    pub fn pairs(&self, key: &str) -> Result<Vec<(&str, &Value)>> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Object(map)) => Ok(map.iter().map(|(k, v)| (k.as_str(), v)).collect()),
            Some(other) => Err(self.wrong(key, other, "an object")),
        }
    }
}

/// What a file says, for a message: not longer than a line.
pub(super) fn short(value: impl ToString) -> String {
    let mut text = value.to_string();
    if let Some((cut, _)) = text.char_indices().nth(80) {
        text.truncate(cut);
        text.push('…');
    }
    text
}

fn on(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(_) => true,
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
    }
}
