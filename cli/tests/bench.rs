//! `lory bench`: every kind of test, every format, on a model of two small layers.

mod program;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use program::{Ran, arg, command, finish, lory};
use serde_json::Value;

struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    fn new() -> Files {
        let files = Files { folder: tempfile::tempdir().unwrap() };
        lory(&["synth", "model", "llama-tiny", "--type", "Q4_0", "-o", &files.at("model.gguf")]).success();
        files
    }

    fn with_pack() -> Files {
        let files = Files::new();
        let (model, pack) = (files.at("model.gguf"), files.at("pack.gguf"));
        lory(&[
            "synth",
            "pack",
            "-m",
            &model,
            "--adapters",
            "6",
            "--rank",
            "4",
            "--clusters",
            "2",
            "-o",
            &pack,
        ])
        .success();
        files
    }

    fn at(&self, name: &str) -> String {
        arg(&Path::new(self.folder.path()).join(name))
    }

    fn command(&self, args: &[&str]) -> Command {
        let model = self.at("model.gguf");
        let mut all = vec!["bench", "-m", &model, "-t", "1", "-r", "2"];
        all.extend_from_slice(args);
        command(&all)
    }

    fn bench(&self, args: &[&str]) -> Ran {
        finish(self.command(args).spawn().expect("the program starts"))
    }

    /// With the emulated driver in `driver`.
    fn emulated(&self, driver: &Path, args: &[&str]) -> Ran {
        finish(self.command(args).env("LD_LIBRARY_PATH", driver).spawn().expect("the program starts"))
    }

    fn rows(&self, args: &[&str]) -> Vec<Value> {
        let ran = self.bench(args);
        match serde_json::from_str(ran.success()) {
            Ok(Value::Array(rows)) => rows,
            other => panic!("no array: {other:?}\n{}", ran.stdout),
        }
    }
}

fn tests(rows: &[Value]) -> Vec<&str> {
    rows.iter().map(|r| r["test"].as_str().unwrap()).collect()
}

#[test]
fn progress_is_a_line_for_each_sample() {
    let files = Files::new();
    let said = |args: &[&str]| {
        let ran = files.bench(args);
        ran.success();
        ran.stderr.lines().filter(|line| line.contains("sample")).map(str::to_owned).collect::<Vec<_>>()
    };
    let lines = said(&["-p", "4", "-n", "3", "--progress", "-o", "csv"]);
    let want = [
        "test 1/2 pp4, sample 1/2",
        "test 1/2 pp4, sample 2/2",
        "test 2/2 tg3, sample 1/2",
        "test 2/2 tg3, sample 2/2",
    ];
    assert_eq!(lines, want);
    assert_eq!(said(&["-p", "4", "-n", "0"]), [""; 0]);
}

