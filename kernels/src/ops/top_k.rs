//! The most likely tokens of a row of logits.

use std::cmp::Ordering;

use crate::backend::Likeliest;

/// The larger logit first, equal ones by token. Of logits that are no number, NaN of either sign and +∞, none is the larger: they
/// come first, so that whoever looks at the first one knows whether there are any, and which is the first.
fn likelier(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    let size = |logit: f32| if logit < f32::INFINITY { logit } else { f32::INFINITY };
    size(b.1).total_cmp(&size(a.1)).then(a.0.cmp(&b.0))
}

/// The first `k` of all tokens but those of logit −∞, as [`Backend::top_k`](crate::Backend::top_k) orders them.
pub fn top_k(logits: &[f32], k: usize) -> Likeliest {
    let mut tokens: Likeliest = (0..).zip(logits.iter().copied()).collect();
    tokens.retain(|(_, logit)| *logit != f32::NEG_INFINITY);
    tokens.sort_unstable_by(likelier);
    tokens.truncate(k);
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_total() {
        let logits = [1.0, -0.0, f32::NEG_INFINITY, 0.0, 1.0, -3.0, 0.0];
        let tokens: Vec<u32> = top_k(&logits, 9).iter().map(|t| t.0).collect();
        assert_eq!(tokens, [0, 4, 3, 6, 1, 5]);
        assert_eq!(top_k(&logits, 1), [(0, 1.0)]);
        assert_eq!(top_k(&logits, 0), []);
        assert_eq!(top_k(&[f32::NEG_INFINITY; 3], 2), []);
        let broken = [7.0, f32::INFINITY, -f32::NAN, f32::NAN, f32::MAX];
        let tokens: Vec<u32> = top_k(&broken, 4).iter().map(|t| t.0).collect();
        assert_eq!(tokens, [1, 2, 3, 4]);
    }
}
