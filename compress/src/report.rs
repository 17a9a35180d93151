//! What a compression did, in numbers: for programs as JSON, for people as Markdown with plots.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use lory_models::adapter::Site;
use lory_models::adapter::{Existing, publish};
use serde::Serialize;

use crate::baseline::{Single, svd_at_equal_bytes};
use crate::cluster::Clustering;
use crate::collection::Collection;
use crate::frozen::Method;
use crate::options::Options;
use crate::pipeline::{AdapterCore, Compressed, CoreForm, ModuleResult, mean_error};
use crate::plan::Plan;
use crate::plot::{Line, svg};
use crate::progress::{Progress, check};
use crate::{Error, Result};

/// Distribution of err² = ‖ΔW − U C Vᵀ‖²_F / ‖ΔW‖²_F.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Errors {
    /// Mean.
    pub mean: f64,
    /// 95th percentile.
    pub p95: f64,
    /// Largest.
    pub worst: f64,
}

impl Errors {
    /// Of some values; zeros for none.
    pub fn of(mut values: Vec<f64>) -> Errors {
        values.sort_by(f64::total_cmp);
        let Some(worst) = values.last().copied() else { return Errors::default() };
        let at = ((values.len() as f64 * 0.95).ceil() as usize).clamp(1, values.len()) - 1;
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        Errors { mean, p95: values.get(at).copied().unwrap_or(worst), worst }
    }
}

/// One module.
#[derive(Clone, Debug, Serialize)]
pub struct ModuleReport {
    /// `blk.3.attn_q`.
    pub site: String,
    /// Outputs.
    pub d_out: usize,
    /// Inputs.
    pub d_in: usize,
    /// Adapters with a delta there that is not zero.
    pub adapters: usize,
    /// The largest rank of a cluster's basis.
    pub rank: usize,
    /// Over its adapters, quantisation included.
    pub err2: Errors,
    /// Bytes of its adapters' factors in their files.
    pub bytes_before: u64,
    /// Bytes of all clusters' U and V, without a V that an earlier module has.
    pub basis_bytes: usize,
    /// Bytes of all cores and own factors, adapters above `--max-error` as if they shared.
    pub core_bytes: usize,
    /// Part of all deltas' energy that the leading 0, 1, 2 … columns of the bases keep, before quantisation.
    pub spectrum: Vec<f64>,
}

impl ModuleReport {
    pub(crate) fn new(site: Site, (d_out, d_in): (usize, usize), adapters: usize) -> Self {
        ModuleReport {
            site: site.to_string(),
            d_out,
            d_in,
            adapters,
            rank: 0,
            err2: Errors::default(),
            bytes_before: 0,
            basis_bytes: 0,
            core_bytes: 0,
            spectrum: Vec::new(),
        }
    }

    pub(crate) fn add_cluster(
        &mut self,
        rank: usize,
        energy: &[f64],
        own_v: bool,
        members: usize,
        options: &Options,
    ) {
        self.rank = self.rank.max(rank);
        self.basis_bytes += match own_v {
            true => options.storage.basis_bytes((self.d_out, self.d_in), rank),
            false => options.storage.u_bytes(self.d_out, rank),
        };
        self.core_bytes += members * options.storage.core_bytes(options.method, rank);
        let whole = self.spectrum.last().copied().unwrap_or(0.0);
        let length = self.spectrum.len().max(energy.len());
        self.spectrum.resize(length, whole);
        let all = self.adapters.max(1) as f64;
        for (r, sum) in self.spectrum.iter_mut().enumerate() {
            *sum += energy.get(r).or(energy.last()).copied().unwrap_or(0.0) / all;
        }
    }

    pub(crate) fn set_errors(&mut self, errors: Vec<f64>) {
        self.err2 = Errors::of(errors);
    }
}

/// One adapter.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterReport {
    /// Its name.
    pub name: String,
    /// Its cluster; `None` with factors of its own.
    pub cluster: Option<usize>,
    /// Why it has factors of its own.
    pub private: Option<String>,
    /// Over its modules, on the shared basis (also for an adapter that then kept its own factors).
    pub err2: Errors,
    /// Per module with a delta, in the order of the modules; −1 where it has none.
    pub module_err2: Vec<f32>,
    /// Bytes of its factors in its file.
    pub bytes_before: u64,
    /// Bytes of its cores, or of its own factors in F16.
    pub bytes_after: u64,
}

