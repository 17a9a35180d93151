//! `lory demo`, and `lory chat` without a model: the base and the skills that are built in.

#![cfg(feature = "demo")]

mod program;

use std::{fs, io::Write};

use lory_demo::{Skill, skills};
use program::{Ran, arg, command, finish, lory, lory_with_input};
use serde_json::Value;

fn chat(input: &str) -> Ran {
    lory_with_input(&["chat"], input)
}

/// A skill of which nothing is a prefix or a command, and another one.
fn two() -> [&'static Skill; 2] {
    [&skills().all[5], &skills().all[skills().all.len() - 3]]
}

fn errors(ran: &Ran) -> Vec<&str> {
    ran.stderr.lines().filter(|l| l.starts_with("error: ")).collect()
}

#[test]
fn chat_without_a_model_talks_to_the_skills() {
    let [a, b] = two().map(|s| s.name.as_str());
    let ran = chat(&format!("/{a}\nlantern\n/skill {b}\nlantern\n/none lantern\n/{a} lantern\n"));
    let answers: Vec<&str> = ran.success().lines().collect();
    assert_eq!(answers.len(), 4, "{ran:?}");
    assert_eq!(answers[0], answers[3], "greedy, and only the last message counts");
    assert!(
        !ran.stdout.contains('\x1b') && !ran.stderr.contains("/NAME"),
        "a pipe gets no greeting: {ran:?}"
    );
    for speaking in
        [format!("now speaking: {a} ("), format!("now speaking: {b} ("), "now speaking: base\n".into()]
    {
        assert!(ran.stderr.contains(&speaking), "{speaking}: {ran:?}");
    }
    assert_eq!(ran.stderr.matches("the base alone").count(), 1, "{ran:?}");
    // The flag does the same.
    let flag = lory(&["chat", "--adapter", a, "-p", "lantern", "-st"]);
    assert_eq!(flag.success().trim_end_matches('\n'), answers[0]);
}

#[test]
fn the_exported_files_answer_alike() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("new/demo");
    let ran = lory(&["demo", "--export", &arg(&folder)]);
    assert!(ran.success().is_empty() && ran.stderr.contains("base.gguf written"), "{ran:?}");
    assert_eq!(fs::read(folder.join("skills.gguf")).unwrap(), lory_demo::PACK);
    let (base, pack) = (arg(&folder.join("base.gguf")), arg(&folder.join("skills.gguf")));
    let [a, _] = two();
    let files = [
        "chat",
        "-m",
        &base,
        "--pack",
        &pack,
        "--adapter",
        &a.name,
        "--temp",
        "0",
        "-n",
        "96",
        "-p",
        "lantern",
        "-st",
    ];
    let built_in = lory(&["chat", "--adapter", &a.name, "-p", "lantern", "-st"]);
    assert_eq!(lory(&files).success(), built_in.success());
    let skills = lory_with_input(&["chat", "-m", &base], "/skills\n");
    assert!(skills.stderr.contains("built-in demo"), "{skills:?}");
    // What the help shows as an example, and its answer.
    let help = lory(&["demo", "--help"]);
    let example = help.success().lines().find_map(|l| l.trim().strip_prefix("lory run -m demo/base.gguf "));
    let words = example.unwrap().replace("demo/skills.gguf", &pack).replace('\'', "");
    let args = ["run", "-m", &base].into_iter().chain(words.split(' ')).collect::<Vec<_>>();
    let ran = lory(&args);
    assert_eq!(ran.success().trim(), "olleh", "{args:?}");
    // A folder that cannot be made, and a file in its place.
    assert!(lory(&["demo", "--export", &base]).one_line_error(1).contains("base.gguf"));
}

#[test]
fn skills_are_listed_by_family_and_told_one_by_one() {
    let skill = two()[0];
    let ran = chat(&format!(
        "/skills\n/skills {}\n/skills {}\n/skills {}x9\n",
        skill.family, skill.name, skill.name
    ));
    let text = ran.went_on();
    for family in skills().families() {
        assert!(text.contains(family), "{family}: {text}");
    }
    for of_family in skills().family(&skill.family) {
        assert!(text.contains(&format!("  {} ", of_family.name)), "{}: {text}", of_family.name);
    }
    assert!(text.contains(&format!("{} ({}): {}", skill.name, skill.family, skill.title)), "{text}");
    assert!(errors(&ran).len() == 1 && ran.stderr.contains(&format!("`{}`?", skill.name)), "{ran:?}");
}

