//! Flags of llama-bench that ask for what happens here in one way: a value that asks for it is taken, any other is answered.

use clap::Args;

use crate::failure::{Failure, Outcome};

const ONE_GPU: &str = "one GPU at most has layers here";

#[derive(Args)]
pub struct FixedFlags {
    /// Attention (short: -fa).
    #[arg(long, value_name = "on|off|auto", hide = true, value_parser = flash_attention)]
    flash_attn: Option<()>,
    /// How several GPUs share a model (short: -sm).
    #[arg(long, value_name = "none|layer", hide = true, value_parser = split_mode)]
    split_mode: Option<()>,
    /// The GPU among several (short: -mg).
    #[arg(long, value_name = "0", hide = true, value_parser = main_gpu)]
    main_gpu: Option<()>,
    /// Shares of several GPUs (short: -ts).
    #[arg(long, value_name = "SHARES", hide = true, value_parser = tensor_split)]
    tensor_split: Option<()>,
    /// Where single tensors are (short: -ot).
    #[arg(long, value_name = "none", hide = true, value_parser = override_tensor)]
    override_tensor: Option<()>,
    /// Whether the cache stays with the processor (short: -nkvo).
    #[arg(long, value_name = "0|1", hide = true, value_parser = clap::value_parser!(u8).range(0..=1))]
    no_kv_offload: Option<u8>,
    /// Whether a GPU leaves to the processor what it has the weights of (short: -nopo): it always does.
    #[arg(long, value_name = "0|1", hide = true, value_parser = clap::value_parser!(u8).range(0..=1))]
    no_op_offload: Option<u8>,
    /// Whether pinned memory is left alone.
    #[arg(long, value_name = "0", hide = true, value_parser = no_host)]
    no_host: Option<()>,
    /// Layers whose experts the processor has (short: -ncmoe).
    #[arg(long, value_name = "0", hide = true, value_parser = experts)]
    n_cpu_moe: Option<()>,
    /// Memory that stays free on a GPU (short: -fitt).
    #[arg(long, value_name = "MIB", hide = true, value_parser = fit)]
    fit_target: Option<()>,
    /// Context that must fit there (short: -fitc).
    #[arg(long, value_name = "N", hide = true, value_parser = fit)]
    fit_ctx: Option<()>,
    /// When weights are read (short: -lzm).
    #[arg(long, value_name = "auto", hide = true, value_parser = lazy)]
    lazy_mode: Option<()>,
    /// Other machines (short: -rpc).
    #[arg(long, value_name = "SERVERS", hide = true, value_parser = rpc)]
    rpc: Option<()>,
    /// A model elsewhere (short: -hf).
    #[arg(long, value_name = "REPO", hide = true, value_parser = download)]
    hf_repo: Option<()>,
    /// A file of it (short: -hff).
    #[arg(long, value_name = "FILE", hide = true, value_parser = download)]
    hf_file: Option<()>,
    /// Who asks for it (short: -hft).
    #[arg(long, value_name = "TOKEN", hide = true, value_parser = download)]
    hf_token: Option<()>,
}

impl FixedFlags {
    /// What depends on where layers are.
    pub fn check(&self, gpu: bool) -> Outcome {
        if gpu && self.no_kv_offload == Some(1) {
            return Err(Failure::usage(
                "-nkvo 1: a layer's keys and values are where the layer is; -ngl moves both",
            ));
        }
        Ok(())
    }
}

/// A flag of which some values say what happens anyway.
fn only(value: &str, taken: &[&str], otherwise: &str) -> Result<(), String> {
    if taken.contains(&value) { Ok(()) } else { Err(format!("{otherwise}; expected {}", taken.join(" or "))) }
}

fn flash_attention(wanted: &str) -> Result<(), String> {
    match wanted {
        "1" | "on" | "-1" | "auto" => Ok(()),
        "0" | "off" => {
            Err("attention is always computed in tiles here; there is no other way to compare".into())
        }
        _ => Err("expected on, off or auto".into()),
    }
}

fn split_mode(wanted: &str) -> Result<(), String> {
    only(wanted, &["none", "layer"], ONE_GPU)
}

fn main_gpu(wanted: &str) -> Result<(), String> {
    only(wanted, &["0"], ONE_GPU)
}

fn tensor_split(wanted: &str) -> Result<(), String> {
    let shares: Result<Vec<f64>, _> = wanted.split(['/', ';']).map(str::parse).collect();
    match shares {
        Ok(shares) if shares.iter().filter(|share| **share != 0.0).count() <= 1 => Ok(()),
        Ok(_) => Err(format!("{ONE_GPU}; expected a single share, or 0")),
        Err(_) => Err("expected shares, as in 0 or 3/1".into()),
    }
}

fn override_tensor(wanted: &str) -> Result<(), String> {
    only(wanted, &["none"], "tensors are where their layers are (-ngl)")
}

fn no_host(wanted: &str) -> Result<(), String> {
    only(wanted, &["0"], "there is no choice of buffers here")
}

fn experts(wanted: &str) -> Result<(), String> {
    only(wanted, &["0"], "there are no models with experts here")
}

fn fit(_: &str) -> Result<(), String> {
    Err("-ngl auto finds how many layers fit, and leaves an eighth of the GPU's memory".into())
}

fn lazy(wanted: &str) -> Result<(), String> {
    only(wanted, &["auto"], "mapped weights are read when they are used, others when a model is opened (-lm)")
}

fn rpc(_: &str) -> Result<(), String> {
    Err("there is one machine, this one".into())
}

fn download(_: &str) -> Result<(), String> {
    Err("nothing is downloaded here: fetch the file, and give it with -m".into())
}