/// Wall-clock seconds of each stage.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Seconds {
    /// Clusters and ranks.
    pub plan: f64,
    /// Bases and cores.
    pub compress: f64,
    /// The curves of this report.
    pub curves: f64,
    /// Writing the pack.
    pub write: f64,
}

impl Seconds {
    /// All of them.
    pub fn total(&self) -> f64 {
        self.plan + self.compress + self.curves + self.write
    }
}

/// Everything about one compression.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The base's file.
    pub base: String,
    /// Number of adapters.
    pub adapters: usize,
    /// `full` or `diag`.
    pub method: &'static str,
    /// Number of bases.
    pub clusters: usize,
    /// Adapters in each cluster.
    pub cluster_sizes: Vec<usize>,
    /// Mean err² at the start of each reassignment round.
    pub cluster_rounds: Vec<f64>,
    /// What `--auto` expected of its choice: mean err² and bytes.
    pub expected: Option<(f64, u64)>,
    /// Formats of bases and cores.
    pub formats: (String, String),
    /// Whether V was shared between projections with the same input.
    pub share_v: bool,
    /// Seed.
    pub seed: u64,
    /// Over all (adapter, module) pairs as packed: own factors count as exact but for F16.
    pub err2: Errors,
    /// The same before adapters above `--max-error` kept their own factors.
    pub shared_err2: Errors,
    /// Adapters that keep their own factors everywhere.
    pub private: usize,
    /// (adapter, module) pairs that `--auto` gave truncated factors of their own …
    pub own: usize,
    /// … and pairs that it left out, whose bytes do more elsewhere.
    pub left_out: usize,
    /// Bytes of all factors before.
    pub bytes_before: u64,
    /// Bytes of the pack file.
    pub bytes_after: u64,
    /// Bytes of bases.
    pub basis_bytes: u64,
    /// Bytes of cores and of own factors.
    pub core_bytes: u64,
    /// Mean err² of the best per-adapter SVDs in the bytes of bases and cores, as if every number took the bits of
    /// the bases' format and none were rounded.
    pub svd_err2_at_equal_bytes: f64,
    /// The same with SVDs as a pack can store them, where rows of U that are no whole blocks take 16 bits a number.
    pub stored_svd_err2_at_equal_bytes: f64,
    /// (rank, mean err²) on the middle module.
    pub error_by_rank: Vec<(usize, f64)>,
    /// (adapters, mean err²) on the middle module, at the rank there and one basis.
    pub error_by_adapters: Vec<(usize, f64)>,
    /// Stages.
    pub seconds: Seconds,
    /// Largest resident set of this process, where the system tells.
    pub peak_memory: Option<u64>,
    /// By module.
    pub modules: Vec<ModuleReport>,
    /// By adapter.
    pub by_adapter: Vec<AdapterReport>,
}

/// Figures that a run collects on its way.
pub(crate) struct Run {
    pub seconds: Seconds,
    error_by_rank: Vec<(usize, f64)>,
    error_by_adapters: Vec<(usize, f64)>,
}

impl Run {
    pub(crate) fn new(_: &Collection, _: &Options) -> Run {
        Run { seconds: Seconds::default(), error_by_rank: Vec::new(), error_by_adapters: Vec::new() }
    }

