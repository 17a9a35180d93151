//! `lory inspect`: what is in a GGUF file.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::PathBuf,
};

use clap::Args;
use lory_models::gguf::{Array, Gguf, Metadata, TensorInfo, Value};
use lory_runtime::mapping::{Loading, open_gguf};
use serde_json::{Map, Value as Json, json};

use crate::{
    failure::{Outcome, one_line},
    terminal::bytes,
};

/// Show what is in a GGUF file: model, LoRA, pack of adapters or anything else.
#[derive(Args)]
#[command(after_help = "Examples:
  lory inspect model.gguf
  lory inspect model.gguf --tensors
  lory inspect --json adapter.gguf | jq .metadata")]
pub struct Inspect {
    /// The file; of a sharded model, any shard.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Everything, as one JSON object: metadata in full, every tensor.
    #[arg(long)]
    json: bool,
    /// List every tensor.
    #[arg(long, conflicts_with = "json")]
    tensors: bool,
}

impl Inspect {
    pub fn run(self) -> Outcome {
        let open = open_gguf(&self.file, Loading::Map)?;
        let mut out = io::BufWriter::new(io::stdout().lock());
        if self.json {
            serde_json::to_writer_pretty(&mut out, &as_json(&open.gguf)).map_err(io::Error::from)?;
            writeln!(out)?;
        } else {
            print(&mut out, &open.gguf, self.tensors)?;
        }
        out.flush()?;
        Ok(())
    }
}

/// What a file is, by its own declaration and its contents.
fn kind(gguf: &Gguf) -> &'static str {
    let text = |key: &str| match gguf.metadata().get(key) {
        Some(Value::String(s)) => Some(s.as_str()),
        _ => None,
    };
    match (text("general.type"), text("adapter.type")) {
        (Some("adapter"), Some("lora")) => "LoRA adapter",
        (Some("adapter"), Some("lora.basis")) => "pack of adapters in a shared basis",
        (Some("adapter"), _) => "adapter of another kind",
        _ if gguf.info("token_embd.weight").is_some() => "language model",
        _ if gguf.metadata().get("tokenizer.ggml.tokens").is_some() => "vocabulary without weights",
        _ => "GGUF file that is neither a language model nor an adapter",
    }
}

/// Tensors, weights and bytes of one format.
#[derive(Default)]
struct Share {
    tensors: u64,
    weights: u64,
    bytes: u64,
}

impl Share {
    fn add(&mut self, info: &TensorInfo) {
        self.tensors += 1;
        self.weights += info.elements() as u64;
        self.bytes += info.byte_range().len() as u64;
    }
}

/// By format, and in all.
fn shares(gguf: &Gguf) -> (BTreeMap<&'static str, Share>, Share) {
    let mut by_type: BTreeMap<&'static str, Share> = BTreeMap::new();
    let mut total = Share::default();
    for info in gguf.tensors() {
        by_type.entry(info.ty.name()).or_default().add(info);
        total.add(info);
    }
    (by_type, total)
}

fn print(out: &mut impl Write, gguf: &Gguf, tensors: bool) -> io::Result<()> {
    let (by_type, total) = shares(gguf);
    for (i, (name, content)) in gguf.shards().iter().enumerate() {
        let label = if i == 0 { "file" } else { "" };
        writeln!(out, "{label:<9} {} ({})", one_line(name), bytes((**content).as_ref().len() as u64))?;
    }
    writeln!(out, "kind      {}", kind(gguf))?;
    writeln!(out, "tensors   {}, {} weights, {}", total.tensors, count(total.weights), bytes(total.bytes))?;
    for (ty, share) in &by_type {
        let per_weight = share.bytes as f64 * 8.0 / share.weights.max(1) as f64;
        writeln!(
            out,
            "  {ty:<8} {:>5} tensors  {:>8} weights  {:>10}  {per_weight:.2} bits each",
            share.tensors,
            count(share.weights),
            bytes(share.bytes)
        )?;
    }
    writeln!(out, "metadata  {} keys", gguf.metadata().iter().count())?;
    for (key, value) in gguf.metadata().iter() {
        writeln!(out, "  {} = {}", one_line(key), short(value))?;
    }
    if tensors {
        writeln!(out, "tensor table")?;
        for info in gguf.tensors() {
            let dims: Vec<String> = info.dims.iter().map(|d| d.to_string()).collect();
            let size = bytes(info.byte_range().len() as u64);
            writeln!(
                out,
                "  {:<8} {:>10}  {:<20} {}",
                info.ty.name(),
                size,
                dims.join(" x "),
                one_line(&info.name)
            )?;
        }
    }
    Ok(())
}

