//! Pre-tokenizers: which stretches of a text byte-level BPE may merge across.
//!
//! A GGUF file only names its pre-tokenizer (`tokenizer.ggml.pre`); the expressions themselves are those of the
//! models' own `tokenizer.json`, in the stages in which llama.cpp applies them (`llm_tokenizer_bpe`).
//!
//! The engine is a finite automaton, so time is linear in the text whatever the text is. It has no look-ahead; the only
//! one that these expressions need is `\s+(?!\S)|\s+`: a run of white space followed by something else leaves
//! its last character to the next word. [`Stage::spaces`] does that.

use regex_automata::{Input, PatternID, meta::Regex};

/// One pass: every match is a piece, and so is every gap between matches.
struct Stage {
    expression: &'static str,
    /// Ends in `|\s+(?!\S)|\s+`.
    spaces: bool,
}

/// A known pre-tokenizer.
pub(super) struct Pre {
    stages: &'static [Stage],
    /// A word that is a token as a whole is not merged from its bytes.
    pub(super) ignore_merges: bool,
    /// The default of `add_bos_token`.
    pub(super) add_bos: bool,
}

const fn spaced(expression: &'static str) -> Stage {
    Stage { expression, spaces: true }
}

const fn plain(expression: &'static str) -> Stage {
    Stage { expression, spaces: false }
}

const fn pre(stages: &'static [Stage]) -> Pre {
    Pre { stages, ignore_merges: false, add_bos: false }
}

