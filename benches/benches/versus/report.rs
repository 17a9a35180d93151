//! Table and JSON.

use lory_benches::{Ratio, Samples};
use lory_kernels::ceilings::Ceilings;
use lory_models::cost::Cost;
use serde_json::{Value, json};

use crate::test::Test;

/// One line of the table.
pub struct Row<'a> {
    pub test: &'a Test,
    pub cost: &'a Cost,
    pub ceilings: &'a Ceilings,
    pub llama: &'a Samples,
    pub lory: &'a Samples,
}

/// How one side did.
struct Speed {
    rate: f64,
    gb: f64,
    gop: f64,
}

pub fn header() -> String {
    "| test | llama.cpp t/s | Lory t/s | ratio | of pairs | Lory GB/s | of read | Lory Gop/s | of peak | llama.cpp of read, of peak |\n\
     | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | --- |"
        .to_owned()
}

/// A part of a ceiling; `None` of one that was not measured.
fn share(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
}

fn percent(part: f64, whole: f64) -> String {
    share(part, whole).map_or("-".to_owned(), |share| format!("{:.0} %", 100.0 * share))
}

impl Row<'_> {
    fn speed(&self, samples: &Samples) -> Speed {
        let (bytes, ops) = self.test.work(self.cost);
        let runs = samples.rate() / samples.tokens as f64;
        Speed { rate: samples.rate(), gb: bytes * runs / 1e9, gop: ops * runs / 1e9 }
    }

    /// As a line of Markdown.
    pub fn line(&self) -> String {
        let (theirs, ours) = (self.speed(self.llama), self.speed(self.lory));
        let ratio = Ratio::of(self.lory, self.llama);
        let (read, peak) = (self.ceilings.read, self.ceilings.of(self.cost.ty));
        format!(
            "| {} | {:.1} | {:.1} | **{:.2}** | {:.2} – {:.2} | {:.1} | {} | {:.0} | {} | {}, {} |",
            self.test.name(),
            theirs.rate,
            ours.rate,
            ratio.median,
            ratio.min,
            ratio.max,
            ours.gb,
            percent(ours.gb, read),
            ours.gop,
            percent(ours.gop, peak),
            percent(theirs.gb, read),
            percent(theirs.gop, peak),
        )
    }

    pub fn json(&self) -> Value {
        let ratio = Ratio::of(self.lory, self.llama);
        let side = |samples: &Samples| {
            let speed = self.speed(samples);
            json!({
                "samples_ns": samples.times.iter().map(|t| t.as_nanos() as u64).collect::<Vec<_>>(),
                "samples_ts": samples.rates(),
                "median_ts": speed.rate,
                "gb_per_s": speed.gb,
                "gop_per_s": speed.gop,
                "share_of_read": share(speed.gb, self.ceilings.read),
                "share_of_peak": share(speed.gop, self.ceilings.of(self.cost.ty)),
            })
        };
        json!({
            "test": self.test.name(),
            "tokens": self.test.tokens(),
            "llama.cpp": side(self.llama),
            "lory": side(self.lory),
            "ratios": ratio.pairs,
            "ratio_median": ratio.median,
            "ratio_min": ratio.min,
            "ratio_max": ratio.max,
        })
    }
}
