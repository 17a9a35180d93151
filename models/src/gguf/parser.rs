//! One file's header: magic, version, keys, tensor descriptions.
//!
//! Every length is compared with the bytes that are left before anything is allocated or
//! skipped, and what the keys decode to is limited as a whole, so that a sparse file of
//! terabytes cannot make the process run out of memory.

use std::{collections::HashSet, ops::Range, sync::Arc};

use lory_kernels::QuantType;

use super::{Array, DEFAULT_ALIGNMENT, Metadata, Value};
use crate::{Error, Result};

/// Memory that all values of one file may take once decoded. The largest vocabularies in
/// use (262,144 tokens, half a million merges) take about 30 MB.
const MAX_METADATA_BYTES: u64 = 256 << 20;
/// The specification's limit for keys.
const MAX_KEY_BYTES: u64 = 65535;
/// The specification's limit for tensor names.
const MAX_NAME_BYTES: u64 = 64;
/// No writer is known to use more than 4096.
const MAX_ALIGNMENT: usize = 1 << 20;
/// Shortest key: length 8, text 1, type 4, value 1.
const MIN_KEY_ENTRY: u64 = 14;
/// Shortest tensor description: length 8, text 1, n_dims 4, one dimension 8, type 4, offset 8.
const MIN_TENSOR_ENTRY: u64 = 33;

/// Keys whose strings are byte strings in practice: vocabularies made from byte-level models
/// hold tokens that are halves of characters.
const BYTE_STRING_KEYS: [&str; 2] = ["tokenizer.ggml.tokens", "tokenizer.ggml.merges"];

/// A tensor's description, its place checked against the file's length.
pub(super) struct Described {
    pub name: Arc<str>,
    pub ty: QuantType,
    pub dims: Vec<usize>,
    /// Bytes of its data, counted from the file's start.
    pub range: Range<usize>,
}

/// All that stands before the tensor data.
pub(super) struct Header {
    pub metadata: Metadata,
    pub tensors: Vec<Described>,
}

/// A fault without its file and key, which the caller adds.
type Parse<T> = std::result::Result<T, String>;

impl Header {
    pub fn parse(file: &Arc<str>, bytes: &[u8]) -> Result<Header> {
        let mut r = Reader { bytes, pos: 0 };
        preamble(file, &mut r)?;
        let broken = |m: String| Error::container(file, m);
        let n_tensors = count(&mut r, "tensors", MIN_TENSOR_ENTRY).map_err(broken)?;
        let n_keys = count(&mut r, "keys", MIN_KEY_ENTRY).map_err(broken)?;

        let mut metadata = Metadata::new(file.clone());
        let mut budget = MAX_METADATA_BYTES;
        for i in 0..n_keys {
            let key =
                r.key().map_err(|m| Error::container(file, format!("key {} of {n_keys}: {m}", i + 1)))?;
            let value = r.typed_value(key, &mut budget).map_err(|m| Error::key(file, key, m))?;
            metadata.insert(key, value)?;
        }

        let alignment = alignment(&metadata)?;
        let mut names = HashSet::new();
        let mut raw = Vec::new();
        for i in 0..n_tensors {
            let which = |m| Error::container(file, format!("tensor {} of {n_tensors}: {m}", i + 1));
            let name = r.name().map_err(which)?;
            if !names.insert(name) {
                return Err(Error::tensor(file, name, "stands twice in the file"));
            }
            raw.push(r.tensor(name).map_err(|m| Error::tensor(file, name, m))?);
        }
        let tensors = place(file, raw, r.pos, alignment, bytes.len())?;
        Ok(Header { metadata, tensors })
    }
}

/// Magic and version: what is not GGUF 2 or 3 is refused by its name.
fn preamble(file: &str, r: &mut Reader<'_>) -> Result<()> {
    if r.bytes.is_empty() {
        return Err(Error::container(file, "the file is empty"));
    }
    let Some(magic) = r.bytes.first_chunk::<4>() else {
        let n = r.bytes.len();
        return Err(Error::container(file, format!("is {n} bytes long, too short for a GGUF file")));
    };
    if magic != b"GGUF" {
        return Err(foreign(file, magic, r.bytes));
    }
    r.pos = 4;
    let version = r.u32().map_err(|m| Error::container(file, format!("version: {m}")))?;
    match version {
        2 | 3 => Ok(()),
        0 => Err(Error::container(file, "GGUF version 0 does not exist")),
        1 => Err(Error::unsupported(file, "GGUF version 1 (2023) is too old; convert the model again")),
        v if v & 0xffff == 0 => Err(Error::unsupported(
            file,
            format!("big-endian GGUF (version field {v:#010x}); convert it to little-endian"),
        )),
        v => Err(Error::unsupported(file, format!("GGUF version {v} is unknown; 2 and 3 can be read"))),
    }
}

