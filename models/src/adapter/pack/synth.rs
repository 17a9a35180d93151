//! Packs of random adapters, to measure with.

use std::io::{Seek, Write};

use lory_kernels::QuantType;

use crate::{
    Error, Result,
    adapter::{BaseInfo, Site, SiteShape},
};

use super::{
    encode::{NewAdapter, NewCore, NewMatrix, StorageTypes},
    record::AdapterMeta,
    writer::{BasisSite, PackSpec, PackWriter},
};

/// What a random pack is like.
#[derive(Clone, Debug)]
pub struct SynthSpec {
    /// Number of adapters, named `synth-00000`, `synth-00001` …; spread evenly over the clusters.
    pub n_adapters: usize,
    /// Number of bases; with 0 every adapter is a plain LoRA with factors of its own.
    pub clusters: u32,
    /// r of every basis.
    pub rank: usize,
    /// Diagonal cores instead of full ones.
    pub diagonal: bool,
    /// Whether projections with the same input have one V.
    pub share_v: bool,
    /// Format of U and V.
    pub basis_type: QuantType,
    /// Format of the cores.
    pub core_type: QuantType,
    /// Equal seeds give equal files.
    pub seed: u64,
}

/// Writes a pack for all seven projections of every layer of `base`.
///
/// The columns of U and V have length about 1, and the deltas' norm is about that of a trained
/// adapter's: they change the answers without drowning the base.
pub fn synth_pack<W: Write + Seek>(base: &BaseInfo, spec: &SynthSpec, out: W) -> Result<W> {
    if spec.rank == 0 {
        return Err(Error::Request("adapters of rank 0".into()));
    }
    let sites: Vec<(Site, SiteShape)> =
        base.shapes.iter().filter(|(site, _)| site.layer_index().is_some()).collect();
    let (rank, u_type) = (spec.rank, spec.basis_type);
    let layout: Vec<BasisSite> = (0..spec.clusters)
        .flat_map(|cluster| {
            sites.iter().map(move |(site, _)| BasisSite {
                cluster,
                site: *site,
                rank,
                u_type,
                v_type: u_type,
                shared_v: spec.share_v && site.input() != *site,
            })
        })
        .collect();
    let mut random = Random(spec.seed);
    let mut w =
        PackWriter::new(out, PackSpec { name: Some("synthetic".into()), ..PackSpec::of(base) }, &layout)?;
    for site in &layout {
        let Some(shape) = base.shapes.get(site.site) else { continue };
        let (u, v) = random.factors(shape, rank, !site.shared_v);
        w.factors(&u, &v)?;
    }
    let types = StorageTypes { core: spec.core_type, factors: spec.basis_type, ..StorageTypes::default() };
    for i in 0..spec.n_adapters {
        let mut core = |(_, shape): &(Site, SiteShape)| {
            if spec.clusters == 0 {
                let factors = Some(random.factors(*shape, rank, true));
                return NewCore { factors, ..NewCore::shared(NewMatrix::Identity, rank, 1.0, None) };
            }
            let matrix = match spec.diagonal {
                true => NewMatrix::Diagonal(random.normal(rank, 1.0)),
                false => NewMatrix::Full(random.normal(rank * rank, (rank as f32).powf(-0.5))),
            };
            NewCore::shared(matrix, rank, 1.0, None)
        };
        let cores = sites.iter().map(|s| (s.0, core(s))).collect();
        w.adapter(&NewAdapter {
            name: format!("synth-{i:05}"),
            cluster: (i as u64).checked_rem(spec.clusters.into()).map(|cluster| cluster as u32),
            meta: AdapterMeta {
                description: "random".into(),
                kind: "synthetic".into(),
                ..Default::default()
            },
            invocation: Vec::new(),
            cores,
            types,
        })?;
    }
    w.finish()
}

/// SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// U and, if it is wanted, V of one site, with columns of length about 1.
    fn factors(&mut self, s: SiteShape, rank: usize, with_v: bool) -> (Vec<f32>, Vec<f32>) {
        let u = self.normal(s.out_features * rank, (s.out_features as f32).powf(-0.5));
        let v = if with_v { s.in_features * rank } else { 0 };
        (u, self.normal(v, (s.in_features as f32).powf(-0.5)))
    }

    /// `n` numbers of mean 0 and this deviation: each the sum of four uniform ones, which is close
    /// enough to normal here and quick.
    fn normal(&mut self, n: usize, deviation: f32) -> Vec<f32> {
        // The sum of four 16-bit numbers has deviation sqrt(4 / 12) · 65536.
        let factor = deviation / (65536.0 * 3f32.sqrt().recip());
        let sum = |z: u64| (0..4).map(|i| (z >> (16 * i) & 0xffff) as i64).sum::<i64>() - 2 * 65535;
        (0..n).map(|_| sum(self.next()) as f32 * factor).collect()
    }
}
