//! Writing GGUF version 3: declare keys and tensors, then stream the data in the same order.

use std::io::{self, Write};

use lory_kernels::QuantType;

use super::{Array, DEFAULT_ALIGNMENT, Value};

/// The header of a file to be written.
///
/// ```
/// use lory_kernels::QuantType;
/// use lory_models::gguf::Writer;
///
/// let mut w = Writer::new();
/// w.set("general.architecture", "llama").tensor("output_norm.weight", QuantType::F32, &[2]);
/// let mut data = w.start(Vec::new())?;
/// data.tensor("output_norm.weight", &[0; 8])?;
/// let file: Vec<u8> = data.finish()?;
/// assert_eq!(&file[..4], b"GGUF");
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug, Clone)]
pub struct Writer {
    keys: Vec<(String, Value)>,
    tensors: Vec<Declared>,
    alignment: usize,
}

#[derive(Debug, Clone)]
struct Declared {
    name: String,
    ty: QuantType,
    dims: Vec<usize>,
}

impl Declared {
    fn size(&self) -> Option<usize> {
        let (&cols, rest) = self.dims.split_first()?;
        rest.iter().try_fold(self.ty.bytes_for(cols)?, |n, &d| n.checked_mul(d))
    }
}

impl Default for Writer {
    fn default() -> Self {
        Writer::new()
    }
}

impl Writer {
    /// A header without keys and tensors.
    pub fn new() -> Self {
        Writer { keys: Vec::new(), tensors: Vec::new(), alignment: DEFAULT_ALIGNMENT }
    }

    /// Sets a key; one that is there already keeps its place and gets the new value.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        let value = value.into();
        match self.keys.iter_mut().find(|(k, _)| k == key) {
            Some(entry) => entry.1 = value,
            None => self.keys.push((key.into(), value)),
        }
        self
    }

    /// Sets `general.alignment`, the multiple at which every tensor's data begins.
    pub fn set_alignment(&mut self, bytes: u32) -> &mut Self {
        self.alignment = bytes as usize;
        self.set("general.alignment", bytes)
    }

    /// Declares the next tensor: `dims[0]` is the length of a row.
    pub fn tensor(&mut self, name: &str, ty: QuantType, dims: &[usize]) -> &mut Self {
        self.tensors.push(Declared { name: name.into(), ty, dims: dims.into() });
        self
    }

    /// Bytes of tensor data that follow the header, padding included.
    pub fn data_bytes(&self) -> u64 {
        let size =
            |t: &Declared| (t.size().unwrap_or(0) as u64).next_multiple_of(self.alignment.max(1) as u64);
        self.tensors.iter().map(size).sum()
    }

    /// Writes the header; the tensors' data follow through what comes back.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a declaration that no reader would accept (dimensions not
    /// 1 to 4 or zero, rows of partial blocks, an alignment that is no power of two, a name twice),
    /// and what `out` reports.
    pub fn start<W: Write>(self, mut out: W) -> io::Result<DataWriter<W>> {
        self.check()?;
        let mut header = Vec::new();
        header.extend_from_slice(b"GGUF");
        header.extend_from_slice(&3u32.to_le_bytes());
        header.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        header.extend_from_slice(&(self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            put_string(&mut header, key);
            put_value(&mut header, value);
        }
        let mut offset = 0u64;
        let mut sizes = Vec::with_capacity(self.tensors.len());
        for t in self.tensors {
            put_string(&mut header, &t.name);
            header.extend_from_slice(&(t.dims.len() as u32).to_le_bytes());
            for &d in &t.dims {
                header.extend_from_slice(&(d as u64).to_le_bytes());
            }
            header.extend_from_slice(&(t.ty as u32).to_le_bytes());
            header.extend_from_slice(&offset.to_le_bytes());
            let size = t.size().unwrap_or(0);
            offset += (size as u64).next_multiple_of(self.alignment.max(1) as u64);
            sizes.push((t.name, size));
        }
        if !sizes.is_empty() {
            header.resize(header.len().next_multiple_of(self.alignment), 0);
        }
        out.write_all(&header)?;
        Ok(DataWriter { out, tensors: sizes.into_iter(), alignment: self.alignment })
    }

    fn check(&self) -> io::Result<()> {
        if !self.alignment.is_power_of_two() {
            return Err(invalid(format!("alignment {} is not a power of two", self.alignment)));
        }
        let mut names = std::collections::HashSet::new();
        let mut total = 0u64;
        for t in &self.tensors {
            let Declared { name, ty, dims } = t;
            if name.is_empty() || name.len() > 64 {
                return Err(invalid(format!("tensor name `{name}` does not have 1 to 64 bytes")));
            }
            if !names.insert(name.as_str()) {
                return Err(invalid(format!("tensor `{name}` is declared twice")));
            }
            let size = t.size().filter(|_| dims.len() <= 4 && !dims.contains(&0));
            let Some(size) = size else {
                return Err(invalid(format!("tensor `{name}`: {dims:?} of {ty} is no shape of a tensor")));
            };
            total = total
                .checked_add((size as u64).next_multiple_of(self.alignment as u64))
                .filter(|&n| n <= i64::MAX as u64)
                .ok_or_else(|| invalid(format!("tensor `{name}`: the file would be too long")))?;
        }
        Ok(())
    }
}