    /// Error against rank and against the number of adapters, by real bases on one module in the middle.
    pub(crate) fn curves(
        &mut self,
        collection: &Collection,
        options: &Options,
        plan: &Plan,
        progress: &dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<()> {
        let clock = std::time::Instant::now();
        let Some(middle) = plan.sites.get(plan.sites.len() / 2).copied() else { return Ok(()) };
        let rank = plan.largest_rank(middle).max(1);
        let stack = collection.stack(middle)?;
        let ranks = [rank.div_ceil(8), rank.div_ceil(4), rank.div_ceil(2), rank, 2 * rank, 4 * rank];
        let counts: Vec<usize> =
            [16, 8, 4, 2, 1].iter().map(|d| stack.len() / d).filter(|n| *n > 0).collect();
        progress.stage("measuring curves", ranks.len() + counts.len());
        for r in ranks {
            check(cancel)?;
            if self.error_by_rank.last().is_none_or(|l| l.0 < r) && r <= stack.left.nrows().max(1) {
                self.error_by_rank.push((r, mean_error(&stack, &plan.clustering, r, options)));
            }
            progress.step();
        }
        for n in counts {
            check(cancel)?;
            if self.error_by_adapters.last().is_none_or(|l| l.0 < n) {
                // Every so-manieth adapter: a folder's order may mean something.
                let step = (stack.len() / n).max(1);
                let part = stack.select(&(0..n).map(|i| i * step).collect::<Vec<_>>());
                let one = Clustering::single(collection.len());
                self.error_by_adapters.push((n, mean_error(&part, &one, rank, options)));
            }
            progress.step();
        }
        self.seconds.curves = clock.elapsed().as_secs_f64();
        Ok(())
    }
}

impl Report {
    pub(crate) fn new(
        collection: &Collection,
        options: &Options,
        done: &Compressed,
        run: Run,
        pack_bytes: u64,
    ) -> Report {
        let clustering = &done.plan.clustering;
        let mut sizes = vec![0; clustering.clusters];
        clustering.assignment.iter().for_each(|&c| sizes[c] += 1);
        let by_adapter: Vec<AdapterReport> =
            (0..collection.len()).map(|i| adapter_report(collection, options, done, i)).collect();
        let pairs = |keep: bool| -> Vec<f64> {
            let rows = done.cores.iter().zip(&done.private);
            rows.flat_map(|(row, private)| {
                let own = private.is_some() && !keep;
                row.iter().flatten().map(move |c| if own { 0.0 } else { c.err2 })
            })
            .collect()
        };
        let basis_bytes: usize = done.modules.iter().map(|m| m.report.basis_bytes).sum();
        let core_bytes: u64 = by_adapter.iter().map(|a| a.bytes_after).sum();
        let bytes = basis_bytes as u64 + core_bytes;
        let singles: Vec<Single> = done.modules.iter().flat_map(|m| m.singles.iter().cloned()).collect();
        let stored: Vec<Single> = done.modules.iter().flat_map(|m| m.stored_singles(options)).collect();
        let forms = |is: fn(&CoreForm) -> bool| {
            let rows = done.cores.iter().zip(&done.private).filter(|(_, private)| private.is_none());
            rows.flat_map(|(row, _)| row.iter().flatten()).filter(|c| is(&c.form)).count()
        };
        Report {
            base: collection.base.file.to_string(),
            adapters: collection.len(),
            method: match options.method {
                Method::Full => "full",
                Method::Diag => "diag",
            },
            clusters: clustering.clusters,
            cluster_sizes: sizes,
            cluster_rounds: clustering.history.clone(),
            expected: done.plan.expected,
            formats: (options.storage.basis.to_string(), options.storage.core.to_string()),
            share_v: options.share_v,
            seed: options.seed,
            err2: Errors::of(pairs(false)),
            shared_err2: Errors::of(pairs(true)),
            private: done.private.iter().flatten().count(),
            own: forms(|f| matches!(f, CoreForm::Own(_))),
            left_out: forms(|f| matches!(f, CoreForm::Nothing)),
            bytes_before: collection.entries.iter().map(|e| e.bytes).sum(),
            bytes_after: pack_bytes,
            basis_bytes: basis_bytes as u64,
            core_bytes,
            svd_err2_at_equal_bytes: svd_at_equal_bytes(&singles, bytes),
            stored_svd_err2_at_equal_bytes: svd_at_equal_bytes(&stored, bytes),
            error_by_rank: run.error_by_rank,
            error_by_adapters: run.error_by_adapters,
            seconds: run.seconds,
            peak_memory: peak_memory(),
            modules: done.modules.iter().map(|m| module_report(collection, m)).collect(),
            by_adapter,
        }
    }

