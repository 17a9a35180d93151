//! A conversation with its terminal: what is typed becomes answers and commands.

use std::{
    io::{self, IsTerminal, Write},
    path::Path,
};

use lory_runtime::Engine;

use super::{
    columns,
    commands::{self, Command},
    conversation::Conversation,
    input::{Entry, Input},
    transcript::Transcript,
};
use crate::{
    answer::Answer,
    demo::World,
    failure::{Failure, Outcome, one_line},
    mix::{self, Mix},
    model_flags::note,
    speed::{self, Costs},
    terminal::Style,
};

/// A conversation with its terminal.
pub struct Talk {
    pub(super) engine: Engine,
    /// The skills, if it is the built-in demo that speaks.
    pub(super) world: Option<World>,
    pub(super) conversation: Conversation,
    input: Input,
    /// Of standard error.
    style: Style,
    costs: Costs,
    /// Whether one answer is all.
    single_turn: bool,
    /// Whether the user was told that the base alone has no skill.
    told: bool,
}

impl Talk {
    /// Nothing typed yet; `style` is for standard error. It ends after one answer, or when the user does.
    pub fn new(
        engine: Engine,
        world: Option<World>,
        conversation: Conversation,
        input: Input,
        style: Style,
        single_turn: bool,
    ) -> Talk {
        Talk { engine, world, conversation, input, style, costs: Costs::default(), single_turn, told: false }
    }

    /// Until it ends. `first` is said before anything is read.
    ///
    /// # Errors
    /// The failure of the only answer; [`Failure::Told`] if any line from a pipe failed, where nobody reads what was said
    /// of it; Ctrl+C; a terminal or a pipe that is gone.
    pub fn hold(&mut self, mut first: Option<String>) -> Outcome {
        self.note_unheeded();
        let mut end = Ok(());
        if self.input.is_terminal() && !self.single_turn {
            if let Some(world) = &self.world {
                note(&world.greeting());
            }
            self.remark("/help lists the commands, Ctrl+D ends");
        }
        loop {
            let text = match first.take() {
                Some(text) => text,
                None => match self.input.next()? {
                    Entry::Text(text) => text,
                    Entry::End => return end,
                    Entry::Interrupt => return Err(Failure::Interrupted),
                },
            };
            if text.trim().is_empty() {
                continue;
            }
            let answered = match Command::parse(&text) {
                Some(Ok(Command::Exit)) => return end,
                Some(Ok(command)) => self.obey(command),
                Some(Err(advice)) => Err(Failure::runtime(advice)),
                None => self.say(commands::said(&text)).map(|()| true),
            };
            match answered {
                // One answer was asked for: its failure is the program's.
                Err(e) if self.single_turn => return Err(e),
                Ok(true) if self.single_turn => return Ok(()),
                Ok(_) => {}
                Err(Failure::Runtime(m) | Failure::Usage(m)) => {
                    note(&format!("error: {}", one_line(&m)));
                    if !self.input.is_terminal() {
                        end = Err(Failure::Told);
                    }
                }
                Err(other) => return Err(other),
            }
        }
    }

    /// Does what was asked for; whether that was to answer a new message.
    fn obey(&mut self, command: Command) -> Outcome<bool> {
        match command {
            Command::Help => print(commands::HELP),
            Command::Exit => Ok(()),
            Command::Clear => {
                self.conversation.clear();
                Ok(())
            }
            Command::Regen => self.regenerate(),
            Command::ShowSystem => print(self.conversation.system().unwrap_or("(no system message)")),
            Command::System(text) => {
                self.conversation.set_system(text);
                self.note_unheeded();
                Ok(())
            }
            Command::Speak { name, text, bare } => {
                self.speak(&name, bare)?;
                return match text {
                    Some(text) => self.say(&text).map(|()| true),
                    None => Ok(false),
                };
            }
            Command::ListAdapters(start) => self.list(&start),
            Command::Adapter(given) => self.only(&given),
            Command::Mix(words) => self.mix(&words),
            Command::LoraAdd { what, scale } => self.add(&what, scale),
            Command::LoraScale { name, scale } => self.scale(&name, scale),
            Command::LoraRemove(name) => self.remove(&name),
            Command::Cost(name) => self.cost(&name),
            Command::Skills(what) => match &self.world {
                Some(world) => print(&world.describe(&what)?),
                None => {
                    let message = "skills are those of the built-in demo (lory chat without -m); \
                                   /lora list shows the adapters of this model";
                    Err(Failure::runtime(message))
                }
            },
            Command::Save(path) => self.save(&path),
            Command::Load(path) => self.load(&path),
            Command::Compare(rest) => self.compare(&rest),
        }?;
        Ok(false)
    }