#[test]
fn tests_are_all_combinations_with_their_samples() {
    let rows = Files::new().rows(&["-p", "4,8", "-n", "3", "-pg", "4,2", "-d", "0-16+16", "-o", "json"]);
    let names = ["pp4", "pp8", "tg3", "pp4+tg2", "pp4 @ d16", "pp8 @ d16", "tg3 @ d16", "pp4+tg2 @ d16"];
    assert_eq!(tests(&rows), names);
    for row in &rows {
        let samples: Vec<f64> =
            row["samples_ns"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect();
        assert_eq!(samples.len(), 2);
        let mean = (samples[0] + samples[1]) / 2.0;
        assert!((row["avg_ns"].as_f64().unwrap() - mean).abs() <= 1.0);
        let tokens = row["n_prompt"].as_u64().unwrap() + row["n_gen"].as_u64().unwrap();
        let rate = tokens as f64 / samples[0] * 1e9;
        assert!((row["samples_ts"][0].as_f64().unwrap() / rate - 1.0).abs() < 1e-6);
        assert!(row["gb_per_s"].as_f64().unwrap() > 0.0 && row["gop_per_s"].as_f64().unwrap() > 0.0);
        assert_eq!(row["adapter_dist"], "none");
        for key in
            ["model_filename", "model_type", "model_size", "n_threads", "type_k", "stddev_ts", "test_time"]
        {
            assert!(!row[key].is_null(), "{key}");
        }
    }
}

/// Threads and embeddings: every combination, recorded, and in columns of its own where it is not the usual one.
#[cfg(target_os = "linux")]
#[test]
fn threads_run_where_they_are_told() {
    let files = Files::new();
    let test =
        ["-r", "1", "-p", "4", "-n", "2", "--poll", "0,100", "-embd", "0,1", "--numa", "distribute", "-o"];
    // All that there can be: whoever runs this may be confined to any of them.
    let all = format!("0x{}", "f".repeat(256));
    let masks = format!("0x0,{all}");
    let rows = files.rows(&[&test[..], &["json", "-C", &masks, "--cpu-strict", "1"]].concat());
    let told: Vec<_> = rows
        .iter()
        .filter(|row| row["test"] == "tg2")
        .map(|row| {
            (row["cpu_mask"].as_str().unwrap(), row["poll"].as_u64().unwrap(), row["embeddings"] == true)
        })
        .collect();
    let mut want = Vec::new();
    for mask in ["0x0", all.as_str()] {
        want.extend([(mask, 0, false), (mask, 0, true), (mask, 100, false), (mask, 100, true)]);
    }
    assert_eq!(told, want);
    assert!(rows.iter().all(|row| row["cpu_strict"] == true));
    let md = files.bench(&[&test[..], &["md"]].concat()).success().to_owned();
    assert!(md.contains(" poll | embd | test ") && !md.contains("cpu_mask"), "{md}");
    // Without the output matrix, a token is a tenth less work.
    let gop = |row: &Value| row["gop_per_s"].as_f64().unwrap() * row["avg_ns"].as_f64().unwrap();
    assert!(gop(&rows[3]) < 0.95 * gop(&rows[1]), "{} {}", rows[1], rows[3]);
    let batched = ["-npp", "3", "-ntg", "2", "-npl", "2", "-embd", "1", "-o", "json"];
    assert_eq!(files.rows(&batched)[0]["embeddings"], true);
}

#[test]
fn flags_of_llama_bench_are_taken_or_answered() {
    let files = Files::new();
    let usual = [
        "-sm",
        "layer",
        "-mg",
        "0",
        "-ts",
        "1",
        "-nkvo",
        "1",
        "-nopo",
        "0",
        "-dev",
        "none",
        "-ot",
        "none",
        "--n-gpu-layers",
        "0",
    ];
    let more = ["--no-host", "0", "-ncmoe", "0", "-lm", "none", "-lzm", "auto", "-fa", "on", "--repack", "0"];
    let test = ["-p", "4", "-n", "0", "-o", "json"];
    let row = files.rows(&[&test[..], &usual, &more].concat()).remove(0);
    assert_eq!((&row["use_mmap"], &row["repack"]), (&false.into(), &"off".into()), "{row}");
    for (flag, value, told) in [
        ("-sm", "row", "one GPU at most"),
        ("-mg", "1", "one GPU at most"),
        ("-ts", "3/1", "one GPU at most"),
        ("-ts", "x", "expected shares"),
        ("-ot", "blk.*=CPU", "-ngl"),
        ("-ncmoe", "4", "experts"),
        ("-fitt", "1024", "-ngl auto"),
        ("-fitc", "4096", "-ngl auto"),
        ("-lm", "dio", "page cache"),
        ("-lzm", "on", "-lm"),
        ("-rpc", "host:50052", "this one"),
        ("-hf", "user/model", "give it with -m"),
        ("--no-host", "1", "buffers"),
        ("-C", "0xg", "hexadecimal"),
        ("-embd", "2", "expected 0 or 1"),
        ("--cpu-strict", "2", "expected 0 or 1"),
        ("--poll", "101", "expected 0 to 100"),
        ("--prio", "4", "-1..=3"),
        ("--numa", "everywhere", "distribute"),
    ] {
        let ran = files.bench(&[flag, value]);
        let line = ran.one_line_error(2);
        assert!(line.contains(told), "{flag} {value}: {line}");
    }
    let trace = ["--trace", "-embd", "1"];
    assert!(files.bench(&trace).one_line_error(2).contains("-embd 1"));
}

/// Types of the cache and ways to open a file come in lists as well.
#[test]
fn caches_and_ways_to_open_are_compared() {
    let files = Files::new();
    // With one sample, rate times time is the bytes.
    let test = ["-p", "0", "-n", "2", "-d", "40", "-r", "1"];
    let lists = ["-ctk", "f16,q8_0", "-mmp", "0,1"];
    let rows = files.rows(&[&test[..], &lists, &["-o", "json"]].concat());
    let told: Vec<_> = rows.iter().map(|r| (r["use_mmap"] == true, r["type_k"].as_str().unwrap())).collect();
    assert_eq!(told, [(false, "f16"), (false, "q8_0"), (true, "f16"), (true, "q8_0")]);
    // A cache in Q8_0 is fewer bytes to read.
    let gb = |row: &Value| row["gb_per_s"].as_f64().unwrap() * row["avg_ns"].as_f64().unwrap();
    let cached = 2.0 * 41.5 * 1024.0;
    let saved = gb(&rows[0]) - gb(&rows[1]);
    assert!((saved / (cached * (1.0 - 17.0 / 32.0)) - 1.0).abs() < 0.1, "{saved} of {cached}");
    let md = files.bench(&[&test[..], &lists].concat()).success().to_owned();
    assert!(md.contains(" type_k/v | mmap | test "), "{md}");
    for wrong in [&["-ctk", "f16,q8_0", "-ctv", "f16"][..], &["-ctv", "q8_0"]] {
        assert!(files.bench(wrong).one_line_error(2).contains("-ctk and -ctv differ"), "{wrong:?}");
    }
    assert!(files.bench(&["-lm", "none", "-mmp", "1"]).one_line_error(2).contains("--mmap"));
}

#[test]
fn devices_are_listed_without_a_model() {
    let ran = lory(&["bench", "--list-devices"]);
    let lines: Vec<&str> = ran.success().lines().collect();
    assert_eq!(lines.len(), 3, "{ran:?}");
    assert!(lines[0] == "Available devices:" && lines[1].starts_with("  cpu ("), "{ran:?}");
    assert!(lines[2].starts_with("  cuda"), "{ran:?}");
    assert!(lory(&["bench"]).one_line_error(2).contains("--model"));
}

#[test]
fn verbose_says_what_is_measured_against_what() {
    let ran = Files::new().bench(&["-v", "-p", "4", "-n", "0"]);
    ran.success();
    let begins = ["model    ", "device   cpu (", "ceilings "];
    let lines: Vec<&str> = ran.stderr.lines().collect();
    assert_eq!(lines.len(), begins.len(), "{ran:?}");
    assert!(lines.iter().zip(begins).all(|(line, begin)| line.starts_with(begin)), "{ran:?}");
}

#[test]
fn every_format_holds_every_row() {
    let files = Files::new();
    let run = |format| files.bench(&["-p", "4", "-n", "2", "-o", format]).success().to_owned();
    let md = run("md");
    assert!(
        md.contains("| model ") && md.contains("| pp4 ") && md.contains("| tg2 ") && md.contains(" ± "),
        "{md}"
    );
    assert_eq!(md.lines().count(), 4, "{md}");
    let csv = run("csv");
    let lines: Vec<&str> = csv.lines().collect();
    assert!(
        lines.len() == 3 && lines[0].starts_with("build_version,") && lines[0].ends_with("avg_ts,stddev_ts"),
        "{csv}"
    );
    let jsonl = run("jsonl");
    assert!(jsonl.lines().all(|l| serde_json::from_str::<Value>(l).unwrap().is_object()), "{jsonl}");
    assert_eq!(jsonl.lines().count(), 2);
    let sql = run("sql");
    assert_eq!((sql.matches("CREATE TABLE").count(), sql.matches("INSERT INTO").count()), (1, 2), "{sql}");
}

#[test]
fn a_second_format_goes_to_the_standard_error() {
    let files = Files::new();
    let ran = files.bench(&["-p", "4", "-n", "2", "-o", "md", "-oe", "json", "-fa", "1"]);
    assert_eq!(ran.success().lines().count(), 4, "{ran:?}");
    let rows: Value = serde_json::from_str(&ran.stderr).unwrap_or_else(|e| panic!("{e}: {ran:?}"));
    assert_eq!(rows.as_array().map(Vec::len), Some(2), "{ran:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn on_a_terminal_a_line_says_what_is_measured() {
    let files = Files::new();
    let run = |test: &str| {
        let (program, model) = (env!("CARGO_BIN_EXE_lory"), files.at("model.gguf"));
        let bench = format!("stty cols 100; exec '{program}' bench -m '{model}' -t 1 -r 2 {test}");
        let ran = Command::new("script")
            .args(["-qec", &bench, "/dev/null"])
            .env("SHELL", "/bin/sh")
            .env("TERM", "xterm")
            .output();
        ran.ok().map(|ran| String::from_utf8_lossy(&ran.stdout).into_owned())
    };
    for (test, told) in [
        ("-p 4 -n 2", ["test 1/2 pp4, sample 1/2", "test 2/2 tg2, sample 2/2"]),
        ("-npp 2 -ntg 1 -npl 0,2", ["test 1/1 pp2 tg1 npl2, sample 1/2", "sample 2/2"]),
        ("--trace --rate 200 --requests 2 -p 2 -n 2", ["trace, request 1/2", "request 2/2"]),
    ] {
        let Some(screen) = run(test) else {
            eprintln!("skipped: `script` (util-linux) is not there");
            return;
        };
        assert!(told.iter().all(|told| screen.contains(told)), "{test}: {screen}");
    }
    assert_eq!(files.bench(&["-p", "4", "-n", "2"]).stderr, "", "a pipe gets no such line");
}

#[test]
fn how_a_model_was_loaded_is_recorded() {
    let files = Files::new();
    let test = ["-p", "3", "-n", "0"];
    let row = files.rows(&[&test[..], &["-o", "json"]].concat()).remove(0);
    assert_eq!((&row["use_mmap"], &row["repack"]), (&true.into(), &"off".into()), "{row}");
    assert!(!files.bench(&test).success().contains("repack"));
    let row = files.rows(&[&test[..], &["-mmp", "0", "-o", "json"]].concat()).remove(0);
    assert_eq!(row["use_mmap"], false, "{row}");
    let other = [&test[..], &["--no-mmap", "--repack", "on", "-o"]].concat();
    let row = files.rows(&[&other[..], &["json"]].concat()).remove(0);
    assert_eq!((&row["use_mmap"], &row["repack"]), (&false.into(), &"on".into()), "{row}");
    let md = files.bench(&[&other[..], &["md"]].concat());
    assert!(md.success().contains(" | mmap | repack | "), "{md:?}");
}

#[test]
fn batches_have_the_columns_of_llama_batched_bench() {
    let files = Files::new();
    let rows = files.rows(&["-npp", "3", "-ntg", "2", "-npl", "1,4", "-o", "json"]);
    assert_eq!(rows.len(), 2);
    assert_eq!(
        (rows[1]["pp"].as_u64(), rows[1]["tg"].as_u64(), rows[1]["pl"].as_u64()),
        (Some(3), Some(2), Some(4))
    );
    assert_eq!(rows[1]["n_kv"], 20);
    let (time, speed) = (rows[1]["t_tg"].as_f64().unwrap(), rows[1]["speed_tg"].as_f64().unwrap());
    assert!((time * speed / 8.0 - 1.0).abs() < 1e-6);
    let md = files.bench(&["-npp", "3", "-ntg", "2", "-npl", "2"]).success().to_owned();
    assert!(md.contains("S_PP t/s") && md.contains("S_TG t/s") && md.contains("N_KV"), "{md}");
}

#[test]
fn adapters_are_measured_beside_the_base() {
    let files = Files::with_pack();
    let pack = files.at("pack.gguf");
    let rows =
        files.rows(&["--pack", &pack, "--adapter-dist", "uniform", "-p", "0", "-n", "3", "-o", "json"]);
    assert_eq!(tests(&rows), ["tg3", "tg3@L6", "arrive", "load", "swap", "mem"]);
    assert!(rows[0]["ratio_to_base"].is_null() && rows[1]["ratio_to_base"].as_f64().unwrap() > 0.0);
    assert_eq!(
        (&rows[1]["n_adapters"], &rows[1]["rank"], &rows[1]["basis_rank"]),
        (&6.into(), &4.into(), &4.into())
    );
    assert!(rows[2]["alone_p50_us"].as_f64().unwrap() > 0.0);
    assert!(rows[3]["open_ms"].as_f64().unwrap() > 0.0);
    for row in &rows[2..5] {
        assert!(row["p50_us"].as_f64().unwrap() <= row["p99_us"].as_f64().unwrap(), "{row}");
    }
    // Two layers of seven cores of 4 x 4 halves, and what describes them.
    assert!(rows[5]["bytes_per_adapter"].as_u64().unwrap() >= 14 * 32, "{}", rows[5]);

    let args = [
        "--pack",
        &pack,
        "--adapter-dist",
        "distinct",
        "-npp",
        "3",
        "-ntg",
        "2",
        "-npl",
        "1,8",
        "-o",
        "json",
    ];
    let rows = files.rows(&args);
    assert_eq!((&rows[0]["n_active"], &rows[1]["n_active"]), (&1.into(), &6.into()));
    for row in &rows {
        assert!(row["speed_tg"].as_f64().unwrap() > 0.0 && row["speed_tg_base"].as_f64().unwrap() > 0.0);
        assert!(
            row["ratio_to_base"].as_f64().unwrap() > 0.0 && row["ratio_pp_to_base"].as_f64().unwrap() > 0.0
        );
    }
}

#[test]
fn a_trace_reports_waiting_times() {
    let files = Files::with_pack();
    let pack = files.at("pack.gguf");
    let args = ["--pack", &pack, "--adapter-dist", "zipf", "-p", "70", "-n", "4", "-o", "json", "--trace"];
    let more = ["--rate", "200", "--requests", "8"];
    let rows = files.rows(&[&args[..], &more].concat());
    assert_eq!(tests(&rows), ["trace", "trace@L6"]);
    for row in &rows {
        assert_eq!((&row["completed"], &row["cached_tokens"]), (&8.0.into(), &0.into()), "{row}");
        assert!(row["median_ttft_ms"].as_f64().unwrap() <= row["p99_ttft_ms"].as_f64().unwrap());
        assert!(
            row["mean_tpot_ms"].as_f64().unwrap() > 0.0 && row["output_throughput"].as_f64().unwrap() > 0.0
        );
    }
}

/// The folder of the emulated CUDA driver; `None`, with a line that says so, where it does not build.
fn emulator() -> Option<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels/src/cuda/emulator/build.sh");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    match Command::new("bash").arg(script).arg(&folder).output() {
        Ok(built) if built.status.success() => Some(folder),
        failed => {
            println!("skipped: the emulated driver does not build here: {failed:?}");
            None
        }
    }
}

