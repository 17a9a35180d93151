//! Joint compression of LoRA adapters into one shared-basis pack.
//!
//! The objective and the algorithms are those of "Compress then Serve" (arXiv 2407.00066); what this
//! crate adds is written in its README.

#![forbid(unsafe_code)]

mod allocate;
mod baseline;
mod cluster;
mod collection;
mod diag;
mod error;
mod factors;
mod frozen;
mod full;
mod linalg;
mod lora_file;
mod modules;
mod options;
mod output;
mod own;
mod packs;
mod peft_folder;
mod pipeline;
mod plan;
mod plot;
mod progress;
mod report;
mod rng;
mod storage;
mod synthetic;

pub use allocate::{
    Allocation, Choice, Form, Goal, Prices, Unit, allocate, leading_energies, leading_energy,
};
pub use baseline::{Single, svd_at_equal_bytes};
pub use cluster::{ClusterOptions, Clustering, PerAdapter, Visit, Work, cluster};
pub use collection::{Collection, Entry, Extras, Loaded, SiteEntry, Source, SourceKind};
pub use diag::{Diag, jd_diag};
pub use error::{Error, Result};
pub use factors::{Factors, Stack};
pub use frozen::{Frozen, Method};
pub use full::{Full, FullOptions, jd_full, jd_full_shared};
pub use lora_file::{base_of, extract, plain_factors, write_gguf_lora};
pub use options::Options;
pub use packs::{
    AddOptions, Added, LITTLE_LEFT, ReadFile, add, merge_segments, open_gguf, open_pack, read_file, remove,
    rename,
};
pub use peft_folder::extract_peft;
pub use pipeline::compress;
pub use progress::{Progress, Silent};
pub use report::{AdapterReport, Errors, ModuleReport, Report, Seconds, peak_memory};
pub use rng::Rng;
pub use storage::{Storage, Stored, read_matrix};
pub use synthetic::{Kind, Synthetic};
