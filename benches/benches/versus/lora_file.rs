//! An adapter of a pack as a GGUF LoRA, for llama.cpp: B = scale · U C and A = Vᵀ, in half precision, as LoRA files
//! usually are. (`lory pack extract` does the same with all cases; this needs no linear algebra library.)

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use lory_kernels::QuantType;
use lory_kernels::quant::{dequantize_row, quantize_row};
use lory_models::Tensor;
use lory_models::adapter::{Adapter, CoreMatrix, Delta};
use lory_models::gguf::Writer;

/// Writes `adapter`, whose deltas are all there is to it.
pub fn write(adapter: &Adapter, architecture: &str, path: &Path) -> Result<(), String> {
    let mut writer = Writer::new();
    writer.set("general.type", "adapter").set("general.architecture", architecture);
    writer.set("adapter.type", "lora");
    let mut tensors = Vec::new();
    let mut alpha = None;
    for (site, core) in adapter.cores() {
        let matrix = match &core.delta {
            Delta::Shared(matrix) | Delta::Private(_, matrix) => matrix,
            Delta::None => return Err(format!("{}: nothing but scales at {site}", adapter.name())),
        };
        let factors = adapter.factors(*site).ok_or_else(|| format!("{site} has no factors"))?;
        let rank = factors.rank();
        // alpha / rank must be 1 everywhere: the scale is in B.
        if *alpha.get_or_insert(rank) != rank {
            return Err(format!("{}: sites of different ranks", adapter.name()));
        }
        let u = factors.u_numbers().map_err(|e| e.to_string())?;
        let outputs = u.len() / rank;
        let b = times(u, rank, matrix, core.scale)?;
        let (a_name, b_name) = (format!("{site}.weight.lora_a"), format!("{site}.weight.lora_b"));
        writer.tensor(&a_name, QuantType::F16, &[factors.v().cols(), rank]);
        writer.tensor(&b_name, QuantType::F16, &[rank, outputs]);
        tensors.push((a_name, numbers(factors.v())?));
        tensors.push((b_name, b));
    }
    writer.set("adapter.lora.alpha", alpha.unwrap_or(1) as f32);
    let text = |e: std::io::Error| format!("{}: {e}", path.display());
    let mut out = writer.start(BufWriter::new(File::create(path).map_err(text)?)).map_err(text)?;
    for (name, values) in tensors {
        let mut bytes = vec![0; 2 * values.len()];
        quantize_row(QuantType::F16, &values, &mut bytes).map_err(|e| e.to_string())?;
        out.tensor(&name, &bytes).map_err(text)?;
    }
    out.finish().and_then(|mut file| file.flush()).map_err(text)
}

fn numbers(tensor: &Tensor) -> Result<Vec<f32>, String> {
    let matrix = tensor.matrix();
    let mut out = vec![0.0; matrix.rows() * matrix.cols()];
    dequantize_row(matrix.ty(), matrix.bytes(), &mut out).map_err(|e| e.to_string())?;
    Ok(out)
}

/// scale · U C; U has `rank` columns.
fn times(mut u: Vec<f32>, rank: usize, core: &CoreMatrix, scale: f32) -> Result<Vec<f32>, String> {
    match core {
        CoreMatrix::Identity => {}
        CoreMatrix::Diagonal(c) => {
            let c = numbers(c)?;
            u.chunks_exact_mut(rank).for_each(|row| row.iter_mut().zip(&c).for_each(|(u, c)| *u *= c));
        }
        CoreMatrix::Full(c) => {
            let c = numbers(c)?;
            let mut sum = vec![0.0; rank];
            for row in u.chunks_exact_mut(rank) {
                sum.fill(0.0);
                for (u, c) in row.iter().zip(c.chunks_exact(rank)) {
                    sum.iter_mut().zip(c).for_each(|(s, c)| *s += u * c);
                }
                row.copy_from_slice(&sum);
            }
        }
    }
    u.iter_mut().for_each(|u| *u *= scale);
    Ok(u)
}
