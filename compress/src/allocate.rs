//! `--auto`: ranks per module under one byte budget, or under an error ceiling.
//!
//! The paper gives every module the same rank. Modules differ: where the energy sits in a few shared
//! directions, more rank buys nothing. Here each module's curve err²(rank) is read off one joint basis of
//! the largest rank, turned so that its leading columns carry the most energy, and ranks are given out one
//! step at a time to the module where a byte lowers the error most.

use faer::Mat;

use crate::frozen::Method;
use crate::linalg;
use crate::storage::Storage;

/// What is known of one module before ranks are given out.
#[derive(Clone, Debug)]
pub struct ModuleCurve {
    /// (d_out, d_in).
    pub shape: (usize, usize),
    /// Adapters that have the module.
    pub adapters: usize,
    /// Clusters with an adapter at the module.
    pub clusters: usize,
    /// Σ err² over its adapters when the leading r columns are kept; index r, from 0 on. Never rises.
    pub error: Vec<f64>,
}

impl ModuleCurve {
    fn bytes(&self, rank: usize, method: Method, storage: Storage) -> usize {
        if rank == 0 {
            return 0;
        }
        self.clusters * storage.basis_bytes(self.shape, rank)
            + self.adapters * storage.core_bytes(method, rank)
    }

    fn error_at(&self, rank: usize) -> f64 {
        self.error.get(rank).or(self.error.last()).copied().unwrap_or(0.0)
    }
}

/// When to stop giving out rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// At most this many bytes of bases and cores.
    Bytes(u64),
    /// A mean err² of at most this.
    Error(f64),
}

/// Ranks per module and what they are expected to give.
#[derive(Clone, Debug)]
pub struct Allocation {
    /// One rank per module; 0 where the module has no adapter.
    pub ranks: Vec<usize>,
    /// Bytes of bases and cores.
    pub bytes: u64,
    /// Expected mean err² over adapters and modules.
    pub error: f64,
}

/// Σ_i ‖leading r × r block of core_i‖² for every r, after turning both sides to their energies.
pub fn leading_energy(cores: &[Mat<f64>]) -> Vec<f64> {
    let Some(first) = cores.first() else { return vec![0.0] };
    let (ru, rv) = first.shape();
    let (mut gu, mut gv) = (Mat::<f64>::zeros(ru, ru), Mat::<f64>::zeros(rv, rv));
    for c in cores {
        gu += linalg::mul(c.as_ref(), c.transpose());
        gv += linalg::mul_tn(c.as_ref(), c.as_ref());
    }
    let (_, pu) = linalg::eigen(gu.as_ref());
    let (_, pv) = linalg::eigen(gv.as_ref());
    let r = ru.max(rv);
    // energy[s]: what lies in rows and columns < s; filled by the larger of the two indices.
    let mut energy = vec![0.0; r + 1];
    for c in cores {
        let turned = linalg::mul(linalg::mul_tn(pu.as_ref(), c.as_ref()).as_ref(), pv.as_ref());
        for j in 0..rv {
            for i in 0..ru {
                energy[i.max(j) + 1] += turned[(i, j)] * turned[(i, j)];
            }
        }
    }
    for s in 1..=r {
        energy[s] += energy[s - 1];
    }
    energy
}

