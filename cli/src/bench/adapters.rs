//! Which adapters the sequences of a test have.

use std::path::Path;

use clap::ValueEnum;
use lory_kernels::Backend;
use lory_models::adapter::{AdapterSet, BaseCheck, pack::Pack};
use lory_runtime::open_pack;
use serde_json::{Map, Value, json};

use crate::failure::{Failure, Outcome};

use super::{Device, Settings, opened::Opened};

/// How the adapters of a pack are dealt out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Distribution {
    /// All have the same.
    One,
    /// All have different ones, as far as the pack goes.
    Distinct,
    /// Each is drawn, every adapter being as likely.
    Uniform,
    /// Each is drawn, the k-th adapter being 1/k times as likely as the first.
    Zipf,
}

impl Distribution {
    fn name(self) -> &'static str {
        match self {
            Distribution::One => "one",
            Distribution::Distinct => "distinct",
            Distribution::Uniform => "uniform",
            Distribution::Zipf => "zipf",
        }
    }
}

/// How many of everything a run has: the base's, and with a pack the one with adapters.
pub fn sides(pool: Option<&Pool>) -> usize {
    if pool.is_some() { 2 } else { 1 }
}

/// The adapters of a pack.
pub struct Pool {
    /// The pack.
    pub pack: Pack,
    names: Vec<String>,
    rank: usize,
    basis_rank: usize,
}

impl Pool {
    /// Opens a pack of the model's.
    pub fn open(path: &Path, opened: &Opened) -> Outcome<Pool> {
        let pack = open_pack(path, opened.model.loading)?;
        pack.check_base(&opened.loaded.base, BaseCheck::Exact)?;
        let names: Vec<String> = pack.names().map(str::to_owned).collect();
        let Some(first) = names.first() else {
            return Err(Failure::runtime(format!("{}: a pack without adapters", path.display())));
        };
        let adapter = pack.adapter(first)?;
        let rank = adapter.cores().iter().filter_map(|(site, _)| Some(adapter.factors(*site)?.rank())).max();
        let basis_rank = adapter.basis().and_then(|b| b.iter().map(|(_, f)| f.rank()).max());
        Ok(Pool { pack, rank: rank.unwrap_or(0), basis_rank: basis_rank.unwrap_or(0), names })
    }

    /// Number of adapters.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// All names.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Deals out adapters; the same ones every time.
    pub fn draw(&self, settings: &Settings) -> Draw<'_> {
        Draw { pool: self, numbers: Numbers::new(settings.distribution, self.len(), settings.seed) }
    }

    /// What a row says of its adapters; `active` sequences had one.
    pub fn fields(
        &self,
        fields: &mut Map<String, Value>,
        settings: &Settings,
        active: usize,
        ratio: Option<f64>,
    ) {
        let mut numbers = Numbers::new(settings.distribution, self.len(), settings.seed);
        let mut different: Vec<usize> = (0..active).map(|_| numbers.next()).collect();
        different.sort_unstable();
        different.dedup();
        fields.insert("n_adapters".into(), json!(self.len()));
        fields.insert("n_active".into(), json!(different.len()));
        fields.insert("rank".into(), json!(self.rank));
        fields.insert("basis_rank".into(), json!(self.basis_rank));
        fields.insert("adapter_dist".into(), json!(settings.distribution.name()));
        fields.insert("ratio_to_base".into(), json!(ratio));
    }

    /// The same for a row without adapters.
    pub fn no_fields(fields: &mut Map<String, Value>) {
        for name in ["n_adapters", "n_active", "rank", "basis_rank"] {
            fields.insert(name.into(), json!(0));
        }
        fields.insert("adapter_dist".into(), json!("none"));
        fields.insert("ratio_to_base".into(), Value::Null);
    }
}

/// Adapters one after the other.
pub struct Draw<'a> {
    pool: &'a Pool,
    numbers: Numbers,
}

impl<'a> Draw<'a> {
    /// The next name.
    pub fn name(&mut self) -> &'a str {
        &self.pool.names[self.numbers.next()]
    }

    /// The next adapter, alone in its set, and where the device needs it.
    pub fn next(&mut self, opened: &Opened, device: &Device) -> Outcome<AdapterSet> {
        let name = self.name();
        let adapter = self.pool.pack.adapter(name)?;
        let weights = opened.loaded.decoder.weights();
        device.backend.prefetch(&mut weights.lora(&adapter)).map_err(lory_models::Error::from)?;
        Ok(AdapterSet::single(adapter))
    }
}

/// Numbers below `n`, dealt out as a distribution says.
struct Numbers {
    distribution: Distribution,
    n: usize,
    dealt: usize,
    /// Sum of the weights up to each, for Zipf.
    sums: Vec<f64>,
    random: Random,
}

impl Numbers {
    fn new(distribution: Distribution, n: usize, seed: u64) -> Numbers {
        let weights = |k: usize| if distribution == Distribution::Zipf { 1.0 / (k + 1) as f64 } else { 1.0 };
        let sums = (0..n).scan(0.0, |sum, k| {
            *sum += weights(k);
            Some(*sum)
        });
        Numbers { distribution, n, dealt: 0, sums: sums.collect(), random: Random::new(seed) }
    }

    fn next(&mut self) -> usize {
        self.dealt += 1;
        match self.distribution {
            Distribution::One => 0,
            Distribution::Distinct => (self.dealt - 1) % self.n,
            Distribution::Uniform | Distribution::Zipf => {
                let at = self.random.uniform() * self.sums.last().copied().unwrap_or(0.0);
                self.sums.partition_point(|sum| *sum <= at).min(self.n - 1)
            }
        }
    }
}

/// SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
pub struct Random(u64);

impl Random {
    /// Equal seeds, equal numbers.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// From 0 up to, not including, 1.
    pub fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dealt(distribution: Distribution, n: usize, count: usize) -> Vec<usize> {
        let mut numbers = Numbers::new(distribution, n, 1);
        (0..count).map(|_| numbers.next()).collect()
    }

    #[test]
    fn one_and_distinct() {
        assert_eq!(dealt(Distribution::One, 5, 3), [0, 0, 0]);
        assert_eq!(dealt(Distribution::Distinct, 3, 5), [0, 1, 2, 0, 1]);
    }

    #[test]
    fn uniform_and_zipf_have_their_frequencies() {
        let shares = |distribution| {
            let all = dealt(distribution, 10, 20_000);
            let share = |k| all.iter().filter(|i| **i == k).count() as f64 / 20_000.0;
            (share(0), share(9))
        };
        let (first, last) = shares(Distribution::Uniform);
        assert!((first - 0.1).abs() < 0.01 && (last - 0.1).abs() < 0.01, "{first} {last}");
        // 1 / (1 + 1/2 + … + 1/10) = 0.3414
        let (first, last) = shares(Distribution::Zipf);
        assert!((first - 0.3414).abs() < 0.015 && (last - 0.0341).abs() < 0.006, "{first} {last}");
        assert_eq!(dealt(Distribution::Zipf, 10, 50), dealt(Distribution::Zipf, 10, 50));
    }
}
