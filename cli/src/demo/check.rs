//! `lory demo --check`: how many answers are right, measured now, beside what was recorded.

use std::time::Duration;

use indicatif::ProgressBar;
use lory_demo::{Skill, Skills};
use lory_runtime::{AdapterId, Engine, EngineOptions};

use crate::{
    chat::format::Format,
    failure::{Failure, Outcome},
    progress::counting_bar,
};

use super::{
    batch::{self, Question, Reply},
    interval::wilson,
    skills::closest,
    sources::Sources,
    table,
};

/// Questions that are answered side by side.
const AT_ONCE: usize = 256;
/// What the mean may fall below the recorded one.
const TOLERANCE: f64 = 0.02;
/// Context of the engine: no question needs more, and it bounds the rows of a step.
const N_CTX: u32 = 512;

/// What is to be measured.
pub struct Selection {
    /// Families, and with them `names`; everything if there are none of both.
    pub families: Vec<String>,
    /// Skills by name.
    pub names: Vec<String>,
    /// Prompts of each skill at most.
    pub samples: usize,
}

impl Selection {
    /// The skills, in their order.
    ///
    /// # Errors
    /// A family or skill that is none, with the closest names.
    fn of<'s>(&self, skills: &'s Skills) -> Outcome<Vec<&'s Skill>> {
        let families = skills.families();
        let known_family = |f: &&String| families.contains(&f.as_str());
        if let Some(bad) = self.families.iter().find(|f| !known_family(f)) {
            return Err(Failure::usage(format!(
                "--family {bad}: no family; there are {}",
                families.join(", ")
            )));
        }
        if let Some(bad) = self.names.iter().find(|n| skills.get(n).is_none()) {
            return Err(Failure::usage(format!("--skill {bad}: no skill; {}", closest(skills, bad))));
        }
        let all = self.families.is_empty() && self.names.is_empty();
        let chosen = |s: &&Skill| all || self.families.contains(&s.family) || self.names.contains(&s.name);
        Ok(skills.all.iter().filter(chosen).collect())
    }
}

/// One skill, measured.
#[derive(Debug)]
pub struct Measured<'s> {
    /// What was recorded.
    pub skill: &'s Skill,
    /// Prompts that were asked.
    pub samples: usize,
    /// How many of them the base alone answered exactly.
    pub base: usize,
    /// How many of them the adapter of the pack did.
    pub pack: usize,
    /// What it answered, in the order of the tests.
    pub answers: Vec<String>,
    /// The adapter's bytes in the pack.
    pub bytes: usize,
}

impl Measured<'_> {
    /// The base's share of right answers.
    pub fn base_share(&self) -> f64 {
        self.base as f64 / self.samples.max(1) as f64
    }

    /// The adapter's.
    pub fn pack_share(&self) -> f64 {
        self.pack as f64 / self.samples.max(1) as f64
    }
}

/// All of them.
pub struct Report<'s> {
    /// One for each skill.
    pub rows: Vec<Measured<'s>>,
    /// Whether every recorded prompt was asked.
    pub complete: bool,
    /// Cost of the answers of the base, and of the adapters.
    pub base: Cost,
    /// The same for the adapters.
    pub pack: Cost,
    /// Where it was measured.
    pub device: String,
}

/// What a pass cost.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Tokens read and made.
    pub tokens: usize,
    /// In how long.
    pub time: Duration,
}

/// Means over skills, as shares.
#[derive(Debug, PartialEq)]
pub struct Means {
    /// Of the base alone, now.
    pub base: f64,
    /// Of the adapters as they were trained, recorded.
    pub lora: f64,
    /// Of the pack, recorded.
    pub recorded: f64,
    /// Of the pack, now.
    pub pack: f64,
    /// Wilson's 95 % interval of the last.
    pub interval: (f64, f64),
    /// Bytes of an adapter.
    pub bytes: f64,
}