/// Takes the tensors' data, in the order in which they were declared.
#[derive(Debug)]
pub struct DataWriter<W> {
    out: W,
    tensors: std::vec::IntoIter<(String, usize)>,
    alignment: usize,
}

impl<W: Write> DataWriter<W> {
    /// Writes the whole data of the next tensor, which must be `name`.
    pub fn tensor(&mut self, name: &str, data: &[u8]) -> io::Result<()> {
        self.tensor_with(name, |out| out.write_all(data))
    }

    /// Lets `write` stream the data of the next tensor, which must be `name`.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if another tensor is next or `write` does not write exactly
    /// the tensor's size; else what `write` or the output reports.
    pub fn tensor_with(
        &mut self,
        name: &str,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some((next, size)) = self.tensors.next() else {
            return Err(invalid(format!("tensor `{name}` was not declared")));
        };
        if next != name {
            return Err(invalid(format!("tensor `{next}` comes next, not `{name}`")));
        }
        let mut counted = Exactly { out: &mut self.out, left: size };
        write(&mut counted)?;
        let missing = counted.left;
        if missing != 0 {
            return Err(invalid(format!("tensor `{name}`: {missing} of its {size} bytes are missing")));
        }
        pad(&mut self.out, size, self.alignment)
    }

    /// Flushes and gives the output back.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if tensors are missing; what the output reports.
    pub fn finish(mut self) -> io::Result<W> {
        if let Some((name, _)) = self.tensors.next() {
            return Err(invalid(format!("tensor `{name}` was declared, but not written")));
        }
        self.out.flush()?;
        Ok(self.out)
    }
}

/// Passes on as much as it was told and refuses more.
struct Exactly<'a, W> {
    out: &'a mut W,
    left: usize,
}

impl<W: Write> Write for Exactly<'_, W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if data.len() > self.left {
            return Err(invalid(format!("{} bytes more than the tensor has", data.len() - self.left)));
        }
        let n = self.out.write(data)?;
        self.left -= n;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

fn pad(out: &mut impl Write, size: usize, alignment: usize) -> io::Result<()> {
    let mut left = size.next_multiple_of(alignment) - size;
    let zeros = [0u8; 64];
    while left > 0 {
        let n = left.min(zeros.len());
        out.write_all(zeros.get(..n).unwrap_or(&zeros))?;
        left -= n;
    }
    Ok(())
}

