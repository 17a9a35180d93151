//! `lory demo`: what Lory does, step by step on the built-in base.

use std::{
    io::{self, IsTerminal, Write},
    thread::sleep,
    time::{Duration, Instant},
};

use console::truncate_str;
use lory_demo::Skill;
use lory_runtime::{AdapterId, Engine, EngineOptions};

use crate::{
    bench::timing::quantile,
    chat::format::Format,
    failure::Outcome,
    switching::switch_time,
    terminal::{ColorChoice, Style, bytes},
};

use super::{
    batch::{self, Answers, Question, Reply},
    skills::{arrow, best},
    world::World,
};

/// How long a step stays on a terminal before the next begins.
const PAUSE: Duration = Duration::from_millis(2500);
/// Tokens that every sequence makes while speed is measured, and how often it is.
const SPEED_TOKENS: usize = 32;
const SPEED_RUNS: usize = 3;
/// Tokens of an answer at most.
const MOST: usize = 80;
/// Columns of a line at most.
const WIDTH: usize = 100;
/// What one prompt is asked of; those that the collection lacks are left out.
const SAME_PROMPT: (&str, [&str; 6]) =
    ("winter", ["reverse", "upper", "rot13", "morse", "sort", "pig-latin"]);

/// Shows everything, on standard output.
pub fn run(threads: Option<usize>, color: ColorChoice) -> Outcome {
    let start = Instant::now();
    let count = lory_demo::skills().all.len();
    let options = EngineOptions {
        threads,
        n_ctx: Some(512),
        kv_tokens: Some((count + 1) * 192),
        // What is asked twice is to be computed twice, or speeds would mean nothing.
        prefix_sharing: false,
        ..EngineOptions::default()
    };
    let (engine, world) = World::open_with(&options)?;
    let format = Format::choose(&engine, None)?;
    let skills = &world.skills().all;
    let ids = skills.iter().map(|s| engine.adapters().resolve(&s.name)).collect::<Result<_, _>>()?;
    let opened = start.elapsed();
    let mut tour = Tour {
        engine,
        format,
        world,
        ids,
        style: Style::stdout(color),
        pause: io::stdout().is_terminal(),
        steps: 0,
    };
    tour.opening(opened)?;
    tour.one_prompt()?;
    tour.families()?;
    tour.all_at_once()?;
    tour.costs()?;
    tour.end()
}

struct Tour {
    engine: Engine,
    format: Format,
    world: World,
    /// Of all skills, in their order.
    ids: Vec<AdapterId>,
    style: Style,
    /// Whether somebody reads along.
    pause: bool,
    steps: usize,
}

