//! `lory pack`: what is in a pack, and changes to it.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand};
use lory_compress::{
    AddOptions, Error, Source, add, base_of, extract, extract_peft, merge_segments, open_pack, remove, rename,
};
use lory_kernels::QuantType;
use lory_models::Bytes;
use lory_models::adapter::pack::Pack as OpenPack;
use lory_models::adapter::{BaseCheck, BaseInfo, publish::folder_of};
use lory_runtime::mapping::{File, Loading, open_gguf};
use serde_json::json;

use crate::{
    compress::{error_limit, failure, in_pool, open_collection, storage_type},
    failure::{Failure, Outcome, one_line},
    inputs::Inputs,
    interrupt,
    mix::{NONE, NOT_A_NAME},
    output::place_of,
};

/// Look into a pack of adapters, or change it.
///
/// Changes are written as further files beside the pack (PACK.seg-0001.gguf …) and never disturb programs
/// that have it open; `merge` puts them into the pack.
#[derive(Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:
  lory pack list styles.gguf
  lory pack info styles.gguf poet
  lory pack add styles.gguf -m model.gguf poet/ chef.gguf
  lory pack rename styles.gguf poet bard
  lory pack remove styles.gguf chef
  lory pack merge styles.gguf
  lory pack extract styles.gguf bard -o bard.gguf
  lory pack verify styles.gguf -m model.gguf"
)]
pub struct Pack {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    List(List),
    Info(Info),
    Add(Add),
    Remove(Remove),
    Rename(Rename),
    Merge(Merge),
    Extract(Extract),
    Verify(Verify),
}

impl Pack {
    pub fn run(self) -> Outcome {
        match self.what {
            What::List(c) => c.run(),
            What::Info(c) => c.run(),
            What::Add(c) => c.run(),
            What::Remove(c) => c.run(),
            What::Rename(c) => c.run(),
            What::Merge(c) => c.run(),
            What::Extract(c) => c.run(),
            What::Verify(c) => c.run(),
        }
    }
}

/// Maps a file, for reading packs without holding them in memory.
fn map(path: &Path) -> lory_compress::Result<Bytes> {
    let file = File::open(path, Loading::Map).map_err(|e| Error::Request(e.to_string()))?;
    Ok(Arc::new(file))
}

fn open(path: &Path) -> Outcome<OpenPack> {
    open_pack(path, &map).map_err(failure)
}

/// A pack that will get another file beside it, or be replaced.
fn open_to_change(path: &Path) -> Outcome<OpenPack> {
    interrupt::leave_nothing_in(folder_of(path));
    open(path)
}

/// List the adapters of a pack.
#[derive(Args)]
struct List {
    /// The pack; its segments beside it are found by their names.
    #[arg(value_name = "PACK")]
    pack: PathBuf,
    /// As one JSON array.
    #[arg(long)]
    json: bool,
}

impl List {
    fn run(self) -> Outcome {
        let pack = open(&self.pack)?;
        let mut out = io::BufWriter::new(io::stdout().lock());
        if self.json {
            let mut all = Vec::with_capacity(pack.len());
            for name in pack.names() {
                let info = pack.info(name)?;
                all.push(json!({
                    "name": name,
                    "cluster": info.cluster,
                    "bytes": info.bytes,
                    "mean_err2": info.mean_err2,
                    "worst_err2": info.worst_err2,
                    "file": info.file,
                }));
            }
            serde_json::to_writer_pretty(&mut out, &all).map_err(io::Error::from)?;
            writeln!(out)?;
        } else {
            for name in pack.names() {
                let info = pack.info(name)?;
                let cluster = info.cluster.map_or("own".into(), |c| c.to_string());
                let error = info.mean_err2.map_or("-".into(), |e| format!("{e:.4}"));
                writeln!(out, "{}\tcluster {cluster}\t{} bytes\terr² {error}", one_line(name), info.bytes)?;
            }
        }
        Ok(out.flush()?)
    }
}

