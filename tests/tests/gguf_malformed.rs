//! Every class of broken GGUF container, built byte by byte: each is refused by an error that
//! names the file, the key or tensor, and the number at fault.

use std::sync::Arc;

use lory_models::{
    Bytes, Error,
    gguf::{Array, Gguf, Value},
};
use lory_tests::gguf_bytes::{GgufBytes, array, string};

const U8: u32 = 0;
const U32: u32 = 4;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const F32_TENSOR: u32 = 0;
const Q4_0_TENSOR: u32 = 2;

fn parse_bytes(bytes: Vec<u8>) -> Result<Gguf, Error> {
    Gguf::parse(vec![("bad.gguf".into(), Arc::new(bytes))])
}

fn parse(file: &GgufBytes) -> Result<Gguf, Error> {
    parse_bytes(file.bytes())
}

/// The file must be refused with the file's name and each of `words`.
#[track_caller]
fn refused(file: &GgufBytes, words: &[&str]) {
    refused_bytes(file.bytes(), words);
}

#[track_caller]
fn refused_bytes(bytes: Vec<u8>, words: &[&str]) {
    let message = parse_bytes(bytes).expect_err("the file was accepted").to_string();
    assert!(message.starts_with("bad.gguf: "), "{message}");
    assert!(!message.contains('\n') && message.len() < 400, "not one short line: {message}");
    for word in words {
        assert!(message.contains(word), "no `{word}` in: {message}");
    }
}

fn new() -> GgufBytes {
    GgufBytes::new()
}

/// A sound file with a key of every kind and two tensors.
fn sound() -> GgufBytes {
    new()
        .key("general.architecture", STRING, &string("llama"))
        .key("n", U32, &7u32.to_le_bytes())
        .key("flag", BOOL, &[1])
        .key("list", ARRAY, &array(STRING, 2, &[string("a"), string("bc")].concat()))
        .key("numbers", ARRAY, &array(6, 2, &[0; 8]))
        .tensor("a.weight", &[32, 3], Q4_0_TENSOR, 0)
        .tensor("b.weight", &[5], F32_TENSOR, 64)
        .data(64 + 20)
}

#[test]
fn the_sound_file_of_this_suite_is_accepted() {
    let g = parse(&sound()).unwrap();
    assert_eq!(g.tensor("a.weight").unwrap().rows(), 3);
    assert_eq!(g.tensor("b.weight").unwrap().matrix().bytes()[0], 64);
    assert_eq!(parse(&sound().version(2)).unwrap().tensors().len(), 2);
    // Padding after the last tensor is common and may be there or not.
    assert_eq!(parse(&sound().data(12)).unwrap().tensors().len(), 2);
}

#[test]
fn g1_empty_short_and_foreign_files() {
    refused_bytes(vec![], &["empty"]);
    for n in 1..4 {
        refused_bytes(b"GGUF"[..n].to_vec(), &[&n.to_string(), "too short"]);
    }
    refused_bytes(b"HELO, this is text".to_vec(), &["`HELO`"]);
    refused_bytes(b"\0\x01\xff\n1234".to_vec(), &[r"`\x00\x01\xff\n`"]);
    for (magic, name) in [
        (b"lmgg", "ggml"),
        (b"fmgg", "ggmf"),
        (b"tjgg", "ggjt"),
        (b"algg", "ggla"),
        (b"ggjt", "ggjt"),
        (b"FUGG", "FUGG"),
        (b"PK\x03\x04", "ZIP"),
        (b"vers", "LFS"),
    ] {
        let file = sound().magic(magic);
        refused(&file, &[name]);
        assert!(matches!(parse(&file), Err(Error::Unsupported { .. })));
    }
}

#[test]
fn g1_cut_at_every_byte() {
    let whole = sound().bytes();
    let header = sound().header().len();
    for n in 0..whole.len() {
        let error = parse_bytes(whole[..n].to_vec()).expect_err("a cut file was accepted");
        if n >= header {
            assert!(matches!(&error, Error::Tensor { .. }), "cut at {n}: {error}");
        }
        assert!(error.to_string().starts_with("bad.gguf: "), "cut at {n}: {error}");
    }
}