    /// Says so if the system message will not be read.
    fn note_unheeded(&self) {
        if self.conversation.system().is_some() && !self.conversation.heeds_system() {
            note("the chat template passes over system messages: put it into your message");
        }
    }

    /// A remark beside the conversation.
    pub(super) fn remark(&self, text: &str) {
        note(&self.style.dim(text));
    }

    fn save(&self, path: &Path) -> Outcome {
        let transcript = self.conversation.transcript();
        transcript.save(path)?;
        self.remark(&format!("{} messages saved in {}", transcript.turns.len(), path.display()));
        Ok(())
    }

    /// On an error everything stays as it was.
    fn load(&mut self, path: &Path) -> Outcome {
        let transcript = Transcript::load(path)?;
        let mut mix = Mix::default();
        for (name, scale) in &transcript.adapters {
            if self.engine.adapters().info(name).is_err() {
                let advice = format!("it speaks with the adapter `{name}`; load that first (/lora add FILE)");
                return Err(Failure::runtime(format!("{}: {advice}", path.display())));
            }
            mix.set(&self.engine, name, *scale)?;
        }
        let messages = transcript.turns.len();
        self.conversation.restore(transcript, mix)?;
        let label = self.conversation.mix().label();
        self.remark(&format!("{messages} messages loaded; now speaking: {label}"));
        Ok(())
    }

    fn say(&mut self, text: &str) -> Outcome {
        let answer = self.conversation.say(text, show)?;
        self.after(&answer)
    }

    fn regenerate(&mut self) -> Outcome {
        let answer = self.conversation.regenerate(show)?;
        self.after(&answer)
    }

    /// Ends the answer's last line and tells what it cost.
    fn after(&mut self, answer: &Answer) -> Outcome {
        let mut out = io::stdout().lock();
        if !answer.text.ends_with('\n') {
            writeln!(out)?;
        }
        out.flush()?;
        let forgotten = self.conversation.take_forgotten();
        if forgotten > 0 {
            self.remark(&format!(
                "[the context is full: the {forgotten} oldest messages were forgotten (-c raises it)]"
            ));
        }
        let mix = self.conversation.mix();
        self.costs.add(&mix.label(), &answer.stats);
        let line = speed::line(answer, mix, &self.engine, Some(&self.costs));
        self.remark(&format!("[{line}]"));
        if let Some(world) = self.world.as_ref().filter(|_| mix.parts().is_empty() && !self.told) {
            self.remark(&world.advice());
            self.told = true;
        }
        self.stopped(answer.was_interrupted())
    }

    /// Ctrl+C stops an answer for whoever can type another message; else it ends the program.
    fn stopped(&self, interrupted: bool) -> Outcome {
        match interrupted && (self.single_turn || !self.input.is_terminal()) {
            true => Err(Failure::Interrupted),
            false => Ok(()),
        }
    }

    fn compare(&mut self, rest: &str) -> Outcome {
        let (names, text) =
            commands::comparison(rest, |word| mix::is_name(&self.engine, word)).map_err(Failure::runtime)?;
        let mixes = names
            .iter()
            .map(|given| {
                let (name, scale) = mix::name_and_scale(&self.engine, given)?;
                Mix::only(&self.engine, name, scale)
            })
            .collect::<Outcome<Vec<Mix>>>()?;
        let answers = self.conversation.compare(&mixes, text.as_deref())?;
        let labels: Vec<String> = mixes.iter().map(Mix::label).collect();
        let size = console::Term::stdout().size_checked();
        let width = size.filter(|_| io::stdout().is_terminal()).map(|(_, columns)| usize::from(columns));
        let titled: Vec<(&str, &str)> =
            labels.iter().zip(&answers).map(|(label, a)| (label.as_str(), a.text.as_str())).collect();
        print(columns::lay_out(&titled, width).trim_end())?;
        let together = if mixes.len() == 2 { "both" } else { "all" };
        for (mix, answer) in mixes.iter().zip(&answers) {
            let line = speed::line(answer, mix, &self.engine, None);
            self.remark(&format!("[{together} at once: {line}]"));
        }
        self.stopped(answers.iter().any(Answer::was_interrupted))
    }
}

/// A piece of an answer, at once.
fn show(piece: &str) -> Outcome {
    let mut out = io::stdout().lock();
    out.write_all(piece.as_bytes())?;
    Ok(out.flush()?)
}

/// A whole text.
pub(super) fn print(text: &str) -> Outcome {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}
