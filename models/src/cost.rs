//! What a model makes a machine do: bytes to read and operations to carry out.

use lory_kernels::{QuantType, backend::KvType};

use crate::decoder::Decoder;

/// The sizes that bytes and operations follow from.
#[derive(Clone, Debug)]
pub struct Cost {
    /// Weights of all layers.
    pub layer_weights: u64,
    /// Their bytes.
    pub layer_bytes: u64,
    /// Weights of the output matrix.
    pub output_weights: u64,
    /// Its bytes.
    pub output_bytes: u64,
    /// Bytes of one token's keys and values.
    pub kv_bytes: u64,
    /// Operations of attention for one query and one cached token.
    pub attention_ops: u64,
    /// The format of most of the layers' bytes.
    pub ty: QuantType,
}

impl Cost {
    /// Of a decoder and the format of its cache.
    pub fn of(decoder: &Decoder, kv_type: KvType) -> Cost {
        let (c, w) = (decoder.config(), decoder.weights());
        let mut cost = Cost {
            layer_weights: 0,
            layer_bytes: 0,
            output_weights: 0,
            output_bytes: 0,
            kv_bytes: 0,
            attention_ops: (4 * c.n_layers() * c.q_width()) as u64,
            ty: w.output.weight().ty(),
        };
        let mut by_type = Vec::<(QuantType, u64)>::new();
        let layers = w.layers.iter().flat_map(|l| {
            [&l.attn_q, &l.attn_k, &l.attn_v, &l.attn_output, &l.ffn_gate, &l.ffn_up, &l.ffn_down]
        });
        for linear in layers {
            let m = linear.weight().matrix();
            let bytes = (m.rows() * m.row_bytes()) as u64;
            cost.layer_weights += (m.rows() * m.cols()) as u64;
            cost.layer_bytes += bytes;
            match by_type.iter_mut().find(|t| t.0 == m.ty()) {
                Some(known) => known.1 += bytes,
                None => by_type.push((m.ty(), bytes)),
            }
        }
        let output = w.output.weight().matrix();
        cost.output_weights = (output.rows() * output.cols()) as u64;
        cost.output_bytes = (output.rows() * output.row_bytes()) as u64;
        let values = (2 * c.n_layers() * c.kv_width()) as u64;
        cost.kv_bytes = match kv_type {
            KvType::F32 => 4 * values,
            KvType::F16 => 2 * values,
            // One 16-bit scale for 32 values.
            KvType::Q8_0 => values * 34 / 32,
        };
        cost.ty = by_type.into_iter().max_by_key(|t| t.1).map_or(cost.ty, |t| t.0);
        cost
    }

    /// The same where nothing goes on to the vocabulary.
    pub fn without_output(&self) -> Cost {
        Cost { output_weights: 0, output_bytes: 0, ..self.clone() }
    }

    /// Bytes that a step must read: the weights once, and what is cached of each sequence.
    pub fn step_bytes(&self, sequences: usize, cached: f64) -> f64 {
        (self.layer_bytes + self.output_bytes) as f64 + sequences as f64 * cached * self.kv_bytes as f64
    }

    /// Operations for `rows` rows that look back at `cached` tokens on average and of which `outputs`
    /// go on to the vocabulary.
    pub fn ops(&self, rows: usize, cached: f64, outputs: usize) -> f64 {
        let layers = 2.0 * self.layer_weights as f64 + self.attention_ops as f64 * cached;
        rows as f64 * layers + outputs as f64 * 2.0 * self.output_weights as f64
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{gguf::Gguf, synth};

    #[test]
    fn the_tiny_shape_costs_what_its_tensors_say() {
        let shape = synth::shape("llama-tiny").unwrap();
        let ty = synth::FileType::from_name("Q8_0").unwrap();
        let file = synth::model(shape, ty, 1, Vec::new(), |_| ()).unwrap();
        let gguf = Gguf::parse(vec![("tiny.gguf".into(), Arc::new(file))]).unwrap();
        let cost = Cost::of(&Decoder::load(&gguf, 64).unwrap(), KvType::F16);
        // Two layers: q and o of 256 x 256, k and v of 128 x 256, three of 512 x 256.
        let weights = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256);
        assert_eq!((cost.layer_weights, cost.layer_bytes), (weights, weights / 32 * 34));
        assert_eq!((cost.output_weights, cost.ty), (512 * 256, QuantType::Q8_0));
        // Two layers, keys and values, 128 of 2 bytes each.
        assert_eq!((cost.kv_bytes, cost.attention_ops), (1024, 4 * 2 * 256));
        let weights_read = (weights + 512 * 256) as f64 / 32.0 * 34.0;
        assert_eq!(cost.step_bytes(3, 10.0), weights_read + 30.0 * 1024.0);
        assert_eq!(cost.ops(1, 0.0, 1), 2.0 * (weights + 512 * 256) as f64);
        let embedding = cost.without_output();
        assert_eq!(embedding.step_bytes(0, 0.0), weights as f64 / 32.0 * 34.0);
        assert_eq!(embedding.ops(1, 0.0, 1), 2.0 * weights as f64);
    }
}