#[test]
fn g2_versions() {
    let version = |v| sound().version(v);
    refused(&version(0), &["version 0"]);
    refused(&version(1), &["version 1"]);
    refused(&version(4), &["version 4"]);
    refused(&version(u32::MAX), &["4294967295"]);
    refused(&version(3u32.swap_bytes()), &["big-endian"]);
    refused(&version(2u32.swap_bytes()), &["big-endian"]);
    assert!(matches!(parse(&version(1)), Err(Error::Unsupported { .. })));
}

#[test]
fn g3_number_of_tensors() {
    for n in [u64::MAX, u64::from(u32::MAX), u64::MAX / 33 + 2, 1 << 63, 4] {
        let file = sound().claim_tensors(n);
        refused(&file, &[]);
    }
    refused(&new().claim_tensors(u64::MAX), &["18446744073709551615 tensors"]);
}

#[test]
fn g4_number_of_keys() {
    for n in [u64::MAX, u64::from(u32::MAX), u64::MAX / 14 + 2, 1 << 63] {
        let file = sound().claim_keys(n);
        refused(&file, &[&n.to_string(), "keys"]);
    }
    // One too many: a tensor is read as a key.
    refused(&sound().claim_keys(6), &["tensor 1 of 2", "844424930131968 bytes"]);
}

#[test]
fn g5_strings() {
    for len in [u64::MAX, 1 << 63, 1 << 32, 65536] {
        let entry = [&len.to_le_bytes()[..], b"key", &[0; 16]].concat();
        refused(&new().raw_key(&entry), &["key 1 of 1", &len.to_string()]);
    }
    for len in [u64::MAX, 1 << 63, 1000, 4] {
        let value = [&len.to_le_bytes()[..], b"abc"].concat();
        refused(&new().key("k", STRING, &value), &["`k`", &len.to_string()]);
    }
    refused(&new().key("a\0b", U8, &[0]), &["key 1 of 1", r"a\x00b"]);
    refused(&new().key("a\nb", U8, &[0]), &[r"a\nb"]);
    refused(&new().key(b"a\xffb", U8, &[0]), &[r"a\xffb", "not UTF-8"]);
    refused(&new().key("k", STRING, &string(b"ab\xff")), &["`k`", "not UTF-8", "byte 2"]);
    refused(&new().key("k", ARRAY, &array(STRING, 1, &string(b"\xff"))), &["`k`", "element 0", "UTF-8"]);
    // A NUL inside a value is text like any other.
    let g = parse(&new().key("k", STRING, &string("a\0b"))).unwrap();
    assert_eq!(g.metadata().str("k").unwrap(), "a\0b");
}

#[test]
fn g5_vocabularies_may_hold_pieces_of_characters() {
    let list = array(STRING, 3, &[string(b"\xe2\x96"), string("b"), string(b"x\xff")].concat());
    let g = parse(&new().key("tokenizer.ggml.tokens", ARRAY, &list)).unwrap();
    assert_eq!(
        g.metadata().get("tokenizer.ggml.tokens"),
        Some(&Value::Array(Array::String(vec!["\u{fffd}".into(), "b".into(), "x\u{fffd}".into()])))
    );
}