/// Names a file that does not begin with GGUF's magic.
fn foreign(file: &str, magic: &[u8; 4], bytes: &[u8]) -> Error {
    // The older formats wrote their magic as a little-endian number: it reads backwards on disk.
    let old = |name: &str| {
        Error::unsupported(
            file,
            format!("is an old {name} file, from before GGUF; convert the model again to GGUF"),
        )
    };
    match magic {
        b"FUGG" => Error::unsupported(file, "is a byte-swapped GGUF file (magic `FUGG`); convert it again"),
        b"lmgg" | b"ggml" => old("ggml (unversioned)"),
        b"fmgg" | b"ggmf" => old("ggmf"),
        b"tjgg" | b"ggjt" => old("ggjt"),
        b"algg" | b"ggla" => old("ggla (LoRA)"),
        b"PK\x03\x04" => {
            Error::unsupported(file, "is a ZIP archive (a PyTorch checkpoint?), not GGUF; convert it")
        }
        b"vers" => Error::unsupported(file, "looks like a Git LFS pointer; fetch the file it stands for"),
        // The length of a JSON header, then the header (source: the safetensors README).
        _ if bytes.get(8) == Some(&b'{') => Error::unsupported(
            file,
            "is a safetensors file, not GGUF; name a PEFT adapter by the folder that it lies in, convert anything else",
        ),
        m => Error::container(
            file,
            format!("begins with `{}`, not with `GGUF`: no GGUF file", m.escape_ascii()),
        ),
    }
}

/// A number of entries, each of which takes at least `min` of the bytes left.
fn count(r: &mut Reader<'_>, what: &str, min: u64) -> Parse<u64> {
    let n = r.u64().map_err(|m| format!("number of {what}: {m}"))?;
    let left = r.left();
    if n > left / min {
        return Err(format!("claims {n} {what}, more than the remaining {left} bytes can hold"));
    }
    Ok(n)
}

fn alignment(metadata: &Metadata) -> Result<usize> {
    const KEY: &str = "general.alignment";
    match metadata.get(KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&Value::U32(a)) => {
            let a = a as usize;
            if a.is_power_of_two() && a <= MAX_ALIGNMENT {
                Ok(a)
            } else {
                Err(metadata.error(KEY, format!("is {a}, expected a power of two up to {MAX_ALIGNMENT}")))
            }
        }
        Some(v) => Err(metadata.error(KEY, format!("is {}, expected uint32", v.type_name()))),
    }
}

/// A description before its place is checked; `offset` counts from the data section's start.
struct Raw<'a> {
    name: &'a str,
    ty: QuantType,
    dims: Vec<usize>,
    size: usize,
    offset: u64,
}

/// Checks that the tensors fill the data section in order, aligned, without gap or overlap
/// (what every known writer does and llama.cpp requires), inside the file.
fn place(
    file: &str,
    raw: Vec<Raw<'_>>,
    header_end: usize,
    alignment: usize,
    file_len: usize,
) -> Result<Vec<Described>> {
    // `header_end` is within a slice, hence at most isize::MAX, and alignment at most 2^20.
    let start = header_end.next_multiple_of(alignment);
    let mut expected: usize = 0;
    let mut placed = Vec::with_capacity(raw.len());
    for t in raw {
        let fault = |m: String| Error::tensor(file, t.name, m);
        if t.offset % alignment as u64 != 0 {
            return Err(fault(format!("offset {} is not a multiple of the alignment {alignment}", t.offset)));
        }
        if t.offset < expected as u64 {
            return Err(fault(format!(
                "offset {} overlaps the tensor before it, which ends at {expected}",
                t.offset
            )));
        }
        if t.offset > expected as u64 {
            return Err(fault(format!("offset {} leaves a gap; {expected} was expected", t.offset)));
        }
        let begin = start.checked_add(expected);
        let end = begin.and_then(|b| b.checked_add(t.size));
        let (Some(begin), Some(end)) = (begin, end) else {
            return Err(fault(format!("{} bytes at offset {} wrap around", t.size, t.offset)));
        };
        if end > file_len {
            return Err(fault(format!(
                "its data reaches byte {end}, but the file ends at {file_len}; is it truncated?"
            )));
        }
        // Both sums are below file_len + alignment here.
        expected = (expected + t.size).next_multiple_of(alignment);
        placed.push(Described { name: t.name.into(), ty: t.ty, dims: t.dims, range: begin..end });
    }
    Ok(placed)
}

