//! Texts about the skills, for people.

use console::{measure_text_width, truncate_str};
use lory_demo::{Example, Skill, Skills};
use lory_models::adapter::unknown_name;

use crate::failure::{Failure, Outcome, one_line};

/// Columns that a line may have.
const WIDTH: usize = 110;

/// The skill that shows its family best: the most reliable, of those the one with the shortest example.
pub fn best<'a>(skills: impl Iterator<Item = &'a Skill>) -> Option<&'a Skill> {
    let length = |s: &Skill| s.example.prompt.len() + s.example.answer.len();
    skills.max_by(|a, b| a.pack.total_cmp(&b.pack).then(length(b).cmp(&length(a))))
}

/// A line for each family, with an example.
pub fn families(skills: &Skills) -> String {
    let families = skills.families();
    let widest = families.iter().map(|f| measure_text_width(f)).max().unwrap_or(0);
    let mut text = String::new();
    for family in families {
        let count = skills.family(family).count();
        let example = best(skills.family(family)).map_or(String::new(), |s| {
            format!("/{} {}", s.name, arrow(&s.example.prompt, &s.example.answer))
        });
        let line = format!("  {family:<widest$}  {count:>3}  {example}");
        text += &truncate_str(&line, WIDTH, "…");
        text.push('\n');
    }
    text
}

/// All families, those of one, or one skill.
///
/// # Errors
/// A name that is none, with the closest ones.
pub fn describe(skills: &Skills, what: &str) -> Outcome<String> {
    let what = what.trim_start_matches('/');
    if what.is_empty() {
        let head = format!("{} skills; /skills FAMILY lists those of a family\n", skills.all.len());
        return Ok(head + families(skills).trim_end());
    }
    if skills.families().contains(&what) {
        return Ok(family(skills, what));
    }
    match skills.get(what) {
        Some(skill) => Ok(one(skill)),
        None => Err(Failure::runtime(format!("no skill and no family `{what}`: {}", closest(skills, what)))),
    }
}

/// Names and families that look like `what`, or the families.
pub fn closest(skills: &Skills, what: &str) -> String {
    let families = skills.families();
    let names = skills.all.iter().map(|s| s.name.as_str());
    let all: Vec<&str> = names.chain(families.iter().copied()).collect();
    match unknown_name(what, &all) {
        hint if hint.starts_with("did you mean") => hint,
        _ => format!("the families are {}", families.join(", ")),
    }
}

fn family(skills: &Skills, family: &str) -> String {
    let widest = skills.family(family).map(|s| s.name.len()).max().unwrap_or(0);
    let title = skills.family(family).map(|s| measure_text_width(&s.title)).max().unwrap_or(0).min(WIDTH / 2);
    let line = |s: &Skill| {
        let padding = " ".repeat(title.saturating_sub(measure_text_width(&s.title)));
        let example = arrow(&s.example.prompt, &s.example.answer);
        let line = format!("  {:<widest$}  {}{padding}  {example}", s.name, s.title);
        truncate_str(&line, WIDTH, "…").into_owned()
    };
    skills.family(family).map(line).collect::<Vec<_>>().join("\n")
}

fn one(skill: &Skill) -> String {
    let Skill { name, family, title, example: Example { prompt, answer }, base, lora, pack, tests } = skill;
    let percent = |share: f64| share * 100.0;
    format!(
        "{name} ({family}): {title}\n  {}\n  right on {} prompts, as recorded: base {:.0} %, adapter as trained {:.0} %, as packed {:.0} %",
        arrow(prompt, answer),
        tests.len(),
        percent(*base),
        percent(*lora),
        percent(*pack)
    )
}

/// A prompt and its answer on one line.
pub fn arrow(prompt: &str, answer: &str) -> String {
    format!("{} → {}", one_line(prompt), one_line(answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skill(name: &str, family: &str, pack: f64) -> Skill {
        Skill {
            name: name.into(),
            family: family.into(),
            title: format!("does {name}"),
            example: Example { prompt: "a\nb".into(), answer: "c".repeat(200) },
            base: 0.02,
            lora: 1.0,
            pack,
            tests: vec![("x".into(), "y".into())],
        }
    }

    fn skills() -> Skills {
        let all = vec![
            skill("rot13", "ciphers", 0.5),
            skill("rot5", "ciphers", 0.9),
            skill("roman", "numbers", 0.9),
        ];
        Skills { seed: 1, rank: 8, all }
    }

    #[test]
    fn families_have_one_line_each() {
        let text = describe(&skills(), "").unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() == 3 && lines[0].starts_with("3 skills"), "{text}");
        assert!(lines[1].starts_with("  ciphers    2  /rot5 a b → cc") && lines[1].ends_with('…'), "{text}");
        assert!(lines.iter().all(|l| measure_text_width(l) <= WIDTH), "{text}");
    }

    #[test]
    fn a_family_lists_its_skills_and_a_skill_its_record() {
        let text = describe(&skills(), "ciphers").unwrap();
        assert!(text.starts_with("  rot13  does rot13  a b → ") && text.lines().count() == 2, "{text}");
        let text = describe(&skills(), "/roman").unwrap();
        assert!(text.starts_with("roman (numbers): does roman\n"), "{text}");
        assert!(
            text.contains("1 prompts, as recorded: base 2 %, adapter as trained 100 %, as packed 90 %"),
            "{text}"
        );
    }

    #[test]
    fn unknown_names_are_told_the_closest() {
        let message = |what: &str| match describe(&skills(), what) {
            Err(Failure::Runtime(m)) => m,
            other => panic!("{other:?}"),
        };
        assert!(message("rot14").contains("did you mean `rot13`"), "{}", message("rot14"));
        assert!(message("poems").contains("the families are ciphers, numbers"), "{}", message("poems"));
        assert!(message("nmubers").contains("`numbers`"), "{}", message("nmubers"));
    }
}
