//! Command lines that make no sense: one line, exit code 2, and no file is touched.

mod program;

use program::lory;

#[test]
fn help_and_version_succeed() {
    for page in [
        "--help",
        "chat --help",
        "run --help",
        "inspect --help",
        "tokenize --help",
        "logits --help",
        "compress --help",
        #[cfg(feature = "demo")]
        "demo --help",
        "bench --help",
        "pack --help",
        "pack extract --help",
        "synth --help",
        "synth model --help",
        "synth adapters --help",
        "synth pack --help",
    ] {
        let args: Vec<&str> = page.split(' ').collect();
        let ran = lory(&args);
        assert!(ran.success().contains("Usage:"), "{args:?}");
        assert!(ran.stdout.contains("xample"), "{args:?} teaches by examples");
        assert!(ran.stdout.lines().all(|line| line.chars().count() <= 100), "{}", ran.stdout);
        // `help run` is `run --help`.
        let help: Vec<&str> = ["help"].iter().chain(&args[..args.len() - 1]).copied().collect();
        assert_eq!(lory(&help).success(), ran.stdout, "{help:?}");
    }
    assert_eq!(lory(&["--version"]).success(), format!("lory {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn no_command_shows_the_help() {
    let ran = lory::<&str>(&[]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("Usage:") && ran.stdout.is_empty(), "{ran:?}");
}

#[test]
fn unknown_and_missing_arguments_are_named() {
    let cases: &[(&[&str], &str)] = &[
        (&["nonsense"], "nonsense"),
        (&["run", "--nonsense"], "--nonsense"),
        (&["run", "-p", "x"], "--model"),
        (&["run", "-m", "x.gguf"], "-p TEXT"),
        (&["tokenize", "-m", "x.gguf"], "-p TEXT"),
        (&["tokenize", "-m", "x.gguf", "-p", "a", "-f", "b"], "cannot be used with"),
        (&["logits", "-m", "x.gguf", "-p", "a"], "--output"),
        (&["logits", "-m", "x.gguf", "--tokens", "1,x", "-o", "o"], "the id of a token"),
        (&["logits", "-m", "x.gguf", "--tokens", "1,,2", "-o", "o"], "the id of a token"),
        (&["inspect"], "FILE"),
        (&["synth", "model", "no-such-shape", "-o", "o"], "no-such-shape"),
        (&["synth", "model", "llama-1b", "--type", "Q9", "-o", "o"], "Q9"),
        (&["run", "-m", "x.gguf", "-p", "a", "-t", "0"], "0"),
        (&["run", "-m", "x.gguf", "-p", "a", "-b", "0"], "0"),
        (&["run", "-m", "x.gguf", "-p", "a", "-n", "-7"], "-7"),
        (&["run", "-m", "x.gguf", "-p", "a", "--kv-type", "q3"], "q3"),
        (&["run", "-m", "x.gguf", "-p", "a", "--device-adapter-mib", "all"], "--device-adapter-mib"),
        (&["run", "-m", "x.gguf", "-p", "a", "-t", "-1"], "-t -1: a negative number"),
        (&["run", "-m", "x.gguf", "-p", "a", "-c", "-20"], "-c -20: a negative number"),
        (&["compress", "-m", "x", "-o", "y", "--rank", "-4", "z"], "--rank -4: a negative number"),
        (&["pack", "add", "p", "-m", "x", "--max-error", "-0.5", "z"], "--max-error -0.5"),
        (&["pack", "add", "p", "-m", "x", "--max-error", "nan", "z"], "--max-error"),
    ];
    for (args, named) in cases {
        let ran = lory(args);
        let line = ran.one_line_error(2);
        assert!(line.contains(named), "{args:?}: {line}");
        assert!(ran.stdout.is_empty());
    }
}

#[test]
fn sampling_values_without_a_meaning_are_refused_before_anything_is_opened() {
    for (flag, value) in [
        ("--temp", "nan"),
        ("--temp", "-1"),
        ("--top-p", "1.5"),
        ("--min-p", "-0.1"),
        ("--repeat-penalty", "0"),
        ("--mirostat", "1"),
        ("--logit-bias", "hello"),
        ("--xtc-threshold", "2"),
    ] {
        for command in ["run", "chat"] {
            let ran = lory(&[command, "-m", "does-not-exist.gguf", "-p", "x", flag, value]);
            assert!(ran.one_line_error(2).contains(flag), "{flag} {value}: {ran:?}");
        }
    }
}

#[test]
fn adapter_weights_that_are_no_numbers_are_refused() {
    for value in ["a.gguf", "a.gguf:abc", "C:\\a.gguf", "a.gguf:inf"] {
        let ran = lory(&["run", "-m", "does-not-exist.gguf", "-p", "x", "--lora-scaled", value]);
        assert!(ran.one_line_error(2).contains("--lora-scaled"), "{value}: {ran:?}");
    }
}

#[cfg(unix)]
#[test]
fn an_argument_that_is_no_text_is_named() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};
    let args = ["run", "-m", "x.gguf", "-p"].map(OsStr::new);
    let ran = lory(&[&args[..], &[OsStr::from_bytes(b"ab\xff")]].concat());
    assert!(ran.one_line_error(2).contains("-p ab\u{fffd}: is not UTF-8"), "{ran:?}");
}