/// Means over these skills.
pub fn means<'a, 's: 'a>(rows: impl Iterator<Item = &'a Measured<'s>> + Clone) -> Means {
    let count = rows.clone().count().max(1) as f64;
    let mean = |value: &dyn Fn(&Measured) -> f64| rows.clone().map(value).sum::<f64>() / count;
    let pack = mean(&|m| m.pack_share());
    Means {
        base: mean(&|m| m.base_share()),
        lora: mean(&|m| m.skill.lora),
        recorded: mean(&|m| m.skill.pack),
        pack,
        interval: wilson(pack, rows.clone().map(|m| m.samples).sum()),
        bytes: mean(&|m| m.bytes as f64),
    }
}

/// An error if the mean is worse than recorded by more than the tolerance. Of a sample of the prompts, its interval must say so.
fn verdict(means: &Means, complete: bool) -> Outcome {
    let found = if complete { means.pack } else { means.interval.1 };
    if found >= means.recorded - TOLERANCE {
        return Ok(());
    }
    Err(Failure::runtime(format!(
        "{:.1} % of the answers are right, {:.1} % were when the skills were trained: more than {:.0} points less",
        means.pack * 100.0,
        means.recorded * 100.0,
        TOLERANCE * 100.0
    )))
}

/// How it is printed.
#[derive(Clone, Copy)]
pub enum Form {
    /// For people.
    Table,
    /// For programs.
    Json {
        /// With every answer.
        answers: bool,
    },
}

/// Measures, prints, and fails if the built-in skills have become worse.
pub fn run(selection: &Selection, sources: &Sources, threads: Option<usize>, form: Form) -> Outcome {
    let skills = selection.of(lory_demo::skills())?;
    let longest =
        skills.iter().flat_map(|s| s.tests.iter()).map(|(p, a)| p.len() + a.len()).max().unwrap_or(0);
    let options = EngineOptions {
        threads,
        n_ctx: Some(N_CTX),
        // A token is a byte, and some around them are special.
        kv_tokens: Some(AT_ONCE * (longest + 8).next_multiple_of(32)),
        prefix_sharing: false,
        ..EngineOptions::default()
    };
    let engine = sources.open(&options, &skills)?;
    let tests = tests(&engine, &skills, selection.samples)?;
    let bar = counting_bar(2 * tests.len() as u64, "prompts");
    let (base, base_cost) = answers(&engine, &tests, None, &bar)?;
    let adapters =
        skills.iter().map(|s| engine.adapters().resolve(&s.name)).collect::<Result<Vec<_>, _>>()?;
    let (pack, pack_cost) = answers(&engine, &tests, Some(&adapters), &bar)?;
    bar.finish_and_clear();
    let mut rows = skills
        .iter()
        .map(|&skill| {
            let (samples, bytes) = (0, engine.adapters().info(&skill.name)?.bytes);
            Ok(Measured { skill, samples, base: 0, pack: 0, answers: Vec::new(), bytes })
        })
        .collect::<Outcome<Vec<_>>>()?;
    for ((test, base), pack) in tests.iter().zip(&base).zip(pack) {
        let row = &mut rows[test.skill];
        row.samples += 1;
        row.base += usize::from(test.is_right(base));
        row.pack += usize::from(test.is_right(&pack));
        row.answers.push(pack.text);
    }
    let complete = rows.iter().all(|r| r.samples == r.skill.tests.len());
    let report = Report { rows, complete, base: base_cost, pack: pack_cost, device: engine.device() };
    match form {
        Form::Table => table::print(&report)?,
        Form::Json { answers } => table::print_json(&report, answers)?,
    }
    if !sources.are_built_in() {
        return Ok(());
    }
    verdict(&means(report.rows.iter()), complete)
}

/// A prompt that was not trained on.
struct Test<'s> {
    /// The skill's place in the selection.
    skill: usize,
    tokens: Vec<u32>,
    answer: &'s str,
}

impl Test<'_> {
    fn is_right(&self, reply: &Reply) -> bool {
        reply.ended && reply.text == self.answer
    }
}