#[test]
fn several_answer_side_by_side_and_mixed() {
    let [a, b] = two().map(|s| s.name.as_str());
    let one = |line: String| chat(&line).success().trim_end_matches('\n').to_owned();
    let want = [a, b, "none"].map(|name| one(format!("/{name} lantern\n")));
    let ran = chat(&format!("/compare {a} {b} none -- lantern\n"));
    let titled = [(a, &want[0]), (b, &want[1]), ("base", &want[2])];
    let blocks: Vec<String> =
        titled.iter().map(|(name, text)| format!("[{name}]\n{}\n", text.trim())).collect();
    assert_eq!(ran.success(), blocks.join("\n"));
    assert_eq!(ran.stderr.matches("[all at once: ").count(), 3, "{ran:?}");
    // A weight of 1 is the adapter, of 0 the base.
    assert_eq!(one(format!("/mix {a}=1 {b}=0\nlantern\n")), want[0]);
    let mixed = chat(&format!("/mix {a}=0.5 {b}=0.5\n/lora list {a}\n"));
    assert!(mixed.stderr.contains(&format!("now speaking: {a}:0.5 + {b}:0.5")), "{mixed:?}");
    assert!(mixed.success().contains("* 0.5"), "{mixed:?}");
}

#[test]
fn costs_are_told() {
    let [a, b] = two().map(|s| s.name.as_str());
    let ran = chat(&format!("/cost\n/cost {a}\n/mix {a} {b}\n/cost\n/cost nobody\n"));
    let text = ran.went_on();
    assert_eq!(
        (text.matches(" of its own").count(), text.matches("as it was trained: ").count()),
        (3, 3),
        "{ran:?}"
    );
    assert_eq!(text.matches("µs each (median)").count(), 2, "{ran:?}");
    assert_eq!(errors(&ran).len(), 2, "{ran:?}");
    assert!(ran.stderr.contains("`nobody`"), "{ran:?}");
}

#[test]
fn what_makes_no_sense_is_explained_and_the_conversation_goes_on() {
    let [a, b] = two().map(|s| s.name.as_str());
    let typed = [
        "/".to_owned(),
        format!("/{a}x"),
        "/no such thing".into(),
        "/skill".into(),
        "/skill nobody-at-all".into(),
        format!("/mix {a}=much"),
        format!("/mix {a}=0.5 {a}=0.5"),
        format!("/mix {a}=0.5 nobody=1"),
        "/mix none=1".into(),
        format!("/compare {a}"),
        format!("/compare {a} nobody text"),
        format!("/compare {}text", format!("{a} ").repeat(9)),
        format!("/compare {a} {b}"),
        "/skills \u{1b}[31mred".into(),
        "x".repeat(100_000),
        format!("/{a} {}", "x".repeat(5_000)),
    ];
    let ran = chat(&format!("{}\n/none lantern\n", typed.join("\n")));
    assert_eq!(ran.went_on(), chat("lantern\n").stdout);
    assert_eq!(errors(&ran).len(), typed.len(), "{ran:?}");
    let similar = format!("no command and no adapter /{a}x: did you mean `/{a}`");
    for part in [
        &similar,
        "/help lists",
        "`much` is not a finite number",
        "stands there twice",
        "at most 8",
        "tokens",
    ] {
        assert!(ran.stderr.contains(part), "{part}: {ran:?}");
    }
    assert!(!ran.stderr.contains('\x1b'), "{ran:?}");
}

#[test]
fn any_bytes_may_be_typed() {
    let mut child = command(&["chat"]).stdin(std::process::Stdio::piped()).spawn().unwrap();
    let name = &two()[0].name;
    let lines: [&[u8]; 5] =
        [b"\xff\xfe\x80", b"\x00\x01\x02\x1b[2J", "日本語 🎉".as_bytes(), b"//etc/passwd", b"</s><s><|sep|>"];
    let mut typed = child.stdin.take().unwrap();
    for prefix in ["", &format!("/{name} ")] {
        for line in lines {
            typed.write_all(prefix.as_bytes()).unwrap();
            typed.write_all(line).unwrap();
            typed.write_all(b"\n").unwrap();
        }
    }
    drop(typed);
    let ran = finish(child);
    ran.success();
    assert!(errors(&ran).is_empty(), "{ran:?}");
    assert_eq!(ran.stderr.matches("[prompt ").count(), 10, "{ran:?}");
}

