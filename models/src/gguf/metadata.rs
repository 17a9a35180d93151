//! The key-value part of a GGUF file.

use std::{collections::BTreeMap, sync::Arc};

use crate::{Error, Result};

/// A metadata value, as the GGUF specification types it.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// A homogeneous array; arrays of arrays are refused by the parser.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
}

impl Value {
    /// The type's name in the specification, for error messages.
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::U8(_) => "uint8",
            Value::I8(_) => "int8",
            Value::U16(_) => "uint16",
            Value::I16(_) => "int16",
            Value::U32(_) => "uint32",
            Value::I32(_) => "int32",
            Value::U64(_) => "uint64",
            Value::I64(_) => "int64",
            Value::F32(_) => "float32",
            Value::F64(_) => "float64",
            Value::Bool(_) => "bool",
            Value::String(_) => "string",
            Value::Array(_) => "array",
        }
    }

    /// Any integer that fits.
    pub fn as_i64(&self) -> Option<i64> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::I64(v) => v,
            Value::U64(v) => v.try_into().ok()?,
            _ => return None,
        })
    }
}

/// All keys of one file. The typed getters name file and key in their errors.
#[derive(Debug, Clone)]
pub struct Metadata {
    file: Arc<str>,
    values: BTreeMap<String, Value>,
}

impl Metadata {
    /// An empty table for `file`.
    pub fn new(file: Arc<str>) -> Self {
        Metadata { file, values: BTreeMap::new() }
    }

    /// Adds a key; a key that is there already is an error.
    pub fn insert(&mut self, key: &str, value: Value) -> Result<()> {
        if self.values.contains_key(key) {
            return Err(self.error(key, "stands twice in the file"));
        }
        self.values.insert(key.into(), value);
        Ok(())
    }

    /// The file's name.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// An error about `key` of this file.
    pub fn error(&self, key: &str, message: impl Into<String>) -> Error {
        Error::key(&self.file, key, message)
    }

    /// The value, if the key is there.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// Keys and values in alphabetical order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(k, v)| (k.as_str(), v))
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        want: &str,
        get: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match get(value) {
            Some(v) => Ok(Some(v)),
            None => Err(self.error(key, format!("is {}, expected {want}", value.type_name()))),
        }
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(key, "is missing"))
    }

    /// An optional string.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |v| if let Value::String(s) = v { Some(s.as_str()) } else { None })
    }

    /// A string that must be there.
    pub fn str(&self, key: &str) -> Result<&str> {
        self.required(key, self.opt_str(key)?)
    }

    /// An optional non-negative integer of any width, at most `u32::MAX`.
    pub fn opt_u32(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "an integer from 0 to 4294967295", |v| v.as_i64().and_then(|i| i.try_into().ok()))
    }

    /// A non-negative integer that must be there.
    pub fn u32(&self, key: &str) -> Result<u32> {
        self.required(key, self.opt_u32(key)?)
    }

    /// An optional finite float (f32 or f64).
    pub fn opt_f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a finite float", |v| match *v {
            Value::F32(f) if f.is_finite() => Some(f),
            Value::F64(f) if (f as f32).is_finite() => Some(f as f32),
            _ => None,
        })
    }

    /// A finite float that must be there.
    pub fn f32(&self, key: &str) -> Result<f32> {
        self.required(key, self.opt_f32(key)?)
    }

    /// An optional bool.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |v| if let Value::Bool(b) = v { Some(*b) } else { None })
    }

    /// An optional array of strings.
    pub fn opt_strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |v| match v {
            Value::Array(Array::String(a)) => Some(a.as_slice()),
            _ => None,
        })
    }

    /// An optional array of 32-bit floats.
    pub fn opt_f32s(&self, key: &str) -> Result<Option<&[f32]>> {
        self.typed(key, "an array of float32", |v| match v {
            Value::Array(Array::F32(a)) => Some(a.as_slice()),
            _ => None,
        })
    }

    /// An optional array of integers of any width, each within `i64`.
    pub fn opt_ints(&self, key: &str) -> Result<Option<Vec<i64>>> {
        self.typed(key, "an array of integers", |v| match v {
            Value::Array(a) => a.to_i64(),
            _ => None,
        })
    }
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Array::U8(a) => a.len(),
            Array::I8(a) => a.len(),
            Array::U16(a) => a.len(),
            Array::I16(a) => a.len(),
            Array::U32(a) => a.len(),
            Array::I32(a) => a.len(),
            Array::U64(a) => a.len(),
            Array::I64(a) => a.len(),
            Array::F32(a) => a.len(),
            Array::F64(a) => a.len(),
            Array::Bool(a) => a.len(),
            Array::String(a) => a.len(),
        }
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements, if they are integers that fit.
    pub fn to_i64(&self) -> Option<Vec<i64>> {
        Some(match self {
            Array::U8(a) => a.iter().map(|&v| v.into()).collect(),
            Array::I8(a) => a.iter().map(|&v| v.into()).collect(),
            Array::U16(a) => a.iter().map(|&v| v.into()).collect(),
            Array::I16(a) => a.iter().map(|&v| v.into()).collect(),
            Array::U32(a) => a.iter().map(|&v| v.into()).collect(),
            Array::I32(a) => a.iter().map(|&v| v.into()).collect(),
            Array::I64(a) => a.clone(),
            Array::U64(a) => a.iter().map(|&v| v.try_into().ok()).collect::<Option<_>>()?,
            _ => return None,
        })
    }
}

macro_rules! value_from {
    ($($t:ty => $make:expr),* $(,)?) => {$(
        impl From<$t> for Value {
            fn from(v: $t) -> Value {
                #[allow(clippy::redundant_closure_call)]
                ($make)(v)
            }
        }
    )*};
}

value_from! {
    u8 => Value::U8, i8 => Value::I8, u16 => Value::U16, i16 => Value::I16, u32 => Value::U32,
    i32 => Value::I32, u64 => Value::U64, i64 => Value::I64, f32 => Value::F32, f64 => Value::F64,
    bool => Value::Bool, String => Value::String, Array => Value::Array,
    &str => |s: &str| Value::String(s.into()),
    Vec<String> => |a| Value::Array(Array::String(a)),
    Vec<f32> => |a| Value::Array(Array::F32(a)),
    Vec<i32> => |a| Value::Array(Array::I32(a)),
    Vec<u32> => |a| Value::Array(Array::U32(a)),
    Vec<bool> => |a| Value::Array(Array::Bool(a)),
}