#[test]
fn g6_arrays() {
    for (ty, count) in [(U8, u64::MAX), (U32, 1 << 62), (U32, u64::MAX), (12, (1 << 61) + 1), (BOOL, 1 << 40)]
    {
        refused(&new().key("k", ARRAY, &array(ty, count, &[0; 64])), &["`k`", &count.to_string()]);
    }
    for count in [u64::MAX, 1 << 61, 9] {
        refused(&new().key("k", ARRAY, &array(STRING, count, &[0; 64])), &["`k`", &count.to_string()]);
    }
    // Of an unknown type: no size per element, so a loop over them would not end.
    for ty in [13, 255, u32::MAX] {
        refused(&new().key("k", ARRAY, &array(ty, u64::MAX, &[0; 64])), &["`k`", &ty.to_string()]);
    }
    let inner = array(U8, 1, &[0]);
    refused(&new().key("k", ARRAY, &array(ARRAY, 1, &inner)), &["`k`", "array of arrays"]);
    let deep = (0..100_000).fold(vec![], |mut v: Vec<u8>, _| {
        v.extend(array(ARRAY, 1, &[]));
        v
    });
    refused(&new().key("k", ARRAY, &deep), &["`k`", "array of arrays"]);
    refused(&new().key("k", ARRAY, &array(BOOL, 2, &[1, 2])), &["`k`", "bool of 2"]);
    let empty = parse(&new().key("k", ARRAY, &array(U32, 0, &[]))).unwrap();
    assert_eq!(empty.metadata().get("k"), Some(&Value::Array(Array::U32(vec![]))));
}

#[test]
fn g6_decoded_values_are_limited_as_a_whole() {
    // 12 million empty strings take 96 MB in the file and would take 288 MB in memory.
    let n = 12u64 << 20;
    let file = new().key("k", ARRAY, &array(STRING, n, &vec![0; 8 * n as usize]));
    refused(&file, &["`k`", "256 MiB"]);
}

#[test]
fn g7_keys() {
    refused(&new().key("", U8, &[0]).key("fill", U32, &[0; 4]), &["key 1 of 2", "empty"]);
    refused(&new().key("k", U8, &[0]).key("k", U32, &[0; 4]), &["`k`", "twice"]);
    for ty in [13, 14, u32::MAX] {
        refused(&new().key("k", ty, &[0; 8]), &["`k`", &ty.to_string()]);
    }
    refused(&new().key("k", BOOL, &[2]), &["`k`", "bool of 2"]);
    let wrong = parse(&new().key("general.architecture", U32, &[0; 4])).unwrap();
    let message = wrong.metadata().str("general.architecture").unwrap_err().to_string();
    assert!(message.contains("`general.architecture`") && message.contains("uint32"), "{message}");
}

#[test]
fn g8_alignment() {
    let with = |a: u32| new().key("general.alignment", U32, &a.to_le_bytes());
    for a in [0, 13, 1 << 30, u32::MAX, 3 << 5] {
        refused(&with(a), &["`general.alignment`", &a.to_string()]);
    }
    refused(&new().key("general.alignment", 5, &[32, 0, 0, 0]), &["`general.alignment`", "int32"]);
    refused(&new().key("general.alignment", 10, &[32, 0, 0, 0, 0, 0, 0, 0]), &["uint64"]);
    for a in [1u32, 8, 4096] {
        let second = 54u64.next_multiple_of(u64::from(a));
        let file = with(a)
            .tensor("a", &[32, 3], Q4_0_TENSOR, 0)
            .tensor("b", &[1], F32_TENSOR, second)
            .data(second as usize + 4)
            .align(a as usize);
        let g = parse(&file).unwrap();
        assert_eq!(g.tensor("b").unwrap().matrix().bytes()[0], second as u8);
    }
}

#[test]
fn g9_tensor_names() {
    let named = |n: &str| new().tensor(n, &[1], F32_TENSOR, 0).data(4);
    let long = "x".repeat(65);
    refused(&named(&long), &["tensor 1 of 1", "65 bytes"]);
    refused(&named(""), &[]);
    refused(&named("").data(60), &["tensor 1 of 1", "empty"]);
    refused(&named("a\tb").data(60), &[r"a\tb"]);
    assert!(parse(&named(&long[1..])).is_ok());
    let twice = named("t").tensor("t", &[1], F32_TENSOR, 32).data(32);
    refused(&twice, &["`t`", "twice"]);
}

#[test]
fn g10_number_of_dimensions() {
    let with = |n: u32| {
        let entry = [&string("t")[..], &n.to_le_bytes(), &[1, 0, 0, 0, 0, 0, 0, 0].repeat(8)].concat();
        new().raw_tensor(&entry).data(64)
    };
    for n in [0, 5, 255, u32::MAX] {
        refused(&with(n), &["`t`", &format!("{n} dimensions")]);
    }
}

