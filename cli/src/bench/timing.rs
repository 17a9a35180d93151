//! Times and what is said of them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

/// Samples of one test.
pub struct Samples {
    /// Tokens of each.
    pub tokens: usize,
    /// What each took.
    pub times: Vec<Duration>,
}

impl Samples {
    /// Tokens per second of each.
    pub fn rates(&self) -> Vec<f64> {
        self.times.iter().map(|t| self.tokens as f64 / t.as_secs_f64().max(1e-9)).collect()
    }

    /// Mean tokens per second.
    pub fn rate(&self) -> f64 {
        mean(&self.rates())
    }

    /// `avg_ns` … `samples_ts`, as llama-bench names them.
    pub fn fields(&self, fields: &mut Map<String, Value>) {
        let nanos: Vec<f64> = self.times.iter().map(|t| t.as_nanos() as f64).collect();
        let rates = self.rates();
        fields.insert("avg_ns".into(), json!(mean(&nanos) as u64));
        fields.insert("stddev_ns".into(), json!(deviation(&nanos) as u64));
        fields.insert("avg_ts".into(), json!(mean(&rates)));
        fields.insert("stddev_ts".into(), json!(deviation(&rates)));
        fields.insert("samples_ns".into(), json!(nanos.iter().map(|n| *n as u64).collect::<Vec<_>>()));
        fields.insert("samples_ts".into(), json!(rates));
    }

    /// `123.45 ± 0.67`.
    pub fn text(&self) -> String {
        format!("{:.2} ± {:.2}", self.rate(), deviation(&self.rates()))
    }
}

/// Arithmetic mean; 0 of nothing.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Standard deviation of a sample (divided by n − 1), as llama-bench gives it.
pub fn deviation(values: &[f64]) -> f64 {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (squares / values.len().saturating_sub(1).max(1) as f64).sqrt()
}

/// The value below which `q` of all lie, by the nearest rank; 0 of nothing.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0.0)
}

/// How much faster `with` is than `without`, sample by sample: the median.
pub fn median_ratio(with: &[Duration], without: &[Duration]) -> f64 {
    let ratios: Vec<f64> =
        with.iter().zip(without).map(|(a, b)| b.as_secs_f64() / a.as_secs_f64().max(1e-9)).collect();
    quantile(&ratios, 0.5)
}

/// Now, as ISO 8601 in UTC.
pub fn now() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    iso8601(seconds)
}

/// The era arithmetic is Howard Hinnant's `civil_from_days`.
fn iso8601(seconds: u64) -> String {
    let shifted = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * from_march + 2) / 153;
    let day = from_march - (153 * march_month + 2) / 5 + 1;
    let month = (march_month + 2) % 12 + 1;
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (h, m, s) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(iso8601(0), "1970-01-01T00:00:00Z");
        assert_eq!(iso8601(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(iso8601(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(iso8601(1_745_495_931), "2025-04-24T11:58:51Z");
    }

    #[test]
    fn statistics() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!((mean(&values), quantile(&values, 0.5), quantile(&values, 0.99)), (2.5, 2.0, 4.0));
        assert!((deviation(&values) - (5.0f64 / 3.0).sqrt()).abs() < 1e-12);
        assert_eq!((quantile(&[], 0.5), deviation(&[1.0])), (0.0, 0.0));
        let ms = |n: &[u64]| n.iter().map(|n| Duration::from_millis(*n)).collect::<Vec<_>>();
        assert_eq!(median_ratio(&ms(&[10, 20, 40]), &ms(&[20, 20, 20])), 1.0);
    }
}
