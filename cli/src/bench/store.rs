//! Tests of the adapter store: `load`, `swap`, `mem`.

use std::{path::Path, time::Instant};

use lory_runtime::{Engine, EngineOptions, OnSwitch, SessionOptions};
use serde_json::{Value, json};

use crate::{failure::Outcome, terminal::bytes};

use super::{
    Run, Settings,
    adapters::Pool,
    opened::Opened,
    table::{Cell, Table},
    timing::quantile,
};

/// The table in SQL.
const NAME: &str = "lory_store";

/// What only these rows have; each of them some of it.
pub const COLUMNS: &[&str] = &["p50_us", "p99_us", "open_ms", "bytes_per_adapter", "basis_bytes"];

/// Adapters that are loaded one by one, at most.
const LOADED: usize = 1000;

/// Switches that are timed.
const SWITCHES: usize = 10_000;

/// `load`: opening the pack, and bringing in adapters that nobody has used yet; `swap`: giving a session another
/// adapter that is there; `mem`: what an adapter takes.
pub fn measure(
    model: &Path,
    opened: &Opened,
    run: Run,
    settings: &Settings,
    pool: &Pool,
    table: &mut Table,
) -> Outcome {
    let Some(pack) = &settings.pack else { return Ok(()) };
    let options = EngineOptions {
        device: run.device,
        gpu_layers: run.gpu_layers,
        threads: Some(run.threads),
        n_ctx: Some(64),
        n_batch: 8,
        kv_type: settings.kv_type,
        loading: settings.loading,
        repacking: settings.repacking,
        ..EngineOptions::default()
    };
    let engine = Engine::open(model, &options)?;
    let start = Instant::now();
    engine.adapters().open_pack(pack)?;
    let open_ms = start.elapsed().as_secs_f64() * 1e3;

    let mut ids = Vec::new();
    let mut load = Vec::new();
    for name in pool.names().iter().take(LOADED) {
        let start = Instant::now();
        ids.push(engine.adapters().resolve(name)?);
        load.push(start.elapsed().as_secs_f64() * 1e6);
    }

    let mut session = engine.session(&SessionOptions::default())?;
    let mut swap = Vec::new();
    for i in 0..SWITCHES {
        let id = ids[i % ids.len()];
        let start = Instant::now();
        session.set_adapters(&[(id, 1.0)], OnSwitch::Recompute)?;
        swap.push(start.elapsed().as_secs_f64() * 1e6);
    }

    let sizes: Vec<f64> = pool
        .names()
        .iter()
        .take(LOADED)
        .map(|name| Ok(engine.adapters().info(name)?.bytes as f64))
        .collect::<Outcome<_>>()?;
    let per_adapter = sizes.iter().sum::<f64>() / sizes.len().max(1) as f64;
    let basis: usize = (0..pool.pack.n_clusters() as u32)
        .map(|c| Ok(pool.pack.basis(c)?.bytes()))
        .sum::<Outcome<usize>>()?;

    let rows = [
        Row::times("load", &load, Some(("open_ms", open_ms))),
        Row::times("swap", &swap, None),
        Row {
            test: "mem",
            values: vec![
                ("bytes_per_adapter", json!(per_adapter.round() as u64)),
                ("basis_bytes", json!(basis)),
            ],
            text: format!("{} each, bases {}", bytes(per_adapter as u64), bytes(basis as u64)),
        },
    ];
    for row in rows {
        let mut fields = opened.fields(&engine.device(), run, settings);
        fields.insert("test".into(), json!(row.test));
        pool.fields(&mut fields, settings, 1, None);
        fields.extend(COLUMNS.iter().map(|name| ((*name).to_owned(), Value::Null)));
        fields.extend(row.values.into_iter().map(|(name, value)| (name.to_owned(), value)));
        let mut cells = opened.cells(run, settings);
        cells.push(Cell::new("test", row.test, 6));
        cells.push(Cell::new("adapters", pool.len().to_string(), 8));
        cells.push(Cell::new("result", row.text, 48));
        table.row(NAME, &fields, &cells)?;
    }
    Ok(())
}

struct Row {
    test: &'static str,
    values: Vec<(&'static str, Value)>,
    text: String,
}

impl Row {
    /// Microseconds of every sample, and another figure.
    fn times(test: &'static str, us: &[f64], more: Option<(&'static str, f64)>) -> Row {
        let (p50, p99) = (quantile(us, 0.5), quantile(us, 0.99));
        let mut values = vec![("p50_us", json!(p50)), ("p99_us", json!(p99))];
        values.extend(more.map(|(name, value)| (name, json!(value))));
        let more = more.map_or(String::new(), |(_, ms)| format!(", pack opened in {ms:.2} ms"));
        Row { test, values, text: format!("p50 {p50:.2} us, p99 {p99:.2} us{more}") }
    }
}
