//! Commands that compute: the published continuation, adapters, logits, interruption.

mod program;

use std::{fs, io::Read, path::Path};

use program::{arg, command, finish, fixture, lory, lory_with_input, shared_data, signal};

/// The instruction set levels of this machine, as the program itself names them.
fn isa_levels() -> Vec<String> {
    let mut run = command(&["run", "-m", &arg(&fixture("models/llama.gguf")), "-p", "x", "-n", "1"]);
    let ran = finish(run.env("LORY_ISA", "no-such-level").spawn().unwrap());
    let line = ran.one_line_error(1).to_owned();
    let (_, names) = line.split_once("this machine has ").expect("the levels are listed");
    names.split(", ").map(str::to_owned).collect()
}

#[test]
fn the_published_continuation_at_every_level_thread_count_and_batch() {
    let Some(model) = shared_data("models/stories260K.gguf") else { return };
    let Some(expected) = shared_data("models/stories260K.expected-greedy-200.txt") else { return };
    let expected = fs::read_to_string(expected).unwrap();
    let model = arg(&model);
    // Once with nothing but BOS, once with the beginning as the prompt, so that batches matter.
    let (beginning, rest) = expected.split_at(expected.find(". She").unwrap() + 1);
    let levels = isa_levels();
    assert!(levels.iter().any(|l| l.eq_ignore_ascii_case("portable")), "{levels:?}");
    for level in &levels {
        for (threads, batch) in [("1", "1"), ("1", "64"), ("2", "1"), ("2", "64")] {
            let run = |prompt: &str, n: &str| {
                let args =
                    ["run", "-m", &model, "-p", prompt, "-n", n, "--temp", "0", "-t", threads, "-b", batch];
                finish(command(&args).env("LORY_ISA", level).spawn().unwrap())
            };
            assert_eq!(run("", "200").success(), expected, "{level}, -t {threads} -b {batch}");
            let continued = run(beginning, "40");
            let continued = continued.success();
            assert!(
                !continued.is_empty() && rest.starts_with(continued),
                "{level}, -t {threads} -b {batch}: {continued}"
            );
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_text() {
    let model = arg(&fixture("models/llama.gguf"));
    let run = |seed: &str| {
        lory(&["run", "-m", &model, "-p", "hello", "-n", "30", "-s", seed, "--temp", "1.5", "--ignore-eos"])
            .success()
            .to_owned()
    };
    assert_eq!(run("42"), run("42"));
    assert_ne!(run("42"), run("43"));
}

#[test]
fn a_stop_text_ends_the_answer_and_is_not_printed() {
    let Some(model) = shared_data("models/stories260K.gguf") else { return };
    let ran = lory(&["run", "-m", &arg(&model), "-p", "", "--temp", "0", "-r", "little girl na"]);
    assert_eq!(ran.success(), "Once upon a time, there was a ");
}

#[test]
fn prompts_come_from_arguments_files_and_standard_input() {
    let model = arg(&fixture("models/llama.gguf"));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    fs::write(&file, "some text\n").unwrap();
    let args = ["run", "-m", &model, "-n", "10", "--temp", "0"];
    let given = lory(&[&args[..], &["-p", "some text"]].concat());
    let from_file = lory(&[&args[..], &["-f", &arg(&file)]].concat());
    let piped = lory_with_input(&[&args[..], &["-f", "-"]].concat(), "some text\r\n");
    assert_eq!(given.success(), from_file.success());
    assert_eq!(given.success(), piped.success());
    let echoed = lory(&[&args[..], &["-p", "some text", "--echo"]].concat());
    assert_eq!(echoed.success(), format!("some text{}", given.stdout));
}

#[test]
fn metrics_are_written_for_prometheus() {
    let model = arg(&fixture("models/llama.gguf"));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("metrics.prom");
    let args = ["run", "-m", &model, "-p", "some text", "-n", "7", "--ignore-eos", "--metrics", &arg(&file)];
    lory(&args).success();
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains("\nlory_generated_tokens_total 7\n"), "{text}");
    let missing = arg(&dir.path().join("none/metrics.prom"));
    assert!(lory(&[&args[..9], &[&missing]].concat()).stderr.contains("metrics.prom"));
}

#[test]
fn tokens_are_printed_on_one_line() {
    let Some(model) = shared_data("models/stories260K.gguf") else { return };
    let tokenize = |extra: &[&str]| {
        lory(&[&["tokenize", "-m", &arg(&model), "-p", "Once upon a time"], extra].concat())
            .success()
            .to_owned()
    };
    assert_eq!(tokenize(&[]), "1 403 407 261 378\n");
    assert_eq!(tokenize(&["--no-bos"]), "403 407 261 378\n");
    assert_eq!(tokenize(&["--show"]).lines().count(), 5);
}

/// Rows of a NumPy file of two dimensions.
fn npy(path: &Path) -> Vec<Vec<f32>> {
    let bytes = fs::read(path).unwrap();
    let header = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let text = String::from_utf8_lossy(&bytes[10..10 + header]).into_owned();
    let (_, shape) = text.split_once("'shape': (").unwrap();
    let (rows, rest) = shape.split_once(", ").unwrap();
    let cols: usize = rest.split(')').next().unwrap().parse().unwrap();
    let values: Vec<f32> =
        bytes[10 + header..].chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    assert_eq!(values.len(), rows.parse::<usize>().unwrap() * cols);
    values.chunks(cols).map(<[f32]>::to_vec).collect()
}

fn assert_near(got: &[Vec<f32>], want: &[Vec<f32>]) {
    assert_eq!(got.len(), want.len());
    for (g, w) in got.iter().zip(want) {
        assert_eq!(g.len(), w.len());
        let range = w.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let worst = g.iter().zip(w).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst <= 1e-3 * range, "{worst} of {range}");
    }
}

/// The tokens of a model fixture's prompt, as `--tokens` takes them.
fn fixture_tokens(name: &str) -> String {
    let text = fs::read_to_string(fixture(&format!("models/{name}.json"))).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let tokens = json["tokens"].as_array().unwrap().iter().map(|t| t.to_string());
    tokens.collect::<Vec<_>>().join(",")
}

#[test]
fn logits_equal_the_reference_with_and_without_adapters() {
    let model = arg(&fixture("models/llama.gguf"));
    let tokens = fixture_tokens("llama");
    let dir = tempfile::tempdir().unwrap();
    // Colons and commas belong to the path; the last colon with a number behind it is the weight.
    let odd = dir.path().join("C:1, two.gguf");
    fs::copy(fixture("lora/attn.gguf"), &odd).unwrap();
    let odd = arg(&odd);
    let all = arg(&fixture("lora/all.gguf"));
    let out = dir.path().join("out.npy");
    let cases: &[(&[&str], &str)] = &[
        (&[], "models/llama.npy"),
        (&["--lora", &odd], "lora/attn.npy"),
        (&["--lora", &format!("{odd}:1.0")], "lora/attn.npy"),
        (&["--lora-scaled", &format!("{odd}:0.7"), "--lora-scaled", &format!("{all}:-0.4")], "lora/both.npy"),
        (
            &["--lora", &odd, "--adapter", "all:-0.4", "--adapter", "C:1, two:0.7", "--lora", &all],
            "lora/both.npy",
        ),
    ];
    for (adapters, reference) in cases {
        let args = ["logits", "-m", &model, "--tokens", &tokens, "--kv-type", "f32", "-o", &arg(&out)];
        let args = [&args[..], adapters].concat();
        lory(&args).success();
        assert_near(&npy(&out), &npy(&fixture(reference)));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file stays");
        fs::remove_file(&out).unwrap();
    }
}

#[test]
fn a_token_outside_the_vocabulary_is_refused_and_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.npy");
    let model = arg(&fixture("models/llama.gguf"));
    let ran = lory(&["logits", "-m", &model, "--tokens", "1,999999", "-o", &arg(&out)]);
    assert!(ran.one_line_error(1).contains("999999"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn an_unknown_adapter_is_named() {
    let model = arg(&fixture("models/llama.gguf"));
    let ran = lory(&["run", "-m", &model, "-p", "x", "--adapter", "nobody:0.5"]);
    assert!(ran.one_line_error(2).contains("--adapter nobody:0.5"), "{ran:?}");
    let lora = arg(&fixture("lora/attn.gguf"));
    for (typed, meant) in [("attn:abc", "the weight `abc`"), ("attn=0.5", "write attn:0.5")] {
        let ran = lory(&["run", "-m", &model, "-p", "x", "--lora", &lora, "--adapter", typed]);
        assert!(ran.one_line_error(2).contains(meant), "{ran:?}");
    }
    for (typed, meant) in [("atn:0.5", "did you mean `attn`?"), ("nobody", "there are attn")] {
        let ran = lory(&["run", "-m", &model, "-p", "x", "--lora", &lora, "--adapter", typed]);
        assert!(ran.one_line_error(1).contains(meant), "{ran:?}");
    }
}

#[test]
fn flags_for_a_device_say_that_they_have_no_effect_without_one() {
    let model = arg(&fixture("models/llama.gguf"));
    let run =
        |more: &[&str]| lory(&[&["run", "-m", &model, "-p", "x", "-n", "1", "--temp", "0"], more].concat());
    let want = run(&[]);
    let ran = run(&["-ngl", "1", "--device-adapter-mib", "64"]);
    assert_eq!(ran.success(), want.success());
    for flag in ["-ngl", "--device-adapter-mib"] {
        assert!(ran.stderr.contains(&format!("{flag} has no effect without --device cuda")), "{ran:?}");
    }
}

#[test]
fn of_an_option_that_is_given_twice_the_last_counts() {
    let model = arg(&fixture("models/llama.gguf"));
    let run =
        |args: &[&str]| lory(&[&["run", "-m", &model, "--ignore-eos"], args].concat()).success().to_owned();
    let once = run(&["-p", "hello", "--temp", "0", "-n", "5"]);
    assert_eq!(run(&["-p", "x", "-n", "9", "--temp", "1", "-p", "hello", "--temp", "0", "-n", "5"]), once);
    // Also where an option has an older name, and where it stands before a nested command's.
    assert_eq!(run(&["-p", "hello", "--temperature", "9", "--temp", "0", "-n", "5"]), once);
    let [attn, all] = ["lora/attn.gguf", "lora/all.gguf"].map(|name| arg(&fixture(name)));
    let both =
        lory(&["chat", "-m", &model, "--lora", &attn, "--lora", &all, "-v", "-p", "x", "-n", "1", "-st"]);
    assert!(both.stderr.contains("adapters 2"), "what can be repeated still adds up: {both:?}");
}

#[test]
fn options_have_the_names_that_other_commands_and_llama_cpp_give_them() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| arg(&dir.path().join(name));
    let model = arg(&fixture("models/llama.gguf"));
    let run = |flag: &str| {
        lory(&["run", "-m", &model, "-p", "x", "-n", "4", "--temp", "0", flag, "q8_0"]).success().to_owned()
    };
    assert_eq!(run("-ctk"), run("--kv-type"));
    let bench = |flag: &str| {
        lory(&["bench", "-m", &model, "-p", "2", "-n", "0", "-r", "1", flag, "q8_0", "-o", "json"])
    };
    assert!(bench("--kv-type").success().contains("\"type_k\": \"q8_0\""));
    let pack = |args: &[&str]| {
        let file = at("pack.gguf");
        lory(&[&["synth", "pack", "-m", &model, "--rank", "4", "-o", &file], args].concat()).success();
        fs::read(file).unwrap()
    };
    assert_eq!(pack(&["--n", "2", "-s", "3"]), pack(&["--adapters", "2", "--seed", "3"]));
    let adapters =
        ["synth", "adapters", "-m", &model, "--adapters", "1", "--rank", "4", "-o", &at("adapters")];
    lory(&adapters).success();
    lory(&["synth", "model", "llama-tiny", "-s", "3", "-o", &at("model.gguf")]).success();
    for n in ["--n", "--adapters"] {
        let ran = lory(&["synth", "pack", "-m", &model, n, "0", "-o", &at("none.gguf")]);
        assert!(ran.one_line_error(2).contains("--adapters"), "{ran:?}");
    }
}

/// Bound to single processors, a program has as many threads as it has unbound, and its answer is the same.
#[cfg(target_os = "linux")]
#[test]
fn threads_can_be_bound() {
    let model = arg(&fixture("models/llama.gguf"));
    let run = |flags: &[&str]| {
        let ran =
            lory(&[&["run", "-m", &model, "-p", "hello", "-n", "20", "--temp", "0", "-v"], flags].concat());
        let device = ran.stderr.lines().find(|line| line.starts_with("device ")).map(str::to_owned);
        (ran.success().to_owned(), device.unwrap_or_else(|| panic!("{ran:?}")))
    };
    let free = run(&[]);
    assert_eq!(run(&["--cpu-strict", "1", "--poll", "0", "--numa", "distribute", "--prio", "-1"]), free);
    let one = run(&["-C", &"f".repeat(256), "-t", "1"]);
    assert_eq!(one.0, free.0);
    assert!(one.1.ends_with(", 1 threads)"), "{one:?}");
    let absent = format!("0x1{}", "0".repeat(255));
    let ran = lory(&["run", "-m", &model, "-p", "hello", "-C", &absent]);
    assert!(ran.one_line_error(2).contains("there are 0x"), "{ran:?}");
}

#[test]
fn a_bos_that_is_written_out_is_told() {
    let Some(model) = shared_data("models/stories260K.gguf") else { return };
    let run = |text: &str| lory(&["run", "-m", &arg(&model), "-p", text, "-n", "1", "--temp", "0"]);
    let told = "the text begins with <s>, which is added anyway";
    assert!(run("<s>Once").stderr.contains(told));
    assert!(!run("Once").stderr.contains(told));
}

#[test]
fn a_prompt_that_is_too_long_is_refused_with_the_flag_that_helps() {
    let model = arg(&fixture("models/llama.gguf"));
    let text = "hello ".repeat(200);
    for command in [&["run"][..], &["chat", "-st"], &["logits", "-o", "/dev/null"]] {
        let ran = lory(&[command, &["-m", &model, "-c", "64", "-p", &text]].concat());
        let line = ran.one_line_error(1);
        assert!(line.contains("the context holds 64") && line.contains("-c"), "{command:?}: {line}");
    }
}

#[test]
fn a_file_that_is_named_several_times_is_refused_with_what_to_do() {
    let (model, lora) = (arg(&fixture("models/llama.gguf")), arg(&fixture("lora/attn.gguf")));
    for (times, advice) in [(2, "add their scales"), (3, "give it another weight")] {
        let loras = ["--lora", &lora].repeat(times);
        let ran = lory(&[&["run", "-m", &model, "-p", "x", "-n", "1"], &loras[..]].concat());
        assert!(ran.one_line_error(1).contains(advice), "{ran:?}");
    }
}

#[test]
fn a_context_without_memory_for_it_is_refused_with_what_fits() {
    let model = arg(&fixture("models/llama.gguf"));
    for n in ["2000000000", "4294967295"] {
        let ran = lory(&["run", "-m", &model, "-p", "x", "-n", "1", "-c", n]);
        let line = ran.one_line_error(2);
        assert!(line.contains(&format!("-c {n}: ")), "{line}");
        let fitting = line.split("at most ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        assert!(fitting.parse::<u32>().unwrap() > 4096, "{line}");
    }
}

#[test]
fn inspect_tells_everything_as_json() {
    let ran = lory(&["inspect", "--json", &arg(&fixture("lora/attn.gguf"))]);
    let json: serde_json::Value = serde_json::from_str(ran.success()).unwrap();
    assert_eq!(json["kind"], "LoRA adapter");
    assert_eq!(json["metadata"]["adapter.type"], "lora");
    let sum: u64 = json["tensors"].as_array().unwrap().iter().map(|t| t["bytes"].as_u64().unwrap()).sum();
    assert_eq!(json["tensor_bytes"].as_u64().unwrap(), sum);
}

#[test]
fn a_synthetic_model_is_reproducible_and_runs() {
    let dir = tempfile::tempdir().unwrap();
    let help = lory(&["synth", "model", "--help"]);
    let (_, shapes) = help.success().split_once("Shapes: ").unwrap();
    let (shapes, _) = shapes.split_once("Types:").unwrap();
    assert!(shapes.split_whitespace().any(|s| s == "llama-1b"), "{shapes}");
    let Some(small) = shapes.split_whitespace().find(|s| s.contains("tiny") || s.contains("test")) else {
        eprintln!("skipped: no shape small enough to be written in a test among {shapes}");
        return;
    };
    let paths = ["a.gguf", "b.gguf"].map(|n| dir.path().join(n));
    for path in &paths {
        lory(&["synth", "model", small, "--type", "Q4_0", "-o", &arg(path), "--seed", "5"]).success();
    }
    assert_eq!(fs::read(&paths[0]).unwrap(), fs::read(&paths[1]).unwrap());
    lory(&["run", "-m", &arg(&paths[0]), "-p", "x", "-n", "2", "--ignore-eos"]).success();
}

#[test]
fn a_random_pack_is_reproducible_and_its_adapters_differ() {
    let dir = tempfile::tempdir().unwrap();
    let model = arg(&fixture("models/llama.gguf"));
    let paths = ["a.gguf", "b.gguf"].map(|n| arg(&dir.path().join(n)));
    for path in &paths {
        let size = ["--adapters", "20", "--rank", "8", "--clusters", "2"];
        lory(&[&["synth", "pack", "-m", &model, "-o", path], &size[..]].concat()).success();
    }
    assert_eq!(fs::read(&paths[0]).unwrap(), fs::read(&paths[1]).unwrap());
    let shown = lory(&["inspect", &paths[0]]);
    assert!(shown.success().contains("kind      pack of adapters"), "{shown:?}");
    let run = |adapters: &[&str]| {
        let args = [
            "run",
            "-m",
            &model,
            "-p",
            "hello",
            "-n",
            "16",
            "--temp",
            "0",
            "--ignore-eos",
            "--pack",
            &paths[0],
        ];
        lory(&[&args[..], adapters].concat()).success().to_owned()
    };
    let base = run(&[]);
    let first = run(&["--adapter", "synth-00000"]);
    let second = run(&["--adapter", "synth-00001"]);
    assert!(base != first && first != second && base != second);
    assert_eq!(run(&["--adapter", "synth-00000:0"]), base);
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let model = arg(&fixture("models/llama.gguf"));
    let args = ["run", "-m", &model, "-p", "x", "-n", "2000", "--ignore-eos", "-c", "4096"];
    let mut child = command(&args).spawn().unwrap();
    let mut pipe = child.stdout.take().unwrap();
    pipe.read_exact(&mut [0]).unwrap();
    drop(pipe);
    let ran = finish(child);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(ran.stderr, "");
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_run_with_130() {
    let model = arg(&fixture("models/llama.gguf"));
    let args = ["run", "-m", &model, "-p", "x", "-n", "-1", "--ignore-eos", "-c", "100000"];
    let mut child = command(&args).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    signal(&child, libc::SIGINT);
    // The rest is read, so that the program is not stopped by a full pipe.
    std::thread::spawn(move || stdout.read_to_end(&mut Vec::new()));
    let ran = finish(child);
    assert_eq!(ran.code, 130, "{ran:?}");
    assert!(!ran.stderr.contains("error"), "{ran:?}");
}

#[test]
fn answers_keep_to_a_grammar_or_a_schema() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        arg(&path)
    };
    let grammar = "root ::= \" \"? (\"yes\" | \"no\") \"!\"{2}";
    let schema = r#"{"type":"object","properties":{"n":{"type":"integer","minimum":1,"maximum":9}},"required":["n"],"additionalProperties":false}"#;
    let (grammar_file, schema_file) = (file("g.gbnf", grammar), file("s.json", schema));
    let mut models = vec![arg(&fixture("models/llama.gguf")), arg(&fixture("models/qwen2.gguf"))];
    models.extend(shared_data("models/stories260K.gguf").map(|path| arg(&path)));
    for model in &models {
        for flags in [["--grammar", grammar], ["--grammar-file", &grammar_file]] {
            let run = lory(
                &[&["run", "-m", model, "-c", "1024", "-p", "Say", "-s", "7", "--temp", "1.5"][..], &flags]
                    .concat(),
            );
            assert!(["yes!!", "no!!"].contains(&run.success().trim_start_matches(' ')), "{run:?}");
        }
        for flags in [["-j", schema], ["--json-schema-file", &schema_file]] {
            let run = lory(
                &[&["run", "-m", model, "-c", "1024", "-p", "Say", "-s", "7", "--temp", "1.5"][..], &flags]
                    .concat(),
            );
            let value: serde_json::Value =
                serde_json::from_str(run.success()).unwrap_or_else(|e| panic!("{run:?}: {e}"));
            assert!((1..=9).contains(&value["n"].as_u64().unwrap()), "{run:?}");
        }
    }
    let run = |flags: &[&str]| lory(&[&["run", "-m", &models[0], "-p", "Say"][..], flags].concat());
    assert!(run(&["--grammar", "root ::= x"]).one_line_error(2).contains("line 1, column 10"));
    assert!(run(&["-j", "{"]).one_line_error(2).contains("--json-schema"));
    let bad = file("bad.gbnf", "root ::= \"a\"\n  |");
    assert!(run(&["--grammar-file", &bad]).one_line_error(1).contains("bad.gbnf"));
    assert!(run(&["--grammar-file", "none.gbnf"]).one_line_error(1).contains("none.gbnf"));
    assert!(run(&["--grammar", grammar, "-j", schema]).one_line_error(2).contains("cannot be used with"));
}

#[test]
fn metrics_are_written_as_prometheus_reads_them() {
    let model = arg(&fixture("models/llama.gguf"));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("metrics.prom");
    let lora = arg(&fixture("lora/attn.gguf"));
    let args = ["run", "-m", &model, "--lora", &lora, "-p", "hello there", "-n", "7", "--temp", "0"];
    lory(&[&args[..], &["--ignore-eos", "--metrics", &arg(&file)]].concat()).success();
    let text = fs::read_to_string(&file).unwrap();
    let value = |name: &str| -> f64 {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
    };
    assert_eq!(value("lory_requests_total"), 1.0);
    assert_eq!(value("lory_requests_ended_total{reason=\"length\"}"), 1.0);
    assert_eq!(value("lory_generated_tokens_total"), 7.0);
    // One step for the prompt, one for each token but the last.
    assert_eq!(value("lory_steps_total"), 7.0);
    assert_eq!(value("lory_adapters_loaded"), 1.0);
    assert!(value("lory_adapter_bytes") > 0.0 && value("lory_kv_bytes") > 0.0);
    assert_eq!(value("lory_time_to_first_token_seconds_count"), 1.0);
    for line in text.lines().filter(|l| !l.starts_with("# HELP lory_") && !l.starts_with("# TYPE lory_")) {
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
        assert!(name.starts_with("lory_") && value.parse::<f64>().is_ok(), "{line}");
    }
    let missing = arg(&folder.path().join("none").join("metrics.prom"));
    let refused = lory(&["run", "-m", &model, "-p", "x", "-n", "1", "--metrics", &missing]);
    assert!(refused.stderr.contains(&missing), "{refused:?}");
}