    /// Writes `report.json`, `report.md` and the plots into a folder, which is made if need be.
    ///
    /// # Errors
    /// The folder or a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let json = serde_json::to_vec_pretty(self).map_err(|e| Error::Request(format!("the report: {e}")))?;
        let spectra: Vec<Line<'_>> = self.spectra();
        let files = [
            ("report.json", json),
            ("report.md", self.markdown().into_bytes()),
            (
                "rank.svg",
                svg(
                    "Error against rank (middle module)",
                    "rank",
                    "mean err²",
                    true,
                    &[Line { name: "this collection", points: points(&self.error_by_rank) }],
                )
                .into_bytes(),
            ),
            (
                "adapters.svg",
                svg(
                    "Error against the number of adapters (middle module, one basis)",
                    "adapters",
                    "mean err²",
                    true,
                    &[Line { name: "this collection", points: points(&self.error_by_adapters) }],
                )
                .into_bytes(),
            ),
            (
                "spectrum.svg",
                svg("Energy kept by the leading columns", "columns", "part of the energy", false, &spectra)
                    .into_bytes(),
            ),
        ];
        for (name, bytes) in files {
            let path = folder.join(name);
            publish(&path, Existing::Replace, |f| std::io::Write::write_all(f, &bytes))
                .map_err(Error::io(&path))?;
        }
        Ok(())
    }

    /// One line per projection: its mean spectrum over the layers.
    fn spectra(&self) -> Vec<Line<'_>> {
        let mut names: Vec<&str> = self.modules.iter().map(|m| projection(&m.site)).collect();
        names.sort_unstable();
        names.dedup();
        names
            .into_iter()
            .map(|name| {
                let of: Vec<&ModuleReport> =
                    self.modules.iter().filter(|m| projection(&m.site) == name).collect();
                let length = of.iter().map(|m| m.spectrum.len()).max().unwrap_or(0);
                let mean = |r: usize| {
                    let at =
                        |m: &&ModuleReport| m.spectrum.get(r).or(m.spectrum.last()).copied().unwrap_or(0.0);
                    of.iter().map(at).sum::<f64>() / of.len().max(1) as f64
                };
                Line { name, points: (0..length).map(|r| (r as f64, mean(r))).collect() }
            })
            .collect()
    }

    /// The page for people.
    pub fn markdown(&self) -> String {
        let mut o = String::new();
        let mb = |b: u64| format!("{:.2} MB", b as f64 / 1e6);
        let _ = writeln!(o, "# Compression report\n");
        let _ = writeln!(
            o,
            "{} adapters of `{}`; {} cores, {} bases, formats {} (bases) and {} (cores), seed {}.\n",
            self.adapters, self.base, self.method, self.clusters, self.formats.0, self.formats.1, self.seed
        );
        let _ =
            writeln!(o, "err² is ‖ΔW − U C Vᵀ‖²_F / ‖ΔW‖²_F, squared and relative, quantisation included.\n");
        let _ = writeln!(o, "| | mean | p95 | worst |\n|---|---|---|---|");
        for (name, e) in [("err² as packed", self.err2), ("err² with all adapters shared", self.shared_err2)]
        {
            let _ = writeln!(o, "| {name} | {:.4} | {:.4} | {:.4} |", e.mean, e.p95, e.worst);
        }
        let _ =
            writeln!(o, "| per-adapter SVD in the same bytes | {:.4} | | |", self.svd_err2_at_equal_bytes);
        let stored = self.stored_svd_err2_at_equal_bytes;
        let _ = writeln!(o, "| the same, stored as a pack stores it | {stored:.4} | | |\n");
        let _ = writeln!(o, "| | |\n|---|---|");
        let _ = writeln!(o, "| bytes before | {} |", mb(self.bytes_before));
        let saved = 100.0 * (1.0 - self.bytes_after as f64 / self.bytes_before.max(1) as f64);
        let _ = writeln!(o, "| pack | {} ({saved:.1} % saved) |", mb(self.bytes_after));
        let _ = writeln!(o, "| of it bases / cores | {} / {} |", mb(self.basis_bytes), mb(self.core_bytes));
        let _ = writeln!(o, "| adapters with their own factors | {} |", self.private);
        let _ = writeln!(
            o,
            "| single modules with their own factors / left out | {} / {} |",
            self.own, self.left_out
        );
        if let Some((error, bytes)) = self.expected {
            let _ = writeln!(o, "| expected by --auto | err² {error:.4} in {} |", mb(bytes));
        }
        let s = &self.seconds;
        let _ = writeln!(
            o,
            "| seconds | plan {:.1}, bases and cores {:.1}, curves {:.1}, writing {:.1} |",
            s.plan, s.compress, s.curves, s.write
        );
        if let Some(peak) = self.peak_memory {
            let _ = writeln!(o, "| peak memory | {} |", mb(peak));
        }
        let _ = writeln!(o, "| adapters per cluster | {:?} |", self.cluster_sizes);
        let _ = writeln!(o, "\n![error against rank](rank.svg)\n![error against adapters](adapters.svg)");
        let _ = writeln!(o, "![spectrum](spectrum.svg)\n\n## Modules\n");
        let _ = writeln!(
            o,
            "| module | shape | adapters | rank | mean err² | p95 | worst | before | bases | cores |\n|---|---|---|---|---|---|---|---|---|---|"
        );
        for m in &self.modules {
            let _ = writeln!(
                o,
                "| {} | {}×{} | {} | {} | {:.4} | {:.4} | {:.4} | {} | {} | {} |",
                m.site,
                m.d_out,
                m.d_in,
                m.adapters,
                m.rank,
                m.err2.mean,
                m.err2.p95,
                m.err2.worst,
                m.bytes_before,
                m.basis_bytes,
                m.core_bytes
            );
        }
        let _ = writeln!(o, "\n## Adapters\n");
        let _ = writeln!(
            o,
            "| adapter | cluster | mean err² | worst | bytes before | after | own factors |\n|---|---|---|---|---|---|---|"
        );
        for a in &self.by_adapter {
            let cluster = a.cluster.map_or("—".into(), |c| c.to_string());
            let _ = writeln!(
                o,
                "| {} | {cluster} | {:.4} | {:.4} | {} | {} | {} |",
                a.name.replace('|', "\\|"),
                a.err2.mean,
                a.err2.worst,
                a.bytes_before,
                a.bytes_after,
                a.private.as_deref().unwrap_or("")
            );
        }
        o
    }
}

