//! Tests of the adapter store: `arrive`, `load`, `swap`, `mem`.

use std::time::Instant;

use lory_runtime::{Engine, EngineOptions, OnSwitch, SessionOptions};
use serde_json::{Value, json};

use crate::{failure::Outcome, terminal::bytes};

use super::{
    Run, Settings,
    adapters::Pool,
    arrivals,
    opened::Opened,
    table::{Cell, Table},
    timing::quantile,
};

/// The table in SQL.
const NAME: &str = "lory_store";

/// What only these rows have; each of them some of it.
pub const COLUMNS: &[&str] =
    &["p50_us", "p99_us", "alone_p50_us", "alone_p99_us", "open_ms", "bytes_per_adapter", "basis_bytes"];

/// Adapters that arrive while a session decodes, at most.
const ARRIVING: usize = 100;

/// Adapters that are loaded one by one, at most.
const LOADED: usize = 1000;

/// Switches that are timed.
const SWITCHES: usize = 10_000;

/// `arrive`: a step of a session that decodes while an adapter arrives that nobody has used yet, and alone; `load`: opening the pack,
/// and bringing in such adapters; `swap`: giving a session another adapter that is there; `mem`: what an adapter takes.
pub fn measure(opened: &Opened, run: Run, settings: &Settings, pool: &Pool, table: &mut Table) -> Outcome {
    let Some(pack) = &settings.pack else { return Ok(()) };
    let options = EngineOptions {
        n_ctx: u32::try_from(arrivals::tokens(ARRIVING)).ok(),
        n_batch: 8,
        ..opened.engine_options(run, settings)
    };
    let engine = Engine::open(&opened.model.path, &options)?;
    let start = Instant::now();
    engine.adapters().open_pack(pack)?;
    let open_ms = start.elapsed().as_secs_f64() * 1e3;

    // An adapter is new only once.
    let (arriving, others) = pool.names().split_at(ARRIVING.min(pool.len() / 2));
    let steps = arrivals::measure(&engine, opened.vocab(), arriving)?;
    let mut ids = Vec::new();
    let mut load = Vec::new();
    for name in others.iter().take(LOADED) {
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

    let sizes: Vec<f64> = others
        .iter()
        .take(LOADED)
        .map(|name| Ok(engine.adapters().info(name)?.bytes as f64))
        .collect::<Outcome<_>>()?;
    let per_adapter = sizes.iter().sum::<f64>() / sizes.len().max(1) as f64;
    let basis: usize = (0..pool.pack.n_clusters() as u32)
        .map(|c| Ok(pool.pack.basis(c)?.bytes()))
        .sum::<Outcome<usize>>()?;

    let rows = [
        Row::steps("arrive", &steps),
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
    // Of a pack with one adapter none is left to arrive.
    for row in rows.into_iter().filter(|row| row.test != "arrive" || !arriving.is_empty()) {
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
    /// What steps take, in milliseconds for readers.
    fn steps(test: &'static str, steps: &arrivals::Steps) -> Row {
        let of = |us: &[f64]| (quantile(us, 0.5), quantile(us, 0.99));
        let ((p50, p99), (alone_p50, alone_p99)) = (of(&steps.arriving), of(&steps.alone));
        let values =
            [("p50_us", p50), ("p99_us", p99), ("alone_p50_us", alone_p50), ("alone_p99_us", alone_p99)];
        Row {
            test,
            values: values.map(|(name, us)| (name, json!(us))).to_vec(),
            text: format!(
                "step p50 {:.2}, p99 {:.2} ms, alone {:.2}, {:.2}",
                p50 / 1e3,
                p99 / 1e3,
                alone_p50 / 1e3,
                alone_p99 / 1e3
            ),
        }
    }

    /// Microseconds of every sample, and another figure.
    fn times(test: &'static str, us: &[f64], more: Option<(&'static str, f64)>) -> Row {
        let (p50, p99) = (quantile(us, 0.5), quantile(us, 0.99));
        let mut values = vec![("p50_us", json!(p50)), ("p99_us", json!(p99))];
        values.extend(more.map(|(name, value)| (name, json!(value))));
        let more = more.map_or(String::new(), |(_, ms)| format!(", pack opened in {ms:.2} ms"));
        Row { test, values, text: format!("p50 {p50:.2} us, p99 {p99:.2} us{more}") }
    }
}
