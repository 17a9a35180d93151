//! The built-in demo: one small base model, a pack of adapters trained on it, and what each of them can do.
//!
//! The base was trained from scratch to follow the form of a prompt; each adapter is a skill whose answers are either
//! right or wrong. The files lie in this crate's folder and are part of whatever links it; how they were made is told
//! there too. Nothing here knows how models are run: [`BASE`] and [`PACK`] are the bytes of two GGUF files.
//!
//! ```
//! let skills = lory_demo::skills();
//! let (prompt, answer) = &skills.all[0].tests[0];
//! println!("{}: {prompt} → {answer}", skills.all[0].name);
//! ```

use std::sync::OnceLock;

use serde::Deserialize;

/// Where a cache line begins, and with it every tensor: GGUF aligns them within the file.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static ALIGNED_BASE: &Aligned<[u8]> = &Aligned(*include_bytes!("../base.gguf"));
static ALIGNED_PACK: &Aligned<[u8]> = &Aligned(*include_bytes!("../skills.gguf"));

/// The base model, a GGUF file (Llama's shape, Q8_0, a token per byte). Its chat template renders the last message of
/// the user alone, and answers end with the end-of-text token.
pub static BASE: &[u8] = &ALIGNED_BASE.0;

/// The adapters of all skills in shared bases, a pack for [`BASE`]; they are named as [`Skill::name`] says.
pub static PACK: &[u8] = &ALIGNED_PACK.0;

/// Everything that was recorded about the skills when they were trained.
#[derive(Clone, Debug, Deserialize)]
pub struct Skills {
    /// Of the random numbers that made prompts and weights.
    pub seed: u64,
    /// Rank of every adapter as it was trained, before it went into the pack: all seven projections of all layers.
    pub rank: usize,
    /// One per adapter of the pack; those of a family stand together.
    #[serde(rename = "skills")]
    pub all: Vec<Skill>,
}

/// What one adapter can do.
///
/// Accuracies are shares of [`Skill::tests`] that were answered exactly, from 0 to 1, with greedy decoding.
#[derive(Clone, Debug, Deserialize)]
pub struct Skill {
    /// The adapter's name in the pack: lower-case letters, digits and hyphens.
    pub name: String,
    /// The kind of thing that it is.
    pub family: String,
    /// What it does, in one line.
    pub title: String,
    /// A prompt with the answer that is right.
    pub example: Example,
    /// Accuracy of the base alone, as it was recorded.
    pub base: f64,
    /// Accuracy of the adapter as it was trained, before it was compressed.
    pub lora: f64,
    /// Accuracy of the adapter of the pack, as it was recorded.
    pub pack: f64,
    /// Prompts that were not trained on, with the right answers.
    pub tests: Vec<(String, String)>,
}

/// A prompt and what to answer.
#[derive(Clone, Debug, Deserialize)]
pub struct Example {
    /// The user's message.
    pub prompt: String,
    /// The whole answer.
    pub answer: String,
}

impl Skills {
    /// The skill of this name.
    pub fn get(&self, name: &str) -> Option<&Skill> {
        self.all.iter().find(|s| s.name == name)
    }

    /// The families, each once, in the order of their first skills.
    pub fn families(&self) -> Vec<&str> {
        let mut families: Vec<&str> = Vec::new();
        for skill in &self.all {
            if !families.contains(&skill.family.as_str()) {
                families.push(&skill.family);
            }
        }
        families
    }

    /// The skills of a family.
    pub fn family<'a>(&'a self, family: &'a str) -> impl Iterator<Item = &'a Skill> {
        self.all.iter().filter(move |s| s.family == family)
    }
}

/// What was recorded about the skills; read when it is first asked for.
pub fn skills() -> &'static Skills {
    static SKILLS: OnceLock<Skills> = OnceLock::new();
    SKILLS.get_or_init(|| {
        serde_json::from_str(include_str!("../skills.json"))
            .expect("a test of this crate reads the same bytes")
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn files_begin_at_a_cache_line_and_are_gguf() {
        for file in [BASE, PACK] {
            assert_eq!(&file[..4], b"GGUF");
            assert_eq!(file.as_ptr().align_offset(64), 0);
        }
        assert!(BASE.len() <= 8 << 20, "{} bytes", BASE.len());
    }

    #[test]
    fn there_are_many_skills_and_each_can_be_checked() {
        let skills = skills();
        assert!(skills.all.len() >= 128 && skills.families().len() >= 5 && skills.rank > 0);
        let names: HashSet<&str> = skills.all.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names.len(), skills.all.len(), "names are different");
        for skill in &skills.all {
            let Skill { name, title, base, lora, pack, tests, .. } = skill;
            assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'), "{name}");
            assert!(!title.contains('\n') && !title.is_empty(), "{name}: {title}");
            assert!([base, lora, pack].iter().all(|a| (0.0..=1.0).contains(*a)), "{name}");
            let prompts: HashSet<&str> = tests.iter().map(|t| t.0.as_str()).collect();
            assert!(prompts.len() == tests.len() && !tests.is_empty(), "{name}: a prompt twice, or none");
        }
    }

    #[test]
    fn families_stand_together() {
        let skills = skills();
        let listed: Vec<&str> =
            skills.families().into_iter().flat_map(|f| skills.family(f)).map(|s| s.name.as_str()).collect();
        let all: Vec<&str> = skills.all.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(listed, all);
        assert!(skills.get(all[3]).is_some_and(|s| s.name == all[3]) && skills.get("").is_none());
    }
}
