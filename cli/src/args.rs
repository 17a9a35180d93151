//! Flags of several letters behind a single dash, as people know them from llama.cpp.
//!
//! clap reads `-ngl 99` as `-n gl …`; such flags are rewritten into long ones beforehand.

use std::ffi::OsString;

/// Single-dash flag, and the long flag it stands for.
const ALIASES: &[(&str, &str)] = &[
    ("-sys", "--system"),
    ("-sysf", "--system-file"),
    ("-st", "--single-turn"),
    ("-ub", "--ubatch-size"),
    ("-ngl", "--gpu-layers"),
    ("-npp", "--npp"),
    ("-ntg", "--ntg"),
    ("-npl", "--npl"),
    ("-pg", "--pg"),
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
    ("-fa", "--flash-attn"),
    ("-mmp", "--mmap"),
    ("-lm", "--load-mode"),
    ("-oe", "--output-err"),
    ("-embd", "--embeddings"),
    ("-dev", "--device"),
    ("-sm", "--split-mode"),
    ("-mg", "--main-gpu"),
    ("-ts", "--tensor-split"),
    ("-ot", "--override-tensor"),
    ("-nkvo", "--no-kv-offload"),
    ("-nopo", "--no-op-offload"),
    ("-ncmoe", "--n-cpu-moe"),
    ("-fitt", "--fit-target"),
    ("-fitc", "--fit-ctx"),
    ("-lzm", "--lazy-mode"),
    ("-rpc", "--rpc"),
    ("-hf", "--hf-repo"),
    ("-hfr", "--hf-repo"),
    ("-hff", "--hf-file"),
    ("-hft", "--hf-token"),
];

/// Flags whose value may be any text, also one that looks like a flag.
const TAKES_TEXT: &[&str] = &[
    "-p",
    "--prompt",
    "-r",
    "--reverse-prompt",
    "--system",
    "--grammar",
    "-j",
    "--json-schema",
    "-f",
    "--file",
    "-o",
    "--output",
    "-m",
    "--model",
];

/// The arguments with every alias replaced. A text that follows `-p` and the like stays as it is,
/// and so does everything after `--`.
pub fn expand(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut out: Vec<OsString> = Vec::new();
    let mut literal = false;
    for arg in args {
        let is_value = out.last().and_then(|a| a.to_str()).is_some_and(|a| TAKES_TEXT.contains(&a));
        let replaced = match arg.to_str() {
            Some(text) if !literal && !is_value => {
                literal = text == "--";
                long_form(text)
            }
            _ => None,
        };
        out.push(replaced.unwrap_or(arg));
    }
    out
}

fn long_form(arg: &str) -> Option<OsString> {
    let (flag, value) = arg.split_once('=').map_or((arg, None), |(f, v)| (f, Some(v)));
    let (_, long) = ALIASES.iter().find(|(short, _)| *short == flag)?;
    Some(match value {
        Some(value) => format!("{long}={value}").into(),
        None => (*long).into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(args: &[&str]) -> Vec<String> {
        expand(args.iter().map(OsString::from)).into_iter().map(|a| a.into_string().unwrap()).collect()
    }

    #[test]
    fn aliases_become_long_flags() {
        assert_eq!(
            expanded(&["lory", "chat", "-ngl", "99", "-st", "-ub=8"]),
            ["lory", "chat", "--gpu-layers", "99", "--single-turn", "--ubatch-size=8"]
        );
        assert_eq!(expanded(&["lory", "-s", "-n5"]), ["lory", "-s", "-n5"]);
    }

    #[test]
    fn texts_are_left_alone() {
        assert_eq!(expanded(&["run", "-p", "-st", "-st"]), ["run", "-p", "-st", "--single-turn"]);
        assert_eq!(expanded(&["run", "-sys", "-ngl", "-ngl"]), ["run", "--system", "-ngl", "--gpu-layers"]);
        assert_eq!(expanded(&["run", "--", "-st"]), ["run", "--", "-st"]);
    }
}
