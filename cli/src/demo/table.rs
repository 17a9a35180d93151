//! What `lory demo --check` prints.

use std::io::{self, BufWriter, Write};

use serde_json::{Value, json};

use crate::{failure::Outcome, terminal::bytes};

use super::{
    check::{Cost, Means, Measured, Report, means},
    interval::wilson,
};

/// The families, each once, in order.
fn families<'a>(report: &'a Report) -> Vec<&'a str> {
    let mut families: Vec<&str> = report.rows.iter().map(|r| r.skill.family.as_str()).collect();
    families.dedup();
    families
}

fn of<'a, 's>(report: &'a Report<'s>, family: &'a str) -> impl Iterator<Item = &'a Measured<'s>> + Clone {
    report.rows.iter().filter(move |r| r.skill.family == family)
}

/// A line for each skill, one for each family, and the mean of all.
pub fn print(report: &Report) -> Outcome {
    let mut out = BufWriter::new(io::stdout().lock());
    let name = report.rows.iter().map(|r| r.skill.name.len()).max().unwrap_or(0).max("all skills".len());
    let family = report.rows.iter().map(|r| r.skill.family.len()).max().unwrap_or(0).max("family".len());
    writeln!(
        out,
        "{:<name$}  {:<family$}  {:>7}  {:>7}  {:>8}  {:>7}  {:>9}",
        "skill", "family", "base", "LoRA", "packed", "packed", "bytes"
    )?;
    writeln!(
        out,
        "{:<name$}  {:<family$}  {:>7}  {:>7}  {:>8}  {:>7}  {:>9}",
        "", "", "now", "then", "then", "now", ""
    )?;
    for row in &report.rows {
        let skill = row.skill;
        let [base, lora, then, now] =
            [row.base_share(), skill.lora, skill.pack, row.pack_share()].map(|share| share * 100.0);
        writeln!(
            out,
            "{:<name$}  {:<family$}  {base:>5.0} %  {lora:>5.0} %  {then:>6.0} %  {now:>5.0} %  {:>9}",
            skill.name,
            skill.family,
            bytes(row.bytes as u64)
        )?;
    }
    writeln!(out)?;
    for name_of in families(report) {
        let means = means(of(report, name_of));
        line(
            &mut out,
            (name_of, name),
            (&format!("{} skills", of(report, name_of).count()), family),
            &means,
        )?;
    }
    let all = means(report.rows.iter());
    line(&mut out, ("all skills", name), (&report.rows.len().to_string(), family), &all)?;
    let samples: usize = report.rows.iter().map(|r| r.samples).sum();
    writeln!(
        out,
        "\nExactly right answers to {samples} prompts that were not trained on{}: base alone {:.1} %, as trained {:.1} %,\n\
         in the pack {:.1} % (95 % interval {:.1} to {:.1}); {:.1} % were recorded for the pack.",
        if report.complete { "" } else { " (not all that were recorded)" },
        all.base * 100.0,
        all.lora * 100.0,
        all.pack * 100.0,
        all.interval.0 * 100.0,
        all.interval.1 * 100.0,
        all.recorded * 100.0
    )?;
    let rate = |cost: Cost| cost.tokens as f64 / cost.time.as_secs_f64().max(1e-9);
    writeln!(
        out,
        "Base {:.1} s at {:.0} tokens/s, {} adapters in the same batches {:.1} s at {:.0} tokens/s, on {}.",
        report.base.time.as_secs_f64(),
        rate(report.base),
        report.rows.len(),
        report.pack.time.as_secs_f64(),
        rate(report.pack),
        report.device
    )?;
    Ok(out.flush()?)
}

/// A line of means; names and what stands under "family" come with the widths of their columns.
fn line(out: &mut impl Write, name: (&str, usize), family: (&str, usize), means: &Means) -> Outcome {
    let [base, lora, then, now] =
        [means.base, means.lora, means.recorded, means.pack].map(|share| share * 100.0);
    writeln!(
        out,
        "{:<n$}  {:<f$}  {base:>5.1} %  {lora:>5.1} %  {then:>6.1} %  {now:>5.1} %  {:>9}",
        name.0,
        family.0,
        bytes(means.bytes as u64),
        n = name.1,
        f = family.1
    )?;
    Ok(())
}

/// The same as one JSON object; shares are from 0 to 1. `answers`: with what every prompt was answered, in the order of the tests.
pub fn print_json(report: &Report, answers: bool) -> Outcome {
    let skill = |row: &Measured| {
        let (low, high) = wilson(row.pack_share(), row.samples);
        let mut skill = json!({
            "name": row.skill.name,
            "family": row.skill.family,
            "samples": row.samples,
            "base": row.base_share(),
            "lora_recorded": row.skill.lora,
            "pack_recorded": row.skill.pack,
            "pack": row.pack_share(),
            "pack_interval_95": [low, high],
            "bytes": row.bytes,
        });
        if answers {
            skill["answers"] = json!(row.answers);
        }
        skill
    };
    let mean = |means: Means| {
        json!({
            "base": means.base,
            "lora_recorded": means.lora,
            "pack_recorded": means.recorded,
            "pack": means.pack,
            "pack_interval_95": [means.interval.0, means.interval.1],
            "bytes": means.bytes,
        })
    };
    let cost = |c: Cost| json!({ "tokens": c.tokens, "seconds": c.time.as_secs_f64() });
    let by_family: serde_json::Map<String, Value> =
        families(report).into_iter().map(|f| (f.to_owned(), mean(means(of(report, f))))).collect();
    let all = json!({
        "device": report.device,
        "complete": report.complete,
        "cost": { "base": cost(report.base), "pack": cost(report.pack) },
        "mean": mean(means(report.rows.iter())),
        "families": by_family,
        "skills": report.rows.iter().map(skill).collect::<Vec<_>>(),
    });
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &all).map_err(io::Error::from)?;
    writeln!(out)?;
    Ok(out.flush()?)
}