/// A cursor over the file.
struct Reader<'a> {
    bytes: &'a [u8],
    pos: usize,
}

impl<'a> Reader<'a> {
    fn left(&self) -> u64 {
        (self.bytes.len() - self.pos) as u64
    }

    fn take(&mut self, n: u64) -> Parse<&'a [u8]> {
        let rest = self.bytes.get(self.pos..).unwrap_or(&[]);
        let taken = usize::try_from(n).ok().and_then(|n| rest.get(..n)).ok_or_else(|| {
            format!("needs {n} bytes at byte {}, but the file has only {} more", self.pos, rest.len())
        })?;
        self.pos += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Parse<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn u32(&mut self) -> Parse<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Parse<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A key or a tensor name: short UTF-8 without control characters, never empty.
    fn identifier(&mut self, max: u64) -> Parse<&'a str> {
        let len = self.u64().map_err(|m| format!("length of its name: {m}"))?;
        if len == 0 {
            return Err("its name is empty".into());
        }
        if len > max {
            return Err(format!("its name has {len} bytes, the limit is {max}"));
        }
        let bytes = self.take(len).map_err(|m| format!("name: {m}"))?;
        match std::str::from_utf8(bytes) {
            Ok(s) if s.chars().any(char::is_control) => {
                Err(format!("its name `{}` holds a control character", bytes.escape_ascii()))
            }
            Ok(s) => Ok(s),
            Err(_) => Err(format!("its name `{}` is not UTF-8", bytes.escape_ascii())),
        }
    }

    fn key(&mut self) -> Parse<&'a str> {
        self.identifier(MAX_KEY_BYTES)
    }

    fn name(&mut self) -> Parse<&'a str> {
        self.identifier(MAX_NAME_BYTES)
    }

    /// A string value. What is not UTF-8 is an error, except in vocabularies (`bytes_allowed`):
    /// there each invalid sequence becomes U+FFFD, so that the ids after it keep their place.
    fn string(&mut self, budget: &mut u64, bytes_allowed: bool) -> Parse<String> {
        let len = self.u64().map_err(|m| format!("length of a string: {m}"))?;
        let at = self.pos;
        let bytes = self.take(len).map_err(|m| format!("string: {m}"))?;
        spend(budget, len)?;
        match std::str::from_utf8(bytes) {
            Ok(s) => Ok(s.into()),
            Err(_) if bytes_allowed => Ok(String::from_utf8_lossy(bytes).into_owned()),
            Err(e) => {
                Err(format!("the string at byte {at} is not UTF-8 from its byte {} on", e.valid_up_to()))
            }
        }
    }

    fn bool(&mut self) -> Parse<bool> {
        let [b] = self.array()?;
        to_bool(b)
    }

    fn typed_value(&mut self, key: &str, budget: &mut u64) -> Parse<Value> {
        let ty = self.u32().map_err(|m| format!("type: {m}"))?;
        let bytes_allowed = BYTE_STRING_KEYS.contains(&key);
        Ok(match ty {
            0 => Value::U8(u8::from_le_bytes(self.array()?)),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.array()?)),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => Value::Bool(self.bool()?),
            8 => Value::String(self.string(budget, false)?),
            9 => Value::Array(self.value_array(budget, bytes_allowed)?),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            t => return Err(format!("has the unknown value type {t}; 0 to 12 exist")),
        })
    }

    fn value_array(&mut self, budget: &mut u64, bytes_allowed: bool) -> Parse<Array> {
        let ty = self.u32().map_err(|m| format!("element type: {m}"))?;
        let n = self.u64().map_err(|m| format!("number of elements: {m}"))?;
        Ok(match ty {
            0 => Array::U8(self.numbers(n, budget, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(n, budget, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(n, budget, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(n, budget, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(n, budget, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(n, budget, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(n, budget, f32::from_le_bytes)?),
            7 => {
                let bytes = self.numbers(n, budget, u8::from_le_bytes)?;
                Array::Bool(bytes.into_iter().map(to_bool).collect::<Parse<_>>()?)
            }
            8 => Array::String(self.strings(n, budget, bytes_allowed)?),
            9 => return Err("is an array of arrays, which is not supported".into()),
            10 => Array::U64(self.numbers(n, budget, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(n, budget, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(n, budget, f64::from_le_bytes)?),
            t => return Err(format!("has the unknown element type {t}; 0 to 12 exist")),
        })
    }

    fn numbers<T, const N: usize>(
        &mut self,
        n: u64,
        budget: &mut u64,
        from: fn([u8; N]) -> T,
    ) -> Parse<Vec<T>> {
        let size = n.checked_mul(N as u64).ok_or_else(|| format!("{n} elements of {N} bytes wrap around"))?;
        let bytes = self.take(size).map_err(|m| format!("array of {n} elements: {m}"))?;
        spend(budget, size)?;
        let (elements, _) = bytes.as_chunks::<N>();
        Ok(elements.iter().map(|e| from(*e)).collect())
    }

    fn strings(&mut self, n: u64, budget: &mut u64, bytes_allowed: bool) -> Parse<Vec<String>> {
        let left = self.left();
        if n > left / 8 {
            return Err(format!("claims {n} strings, more than the remaining {left} bytes can hold"));
        }
        spend(budget, n.saturating_mul(size_of::<String>() as u64))?;
        // The budget above is what makes this cast and the allocation harmless.
        let mut out = Vec::with_capacity(n as usize);
        for i in 0..n {
            out.push(self.string(budget, bytes_allowed).map_err(|m| format!("element {i} of {n}: {m}"))?);
        }
        Ok(out)
    }

    /// What follows a tensor's name.
    fn tensor(&mut self, name: &'a str) -> Parse<Raw<'a>> {
        let n_dims = self.u32().map_err(|m| format!("number of dimensions: {m}"))?;
        if !(1..=4).contains(&n_dims) {
            return Err(format!("has {n_dims} dimensions, expected 1 to 4"));
        }
        let mut dims = Vec::with_capacity(4);
        for i in 0..n_dims {
            let d = self.u64().map_err(|m| format!("dimension {i}: {m}"))?;
            match usize::try_from(d) {
                Ok(d) if d > 0 && d <= isize::MAX as usize => dims.push(d),
                _ => return Err(format!("dimension {i} is {}, expected a positive size", d as i64)),
            }
        }
        let id = self.u32().map_err(|m| format!("type: {m}"))?;
        let ty = QuantType::from_id(id).ok_or_else(|| unknown_type(id))?;
        let size = byte_size(ty, &dims)?;
        let offset = self.u64().map_err(|m| format!("offset: {m}"))?;
        Ok(Raw { name, ty, dims, size, offset })
    }
}

fn to_bool(b: u8) -> Parse<bool> {
    match b {
        0 => Ok(false),
        1 => Ok(true),
        b => Err(format!("holds a bool of {b}, expected 0 or 1")),
    }
}

fn spend(budget: &mut u64, bytes: u64) -> Parse<()> {
    *budget = budget.checked_sub(bytes).ok_or_else(|| {
        format!("all values together take more than the limit of {} MiB", MAX_METADATA_BYTES >> 20)
    })?;
    Ok(())
}

fn unknown_type(id: u32) -> String {
    match id {
        4 | 5 => format!("type {id} (Q4_2 / Q4_3) was removed from ggml in 2023; quantize the model again"),
        31..=33 | 36..=38 => {
            format!("type {id} (a repacked Q4_0 or IQ4_NL) was removed from ggml; quantize the model again")
        }
        _ => format!("has the unknown type {}", id as i32),
    }
}

fn byte_size(ty: QuantType, dims: &[usize]) -> Parse<usize> {
    let cols = dims.first().copied().unwrap_or(0);
    if cols % ty.block_len() != 0 {
        return Err(format!("rows of {cols} are not whole {ty} blocks of {}", ty.block_len()));
    }
    // Limited to isize, like every slice, so that later sums of two sizes cannot wrap.
    let elements = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    elements
        .and_then(|n| ty.bytes_for(n))
        .filter(|&n| n <= isize::MAX as usize)
        .ok_or_else(|| format!("shape {dims:?} of {ty} is larger than any file"))
}