/// Gives out ranks from `steps` (rising, none 0) until the goal is met.
///
/// Each module begins with the first step; that much is given even above the budget.
pub fn allocate(
    modules: &[ModuleCurve],
    steps: &[usize],
    goal: Goal,
    method: Method,
    storage: Storage,
) -> Allocation {
    let entries: usize = modules.iter().map(|m| m.adapters).sum();
    let mut level: Vec<usize> = vec![0; modules.len()];
    let rank = |m: usize, level: usize| match modules[m].adapters {
        0 => 0,
        _ => steps.get(level).copied().unwrap_or(0),
    };
    let bytes = |m: usize, level: usize| modules[m].bytes(rank(m, level), method, storage);
    let error = |m: usize, level: usize| modules[m].error_at(rank(m, level));
    let mut spent: usize = (0..modules.len()).map(|m| bytes(m, 0)).sum();
    let mut left: f64 = (0..modules.len()).map(|m| error(m, 0)).sum();
    let mean = |left: f64| left / entries.max(1) as f64;
    loop {
        if matches!(goal, Goal::Error(e) if mean(left) <= e) {
            break;
        }
        let mut best: Option<(f64, usize, usize)> = None;
        for (m, &now) in level.iter().enumerate().filter(|(m, _)| modules[*m].adapters > 0) {
            // Looking past the next step finds gains behind a step that brings nothing (F16 to Q8_0).
            for to in now + 1..steps.len() {
                let cost = bytes(m, to).saturating_sub(bytes(m, now));
                if matches!(goal, Goal::Bytes(b) if (spent + cost) as u64 > b) {
                    continue;
                }
                let gain = (error(m, now) - error(m, to)) / cost.max(1) as f64;
                if gain > 0.0 && best.is_none_or(|b| gain > b.0) {
                    best = Some((gain, m, to));
                }
            }
        }
        let Some((_, m, to)) = best else { break };
        spent = spent + bytes(m, to) - bytes(m, level[m]);
        left += error(m, to) - error(m, level[m]);
        level[m] = to;
    }
    let ranks = level.iter().enumerate().map(|(m, &l)| rank(m, l)).collect();
    Allocation { ranks, bytes: spent as u64, error: mean(left) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factors::Stack;
    use crate::factors::tests::random_items;
    use crate::frozen::Frozen;
    use crate::full::{FullOptions, jd_full};
    use lory_kernels::QuantType;

    const HALF: Storage = Storage { basis: QuantType::F16, core: QuantType::F16 };

    fn curve(stack: &Stack, most: usize) -> ModuleCurve {
        let full = jd_full(stack, FullOptions::new(most, 1));
        let frozen = Frozen::new(full.u[0].clone(), full.v.clone(), Method::Full);
        let energy = leading_energy(&frozen.projections(stack));
        let error = energy.iter().map(|e| stack.len() as f64 - e).collect();
        let shape = (stack.left.nrows(), stack.right.nrows());
        ModuleCurve { shape, adapters: stack.len(), clusters: 1, error }
    }

    #[test]
    fn leading_blocks_predict_real_bases_of_smaller_rank() {
        let stack = Stack::new(50, 44, &random_items(20, (50, 44), 3, true));
        let curve = curve(&stack, 24);
        assert!(curve.error.windows(2).all(|w| w[1] <= w[0] + 1e-9));
        for r in [4, 8, 16] {
            let real = 20.0 - jd_full(&stack, FullOptions::new(r, 1)).objective.last().unwrap();
            assert!(curve.error[r] >= real - 1e-3, "{r}: {} {real}", curve.error[r]);
            assert!(curve.error[r] < real + 0.05 * 20.0, "{r}: {} {real}", curve.error[r]);
        }
    }

    #[test]
    fn beats_the_uniform_rank_at_equal_bytes() {
        // Two modules with structure, two without: the shared ones need less rank.
        let dims = (48, 48);
        let stacks: Vec<Stack> = (0..4)
            .map(|m| {
                let mut items = random_items(24, dims, 3, m < 2);
                for (i, f) in items.iter_mut().filter(|_| m < 2) {
                    // B drawn from few directions too: a low-dimensional family.
                    let u = linalg::random(48, 4, &mut crate::Rng::new(60 + m));
                    let mix = linalg::random(4, 3, &mut crate::Rng::stream(61, *i as u64));
                    f.b = linalg::mul(u.as_ref(), mix.as_ref());
                }
                Stack::new(dims.0, dims.1, &items)
            })
            .collect();
        let real = |ranks: &[usize]| -> f64 {
            let pairs = stacks.iter().zip(ranks);
            let kept: f64 =
                pairs.map(|(s, &r)| *jd_full(s, FullOptions::new(r, 1)).objective.last().unwrap()).sum();
            1.0 - kept / (4.0 * 24.0)
        };
        let curves: Vec<ModuleCurve> = stacks.iter().map(|s| curve(s, 32)).collect();
        let steps: Vec<usize> = (1..=16).map(|s| 2 * s).collect();
        for uniform in [8, 12, 16] {
            let bytes: usize = curves.iter().map(|c| c.bytes(uniform, Method::Full, HALF)).sum();
            let auto = allocate(&curves, &steps, Goal::Bytes(bytes as u64), Method::Full, HALF);
            assert!(auto.bytes <= bytes as u64);
            let (with, without) = (real(&auto.ranks), real(&[uniform; 4]));
            assert!(with < without - 0.005, "uniform {uniform}: {with} {without} {:?}", auto.ranks);
        }
    }

    #[test]
    fn an_error_ceiling_is_met_with_few_bytes() {
        let stack = Stack::new(50, 44, &random_items(20, (50, 44), 3, true));
        let curves = [curve(&stack, 32)];
        let steps: Vec<usize> = (1..=32).collect();
        let found = allocate(&curves, &steps, Goal::Error(0.3), Method::Full, HALF);
        assert!(found.error <= 0.3);
        assert!(curves[0].error[found.ranks[0] - 1] / 20.0 > 0.3);
    }
}