fn put_string(out: &mut Vec<u8>, s: &str) {
    out.extend_from_slice(&(s.len() as u64).to_le_bytes());
    out.extend_from_slice(s.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    let mut put = |ty: u32, bytes: &[u8]| {
        out.extend_from_slice(&ty.to_le_bytes());
        out.extend_from_slice(bytes);
    };
    match value {
        Value::U8(v) => put(0, &v.to_le_bytes()),
        Value::I8(v) => put(1, &v.to_le_bytes()),
        Value::U16(v) => put(2, &v.to_le_bytes()),
        Value::I16(v) => put(3, &v.to_le_bytes()),
        Value::U32(v) => put(4, &v.to_le_bytes()),
        Value::I32(v) => put(5, &v.to_le_bytes()),
        Value::F32(v) => put(6, &v.to_le_bytes()),
        Value::Bool(v) => put(7, &[u8::from(*v)]),
        Value::U64(v) => put(10, &v.to_le_bytes()),
        Value::I64(v) => put(11, &v.to_le_bytes()),
        Value::F64(v) => put(12, &v.to_le_bytes()),
        Value::String(s) => {
            put(8, &[]);
            put_string(out, s);
        }
        Value::Array(a) => {
            put(9, &[]);
            put_array(out, a);
        }
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    fn all<T: Copy, const N: usize>(out: &mut Vec<u8>, ty: u32, items: &[T], to: fn(T) -> [u8; N]) {
        out.extend_from_slice(&ty.to_le_bytes());
        out.extend_from_slice(&(items.len() as u64).to_le_bytes());
        for &item in items {
            out.extend_from_slice(&to(item));
        }
    }
    match array {
        Array::U8(a) => all(out, 0, a, u8::to_le_bytes),
        Array::I8(a) => all(out, 1, a, i8::to_le_bytes),
        Array::U16(a) => all(out, 2, a, u16::to_le_bytes),
        Array::I16(a) => all(out, 3, a, i16::to_le_bytes),
        Array::U32(a) => all(out, 4, a, u32::to_le_bytes),
        Array::I32(a) => all(out, 5, a, i32::to_le_bytes),
        Array::F32(a) => all(out, 6, a, f32::to_le_bytes),
        Array::Bool(a) => all(out, 7, a, |b| [u8::from(b)]),
        Array::U64(a) => all(out, 10, a, u64::to_le_bytes),
        Array::I64(a) => all(out, 11, a, i64::to_le_bytes),
        Array::F64(a) => all(out, 12, a, f64::to_le_bytes),
        Array::String(a) => {
            out.extend_from_slice(&8u32.to_le_bytes());
            out.extend_from_slice(&(a.len() as u64).to_le_bytes());
            a.iter().for_each(|s| put_string(out, s));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::gguf::Gguf;

    fn every_value() -> Vec<(&'static str, Value)> {
        vec![
            ("u8", Value::U8(200)),
            ("i8", Value::I8(-3)),
            ("u16", Value::U16(60000)),
            ("i16", Value::I16(-30000)),
            ("u32", Value::U32(u32::MAX)),
            ("i32", Value::I32(i32::MIN)),
            ("u64", Value::U64(u64::MAX)),
            ("i64", Value::I64(i64::MIN)),
            ("f32", Value::F32(1.5)),
            ("f64", Value::F64(-0.1)),
            ("bool", Value::Bool(true)),
            ("string", "grüß Gott\0".into()),
            ("empty", "".into()),
            ("au8", Value::Array(Array::U8(vec![1, 2]))),
            ("ai8", Value::Array(Array::I8(vec![-1, 2]))),
            ("au16", Value::Array(Array::U16(vec![1, 65535]))),
            ("ai16", Value::Array(Array::I16(vec![-1]))),
            ("au32", Value::Array(Array::U32(vec![7; 9]))),
            ("ai32", Value::Array(Array::I32(vec![]))),
            ("au64", Value::Array(Array::U64(vec![u64::MAX]))),
            ("ai64", Value::Array(Array::I64(vec![i64::MIN, 1]))),
            ("af32", Value::Array(Array::F32(vec![0.25, f32::MAX]))),
            ("af64", Value::Array(Array::F64(vec![0.1]))),
            ("abool", Value::Array(Array::Bool(vec![true, false]))),
            ("astring", Value::Array(Array::String(vec!["a".into(), "".into(), "ü".into()]))),
        ]
    }

    #[test]
    fn what_is_written_is_read_back() {
        for alignment in [None, Some(8), Some(4096)] {
            let mut w = Writer::new();
            for (key, value) in every_value() {
                w.set(key, value);
            }
            alignment.map(|a| w.set_alignment(a));
            w.tensor("a", QuantType::F32, &[3]).tensor("b", QuantType::Q4_0, &[64, 5, 2]);
            w.tensor("c", QuantType::I8, &[1, 1, 1, 1]);
            let data: Vec<Vec<u8>> =
                [12, 360, 1].iter().map(|&n| (0..n).map(|i| (i * 7 % 251) as u8).collect()).collect();
            let header_and_data = w.data_bytes();
            let mut out = w.start(Vec::new()).unwrap();
            out.tensor("a", &data[0]).unwrap();
            out.tensor_with("b", |o| data[1].chunks(100).try_for_each(|c| o.write_all(c))).unwrap();
            out.tensor("c", &data[2]).unwrap();
            let file = out.finish().unwrap();
            assert!(file.len() as u64 > header_and_data);

            let g = Gguf::parse(vec![("t.gguf".into(), Arc::new(file))]).unwrap();
            for (key, value) in every_value() {
                assert_eq!(g.metadata().get(key), Some(&value), "{key}");
            }
            let b = g.tensor("b").unwrap();
            assert_eq!((b.rows(), b.cols(), b.ty()), (10, 64, QuantType::Q4_0));
            for (name, data) in ["a", "b", "c"].iter().zip(&data) {
                assert_eq!(g.tensor(name).unwrap().matrix().bytes(), data);
                assert_eq!(g.info(name).unwrap().byte_range().start % alignment.unwrap_or(32) as usize, 0);
            }
            assert_eq!(g.info("b").unwrap().dims, [64, 5, 2]);
        }
    }

    #[test]
    fn setting_a_key_again_replaces_it() {
        let mut w = Writer::new();
        w.set("k", 1u32).set("l", 2u32).set("k", 3u32);
        let file = w.start(Vec::new()).unwrap().finish().unwrap();
        let g = Gguf::parse(vec![("t.gguf".into(), Arc::new(file))]).unwrap();
        assert_eq!(g.metadata().u32("k").unwrap(), 3);
    }

    #[test]
    fn impossible_declarations_are_refused() {
        let refused = |name: &str, ty, dims: &[usize]| {
            let mut w = Writer::new();
            w.tensor(name, ty, dims);
            w.start(Vec::new()).unwrap_err().to_string()
        };
        assert!(refused("t", QuantType::Q4_0, &[33]).contains("[33] of Q4_0"));
        refused("t", QuantType::F32, &[]);
        refused("t", QuantType::F32, &[1, 0]);
        refused("t", QuantType::F32, &[1; 5]);
        refused("t", QuantType::F32, &[usize::MAX, 2]);
        refused("", QuantType::F32, &[1]);
        refused(&"x".repeat(65), QuantType::F32, &[1]);
        let mut w = Writer::new();
        w.tensor("t", QuantType::F32, &[1]).tensor("t", QuantType::F32, &[1]);
        assert!(w.start(Vec::new()).unwrap_err().to_string().contains("twice"));
        let mut w = Writer::new();
        w.set_alignment(12);
        w.start(Vec::new()).unwrap_err();
    }

    #[test]
    fn data_of_the_wrong_length_or_order_is_refused() {
        let start = || {
            let mut w = Writer::new();
            w.tensor("a", QuantType::F32, &[2]).tensor("b", QuantType::F32, &[2]);
            w.start(Vec::new()).unwrap()
        };
        assert!(start().tensor("a", &[0; 7]).unwrap_err().to_string().contains("1 of its 8 bytes"));
        assert!(start().tensor("a", &[0; 9]).unwrap_err().to_string().contains("1 bytes more"));
        assert!(start().tensor("b", &[0; 8]).unwrap_err().to_string().contains("`a` comes next"));
        let mut w = start();
        w.tensor("a", &[0; 8]).unwrap();
        assert!(w.finish().unwrap_err().to_string().contains("`b`"));
    }
}