/// `name` of every row, in the formats for programs.
fn values(format: &str, text: &str, name: &str) -> Vec<String> {
    let object = |row: &Value| row[name].to_string().trim_matches('"').to_owned();
    let lines = || text.lines().filter(|line| !line.is_empty());
    // Counted from the end: what computes, in words, may have commas.
    let behind =
        |names: &str| names.rsplit(',').position(|n| n.trim_end_matches(')').trim() == name).unwrap();
    match format {
        "json" => serde_json::from_str::<Vec<Value>>(text).unwrap().iter().map(object).collect(),
        "jsonl" => lines().map(|line| object(&serde_json::from_str(line).unwrap())).collect(),
        "csv" => {
            let behind = behind(lines().next().unwrap());
            lines().skip(1).map(|l| l.rsplit(',').nth(behind).unwrap().trim_matches('"').to_owned()).collect()
        }
        _ => {
            let rows = lines().filter_map(|line| line.strip_prefix("INSERT INTO ")?.split_once(" VALUES "));
            let value = |(names, values): (&str, &str)| {
                values.rsplit(", ").nth(behind(names)).unwrap().trim_matches('\'').to_owned()
            };
            rows.map(value).collect()
        }
    }
}

/// A table of SQL: its columns with their types, and how many rows it has.
struct SqlTable {
    name: String,
    columns: Vec<(String, String)>,
    rows: usize,
}