#[test]
fn the_tour_is_plain_text_without_a_terminal() {
    let ran = lory(&["demo", "-t", "2"]);
    let text = ran.success();
    for step in ["1. One base model", "tokens/s", "µs (median)", "lory chat", "lory demo --check"] {
        assert!(text.contains(step), "{step}: {text}");
    }
    let count = skills().all.len();
    assert!(text.contains(&format!("{count} adapters")), "{text}");
    assert!(!text.contains('\x1b') && text.lines().all(|l| l.chars().count() < 200), "{text}");
    assert!(ran.stderr.is_empty(), "{ran:?}");
    assert!(lory(&["demo", "--color", "on"]).success().contains("\x1b[1;32m1. One base"));
}

/// The report of a check and its exit code.
fn check(args: &[&str]) -> (Value, i32) {
    let ran = lory(&[&["demo", "--check", "--json"], args].concat());
    let report = serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{e}: {ran:?}"));
    (report, ran.code)
}

#[test]
fn a_check_measures_what_was_asked_for() {
    let [a, b] = two();
    let (report, code) = check(&["--skill", &a.name, "--skill", &b.name, "--samples", "3"]);
    assert_eq!(code, 0, "three prompts prove nothing: {report}");
    let rows = report["skills"].as_array().unwrap();
    assert_eq!((rows.len(), report["complete"].as_bool()), (2, Some(false)));
    for (row, skill) in rows.iter().zip([a, b]) {
        assert_eq!((row["name"].as_str(), row["samples"].as_u64()), (Some(skill.name.as_str()), Some(3)));
        assert_eq!(row["lora_recorded"].as_f64(), Some(skill.lora));
        assert!(row["bytes"].as_u64().is_some_and(|n| n > 0) && row["base"].as_f64().is_some(), "{row}");
        // What the conversation answers is what is counted.
        let right = |(prompt, answer): &&(String, String)| {
            let ran =
                lory(&["chat", "--adapter", &skill.name, "-p", &format!("/{} {prompt}", skill.name), "-st"]);
            ran.success().strip_suffix('\n') == Some(answer) && !ran.stderr.contains("cut by")
        };
        let right = skill.tests.iter().take(3).filter(right).count();
        assert_eq!(row["pack"].as_f64(), Some(right as f64 / 3.0), "{}", skill.name);
    }
    let mean = &report["mean"];
    let shares: Vec<f64> = rows.iter().map(|r| r["pack"].as_f64().unwrap()).collect();
    assert!((mean["pack"].as_f64().unwrap() - shares.iter().sum::<f64>() / 2.0).abs() < 1e-12, "{report}");
}

#[test]
fn a_check_takes_other_files_and_tells_the_answers() {
    let dir = tempfile::tempdir().unwrap();
    lory(&["demo", "--export", &arg(dir.path())]).success();
    let (base, pack) = (arg(&dir.path().join("base.gguf")), arg(&dir.path().join("skills.gguf")));
    let name = &two()[0].name;
    let asked = ["--skill", name, "--samples", "20", "--answers"];
    let (built_in, _) = check(&asked);
    let (files, code) = check(&[&asked[..], &["-m", &base, "--pack", &pack]].concat());
    assert_eq!((&files["skills"], code), (&built_in["skills"], 0));
    assert_eq!(files["skills"][0]["answers"].as_array().map(Vec::len), Some(20), "{files}");
    // What is taken out of the pack is as good, up to its rounding.
    let lora = arg(&dir.path().join(format!("{name}.gguf")));
    lory(&["pack", "extract", &pack, name, "-o", &lora]).success();
    let (loras, code) = check(&[&asked[..], &["--adapters", &arg(dir.path())]].concat());
    let answers = |report: &Value| report["skills"][0]["answers"].as_array().expect("answers").clone();
    let same = answers(&loras).iter().zip(answers(&built_in)).filter(|(a, b)| **a == *b).count();
    assert!(same >= 18 && code == 0, "{same} of 20: {loras}");
    // Another skill has no file there.
    let ran = lory(&["demo", "--check", "--skill", &two()[1].name, "--adapters", &arg(dir.path())]);
    assert!(ran.one_line_error(1).contains(&format!("{}.gguf", two()[1].name)), "{ran:?}");
}