/// The tests in turn over the skills: those side by side have as many different adapters as there are.
fn tests<'s>(engine: &Engine, skills: &[&'s Skill], samples: usize) -> Outcome<Vec<Test<'s>>> {
    let format = Format::choose(engine, None)?;
    let most = skills.iter().map(|s| s.tests.len()).max().unwrap_or(0).min(samples);
    let mut tests = Vec::new();
    for sample in 0..most {
        for (skill, (prompt, answer)) in
            skills.iter().enumerate().filter_map(|(i, s)| Some((i, s.tests.get(sample)?)))
        {
            tests.push(Test { skill, tokens: batch::tokens(engine, &format, prompt)?, answer });
        }
    }
    Ok(tests)
}

/// What the adapters answer, or the base alone.
fn answers(
    engine: &Engine,
    tests: &[Test],
    adapters: Option<&[AdapterId]>,
    bar: &ProgressBar,
) -> Outcome<(Vec<Reply>, Cost)> {
    let question = |test: &Test| Question {
        tokens: test.tokens.clone(),
        adapter: adapters.and_then(|ids| ids.get(test.skill).copied()),
        // An answer that goes on beyond the right one is wrong already.
        most: batch::length(engine, test.answer),
        to_the_end: false,
    };
    let questions: Vec<Question> = tests.iter().map(question).collect();
    let answers = batch::answer(engine, &questions, AT_ONCE, || bar.inc(1))?;
    let tokens = answers.prompt_tokens + answers.generated_tokens;
    Ok((answers.replies, Cost { tokens, time: answers.time }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skill(name: &str, family: &str, recorded: f64) -> Skill {
        let example = lory_demo::Example { prompt: "a".into(), answer: "b".into() };
        let (base, lora, pack) = (0.0, 1.0, recorded);
        let tests = vec![("x".into(), "y".into()); 100];
        Skill {
            name: name.into(),
            family: family.into(),
            title: "t".into(),
            example,
            base,
            lora,
            pack,
            tests,
        }
    }

    fn chosen(families: &[&str], names: &[&str]) -> Outcome<String> {
        let all = vec![
            skill("rot13", "ciphers", 1.0),
            skill("leet", "ciphers", 1.0),
            skill("roman", "numbers", 1.0),
        ];
        let skills = Skills { seed: 1, rank: 8, all };
        let owned = |list: &[&str]| list.iter().map(|s| s.to_string()).collect();
        let selection = Selection { families: owned(families), names: owned(names), samples: 1 };
        let names: Vec<&str> = selection.of(&skills)?.iter().map(|s| s.name.as_str()).collect();
        Ok(names.join(" "))
    }

    #[test]
    fn families_and_names_add_up() {
        assert_eq!(chosen(&[], &[]).unwrap(), "rot13 leet roman");
        assert_eq!(chosen(&["numbers"], &["leet"]).unwrap(), "leet roman");
        let message = |r: Outcome<String>| match r {
            Err(Failure::Usage(m)) => m,
            other => panic!("{other:?}"),
        };
        assert!(message(chosen(&["cipher"], &[])).contains("there are ciphers, numbers"));
        assert!(message(chosen(&[], &["rot14"])).contains("`rot13`"));
    }

    #[test]
    fn worse_than_recorded_is_an_error() {
        let (a, b) = (skill("a", "f", 0.9), skill("b", "f", 1.0));
        let rows = |right: usize, samples: usize| {
            let row =
                |skill, pack| Measured { skill, samples, base: 0, pack, answers: Vec::new(), bytes: 10 };
            [row(&a, right), row(&b, right)]
        };
        let judged = |right, samples, complete| verdict(&means(rows(right, samples).iter()), complete);
        assert!(judged(93, 100, true).is_ok(), "two points below 95 %");
        assert!(judged(92, 100, true).is_err());
        // Of 10 prompts each, 18 of 20 right say nothing against 95 %.
        assert!(judged(9, 10, false).is_ok());
        assert!(judged(5, 10, false).is_err());
        let means = means(rows(50, 100).iter());
        assert_eq!((means.base, means.pack, means.recorded, means.bytes), (0.0, 0.5, 0.95, 10.0));
        assert!(means.interval.0 > 0.43 && means.interval.1 < 0.57, "{means:?}");
    }
}