/// The tables that SQL text makes. A row that names another column than its
/// table has, or gives a number to a text, is a failure.
fn sql_tables(text: &str) -> Vec<SqlTable> {
    let mut tables: Vec<SqlTable> = Vec::new();
    let mut lines = text.lines().filter(|line| !line.is_empty());
    while let Some(line) = lines.next() {
        if let Some(name) = line.strip_prefix("CREATE TABLE IF NOT EXISTS ") {
            let columns = lines.by_ref().take_while(|l| *l != ");").map(|l| {
                let (name, kind) = l.trim().trim_end_matches(',').split_once(' ').unwrap();
                (name.to_owned(), kind.to_owned())
            });
            let name = name.trim_end_matches(" (").to_owned();
            let table = SqlTable { name, columns: columns.collect(), rows: 0 };
            assert!(tables.iter().all(|t| t.name != table.name), "{} is made twice: {text}", table.name);
            tables.push(table);
            continue;
        }
        let (into, values) = line.strip_prefix("INSERT INTO ").unwrap().split_once(" VALUES ").unwrap();
        let (name, columns) = into.split_once(" (").unwrap();
        let table = tables.iter_mut().find(|t| t.name == name).unwrap_or_else(|| panic!("no table {name}"));
        let made: Vec<&str> = table.columns.iter().map(|c| c.0.as_str()).collect();
        assert_eq!(columns.trim_end_matches(')').split(", ").collect::<Vec<_>>(), made);
        // What computes, in words, may have commas: only the figures behind it are looked at.
        let figures = values.trim_end_matches(");").rsplit(", ").zip(table.columns.iter().rev()).take(12);
        for (value, (column, kind)) in figures {
            let text = value.starts_with('\'');
            assert!(value == "NULL" || text == (kind == "TEXT"), "{column} {kind}: {value}");
        }
        table.rows += 1;
    }
    tables
}