/// Say everything about one adapter, as JSON.
#[derive(Args)]
struct Info {
    /// The pack; its segments beside it are found by their names.
    #[arg(value_name = "PACK")]
    pack: PathBuf,
    /// The adapter, as `lory pack list` names it.
    #[arg(value_name = "NAME")]
    name: String,
}

impl Info {
    fn run(self) -> Outcome {
        let pack = open(&self.pack)?;
        let info = pack.info(&self.name)?;
        let sites: Vec<_> = info
            .sites
            .iter()
            .map(|s| {
                json!({
                    "site": s.site.to_string(),
                    "rank": s.rank,
                    "core_type": s.core_type.map(|t| t.name()),
                    "own_factors": s.private,
                    "scale": s.scale,
                    "err2": s.err2,
                })
            })
            .collect();
        let all = json!({
            "name": info.name,
            "file": info.file,
            "base": pack.spec().base_name,
            "architecture": pack.spec().architecture,
            "cluster": info.cluster,
            "bytes": info.bytes,
            "mean_err2": info.mean_err2,
            "worst_err2": info.worst_err2,
            "description": info.meta.description,
            "source": info.meta.source,
            "source_hash": info.meta.source_hash,
            "kind": info.meta.kind,
            "invocation": info.invocation,
            "sites": sites,
        });
        let mut out = io::stdout().lock();
        serde_json::to_writer_pretty(&mut out, &all).map_err(io::Error::from)?;
        writeln!(out)?;
        Ok(())
    }
}

/// Add adapters on the pack's bases, which stay as they are.
#[derive(Args)]
struct Add {
    /// The pack; its segments beside it are found by their names.
    #[arg(value_name = "PACK")]
    pack: PathBuf,
    /// The base model.
    #[arg(short = 'm', long, value_name = "FILE")]
    model: PathBuf,
    /// Adapters with a larger mean err² keep their own factors.
    #[arg(long, value_name = "E", value_parser = error_limit)]
    max_error: Option<f64>,
    /// Take the place of adapters of the same name.
    #[arg(long)]
    replace: bool,
    /// PEFT folders, GGUF LoRA files, and folders of those.
    #[arg(value_name = "ADAPTER", required = true)]
    adapters: Vec<PathBuf>,
}

impl Add {
    fn run(self) -> Outcome {
        let pack = open_to_change(&self.pack)?;
        let options = AddOptions { max_error: self.max_error, replace: self.replace };
        let added = in_pool(0, |bar, cancel| {
            let sources = Source::find(&self.adapters)?;
            let collection = open_collection(&self.model, &sources, &self.pack, bar, cancel)?;
            add(&self.pack, &pack, &collection, options, bar, cancel)
        })?;
        for a in added {
            let place = a.cluster.map_or("own factors".into(), |c| format!("cluster {c}"));
            let advice = match a.poor {
                true => "; a poor fit: compress the collection again, or give --max-error",
                false => "",
            };
            eprintln!("{}: {place}, err² {:.4}{advice}", one_line(&a.name), a.mean_err2);
        }
        Ok(())
    }
}

/// Take adapters out of a pack; their bytes go at the next merge.
#[derive(Args)]
struct Remove {
    /// The pack; its segments beside it are found by their names.
    #[arg(value_name = "PACK")]
    pack: PathBuf,
    /// Adapters, as `lory pack list` names them.
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
}

impl Remove {
    fn run(mut self) -> Outcome {
        // A name that stands there twice is one adapter.
        self.names.sort_unstable();
        self.names.dedup();
        remove(&self.pack, &open_to_change(&self.pack)?, &self.names).map_err(failure)?;
        Ok(())
    }
}

