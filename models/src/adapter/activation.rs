//! Activated LoRA (aLoRA, arXiv 2504.12397): which adapters work on which positions of a sequence.
//!
//! An adapter with invocation tokens works from the first token of their **last** occurrence in the
//! prompt on. What stands before is read by the rest of the set alone, so its keys and values are
//! those of a session that never had the adapter. Without an occurrence it does nothing.
//! Source: PEFT `tuners/lora/variants.py`, `calculate_alora_offsets` and `ALoraLinearVariant`.

use std::sync::Arc;

use super::{AdapterKey, AdapterSet};

/// Positions of a sequence in runs of one set each.
#[derive(Clone, Debug)]
pub struct Phases {
    /// Ascending starts, the first one 0.
    runs: Vec<Phase>,
}

/// A run of positions; it lasts until the next one starts.
#[derive(Clone, Debug)]
pub struct Phase {
    /// First position.
    pub start: usize,
    /// The adapters that work there.
    pub set: Arc<AdapterSet>,
    /// Their key.
    pub key: Arc<AdapterKey>,
}

impl Phase {
    fn new(start: usize, set: Arc<AdapterSet>) -> Phase {
        let key = Arc::new(set.key());
        Phase { start, set, key }
    }
}

impl Default for Phases {
    fn default() -> Self {
        Phases { runs: vec![Phase::new(0, Arc::default())] }
    }
}

impl Phases {
    /// Looks for every adapter's invocation tokens in `prompt`.
    pub fn new(set: &Arc<AdapterSet>, prompt: &[u32]) -> Phases {
        Phases::starting(set, &set.activations(prompt))
    }

    /// Each adapter of `set` from the position of the same index on; `None` is never.
    pub fn starting(set: &Arc<AdapterSet>, activations: &[Option<usize>]) -> Phases {
        let mut starts: Vec<usize> = activations.iter().flatten().copied().filter(|s| *s > 0).collect();
        starts.sort_unstable();
        starts.dedup();
        let run = |start: usize| {
            let works = |at: &Option<usize>| at.is_some_and(|at| at <= start);
            if activations.iter().all(works) {
                return Phase::new(start, set.clone());
            }
            let entries = set.entries().iter().zip(activations).filter(|(_, at)| works(at));
            Phase::new(start, Arc::new(AdapterSet::checked(entries.map(|(e, _)| e.clone()).collect())))
        };
        let mut runs = vec![run(0)];
        runs.extend(starts.into_iter().map(run));
        Phases { runs }
    }

    /// The run that `position` belongs to.
    pub fn at(&self, position: usize) -> &Phase {
        let after = self.runs.partition_point(|run| run.start <= position);
        &self.runs[after.saturating_sub(1)]
    }

    /// All runs in ascending order.
    pub fn runs(&self) -> &[Phase] {
        &self.runs
    }

    /// The first position at which the two differ; `None` if they never do.
    pub fn differs_at(&self, other: &Phases) -> Option<usize> {
        if let ([a], [b]) = (&self.runs[..], &other.runs[..]) {
            return (a.key != b.key).then_some(0);
        }
        let mut starts: Vec<usize> = self.runs.iter().chain(&other.runs).map(|run| run.start).collect();
        starts.sort_unstable();
        starts.into_iter().find(|start| self.at(*start).key != other.at(*start).key)
    }
}

