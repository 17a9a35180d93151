//! The safetensors container, checked before anything in it is believed.
//!
//! Eight bytes of header length, a JSON header `{name: {dtype, shape, data_offsets}}`, then the
//! tensors' bytes without gaps. Source: huggingface/safetensors, README and `tensor.rs`.

use std::{collections::BTreeMap, fmt, ops::Range};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, Visitor},
};

use crate::{Error, Result};

/// What the reference implementation allows a header to take.
const MAX_HEADER: u64 = 100_000_000;
/// What PyTorch's own files begin with: a zip archive, or a pickle of protocol 2.
const PICKLES: [&[u8]; 2] = [b"PK\x03\x04", b"\x80\x02"];

/// Element formats that adapters are saved in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    fn bytes(self) -> u64 {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

/// One tensor: its name, format, shape, and bytes.
#[derive(Clone, Debug)]
pub(super) struct View<'a> {
    pub file: &'a str,
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Where its data begins in the file.
    pub start: usize,
    /// Its bytes, counted from the end of the header.
    range: Range<usize>,
    bytes: &'a [u8],
}

impl View<'_> {
    /// Decodes all elements.
    ///
    /// # Errors
    /// The index of an element that is NaN or infinite.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let values = decode(self.dtype, self.bytes);
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(i) => Err(self.error(format!("element {i} is not a finite number"))),
        }
    }

    /// An error about this tensor.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::tensor(self.file, &self.name, message)
    }
}

/// Elements of `bytes`; a rest shorter than an element is not looked at.
pub(super) fn decode(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::Bf16 => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
    }
}

