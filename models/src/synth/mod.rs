//! Models of real shape and random weights, for measuring and testing where no real one is at hand.
//!
//! A synthetic model has the keys, tensor names, formats and vocabulary size of a real one; its
//! weights are random blocks whose scales keep activations near unit size through the layers. It
//! says nothing of use, at the speed and with the memory of the real thing.

mod blocks;
mod mix;
mod rng;
mod shape;
mod vocab;

use std::io::{self, Write};

use lory_kernels::QuantType;

use crate::gguf;

pub use mix::FileType;
pub use shape::{Shape, shape, shapes};

use rng::Rng;
use shape::{Init, Spec};

/// How far the writing has come.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// The tensor written last.
    pub tensor: &'a str,
    /// Bytes of tensor data written.
    pub done: u64,
    /// Bytes of tensor data in the file.
    pub total: u64,
}

/// Writes a model of `shape` as GGUF; the same seed gives the same bytes.
///
/// Tensors are made and written piece by piece, so memory stays small for any size.
///
/// # Errors
/// Those of `out`.
pub fn model<W: Write>(
    shape: &Shape,
    file_type: FileType,
    seed: u64,
    out: W,
    mut progress: impl FnMut(Progress<'_>),
) -> io::Result<W> {
    let w = header(shape, file_type, seed);
    let total = w.data_bytes();
    let mut done = 0;
    let mut data = w.start(out)?;
    for (i, spec) in shape.tensors().iter().enumerate() {
        let ty = file_type.of(spec, shape);
        let mut rng = Rng::new(seed, i as u64 + 1);
        data.tensor_with(&spec.name, |out| write_tensor(spec, ty, &mut rng, &mut done, out))?;
        progress(Progress { tensor: &spec.name, done, total });
    }
    data.finish()
}

/// The keys, the vocabulary and the tensors' descriptions of [`model`], without data.
pub fn header(shape: &Shape, file_type: FileType, seed: u64) -> gguf::Writer {
    let mut w = gguf::Writer::new();
    shape.keys(&mut w);
    w.set("general.file_type", file_type.id()).set("general.quantization_version", 2u32);
    vocab::keys(&mut w, shape.vocab, seed);
    for spec in shape.tensors() {
        w.tensor(&spec.name, file_type.of(&spec, shape), &spec.dims);
    }
    w
}

fn write_tensor(
    spec: &Spec,
    ty: QuantType,
    rng: &mut Rng,
    done: &mut u64,
    out: &mut dyn Write,
) -> io::Result<()> {
    let sigma = match &spec.init {
        Init::Exact(values) => {
            *done += 4 * values.len() as u64;
            return values.iter().try_for_each(|v| out.write_all(&v.to_le_bytes()));
        }
        Init::Norm => {
            let n = spec.dims.iter().product::<usize>();
            *done += 4 * n as u64;
            return (0..n).try_for_each(|_| out.write_all(&(1.0 + 0.05 * rng.signed()).to_le_bytes()));
        }
        Init::Normal(sigma) => *sigma,
    };
    // Pieces of whole blocks, about a megabyte, which stay in cache.
    let elements = spec.dims.iter().product::<usize>();
    let mut left = elements / ty.block_len();
    let piece = (1 << 20) / ty.block_bytes();
    let mut buffer = Vec::new();
    while left > 0 {
        let n = left.min(piece);
        buffer.resize(n * ty.block_bytes(), 0);
        blocks::fill(ty, sigma, rng, &mut buffer)?;
        out.write_all(&buffer)?;
        *done += buffer.len() as u64;
        left -= n;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::gguf::Gguf;

    fn tiny(ty: &str, seed: u64) -> Vec<u8> {
        let shape = shape("llama-tiny").unwrap();
        model(shape, FileType::from_name(ty).unwrap(), seed, Vec::new(), |_| ()).unwrap()
    }

    fn open(file: Vec<u8>) -> Gguf {
        Gguf::parse(vec![("synth.gguf".into(), Arc::new(file))]).unwrap()
    }

    #[test]
    fn every_file_type_parses_and_holds_what_the_shape_says() {
        let shape = shape("llama-tiny").unwrap();
        for ty in FileType::all() {
            let g = open(tiny(ty.name(), 1));
            assert_eq!(g.tensors().len(), shape.tensors().len(), "{ty}");
            assert_eq!(g.metadata().u32("general.file_type").unwrap(), ty.id());
            for (info, spec) in g.tensors().zip(shape.tensors()) {
                assert_eq!((&*info.name, &info.dims), (&*spec.name, &spec.dims));
            }
        }
    }

    #[test]
    fn the_seed_decides_every_byte() {
        assert_eq!(tiny("Q4_K_M", 7), tiny("Q4_K_M", 7));
        assert_ne!(tiny("Q4_K_M", 7), tiny("Q4_K_M", 8));
    }

    #[test]
    fn progress_reaches_its_total() {
        let shape = shape("llama-tiny").unwrap();
        let mut last = (0, 1);
        model(shape, FileType::from_name("F32").unwrap(), 1, io::sink(), |p| {
            assert!(p.done > last.0 && p.done <= p.total);
            last = (p.done, p.total);
        })
        .unwrap();
        assert_eq!(last.0, last.1, "every tensor of this shape is a multiple of the alignment");
    }
}