/// Give an adapter another name.
#[derive(Args)]
struct Rename {
    /// The pack; its segments beside it are found by their names.
    #[arg(value_name = "PACK")]
    pack: PathBuf,
    /// What it is called.
    #[arg(value_name = "FROM")]
    from: String,
    /// What it is to be called.
    #[arg(value_name = "TO")]
    to: String,
}

impl Rename {
    fn run(self) -> Outcome {
        if self.to == NONE {
            return Err(Failure::usage(NOT_A_NAME));
        }
        rename(&self.pack, &open_to_change(&self.pack)?, &self.from, &self.to).map_err(failure)?;
        Ok(())
    }
}

/// Put a pack and its segments into one file.
#[derive(Args)]
struct Merge {
    /// The pack; its segments beside it are found by their names.
    #[arg(value_name = "PACK")]
    pack: PathBuf,
}

impl Merge {
    fn run(self) -> Outcome {
        merge_segments(&self.pack, &open_to_change(&self.pack)?).map_err(failure)
    }
}

/// Write one adapter of a pack as a plain LoRA: a GGUF file, or a PEFT folder.
#[derive(Args)]
#[command(after_help = "Examples:
  lory pack extract styles.gguf poet -o poet.gguf
  lory pack extract styles.gguf poet -m model.gguf -o poet/")]
struct Extract {
    /// The pack; its segments beside it are found by their names.
    #[arg(value_name = "PACK")]
    pack: PathBuf,
    /// The adapter, as `lory pack list` names it.
    #[arg(value_name = "NAME")]
    name: String,
    /// The base model; needed for a PEFT folder, and where its file keeps q, k and v, or gate and up, in one
    /// tensor.
    #[arg(short = 'm', long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// The GGUF file to write; ending in a slash, the PEFT folder.
    #[arg(short = 'o', long, value_name = "FILE|DIR/")]
    output: PathBuf,
    /// Format of the weights of a GGUF file; F32 keeps every number, and is what PEFT folders get.
    #[arg(long = "type", value_name = "TYPE", default_value = "F32", value_parser = storage_type)]
    ty: QuantType,
}

impl Extract {
    fn run(self) -> Outcome {
        let inputs = Inputs::default().pack(&self.pack);
        self.model.iter().fold(inputs, |inputs, m| inputs.model(m)).refuse("-o", &self.output)?;
        let pack = open(&self.pack)?;
        let model = self.model.as_ref().map(|model| open_gguf(model, Loading::Map)).transpose()?;
        let base = match &model {
            None => base_of(&pack),
            Some(model) => BaseInfo::from_gguf(&model.gguf)?,
        };
        pack.check_base(&base, BaseCheck::Shapes)?;
        place_of(&self.output)?;
        if self.output.as_os_str().to_string_lossy().ends_with(std::path::is_separator)
            || self.output.is_dir()
        {
            let Some(model) = &model else {
                return Err(Failure::usage(
                    "a PEFT folder needs -m MODEL: it says in which order the original model has the rows of q and k",
                ));
            };
            return extract_peft(&pack, &self.name, &base, &model.gguf, &self.output).map_err(failure);
        }
        extract(&pack, &self.name, &base, self.ty, &self.output).map_err(failure)
    }
}

/// Read everything in a pack and compare it with its base and its hashes.
#[derive(Args)]
struct Verify {
    /// The pack; its segments beside it are found by their names.
    #[arg(value_name = "PACK")]
    pack: PathBuf,
    /// The base model.
    #[arg(short = 'm', long, value_name = "FILE")]
    model: Option<PathBuf>,
}

impl Verify {
    fn run(self) -> Outcome {
        let pack = open(&self.pack)?;
        if let Some(model) = &self.model {
            let base = BaseInfo::from_gguf(&open_gguf(model, Loading::Map)?.gguf)?;
            pack.check_base(&base, BaseCheck::Exact)?;
        }
        pack.verify()?;
        eprintln!("{}: {} adapters, sound", self.pack.display(), pack.len());
        Ok(())
    }
}