/// All tensors of a file, by name.
///
/// # Errors
/// [`Error::Container`] for a broken container and [`Error::Tensor`] for an entry that is
/// inconsistent in itself or with its neighbours, with the numbers.
pub(super) fn parse<'a>(file: &'a str, bytes: &'a [u8]) -> Result<Vec<View<'a>>> {
    let broken = |m: String| Error::container(file, m);
    // Asked only of what is no safetensors file: a sound one may begin with the same bytes.
    let foreign = |m: String| match PICKLES.iter().any(|magic| bytes.starts_with(magic)) {
        true => Error::unsupported(
            file,
            "is a PyTorch pickle, which can run code when read; save it with safe_serialization=True",
        ),
        false => broken(m),
    };
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(foreign(format!("has {} bytes, a safetensors file has at least 10", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    if !(2..=MAX_HEADER).contains(&length) {
        return Err(foreign(format!("says its header has {length} bytes, expected 2 to {MAX_HEADER}")));
    }
    let Some((header, data)) = usize::try_from(length).ok().and_then(|n| rest.split_at_checked(n)) else {
        return Err(foreign(format!("says its header has {length} bytes, only {} follow", rest.len())));
    };
    let text = std::str::from_utf8(header)
        .map_err(|e| broken(format!("header is not UTF-8 after byte {}", e.valid_up_to())))?;
    let header: Header =
        serde_json::from_str(text).map_err(|e| broken(format!("header is not valid: {e}")))?;
    let mut views = Vec::with_capacity(header.0.len());
    for (name, entry) in header.0 {
        views.push(view(file, bytes.len() - data.len(), data, name, entry)?);
    }
    check_layout(file, data.len(), &views)?;
    // The reference implementation's opinion last: its messages name neither tensor nor number.
    safetensors::SafeTensors::read_metadata(bytes).map_err(|e| broken(e.to_string()))?;
    Ok(views)
}

/// `header` is the length of what stands before `data`.
fn view<'a>(file: &'a str, header: usize, data: &'a [u8], name: String, entry: Entry) -> Result<View<'a>> {
    let fail = |m: String| Error::tensor(file, &name, m);
    let dtype = match entry.dtype.as_str() {
        "F32" => Dtype::F32,
        "F16" => Dtype::F16,
        "BF16" => Dtype::Bf16,
        other => return Err(fail(format!("has type `{other}`, expected F32, F16 or BF16"))),
    };
    let (start, end) = entry.data_offsets;
    let elements = entry.shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
    let Some(size) = elements.and_then(|n| n.checked_mul(dtype.bytes())) else {
        return Err(fail(format!("has the impossible shape {:?}", entry.shape)));
    };
    if end.checked_sub(start) != Some(size) {
        let m =
            format!("has shape {:?}, which takes {size} bytes, and offsets {start} to {end}", entry.shape);
        return Err(fail(m));
    }
    let range = usize::try_from(start).ok().zip(usize::try_from(end).ok()).map(|(s, e)| s..e);
    let Some((range, bytes)) = range.and_then(|r| Some((r.clone(), data.get(r)?))) else {
        return Err(fail(format!("ends at byte {end}, the file has {} bytes of data", data.len())));
    };
    // Every dimension of a shape with a zero in it is free: keep what fits.
    let shape = entry.shape.iter().map(|d| usize::try_from(*d)).collect::<std::result::Result<_, _>>();
    let shape = shape.map_err(|_| fail(format!("has the impossible shape {:?}", entry.shape)))?;
    Ok(View { file, name, dtype, shape, start: header + range.start, range, bytes })
}

/// The tensors cover the data exactly: no gap, no overlap.
fn check_layout(file: &str, len: usize, views: &[View<'_>]) -> Result<()> {
    let mut order: Vec<_> = views.iter().collect();
    order.sort_by_key(|v| (v.range.start, v.range.end));
    let mut end = 0;
    for v in order {
        if v.range.start != end {
            let what = if v.range.start < end { "overlap" } else { "gap" };
            return Err(v.error(format!("starts at byte {}, expected {end}: {what}", v.range.start)));
        }
        end = v.range.end;
    }
    if end != len {
        return Err(Error::container(file, format!("has {len} bytes of data, its tensors take {end}")));
    }
    Ok(())
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Names are unique; the free-form `__metadata__` is not looked at.
struct Header(BTreeMap<String, Entry>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> std::result::Result<Header, M::Error> {
        let mut found = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<BTreeMap<String, String>>()?;
                continue;
            }
            let entry = map.next_value::<Entry>()?;
            if found.contains_key(&name) {
                return Err(M::Error::custom(format!("tensor `{name}` stands twice")));
            }
            found.insert(name, entry);
        }
        Ok(Header(found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    fn refusal(header: &str, data: &[u8]) -> String {
        parse("a.safetensors", &file(header, data)).map(|v| v.len()).expect_err(header).to_string()
    }

    #[test]
    fn reads_three_formats() {
        let header = r#"{"__metadata__":{"format":"pt"},
            "b":{"dtype":"BF16","shape":[1],"data_offsets":[8,10]},
            "a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},
            "c":{"dtype":"F16","shape":[2,1],"data_offsets":[10,14]},
            "none":{"dtype":"F32","shape":[0,7],"data_offsets":[14,14]}}  "#;
        let mut data = 1.5f32.to_le_bytes().to_vec();
        data.extend((-2.0f32).to_le_bytes());
        data.extend([0x80, 0x3f, 0x00, 0x3c, 0x00, 0xc0]);
        let bytes = file(header, &data);
        let views = parse("x", &bytes).expect("valid");
        let values: Vec<_> = views.iter().map(|v| (v.name.as_str(), v.to_f32().expect("finite"))).collect();
        assert_eq!(
            values,
            [("a", vec![1.5, -2.0]), ("b", vec![1.0]), ("c", vec![1.0, -2.0]), ("none", vec![])]
        );
    }

    #[test]
    fn every_broken_container_names_its_fault() {
        let one = |entry: &str| format!(r#"{{"t":{{{entry}}}}}"#);
        let cases = [
            (one(r#""dtype":"F32","shape":[2],"data_offsets":[0,4]"#), "takes 8 bytes, and offsets 0 to 4"),
            (one(r#""dtype":"F32","shape":[1],"data_offsets":[4,0]"#), "offsets 4 to 0"),
            (one(r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#), "ends at byte 8"),
            (one(r#""dtype":"F32","shape":[0],"data_offsets":[0,0]"#), "has 4 bytes of data"),
            (one(r#""dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]"#), "`F8_E4M3`"),
            (
                one(r#""dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]"#),
                "impossible shape",
            ),
            (one(r#""dtype":"F32","shape":[-1],"data_offsets":[0,4]"#), "invalid value"),
            (one(r#""dtype":"F32","data_offsets":[0,4]"#), "missing field `shape`"),
            (
                r#"{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},
                    "b":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}"#
                    .into(),
                "overlap",
            ),
            (
                r#"{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},
                    "b":{"dtype":"F16","shape":[0],"data_offsets":[4,4]}}"#
                    .into(),
                "gap",
            ),
            (
                r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
                    "t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#
                    .into(),
                "`t` stands twice",
            ),
            ("[1]".into(), "invalid type"),
            ("{ ".into(), "EOF"),
            (format!("{{\"t\":{}", "[".repeat(10_000)), "not valid"),
        ];
        for (header, word) in cases {
            let text = refusal(&header, &[0; 4]);
            assert!(text.starts_with("a.safetensors: ") && text.contains(word), "{text}");
        }
    }

    #[test]
    fn every_cut_and_every_length_is_an_error() {
        let whole = file(r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]);
        assert!(parse("x", &whole).is_ok());
        for end in 0..whole.len() {
            assert!(parse("x", &whole[..end]).is_err(), "cut at {end}");
        }
        for length in [0, 1, 100_000_001, u64::MAX] {
            let mut bytes = whole.clone();
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            assert!(parse("x", &bytes).is_err(), "{length}");
        }
        let mut latin = whole.clone();
        latin[10] = 0xff;
        assert!(parse("x", &latin).expect_err("not text").to_string().contains("UTF-8"));
        assert!(parse("x", b"PK\x03\x04data.pkl").expect_err("pickle").to_string().contains("pickle"));
    }

    #[test]
    fn a_header_whose_length_looks_like_a_pickle_is_read() {
        let header = r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        let bytes = file(&format!("{header:640}"), &[0; 4]);
        assert!(bytes.starts_with(PICKLES[1]));
        assert_eq!(parse("x", &bytes).expect("valid").len(), 1);
        // One that was saved by PyTorch, old and cut.
        for pickle in [&b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."[..], b"\x80\x02"] {
            assert!(parse("x", pickle).expect_err("pickle").to_string().contains("pickle"));
        }
    }

    #[test]
    fn a_weight_that_is_no_number_is_named() {
        let bytes = file(
            r#"{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
            &[0, 0, 0, 0, 0, 0, 0xc0, 0x7f],
        );
        let view = parse("x", &bytes).expect("valid").remove(0);
        assert_eq!(
            view.to_f32().expect_err("NaN").to_string(),
            "x: tensor `t`: element 1 is not a finite number"
        );
    }
}