#[test]
fn formats_for_programs_are_one_file_of_one_shape_with_adapters_too() {
    let files = Files::with_pack();
    let pack = files.at("pack.gguf");
    let run = |more: &[&str]| files.bench(&[&["--pack", &pack], more].concat()).success().to_owned();
    let single = ["-p", "0", "-n", "2", "-o"];
    let batched = ["-npp", "2", "-ntg", "1", "-npl", "1,2", "-o"];
    let trace = ["--trace", "--rate", "200", "--requests", "2", "-p", "2", "-n", "2", "-o"];
    for (args, rows) in [(&single[..], 6), (&batched, 2), (&trace, 2)] {
        let csv = run(&[args, &["csv"]].concat());
        // Every value is quoted, no name is.
        let columns: Vec<usize> = csv.lines().skip(1).map(|l| l.split("\",\"").count()).collect();
        assert_eq!(columns, vec![csv.lines().next().unwrap().split(',').count(); rows], "{csv}");
        let jsonl = run(&[args, &["jsonl"]].concat());
        assert_eq!(jsonl.lines().count(), rows, "{jsonl}");
        let sql = run(&[args, &["sql"]].concat());
        assert_eq!(sql_tables(&sql).iter().map(|t| t.rows).sum::<usize>(), rows, "{sql}");
        for SqlTable { name, columns, .. } in sql_tables(&sql) {
            let ratio = columns.iter().find(|c| c.0 == "ratio_to_base").unwrap();
            assert_ne!(ratio.1, "TEXT", "{name}: {sql}");
        }
    }
    let tables = sql_tables(&run(&[&single[..], &["sql"]].concat()));
    let of: Vec<(&str, usize)> = tables.iter().map(|t| (t.name.as_str(), t.rows)).collect();
    assert_eq!(of, [("lory_bench", 2), ("lory_store", 4)]);
    let csv = run(&[&single[..], &["csv"]].concat());
    assert!(csv.lines().next().unwrap().ends_with("bytes_per_adapter,basis_bytes"), "{csv}");
    assert_eq!(values("csv", &csv, "bytes_per_adapter").iter().filter(|v| !v.is_empty()).count(), 1, "{csv}");
}