/// 7.2 B, 260.0 K.
fn count(n: u64) -> String {
    let scaled = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")];
    match scaled.iter().find(|(unit, _)| n as f64 >= *unit) {
        Some((unit, letter)) => format!("{:.1} {letter}", n as f64 / unit),
        None => n.to_string(),
    }
}

/// Characters and elements of a value that are shown.
const SHOWN_CHARS: usize = 100;
const SHOWN_ITEMS: usize = 6;

fn short(value: &Value) -> String {
    match value {
        Value::Array(a) => {
            let items: Vec<String> = array_items(a).take(SHOWN_ITEMS).map(|v| shown(&v)).collect();
            let more = if a.len() > SHOWN_ITEMS { ", …" } else { "" };
            format!("[{}{more}] ({} elements)", items.join(", "), a.len())
        }
        other => shown(&scalar(other)),
    }
}

fn shown(value: &Json) -> String {
    let text = match value {
        Json::String(s) => format!("{s:?}"),
        other => other.to_string(),
    };
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((at, _)) => format!("{}… ({} characters)", &text[..at], text.chars().count()),
        None => text,
    }
}

/// A float as JSON has it: the shortest digits that mean the same f32, and words where JSON has
/// no number.
fn float(shortest: String) -> Json {
    match shortest.parse().ok().and_then(serde_json::Number::from_f64) {
        Some(n) => Json::Number(n),
        None => Json::String(shortest),
    }
}

fn scalar(value: &Value) -> Json {
    match value {
        Value::U8(v) => json!(v),
        Value::I8(v) => json!(v),
        Value::U16(v) => json!(v),
        Value::I16(v) => json!(v),
        Value::U32(v) => json!(v),
        Value::I32(v) => json!(v),
        Value::U64(v) => json!(v),
        Value::I64(v) => json!(v),
        Value::F32(v) => float(v.to_string()),
        Value::F64(v) => float(v.to_string()),
        Value::Bool(v) => json!(v),
        Value::String(v) => json!(v),
        Value::Array(a) => Json::Array(array_items(a).collect()),
    }
}

fn array_items(array: &Array) -> Box<dyn Iterator<Item = Json> + '_> {
    match array {
        Array::U8(a) => Box::new(a.iter().map(|v| json!(v))),
        Array::I8(a) => Box::new(a.iter().map(|v| json!(v))),
        Array::U16(a) => Box::new(a.iter().map(|v| json!(v))),
        Array::I16(a) => Box::new(a.iter().map(|v| json!(v))),
        Array::U32(a) => Box::new(a.iter().map(|v| json!(v))),
        Array::I32(a) => Box::new(a.iter().map(|v| json!(v))),
        Array::U64(a) => Box::new(a.iter().map(|v| json!(v))),
        Array::I64(a) => Box::new(a.iter().map(|v| json!(v))),
        Array::F32(a) => Box::new(a.iter().map(|v| float(v.to_string()))),
        Array::F64(a) => Box::new(a.iter().map(|v| float(v.to_string()))),
        Array::Bool(a) => Box::new(a.iter().map(|v| json!(v))),
        Array::String(a) => Box::new(a.iter().map(|v| json!(v))),
    }
}

fn metadata(metadata: &Metadata) -> Json {
    Json::Object(metadata.iter().map(|(key, value)| (key.to_owned(), scalar(value))).collect::<Map<_, _>>())
}

fn as_json(gguf: &Gguf) -> Json {
    let (by_type, total) = shares(gguf);
    let types: Map<_, _> = by_type
        .iter()
        .map(|(ty, s)| {
            ((*ty).to_owned(), json!({"tensors": s.tensors, "weights": s.weights, "bytes": s.bytes}))
        })
        .collect();
    let tensors: Vec<Json> = gguf
        .tensors()
        .map(|t| {
            json!({
                "name": &*t.name,
                "type": t.ty.name(),
                "dims": t.dims,
                "bytes": t.byte_range().len(),
                "offset": t.byte_range().start,
                "file": &*t.file,
            })
        })
        .collect();
    let files: Vec<Json> = gguf
        .shards()
        .iter()
        .map(|(name, content)| json!({"name": &**name, "bytes": (**content).as_ref().len()}))
        .collect();
    json!({
        "kind": kind(gguf),
        "files": files,
        "weights": total.weights,
        "tensor_bytes": total.bytes,
        "types": types,
        "metadata": metadata(gguf.metadata()),
        "tensors": tensors,
    })
}