/// Where the last occurrence of `invocation` in `prompt` begins.
pub fn last_occurrence(prompt: &[u32], invocation: &[u32]) -> Option<usize> {
    if invocation.is_empty() {
        return None;
    }
    prompt.windows(invocation.len()).rposition(|window| window == invocation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Tensor,
        adapter::{Adapter, AdapterBuilder, Core, Delta, Projection, Site, synthetic_base},
    };
    use lory_kernels::QuantType;

    fn adapter(name: &str, bias: f32, invocation: &[u32]) -> Arc<Adapter> {
        let base = synthetic_base(1, 4, 4, 4, 10);
        let bytes = [bias; 4].iter().flat_map(|v| v.to_le_bytes()).collect();
        let mut core = Core::new(Delta::None, 1.0);
        core.bias = Some(Tensor::owned("b", QuantType::F32, 1, 4, bytes).unwrap());
        let mut builder = AdapterBuilder::new(name).invocation(invocation.to_vec());
        builder.core(Site::layer(0, Projection::AttnQ), core);
        Arc::new(builder.build(&base.shapes).unwrap())
    }

    /// Sets of one, of none, and of more are compared in different ways.
    #[test]
    fn sets_are_equal_where_their_keys_are() {
        let (a, b) = (adapter("a", 1.0, &[]), adapter("b", 2.0, &[]));
        let set = |entries: &[(&Arc<Adapter>, f32)]| {
            AdapterSet::new(entries.iter().map(|(a, scale)| ((*a).clone(), *scale)).collect()).unwrap()
        };
        let one = |scale| [(&a, scale)];
        let (off, on) = ([(&a, 0.0), (&b, 1.0)], [(&b, 1.0), (&a, 0.5)]);
        let sets =
            [set(&[]), set(&one(0.0)), set(&one(-0.0)), set(&one(1.0)), set(&one(0.5)), set(&off), set(&on)];
        for x in sets.iter().chain([&set(&[(&b, 1.0)]), &set(&[(&a, 0.5), (&b, 1.0)])]) {
            for y in &sets {
                assert_eq!(x == y, x.key() == y.key(), "{:?} {:?}", x.key(), y.key());
            }
        }
        assert!(sets[0] == sets[1] && sets[3] != sets[4] && sets[5] != sets[6]);
    }

    #[test]
    fn the_last_occurrence_counts() {
        assert_eq!(last_occurrence(&[1, 2, 3, 1, 2, 4], &[1, 2]), Some(3));
        assert_eq!(last_occurrence(&[1, 1, 1], &[1, 1]), Some(1));
        assert_eq!(last_occurrence(&[1, 2], &[1, 2]), Some(0));
        for (prompt, tokens) in [(&[1][..], &[1, 2][..]), (&[], &[1]), (&[2, 1], &[1, 2]), (&[1], &[])] {
            assert_eq!(last_occurrence(prompt, tokens), None);
        }
    }

    #[test]
    fn each_adapter_of_a_set_has_its_own_start() {
        let (plain, late) = (adapter("plain", 1.0, &[]), adapter("late", 2.0, &[7, 8]));
        let later = adapter("later", 3.0, &[9]);
        let set = |entries: &[(&Arc<Adapter>, f32)]| {
            Arc::new(AdapterSet::new(entries.iter().map(|(a, s)| ((*a).clone(), *s)).collect()).unwrap())
        };
        let all = set(&[(&plain, 0.5), (&late, 1.0), (&later, 1.0)]);
        let phases = Phases::new(&all, &[0, 7, 8, 1, 7, 8, 9, 2]);
        let runs: Vec<_> = phases.runs().iter().map(|r| (r.start, r.set.entries().len())).collect();
        assert_eq!(runs, [(0, 1), (4, 2), (6, 3)]);
        assert_eq!(phases.at(3).set, set(&[(&plain, 0.5)]));
        assert_eq!(phases.at(4).set, set(&[(&plain, 0.5), (&late, 1.0)]));
        assert_eq!(phases.at(100).set, all);
        // Elsewhere or nowhere: the first position at which that matters.
        assert_eq!(phases.differs_at(&Phases::new(&all, &[0, 7, 8, 1, 7, 8, 2, 9])), Some(6));
        assert_eq!(phases.differs_at(&Phases::new(&all, &[0, 7, 8])), Some(1));
        assert_eq!(phases.differs_at(&phases.clone()), None);
        let alone = Phases::new(&set(&[(&late, 1.0)]), &[1, 2, 3]);
        assert!(alone.at(50).key.is_base());
        assert_eq!(alone.differs_at(&Phases::default()), None, "never invoked: the base");
        // Invoked by the very first token: it works everywhere.
        assert_eq!(Phases::new(&set(&[(&late, 1.0)]), &[7, 8]).runs().len(), 1);
    }
}