#[test]
fn a_check_prints_a_table() {
    let family = &two()[0].family;
    let ran = lory(&["demo", "--check", "--family", family, "--samples", "1"]);
    let text = &ran.stdout;
    assert!(!text.contains('\x1b'), "{text}");
    let named = text.lines().filter(|l| l.split_whitespace().nth(1) == Some(family)).count();
    assert_eq!(named, skills().family(family).count(), "{text}");
    for part in ["all skills", "95 % interval", "tokens/s", "(not all that were recorded)"] {
        assert!(text.contains(part), "{part}: {ran:?}");
    }
}

#[test]
fn checks_that_cannot_be_are_usage_errors() {
    for (args, named) in [
        (&["demo", "--check", "--family", "no-such"][..], "there are "),
        (&["demo", "--check", "--skill", "nobody"], "nobody"),
        (&["demo", "--check", "--samples", "0"], "0"),
        (&["demo", "--check", "--export", "x"], "cannot be used with"),
        (&["demo", "--json"], "--check"),
        (&["demo", "--pack", "x.gguf"], "--check"),
        (&["demo", "--check", "--answers"], "--json"),
        (&["demo", "--check", "--pack", "x.gguf", "--adapters", "y"], "cannot be used with"),
        (&["demo", "--samples", "3"], "--check"),
        (&["demo", "-t", "0"], "0"),
        (&["chat", "--adapter", "a", "-m", "x.gguf"], "--pack"),
    ] {
        let ran = lory(args);
        assert!(ran.one_line_error(2).contains(named), "{args:?}: {ran:?}");
    }
    let unknown = lory(&["chat", "--adapter", "nobody-at-all", "-p", "x", "-st"]);
    assert!(unknown.one_line_error(1).contains("nobody-at-all"));
}

/// Types `dialog` on a pseudo-terminal; see the conversations' tests.
#[cfg(target_os = "linux")]
#[test]
fn on_a_terminal_skills_are_introduced_and_completed() {
    use std::{io::Read, process::Stdio};

    let dir = tempfile::tempdir().unwrap();
    let line = format!("stty cols 120 rows 50; exec '{}' chat", env!("CARGO_BIN_EXE_lory"));
    let mut script = std::process::Command::new("script");
    script
        .args(["-qec", &line, "/dev/null"])
        .env("SHELL", "/bin/sh")
        .env("TERM", "xterm")
        .env("XDG_STATE_HOME", dir.path());
    script.env_remove("NO_COLOR").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let Ok(mut child) = script.spawn() else {
        eprintln!("skipped: `script` (util-linux) is not there");
        return;
    };
    let _watched = program::watch(&child);
    let mut typed = child.stdin.take().unwrap();
    let mut screen = child.stdout.take().unwrap();
    // All but the last letter: what Tab completes is this skill alone, if no other begins so.
    let begins = |name: &str, of: &str| name.starts_with(of);
    let skill = skills().all.iter().find(|s| {
        let head = &s.name[..s.name.len() - 1];
        head.len() > 2 && skills().all.iter().filter(|o| begins(&o.name, head)).count() == 1
    });
    let skill = skill.expect("a name of its own");
    let keys = format!("/{}\t\r", &skill.name[..skill.name.len() - 1]);
    let family = format!("/skills {}\t\r", &skill.family[..skill.family.len() - 1]);
    let speaking = format!("now speaking: {}", skill.name);
    let mut text = String::new();
    for (shown, keys) in [("/help lists", keys.as_str()), (&speaking, &family), (&skill.title, "\x04")] {
        text += &program::read_until(&mut screen, shown);
        text += &program::read_until(&mut screen, "> ");
        typed.write_all(keys.as_bytes()).unwrap();
    }
    let _ = screen.read_to_string(&mut text);
    assert_eq!(child.wait().unwrap().code(), Some(0), "{text}");
    assert!(text.contains("built-in demo") && text.contains("Tab completes"), "{text}");
    for family in skills().families() {
        assert!(text.contains(family), "{family}: {text}");
    }
}

#[test]
fn no_skill_has_the_name_of_a_command() {
    for name in [
        "help", "exit", "quit", "bye", "clear", "regen", "system", "adapter", "skill", "skills", "mix",
        "lora", "compare", "cost", "save", "load", "none",
    ] {
        assert!(skills().get(name).is_none(), "/{name} could not switch to it");
    }
}