impl Tour {
    fn skills(&self) -> &'static [Skill] {
        &self.world.skills().all
    }

    /// Begins a step, some time after the one before.
    fn step(&mut self, title: &str) -> Outcome {
        if self.pause && self.steps > 0 {
            sleep(PAUSE);
        }
        self.steps += 1;
        let title = self.style.prompt(&format!("{}. {title}", self.steps));
        let gap = if self.steps > 1 { "\n" } else { "" };
        print(&format!("{gap}{title}\n"))
    }

    fn question(&self, prompt: &str, adapter: Option<AdapterId>) -> Outcome<Question> {
        let tokens = batch::tokens(&self.engine, &self.format, prompt)?;
        Ok(Question { tokens, adapter, most: MOST, to_the_end: false })
    }

    fn ask(&self, questions: &[Question]) -> Outcome<Answers> {
        batch::answer(&self.engine, questions, questions.len(), || {})
    }

    fn id(&self, skill: &Skill) -> Option<AdapterId> {
        let at = self.skills().iter().position(|s| s.name == skill.name)?;
        self.ids.get(at).copied()
    }

    /// The base, and that it has no skill.
    fn opening(&mut self, opened: Duration) -> Outcome {
        let sizes = self.world.sizes(&self.engine)?;
        self.step("One base model")?;
        let config = self.engine.model().decoder.config();
        print(&format!(
            "   {} of weights in {} layers of {}, trained from scratch for this program and built into it.\n   \
             Opened with {} adapters in {:.0} ms, on {}.\n   \
             It knows what prompts look like, but has no skill. Asked for `{}`, it says:\n",
            bytes(sizes.base as u64),
            config.n_layers(),
            config.n_embd,
            self.ids.len(),
            opened.as_secs_f64() * 1e3,
            self.engine.device(),
            SAME_PROMPT.0,
        ))?;
        let answers = self.ask(&[self.question(SAME_PROMPT.0, None)?])?;
        let text = answers.replies.first().map_or("", |r| r.text.as_str());
        print(&format!("{}\n", shown("base alone", SAME_PROMPT.0, text)))
    }

    /// The same prompt to several adapters, in one batch.
    fn one_prompt(&mut self) -> Outcome {
        let (prompt, names) = SAME_PROMPT;
        let skills: Vec<&Skill> = names.iter().filter_map(|n| self.world.skills().get(n)).collect();
        if skills.is_empty() {
            return Ok(());
        }
        self.step("One prompt, several skills")?;
        print(
            "   The same base and the same prompt, with another adapter for each line, all in one batch:\n",
        )?;
        let questions =
            skills.iter().map(|s| self.question(prompt, self.id(s))).collect::<Outcome<Vec<Question>>>()?;
        let answers = self.ask(&questions)?;
        for (skill, reply) in skills.iter().zip(&answers.replies) {
            print(&format!("{}\n", shown(&skill.name, prompt, &reply.text)))?;
        }
        Ok(())
    }

    /// A prompt that was not trained on for the best skill of every family.
    fn families(&mut self) -> Outcome {
        let all = self.world.skills();
        let skills: Vec<&Skill> = all.families().into_iter().filter_map(|f| best(all.family(f))).collect();
        self.step("Every adapter is a skill, and every answer is right or wrong")?;
        print(&format!(
            "   {} skills in {} families; prompts that no adapter was trained on:\n",
            all.all.len(),
            skills.len()
        ))?;
        let tests: Vec<(&Skill, &(String, String))> =
            skills.into_iter().filter_map(|s| Some((s, s.tests.first()?))).collect();
        let questions = tests
            .iter()
            .map(|(skill, (prompt, _))| self.question(prompt, self.id(skill)))
            .collect::<Outcome<Vec<Question>>>()?;
        let answers = self.ask(&questions)?;
        for ((skill, (prompt, answer)), reply) in tests.iter().zip(&answers.replies) {
            let mark = if is_right(reply, answer) { "right" } else { "wrong" };
            let line = shown(&skill.name, prompt, &reply.text);
            print(&format!("{line}  {}\n", self.style.dim(mark)))?;
        }
        Ok(())
    }

    /// Every adapter in one batch, and how fast that is.
    fn all_at_once(&mut self) -> Outcome {
        let skills = self.skills();
        self.step("All of them in one batch")?;
        let tests: Vec<(AdapterId, &(String, String))> =
            self.ids.iter().zip(skills).filter_map(|(id, s)| Some((*id, s.tests.get(1)?))).collect();
        let questions = tests
            .iter()
            .map(|(id, (prompt, _))| self.question(prompt, Some(*id)))
            .collect::<Outcome<Vec<Question>>>()?;
        let answers = self.ask(&questions)?;
        let right = tests.iter().zip(&answers.replies).filter(|((_, (_, a)), r)| is_right(r, a)).count();
        print(&format!(
            "   {} people ask {} different adapters at the same time, each something else: {right} answers are right,\n   \
             all together in {:.0} ms.\n",
            questions.len(),
            questions.len(),
            answers.time.as_secs_f64() * 1e3
        ))?;
        let fixed = |adapted: bool| -> Vec<Question> {
            let question = |q: &Question| Question {
                tokens: q.tokens.clone(),
                adapter: q.adapter.filter(|_| adapted),
                most: SPEED_TOKENS,
                to_the_end: true,
            };
            questions.iter().map(question).collect()
        };
        let (mut base, mut adapted) = (Vec::new(), Vec::new());
        for _ in 0..SPEED_RUNS {
            base.push(self.ask(&fixed(false))?.rate());
            adapted.push(self.ask(&fixed(true))?.rate());
        }
        let (base, adapted) = (quantile(&base, 0.5), quantile(&adapted, 0.5));
        print(&format!(
            "   Speed of {} sequences that read these prompts and write {SPEED_TOKENS} tokens each:\n     \
             base alone          {base:>7.0} tokens/s\n     \
             {:<4}adapters        {adapted:>7.0} tokens/s, {:.0} % of that\n",
            questions.len(),
            questions.len(),
            adapted / base.max(1e-9) * 100.0
        ))
    }

    /// What a switch and an adapter cost.
    fn costs(&mut self) -> Outcome {
        let us = switch_time(&self.engine, &self.ids)?;
        let sizes = self.world.sizes(&self.engine)?;
        let (count, records) = self
            .skills()
            .iter()
            .map(|s| self.world.bytes(s))
            .try_fold((0, 0), |(n, sum), b| Outcome::Ok((n + 1, sum + b?)))?;
        self.step("What an adapter costs")?;
        let each = records / count.max(1);
        print(&format!(
            "   A switch is a change of index: {us:.2} µs (median), whatever the adapter's size.\n   \
             The {count} adapters share bases of {}; each adds a core of {} (mean).\n   \
             As they were trained, LoRAs of rank {} in F16, each had {}: {:.0} times as much,\n   \
             and all of them {} in place of a pack of {}.\n",
            bytes(sizes.bases as u64),
            bytes(each as u64),
            self.world.skills().rank,
            bytes(sizes.lora as u64),
            sizes.lora as f64 / each.max(1) as f64,
            bytes((sizes.lora * count) as u64),
            bytes(sizes.pack as u64)
        ))
    }

    fn end(&mut self) -> Outcome {
        self.step("Your turn")?;
        print(
            "   lory chat                talk to the same model; Tab completes the skills\n   \
             lory demo --check        measure every skill\n   \
             lory chat -m MODEL.gguf  a model and adapters of your own (lory --help)\n",
        )
    }
}

/// Who answered what, on one line.
fn shown(name: &str, prompt: &str, answer: &str) -> String {
    truncate_str(&format!("     {name:<16} {}", arrow(prompt, answer)), WIDTH, "…").into_owned()
}

fn is_right(reply: &Reply, answer: &str) -> bool {
    reply.ended && reply.text == answer
}

fn print(text: &str) -> Outcome {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}
