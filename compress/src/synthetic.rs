//! Collections that look trained, made from a seed: for tests and measurements without downloads.
//!
//! Adapters fall into families. In a family, the update that training would make at a module is
//! G_i = P_f M_i Q_fᵀ, where P_f and Q_f are the family's few directions and M_i is the adapter's own; LoRA
//! training from a random A₀ turns that into B ≈ G A₀ᵀ and a small move of A along G. Both get noise, and
//! norms differ eightfold between adapters, as in public collections.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use faer::Mat;
use lory_kernels::QuantType;
use lory_models::adapter::{BaseInfo, Site, publish::remove_abandoned};
use rayon::prelude::*;

use crate::factors::Factors;
use crate::lora_file::write_gguf_lora;
use crate::progress::{Progress, check};
use crate::rng::Rng;
use crate::{Error, Result, linalg};

/// How adapters of a collection begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All from one random A₀ per module (38 % of public collections).
    Shared,
    /// Each from its own, which is much harder to compress.
    Independent,
}

/// A synthetic collection; adapters are made one by one, on demand.
#[derive(Clone, Debug)]
pub struct Synthetic {
    /// Number of adapters.
    pub adapters: usize,
    /// r of each.
    pub rank: usize,
    /// How they begin.
    pub kind: Kind,
    /// Number of families.
    pub families: usize,
    /// Directions of a family at a module, on each side.
    pub directions: usize,
    /// Part of each factor's energy that is noise.
    pub noise: f32,
    /// Seed of everything.
    pub seed: u64,
}

impl Synthetic {
    /// `adapters` of rank `rank` in up to eight families.
    pub fn new(adapters: usize, rank: usize, kind: Kind, seed: u64) -> Synthetic {
        Synthetic {
            adapters,
            rank,
            kind,
            families: (adapters / 8).clamp(1, 8),
            directions: 8,
            noise: 0.1,
            seed,
        }
    }

    /// Adapter `index` at a module of d_out × d_in.
    pub fn factors(&self, index: usize, site: Site, (d_out, d_in): (usize, usize)) -> Factors {
        let family = (index % self.families) as u64;
        let stream =
            |what: u64, who: u64| Rng::stream(self.seed ^ (site.index() as u64) << 24, what << 40 | who);
        let p = linalg::random(d_out, self.directions, &mut stream(1, family));
        let q = linalg::random(self.directions, d_in, &mut stream(2, family));
        let start = match self.kind {
            Kind::Shared => linalg::random(self.rank, d_in, &mut stream(3, 0)),
            Kind::Independent => linalg::random(self.rank, d_in, &mut stream(4, index as u64)),
        };
        let mut own = stream(5, index as u64);
        let mix = linalg::random(self.directions, self.directions, &mut own);
        let along = linalg::random(self.rank, self.directions, &mut own);
        // G A₀ᵀ in units of its own size, so that `noise` means the same at every width.
        let seen = linalg::mul(q.as_ref(), start.transpose());
        let task = linalg::mul(p.as_ref(), linalg::mul(mix.as_ref(), seen.as_ref()).as_ref());
        let moved = linalg::mul(along.as_ref(), q.as_ref());
        let size = self.size(index) / (d_in as f32 * self.rank as f32).sqrt();
        let b = with_noise(task, 1.0, self.noise, &mut own, size);
        let drift = unit_entries(&moved);
        let a = Mat::from_fn(self.rank, d_in, |i, j| start[(i, j)] + 0.3 * drift * moved[(i, j)]);
        Factors { b, a: with_noise(a, 1.0, self.noise * 0.1, &mut own, 1.0) }
    }

    /// Norms differ between adapters, up to eightfold.
    fn size(&self, index: usize) -> f32 {
        let mut rng = Rng::stream(self.seed, 1 << 50 | index as u64);
        (2.0f64).powf(3.0 * rng.uniform()) as f32 * 0.05
    }

    /// Name of adapter `index`.
    pub fn name(index: usize) -> String {
        format!("adapter-{index:05}")
    }

    /// Writes all adapters as GGUF LoRA files (F16) into `folder`, which is made if need be.
    ///
    /// # Errors
    /// A file that cannot be written, [`Error::Interrupted`].
    pub fn write(
        &self,
        base: &BaseInfo,
        folder: &Path,
        progress: &dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<Vec<PathBuf>> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        remove_abandoned(folder);
        let sites: Vec<(Site, (usize, usize))> = base
            .shapes
            .iter()
            .filter(|(site, _)| site.projection().is_some())
            .map(|(site, s)| (site, (s.out_features, s.in_features)))
            .collect();
        progress.stage("writing adapters", self.adapters);
        let one = |index: usize| {
            check(cancel)?;
            let deltas =
                sites.iter().map(|(site, shape)| (*site, self.factors(index, *site, *shape))).collect();
            let name = Synthetic::name(index);
            let path = folder.join(format!("{name}.gguf"));
            write_gguf_lora(&path, base, &name, QuantType::F16, &[], deltas)?;
            progress.step();
            Ok(path)
        };
        (0..self.adapters).into_par_iter().map(one).collect()
    }
}

/// 1 / root mean square of the entries.
fn unit_entries(x: &Mat<f32>) -> f32 {
    let n = (x.nrows() * x.ncols()).max(1) as f64;
    let mean = linalg::norm2(x.as_ref()) / n;
    if mean > 0.0 { (1.0 / mean.sqrt()) as f32 } else { 0.0 }
}

/// `size · (√(1−noise) · x + √noise · normal)` with x brought to unit entries first.
fn with_noise(x: Mat<f32>, weight: f32, noise: f32, rng: &mut Rng, size: f32) -> Mat<f32> {
    let unit = unit_entries(&x) * weight * (1.0 - noise).sqrt();
    let amount = noise.sqrt();
    let mut out = x;
    for j in 0..out.ncols() {
        for v in out.col_as_slice_mut(j) {
            *v = size * (unit * *v + amount * rng.normal());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FullOptions, Stack, jd_full};

    #[test]
    fn shared_starts_are_easier_than_independent_ones() {
        let error = |kind| {
            let synthetic = Synthetic { families: 2, ..Synthetic::new(32, 8, kind, 3) };
            let shape = (96, 128);
            let items: Vec<_> =
                (0..32).map(|i| (i, synthetic.factors(i, Site::from_index(2), shape))).collect();
            let stack = Stack::new(shape.0, shape.1, &items);
            let norms: Vec<f64> = stack.norms.clone();
            let ratio =
                norms.iter().cloned().fold(0.0, f64::max) / norms.iter().cloned().fold(f64::MAX, f64::min);
            assert!(ratio > 2.0 && ratio < 20.0, "{ratio}");
            1.0 - jd_full(&stack, FullOptions::new(24, 1)).objective.last().unwrap() / 32.0
        };
        let (shared, independent) = (error(Kind::Shared), error(Kind::Independent));
        assert!(shared < 0.4 && shared + 0.1 < independent, "{shared} {independent}");
    }

    #[test]
    fn the_same_seed_gives_the_same_adapter() {
        let s = Synthetic::new(4, 4, Kind::Independent, 9);
        let site = Site::from_index(5);
        assert_eq!(s.factors(2, site, (20, 24)).b, s.factors(2, site, (20, 24)).b);
        assert_ne!(s.factors(2, site, (20, 24)).b, s.factors(3, site, (20, 24)).b);
    }
}