#[test]
fn g11_dimensions() {
    let with = |dims: &[u64], ty| new().tensor("t", dims, ty, 0).data(64);
    refused(&with(&[1, 0], F32_TENSOR), &["`t`", "dimension 1 is 0"]);
    refused(&with(&[u64::MAX], F32_TENSOR), &["`t`", "dimension 0 is -1"]);
    refused(&with(&[1, 1 << 63], F32_TENSOR), &["`t`", "dimension 1 is -9223372036854775808"]);
    // Number of elements wraps; so does the product of two that wraps to a small one.
    refused(&with(&[1 << 62, 4], F32_TENSOR), &["`t`", "4611686018427387904"]);
    refused(&with(&[1 << 32, 1 << 32], F32_TENSOR), &["`t`", "larger than any file"]);
    refused(&with(&[1 << 31, 1 << 31, 1 << 31, 1 << 31], F32_TENSOR), &["`t`", "larger than any file"]);
    // Elements fit, bytes do not.
    refused(&with(&[1 << 61, 1], F32_TENSOR), &["`t`", "larger than any file"]);
    refused(&with(&[1 << 62], 28), &["`t`", "larger than any file"]);
    // Each fits, padded or accumulated they do not.
    refused(&with(&[(1 << 63) - 1], 24), &["`t`", "9223372036854775"]);
    let huge = (1u64 << 62) - 32;
    let many = (0..5).fold(new(), |f, i| f.tensor(format!("t{i}"), &[huge], 24, huge.wrapping_mul(i)));
    refused(&many.data(64), &["`t0`", "46116860184273880"]);
}

#[test]
fn g12_types() {
    let with = |dims: &[u64], ty: u32| new().tensor("t", dims, ty, 0).data(256);
    for ty in [4, 5, 31, 32, 33, 36, 37, 38] {
        refused(&with(&[32], ty), &["`t`", &format!("type {ty}"), "removed"]);
    }
    refused(&with(&[32], 1000), &["`t`", "type 1000"]);
    refused(&with(&[32], u32::MAX), &["`t`", "type -1"]);
    refused(&with(&[33, 32], Q4_0_TENSOR), &["`t`", "rows of 33", "Q4_0"]);
    refused(&with(&[128, 2], 12), &["`t`", "rows of 128", "Q4_K", "256"]);
}

#[test]
fn g13_offsets() {
    let two = |second: u64| {
        new().tensor("a", &[32, 3], Q4_0_TENSOR, 0).tensor("b", &[8], F32_TENSOR, second).data(1024)
    };
    assert!(parse(&two(64)).is_ok());
    refused(&two(65), &["`b`", "offset 65", "alignment 32"]);
    refused(&two(32), &["`b`", "offset 32 overlaps", "64"]);
    refused(&two(0), &["`b`", "offset 0 overlaps"]);
    refused(&two(96), &["`b`", "offset 96", "gap", "64"]);
    refused(&two(u64::MAX - 31), &["`b`", "18446744073709551584"]);
    let first = new().tensor("a", &[8], F32_TENSOR, 32).data(128);
    refused(&first, &["`a`", "offset 32", "gap", "0 was expected"]);
    let past = new().tensor("a", &[1 << 20], F32_TENSOR, 0).data(128);
    refused(&past, &["`a`", "4194", "truncated"]);
}

#[test]
fn g14_data_cut_short() {
    refused(&new().tensor("t", &[8], F32_TENSOR, 0), &["`t`", "truncated"]);
    refused(&new().tensor("t", &[8], F32_TENSOR, 0).data(31), &["`t`", "truncated"]);
    assert!(parse(&new().tensor("t", &[8], F32_TENSOR, 0).data(32)).is_ok());
}