fn points(values: &[(usize, f64)]) -> Vec<(f64, f64)> {
    values.iter().map(|(x, y)| (*x as f64, *y)).collect()
}

fn projection(site: &str) -> &str {
    site.rsplit('.').next().unwrap_or(site)
}

fn module_report(collection: &Collection, module: &ModuleResult) -> ModuleReport {
    let before = collection.entries.iter().filter_map(|e| e.sites.get(&module.site)).map(|s| s.bytes);
    ModuleReport { bytes_before: before.sum(), ..module.report.clone() }
}

fn adapter_report(collection: &Collection, options: &Options, done: &Compressed, i: usize) -> AdapterReport {
    let entry = &collection.entries[i];
    let row = &done.cores[i];
    let cluster = done.plan.clustering.assignment[i];
    let private = done.private[i].map(|mean| {
        let limit = options.max_error.unwrap_or(0.0);
        format!("mean err² {mean:.4} is above {limit}")
    });
    let bytes = |(m, core): (&ModuleResult, &Option<AdapterCore>)| {
        let storage = options.storage;
        Some(match &core.as_ref()?.form {
            CoreForm::Shared(_) => storage.core_bytes(options.method, m.bases.get(cluster)?.as_ref()?.rank),
            CoreForm::Own(place) => storage.basis_bytes((m.report.d_out, m.report.d_in), place.rank),
            CoreForm::Nothing => 0,
        })
    };
    let shared: usize = done.modules.iter().zip(row).filter_map(bytes).sum();
    let own: usize = entry
        .sites
        .iter()
        .map(|(site, s)| {
            let (d_out, d_in) = collection.shape(*site);
            2 * s.rank * (d_out + d_in)
        })
        .sum();
    AdapterReport {
        name: entry.name.clone(),
        cluster: private.is_none().then_some(cluster),
        err2: Errors::of(row.iter().flatten().map(|c| c.err2).collect()),
        module_err2: row.iter().map(|c| c.as_ref().map_or(-1.0, |c| c.err2 as f32)).collect(),
        bytes_before: entry.bytes,
        bytes_after: if private.is_some() { own } else { shared } as u64,
        private,
    }
}

/// The process's largest resident set in bytes, on Linux.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}
