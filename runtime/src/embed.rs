//! Embeddings: final states of a text, pooled.

use crate::{Event, Hidden, Request, Result, Session};

/// How the final states of a text become its embedding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pooling {
    /// One vector per token.
    None,
    /// The mean over the tokens: one vector.
    #[default]
    Mean,
    /// That of the last token, which has seen all others: one vector.
    Last,
}

impl Session {
    /// Embeds `tokens` as they would be read after the session's own tokens (none in a new session),
    /// which do not change. Final states are normed as the output layer takes them, n_embd values
    /// each; [`normalize`] brings them to length 1, as comparisons by cosine want.
    pub fn embed(&self, tokens: &[u32], pooling: Pooling) -> Result<Vec<Vec<f32>>> {
        if tokens.is_empty() {
            return Err(crate::Error::Request("there is no token to embed: give at least one".into()));
        }
        let hidden = if pooling == Pooling::Last { Hidden::Last } else { Hidden::All };
        let request = Request { tokens: tokens.to_vec(), max_new_tokens: 0, hidden, ..Request::default() };
        let mut reader = self.fork();
        let states = reader.generate(request)?.filter_map(|event| match event {
            Ok(Event::Hidden { values, .. }) => Some(Ok(values)),
            Ok(_) => None,
            Err(e) => Some(Err(e)),
        });
        if pooling != Pooling::Mean {
            return states.collect();
        }
        let mut sum: Vec<f64> = Vec::new();
        for values in states {
            let values = values?;
            sum.resize(values.len(), 0.0);
            sum.iter_mut().zip(values).for_each(|(sum, v)| *sum += f64::from(v));
        }
        let n = tokens.len() as f64;
        Ok(vec![sum.into_iter().map(|v| (v / n) as f32).collect()])
    }
}

/// Scales a vector to length 1; zero stays zero.
pub fn normalize(vector: &mut [f32]) {
    let length = vector.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|v| *v = (f64::from(*v) / length) as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_normalized_vector_has_length_one() {
        let mut v = [3.0, 0.0, -4.0];
        normalize(&mut v);
        assert_eq!(v, [0.6, 0.0, -0.8]);
        let mut zero = [0.0; 2];
        normalize(&mut zero);
        assert_eq!(zero, [0.0; 2]);
    }
}