/// Terabytes of zeros that take no memory: what a sparse file looks like to the parser is
/// counts that the file's length does not contradict.
#[test]
fn g14_counts_that_only_a_sparse_file_could_hold() {
    let file = new().claim_keys(1_000_000);
    let mut bytes = file.bytes();
    bytes.resize(16 << 20, 0);
    refused_bytes(bytes, &["key 1 of 1000000", "empty"]);
    let file = new().claim_tensors(400_000);
    let mut bytes = file.bytes();
    bytes.resize(16 << 20, 0);
    refused_bytes(bytes, &["tensor 1 of 400000", "empty"]);
}

fn shard(no: u16, count: u16, total: i32, tensor: &str) -> GgufBytes {
    new()
        .key("split.no", 2, &no.to_le_bytes())
        .key("split.count", 2, &count.to_le_bytes())
        .key("split.tensors.count", 5, &total.to_le_bytes())
        .tensor(tensor, &[8], F32_TENSOR, 0)
        .data(32)
}

fn parse_shards(shards: &[GgufBytes]) -> Result<Gguf, Error> {
    let file = |(i, s): (usize, &GgufBytes)| (format!("s{i}.gguf").into(), Arc::new(s.bytes()) as Bytes);
    Gguf::parse(shards.iter().enumerate().map(file).collect())
}

#[track_caller]
fn shards_refused(shards: &[GgufBytes], words: &[&str]) {
    let message = parse_shards(shards).expect_err("the shards were accepted").to_string();
    for word in words {
        assert!(message.contains(word), "no `{word}` in: {message}");
    }
}

#[test]
fn g15_shards() {
    let (a, b, c) = (shard(0, 3, 3, "a"), shard(1, 3, 3, "b"), shard(2, 3, 3, "c"));
    let g = parse_shards(&[a.clone(), b.clone(), c.clone()]).unwrap();
    assert_eq!(g.tensors().map(|t| &*t.file).collect::<Vec<_>>(), ["s0.gguf", "s1.gguf", "s2.gguf"]);

    shards_refused(&[], &["no file"]);
    shards_refused(std::slice::from_ref(&a), &["s0.gguf", "split.count", "is 3"]);
    shards_refused(&[a.clone(), b.clone()], &["s0.gguf", "split.count", "is 3", "2 files"]);
    shards_refused(&[a.clone(), a.clone(), c.clone()], &["s1.gguf", "split.no", "is 0", "expected 1"]);
    shards_refused(&[a.clone(), c.clone(), b.clone()], &["s1.gguf", "split.no", "is 2"]);
    shards_refused(&[a.clone(), b.clone(), shard(2, 3, 3, "a")], &["s2.gguf", "`a`", "s0.gguf"]);
    shards_refused(&[shard(0, 3, 4, "a"), b.clone(), c.clone()], &["split.tensors.count", "4", "3"]);
    shards_refused(&[shard(0, 1, 1, "a"), shard(0, 1, 1, "b")], &["split.count", "is 1", "2 files"]);
    shards_refused(&[shard(3, 3, 3, "a")], &["split.no", "is 3", "3"]);
    shards_refused(&[shard(0, 2, 2, "a"), new().tensor("b", &[8], F32_TENSOR, 0).data(32)], &["s1.gguf"]);
    let text = new().key("split.count", STRING, &string("3"));
    shards_refused(&[text], &["split.count", "string", "integer"]);
    let huge = new().key("split.count", U32, &u32::MAX.to_le_bytes());
    shards_refused(&[huge], &["split.count", "4294967295"]);
    let negative = new().key("split.count", 5, &(-1i32).to_le_bytes());
    shards_refused(&[negative], &["split.count"]);
    // A broken later shard is named.
    let cut = shard(2, 3, 3, "c").claim_keys(u64::MAX);
    shards_refused(&[a, b, cut], &["s2.gguf", "keys"]);
}

/// Flips every byte of a sound file to several values: whatever happens, it ends, and an
/// accepted file has tensors that lie inside it.
#[test]
fn any_single_byte_may_be_wrong() {
    let whole = sound().bytes();
    for at in 0..sound().header().len() {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            if let Ok(g) = parse_bytes(bytes) {
                for t in g.tensors() {
                    assert!(g.tensor(&t.name).unwrap().matrix().bytes().len() <= whole.len());
                }
            }
        }
    }
}