#[test]
fn layers_on_a_gpu_have_a_column() {
    let files = Files::with_pack();
    let Some(driver) = emulator() else { return };
    let pack = files.at("pack.gguf");
    let args = ["-ngl", "0,1-2,all", "-p", "3", "-n", "0", "-o"];
    for format in ["csv", "json", "jsonl", "sql"] {
        let text = files.emulated(&driver, &[&args[..], &[format]].concat()).success().to_owned();
        assert_eq!(values(format, &text, "n_gpu_layers"), ["0", "1", "2", "-2"], "{text}");
        assert_eq!(values(format, &text, "backends"), ["CPU", "CUDA", "CUDA", "CUDA"], "{text}");
    }
    let md = files.emulated(&driver, &[&args[..], &["md"]].concat()).success().to_owned();
    let cells: Vec<Vec<&str>> = md.lines().map(|line| line.split('|').map(str::trim).collect()).collect();
    assert_eq!(cells[0][4..7], ["backend", "ngl", "threads"], "{md}");
    let ngl: Vec<_> = cells[2..].iter().map(|row| row[5]).collect();
    assert_eq!(ngl, ["0", "1", "2", "-2"], "{md}");

    // The other kinds of tests, with adapters.
    let on_gpu = |more: &[&str]| {
        let args = [&["--device", "cuda", "--pack", &pack, "-o", "json"], more].concat();
        let ran = files.emulated(&driver, &args);
        let rows: Vec<Value> = serde_json::from_str(ran.success()).unwrap();
        for row in &rows {
            assert!(row["gpu_info"].as_str().unwrap().starts_with("cuda (Emulated)"), "{row}");
            assert_eq!((&row["n_gpu_layers"], &row["cpu_info"]), (&(-1).into(), &"".into()), "{row}");
        }
        rows.len()
    };
    assert_eq!(on_gpu(&["-p", "0", "-n", "2"]), 6);
    assert_eq!(on_gpu(&["-npp", "2", "-ntg", "1", "-npl", "2"]), 1);
    assert_eq!(on_gpu(&["--trace", "--rate", "200", "--requests", "2", "-p", "2", "-n", "2"]), 2);
}