const GPT2: &[Stage] = &[spaced(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+")];
const SMOLLM: &[Stage] =
    &[plain(r"\p{N}"), spaced(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+")];
const LLAMA3: &[Stage] = &[spaced(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
)];
const QWEN2: &[Stage] = &[spaced(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
)];
const QWEN35: &[Stage] = &[spaced(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+",
)];
const TEKKEN: &[Stage] = &[spaced(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+",
)];
const GPT4O: &[Stage] = &[spaced(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+",
)];
const DEEPSEEK3: &[Stage] = &[
    plain(r"\p{N}{1,3}"),
    plain(r"[一-龥\x{3040}-ゟ゠-ヿ]+"),
    spaced(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`\{|\}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"##,
    ),
];
const DEEPSEEK_CODER: &[Stage] = &[
    plain(r"[\r\n]"),
    plain(r"\s?\p{L}+"),
    plain(r"\s?\p{P}+"),
    plain(r"[一-龥ࠀ-一가-\x{D7FF}]+"),
    plain(r"\p{N}"),
];
// `\p{Lu}\p{Ll}\p{Lt}` are the cased letters that the original spells out as ranges.
const DEEPSEEK_LLM: &[Stage] = &[
    plain(r"[\r\n]"),
    plain(r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"),
    plain(r"\s?[!-/:-\~！-／：-～‘-‟\x{3000}-。]+"),
    plain(r"\s+$"),
    plain(r"[一-龥ࠀ-一가-\x{D7FF}]+"),
    plain(r"\p{N}+"),
];
const FALCON: &[Stage] = &[
    plain(r"[\p{P}$+<=>\^\~|`]+"),
    spaced(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"),
    plain(r"[0-9][0-9][0-9]"),
];
const BLOOM: &[Stage] = &[plain(r" ?[^(\s|.,!?…。，、।۔،)]+")];
const VIKING: &[Stage] = &[plain(r" ?[^(\s|.,!?…。，、।۔،)]+"), plain(r"\p{N}")];
const BAILING: &[Stage] =
    &[spaced(r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]")];
const SEED_CODER: &[Stage] = &[spaced(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+",
)];
const DEFAULT: &[Stage] = &[
    plain(r"[\p{P}$+<=>\^\~|]+"),
    spaced(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"),
    plain(r"\p{N}+"),
    plain(r"[0-9][0-9][0-9]"),
];

/// Names in `tokenizer.ggml.pre`, and what they stand for.
const KNOWN: &[(&[&str], Pre)] = &[
    (&["default"], pre(DEFAULT)),
    (
        &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        Pre { stages: LLAMA3, ignore_merges: true, add_bos: true },
    ),
    (&["dbrx", "smaug-bpe", "chatglm-bpe"], pre(LLAMA3)),
    (&["glm4"], Pre { stages: LLAMA3, ignore_merges: true, add_bos: false }),
    (&["qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "grok-2", "kormo"], pre(QWEN2)),
    (&["qwen35"], pre(QWEN35)),
    (
        &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "exaone4",
            "trillion",
            "gigachat",
            "mellum",
            "a.x-4.0",
            "granite-docling",
        ],
        pre(GPT2),
    ),
    (
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
        pre(SMOLLM),
    ),
    (&["tekken"], Pre { stages: TEKKEN, ignore_merges: true, add_bos: true }),
    (&["gpt-4o", "llama4", "kanana2", "minimax-m2"], pre(GPT4O)),
    (&["deepseek-v3", "hunyuan-dense", "joyai-llm"], pre(DEEPSEEK3)),
    (&["deepseek-coder"], pre(DEEPSEEK_CODER)),
    (&["deepseek-llm"], pre(DEEPSEEK_LLM)),
    (&["falcon"], pre(FALCON)),
    (&["bloom", "poro-chat", "gpt3-finnish"], pre(BLOOM)),
    (&["viking"], pre(VIKING)),
    (&["bailingmoe", "bailingmoe2", "llada-moe"], pre(BAILING)),
    (&["seed-coder"], pre(SEED_CODER)),
];

/// The pre-tokenizer of that name.
pub(super) fn find(name: &str) -> Option<&'static Pre> {
    KNOWN.iter().find(|(names, _)| names.contains(&name)).map(|(_, pre)| pre)
}

/// Every known name, for an error message.
pub(super) fn known() -> String {
    let names: Vec<&str> = KNOWN.iter().flat_map(|(names, _)| names.iter().copied()).collect();
    names.join(", ")
}

/// The compiled stages of one pre-tokenizer.
#[derive(Debug)]
pub(super) struct Splitter {
    stages: Vec<Regex>,
}

impl Splitter {
    /// Compiles the expressions; the error text is the engine's.
    pub(super) fn new(pre: &Pre) -> Result<Splitter, String> {
        let compile = |stage: &Stage| {
            // As the second pattern it is tried last, and its number tells that it was the one that matched.
            let patterns: &[&str] =
                if stage.spaces { &[stage.expression, r"\s+"] } else { &[stage.expression] };
            Regex::new_many(patterns).map_err(|e| e.to_string())
        };
        Ok(Splitter { stages: pre.stages.iter().map(compile).collect::<Result<_, _>>()? })
    }

    /// Calls `word` with the pieces of `text`, in order; joined they are `text`.
    pub(super) fn split<'t>(&self, text: &'t str, word: &mut impl FnMut(&'t str)) {
        split_stages(&self.stages, text, word);
    }
}

/// `dyn`, because every stage wraps the callback once more and a generic one would have no end of types.
fn split_stages<'t>(stages: &[Regex], text: &'t str, word: &mut dyn FnMut(&'t str)) {
    let Some((first, rest)) = stages.split_first() else {
        if !text.is_empty() {
            word(text);
        }
        return;
    };
    pieces(first, text, &mut |piece| split_stages(rest, piece, word));
}

/// Matches of `regex` and the gaps between them.
fn pieces<'t>(regex: &Regex, text: &'t str, piece: &mut dyn FnMut(&'t str)) {
    let mut done = 0;
    let mut at = 0;
    while at < text.len() {
        let Some(found) = regex.find(Input::new(text).range(at..)) else { break };
        let mut end = found.end();
        if found.pattern() == PatternID::must(1) && end < text.len() {
            end = without_last_char(text, found.start(), end);
        }
        if end <= found.start() {
            at = found.start() + text[found.start()..].chars().next().map_or(1, char::len_utf8);
            continue;
        }
        if done < found.start() {
            piece(&text[done..found.start()]);
        }
        piece(&text[found.start()..end]);
        done = end;
        at = end;
    }
    if done < text.len() {
        piece(&text[done..]);
    }
}

/// `end` moved before the last character of `text[start..end]`, if it has two or more.
fn without_last_char(text: &str, start: usize, end: usize) -> usize {
    match text[start..end].char_indices().next_back() {
        Some((last, _)) if last > 0 => start + last,
        _ => end,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words<'t>(name: &str, text: &'t str) -> Vec<&'t str> {
        let splitter = Splitter::new(find(name).unwrap()).unwrap();
        let mut words = Vec::new();
        splitter.split(text, &mut |w| words.push(w));
        assert_eq!(words.concat(), text);
        words
    }

    #[test]
    fn every_known_expression_compiles_and_loses_nothing() {
        let text = "Hello, wörld's 12345 \t\n\n  日本語 \u{85}\u{a0}x…!?  \r\n end  ";
        for (names, pre) in KNOWN {
            let splitter = Splitter::new(pre).unwrap_or_else(|e| panic!("{names:?}: {e}"));
            let mut joined = String::new();
            splitter.split(text, &mut |w| {
                assert!(!w.is_empty());
                joined.push_str(w);
            });
            assert_eq!(joined, text, "{names:?}");
        }
    }

    #[test]
    fn names_are_unique() {
        let names: Vec<&str> = KNOWN.iter().flat_map(|(n, _)| n.iter().copied()).collect();
        let set: std::collections::BTreeSet<&str> = names.iter().copied().collect();
        assert_eq!(set.len(), names.len());
    }

    #[test]
    fn a_run_of_spaces_leaves_its_last_to_the_next_word() {
        assert_eq!(words("gpt-2", "a   b"), ["a", "  ", " b"]);
        assert_eq!(words("gpt-2", "a   "), ["a", "   "]);
        assert_eq!(words("gpt-2", "a\n\nb"), ["a", "\n", "\n", "b"]);
        assert_eq!(words("llama-bpe", "a\n\n b"), ["a", "\n\n", " b"]);
        assert_eq!(words("llama-bpe", "x \u{3000}\u{3000}y"), ["x", " \u{3000}", "\u{3000}y"]);
    }

    #[test]
    fn digits_split_as_the_model_wants_them() {
        assert_eq!(words("llama-bpe", "12345"), ["123", "45"]);
        assert_eq!(words("qwen2", "123"), ["1", "2", "3"]);
        assert_eq!(words("smollm", " 12"), [" ", "1", "2"]);
        assert_eq!(words("gpt-2", " 123"), [" 123"]);
    }

    #[test]
    fn contractions_follow_case_rules() {
        assert_eq!(words("gpt-2", "I'm I'M"), ["I", "'m", " I", "'", "M"]);
        assert_eq!(words("llama-bpe", "I'm I'LL"), ["I", "'m", " I", "'LL"]);
    }
}