#[test]
fn layers_on_a_gpu_that_is_not_there_are_one_line() {
    let files = Files::new();
    let without_gpu = |mut command: Command| {
        finish(command.env("CUDA_VISIBLE_DEVICES", "").spawn().expect("the program starts"))
    };
    let model = files.at("model.gguf");
    let elsewhere = without_gpu(command(&["run", "-m", &model, "-p", "x", "--device", "cuda"]));
    let line = elsewhere.one_line_error(1);
    for args in [&["-ngl", "1"][..], &["-ngl", "all"], &["--device", "cuda"]] {
        assert_eq!(without_gpu(files.command(args)).one_line_error(1), line, "{args:?}");
    }
    for args in [&["-ngl", "0"][..], &["-ngl", "0", "--device", "cuda"], &["-ngl", "auto"], &["-ngl", "-1"]] {
        let ran = without_gpu(files.command(&[args, &["-p", "3", "-n", "0", "-o", "json"]].concat()));
        assert_eq!(values("json", ran.success(), "n_gpu_layers"), ["0"], "{args:?}");
        let md = without_gpu(files.command(&[args, &["-p", "3", "-n", "0"]].concat()));
        assert!(!md.success().contains("ngl"), "{md:?}");
    }
}

#[test]
fn nonsense_is_one_line() {
    let files = Files::new();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["-p", "4-1"], 2, "4-1"),
        (&["-t", "0"], 2, "-t 0"),
        (&["-b", "0"], 2, "-b 0"),
        (&["-ctk", "f16", "-ctv", "q8_0"], 2, "-ctk"),
        (&["-o", "xml"], 2, "xml"),
        (&["-oe", "none"], 2, "none"),
        (&["-mmp", "2"], 2, "2"),
        (&["-fa", "off"], 2, "in tiles"),
        (&["-ngl", "many"], 2, "many"),
        (&["-ngl", "1", "--device", "cpu"], 2, "--device cpu"),
        (&["--adapter-dist", "one"], 2, "--pack"),
        (&["--trace", "--rate", "0"], 2, "--rate"),
        (&["-p", "0", "-n", "0"], 2, "nothing to measure"),
        (&["-npl", "0"], 2, "nothing to measure"),
        (&["-npp", "0", "-ntg", "0"], 2, "nothing to measure"),
        (&["-d", "99999999999"], 1, "-d"),
        (&["-npp", "99999999999"], 1, "-npp"),
        (&["--pack", "does-not-exist.gguf"], 1, "does-not-exist.gguf"),
    ];
    for (args, code, named) in cases {
        let ran = files.bench(args);
        assert!(ran.one_line_error(*code).contains(named), "{args:?}: {ran:?}");
    }
    assert!(lory(&["bench"]).one_line_error(2).contains("--model"));
}
