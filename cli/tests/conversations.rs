//! `lory chat` driven through a pipe, and through a pseudo-terminal.

mod program;

use std::{
    fs,
    io::{Read, Write},
    process::Stdio,
};

use program::{Ran, arg, command, finish, fixture, lory, lory_with_input, read_until, signal};

fn model() -> String {
    arg(&fixture("models/llama.gguf"))
}

/// Greedy answers of at most 12 tokens to what is typed, with both adapters loaded, none speaking.
fn chat(extra: &[&str], input: &str) -> Ran {
    let model = model();
    let args = ["chat", "-m", &model, "-n", "12", "--temp", "0", "--ignore-eos"];
    lory_with_input(&[&args[..], extra].concat(), input)
}

/// Both adapters, loaded and silent.
fn silent() -> Vec<String> {
    vec!["--lora".into(), arg(&fixture("lora/attn.gguf")), "--lora".into(), arg(&fixture("lora/all.gguf"))]
}

fn chat_with_adapters(input: &str) -> Ran {
    let adapters = silent();
    let adapters: Vec<&str> = adapters.iter().map(String::as_str).collect();
    let ran = chat(&adapters, &format!("/adapter none\n{input}"));
    assert_eq!(ran.code, 0, "{ran:?}");
    ran
}

/// The lines of speeds.
fn speeds(ran: &Ran) -> Vec<&str> {
    ran.stderr.lines().filter(|l| l.starts_with("[prompt")).collect()
}

#[test]
fn a_pipe_gets_answers_without_decoration() {
    let once = chat(&[], "hello\n");
    assert!(!once.success().contains("> ") && !once.stdout.contains('\x1b'), "{once:?}");
    assert!(once.stdout.ends_with('\n') && once.stdout.trim().len() > 1, "{once:?}");
    assert_eq!(speeds(&once).len(), 1, "{once:?}");
    // The same first answer, and a second to a longer conversation.
    let twice = chat(&[], "hello\n\nhello\n");
    assert!(twice.success().starts_with(&once.stdout));
    assert!(speeds(&twice)[1].contains("cached"), "{twice:?}");
}

#[test]
fn a_single_turn_answers_once() {
    let ran = chat(&["-p", "hello", "-st"], "never read\n");
    assert_eq!(ran.success(), chat(&[], "hello\n").stdout);
    assert_eq!(speeds(&ran).len(), 1);
    assert_eq!(chat(&["-st"], "hello\nnever read\n").success(), ran.stdout);
}

#[test]
fn adapters_are_switched_while_talking_and_switching_back_restores_the_answer() {
    let answer = |input: &str| {
        let ran = chat_with_adapters(input);
        ran.stdout.lines().last().unwrap_or_default().to_owned()
    };
    let base = answer("hello\n");
    let attn = answer("/adapter attn\nhello\n");
    let all = answer("/adapter all\nhello\n");
    assert!(base != attn && attn != all && base != all, "{base} / {attn} / {all}");
    // After a detour everything is as in a conversation of its own.
    assert_eq!(answer("/adapter all\nhello\n/clear\n/adapter attn\nhello\n"), attn);
    assert_eq!(answer("/adapter all\nhello\n/clear\n/adapter none\nhello\n"), base);
    assert_eq!(answer("/adapter attn:0\nhello\n"), base);
    // Mixing by steps is mixing at once.
    let mixed = answer("/lora add attn 0.7\n/lora add all -0.4\nhello\n");
    assert_eq!(answer("/lora add all\n/lora add attn 0.7\n/lora scale all -0.4\nhello\n"), mixed);
    assert_eq!(
        answer("/lora add all -0.4\n/lora add attn 0.7\n/lora rm all\n/lora scale attn 1\nhello\n"),
        attn
    );
}

#[test]
fn the_speed_line_names_the_adapters_and_their_cost() {
    let ran = chat_with_adapters("hello\n/lora add attn 0.7\nhello\n");
    let lines = speeds(&ran);
    assert!(lines[0].contains("· base"), "{lines:?}");
    assert!(lines[1].contains("attn:0.7 (") && lines[1].contains("ms/token"), "{lines:?}");
}

#[test]
fn adapters_are_loaded_by_file_name_while_talking() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("my, own: adapter.gguf");
    fs::copy(fixture("lora/attn.gguf"), &path).unwrap();
    let ran = chat(&[], &format!("/lora add {} 0.5\n/lora list\n", path.display()));
    let line = ran.success();
    assert!(line.starts_with("* 0.5") && line.contains("my, own: adapter"), "{ran:?}");
}

#[test]
fn two_adapters_answer_side_by_side() {
    let ran = chat_with_adapters("/compare attn none hello\n");
    let answer = |input: &str| chat_with_adapters(input).stdout.trim().to_owned();
    assert_eq!(ran.stderr.matches(" · cut by -n]").count(), 2, "{ran:?}");
    let want = format!("[attn]\n{}\n\n[base]\n{}\n", answer("/adapter attn\nhello\n"), answer("hello\n"));
    assert_eq!(ran.stdout, want);
    // The conversation does not remember it; without a text the last question is asked again.
    let again = chat_with_adapters("hello\n/compare attn none\n");
    assert!(again.stdout.ends_with(&want), "{again:?}");
}

#[test]
fn commands_that_fail_are_explained_and_the_conversation_goes_on() {
    let ran = chat(
        &[],
        "/nonsense\n/adapter nobody\n/lora rm nobody\n/lora add /no/such/file.gguf\n/regen\n/compare a\nhello\n",
    );
    assert_eq!(ran.went_on(), chat(&[], "hello\n").stdout);
    for named in ["/nonsense", "`nobody`", "/no/such/file.gguf", "nothing was said", "/compare A B"] {
        assert!(ran.stderr.contains(named), "{named}: {ran:?}");
    }
    assert_eq!(ran.stderr.lines().filter(|l| l.starts_with("error: ")).count(), 6, "{ran:?}");
}

#[test]
fn system_help_clear_regen_exit_and_several_lines() {
    let base = chat(&[], "hello\n").stdout;
    let ran = chat(&[], "/system\n/system Be brief.\n/system\n/exit\nhello\n");
    assert_eq!(ran.success(), "(no system message)\nBe brief.\n");
    let with_system = chat(&["-sys", "Be brief."], "hello\n").stdout;
    assert_ne!(with_system, base);
    assert_eq!(chat(&[], "/system Be brief.\nhello\n").stdout, with_system);
    assert_eq!(chat(&["-sys", "Be brief."], "/system none\nhello\n").stdout, base);
    assert_eq!(chat(&[], "hello\n/clear\nhello\n").stdout, base.repeat(2));
    // Greedy: once more is the same.
    assert_eq!(chat(&[], "hello\n/regen\n").stdout, base.repeat(2));
    assert!(chat(&[], "/help\n").stdout.contains("/compare"));
    let lines = chat(&[], "\"\"\"one\n/exit\ntwo\"\"\"\n");
    assert_eq!(lines.success(), chat(&["-p", "one\n/exit\ntwo", "-st"], "").stdout);
}

#[test]
fn a_template_from_a_file_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.jinja");
    fs::write(&path, "{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    let plain = chat(&["--chat-template", &arg(&path)], "hello\n");
    let model = model();
    let run = lory(&["run", "-m", &model, "-p", "hello", "-n", "12", "--temp", "0", "--ignore-eos"]);
    assert_eq!(plain.success().trim_end(), run.success().trim_end());
    fs::write(&path, "{{ raise_exception('no way') }}").unwrap();
    let refused = chat(&["--chat-template", &arg(&path), "-st"], "hello\n");
    assert!(refused.one_line_error(1).contains("no way"), "{refused:?}");
}

#[test]
fn messages_that_nobody_would_read_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let [template, empty] = ["t.jinja", "empty.txt"].map(|name| dir.path().join(name));
    fs::write(&template, "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}").unwrap();
    fs::write(&empty, "\n").unwrap();
    let told = "passes over system messages";
    let ran = chat(&["--chat-template", &arg(&template), "-sys", "Be brief."], "hello\nhello\n");
    assert_eq!((ran.code, ran.stderr.matches(told).count()), (0, 1), "{ran:?}");
    let typed = chat(&["--chat-template", &arg(&template)], "/system Be brief.\n");
    assert!(typed.stderr.contains(told), "{typed:?}");
    assert!(!chat(&["-sys", "Be brief."], "hello\n").stderr.contains(told));
    assert!(chat(&["-f", &arg(&empty), "-st"], "").one_line_error(2).contains("the message is empty"));
}

#[cfg(unix)]
#[test]
fn signals_end_a_chat_that_nobody_types_at() {
    let model = model();
    let endless = ["chat", "-m", &model, "-n", "-1", "--ignore-eos", "-c", "100000"];
    let single = [&endless[..], &["-p", "hello", "-st"]].concat();
    for (args, signal_sent, code) in [
        (&endless[..], libc::SIGINT, 130),
        (&endless, libc::SIGTERM, 143),
        (&endless, libc::SIGHUP, 129),
        (&single, libc::SIGINT, 130),
        (&single, libc::SIGTERM, 143),
    ] {
        let mut chat = command(args);
        program::heed_hangups(&mut chat);
        let mut child = chat.stdin(Stdio::piped()).spawn().unwrap();
        let mut typed = child.stdin.take().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        // The second message would be answered for ever.
        let _ = typed.write_all(b"hello\nhello\n");
        stdout.read_exact(&mut [0]).unwrap();
        signal(&child, signal_sent);
        // The rest is read, so that the program is not stopped by a full pipe.
        std::thread::spawn(move || stdout.read_to_end(&mut Vec::new()));
        let ran = finish(child);
        assert_eq!(ran.code, code, "{args:?}: {ran:?}");
        assert_eq!(speeds(&ran).len(), usize::from(signal_sent == libc::SIGINT), "{args:?}: {ran:?}");
    }
    // Where a message is awaited.
    let mut child = command(&endless).stdin(Stdio::piped()).spawn().unwrap();
    let mut typed = child.stdin.take().unwrap();
    typed.write_all(b"/help\n").unwrap();
    read_until(child.stdout.as_mut().unwrap(), "/regen");
    signal(&child, libc::SIGINT);
    assert_eq!(finish(child).code, 130);
}

#[cfg(target_os = "linux")]
#[test]
fn who_was_started_to_outlive_its_terminal_does() {
    let chat = format!("trap '' HUP; exec '{}' chat -m '{}'", env!("CARGO_BIN_EXE_lory"), model());
    let mut sh = std::process::Command::new("sh");
    sh.args(["-c", &chat]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = sh.spawn().unwrap();
    child.stdin.as_mut().unwrap().write_all(b"/help\n").unwrap();
    read_until(child.stdout.as_mut().unwrap(), "/regen");
    // Of two that wait, the first number is taken first.
    signal(&child, libc::SIGHUP);
    signal(&child, libc::SIGTERM);
    assert_eq!(finish(child).code, 143);
}

/// `lory chat` on a pseudo-terminal of 100 columns, with a shell that outlives it and its Ctrl+C.
#[cfg(target_os = "linux")]
struct Terminal {
    script: std::process::Child,
    typed: std::process::ChildStdin,
    screen: std::process::ChildStdout,
    /// All that was shown.
    text: String,
    _watched: std::sync::mpsc::Sender<()>,
}

#[cfg(target_os = "linux")]
impl Terminal {
    /// `None`, with a line that says so, where there is no pseudo-terminal to be had.
    fn chat(args: &str, dir: &std::path::Path) -> Option<Terminal> {
        let chat = format!(
            "trap : INT; stty cols 100 rows 40; sh -c \"echo pid \\$\\$; exec '{}' chat -m '{}' {args}\"; code=$?; stty -a; exit $code",
            env!("CARGO_BIN_EXE_lory"),
            model(),
        );
        let mut script = std::process::Command::new("script");
        script
            .args(["-qec", &chat, "/dev/null"])
            .env("SHELL", "/bin/sh")
            .env("TERM", "xterm")
            .env("XDG_STATE_HOME", dir);
        script.env_remove("NO_COLOR").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        program::heed_hangups(&mut script);
        let Ok(mut script) = script.spawn() else {
            eprintln!("skipped: `script` (util-linux) is not there");
            return None;
        };
        let (typed, screen) = (script.stdin.take().unwrap(), script.stdout.take().unwrap());
        let _watched = program::watch(&script);
        Some(Terminal { script, typed, screen, text: String::new(), _watched })
    }

    /// Waits for a text on the screen.
    fn see(&mut self, text: &str) {
        self.text += &read_until(&mut self.screen, text);
    }

    /// What is typed at a prompt while nobody edits a line would be lost.
    fn see_prompt(&mut self) {
        self.see("> ");
    }

    fn type_keys(&mut self, keys: &str) {
        self.typed.write_all(keys.as_bytes()).unwrap();
    }

    /// The process of the chat.
    fn process(&mut self) -> u32 {
        self.see("pid ");
        let line = read_until(&mut self.screen, "\n");
        line.trim().parse().unwrap()
    }

    /// Waits for the end: the exit code, and all that was shown.
    fn end(mut self) -> (Option<i32>, String) {
        // On a terminal the other end's closing is an error of reading.
        let _ = self.screen.read_to_string(&mut self.text);
        (self.script.wait().unwrap().code(), self.text)
    }
}

/// A chat with an adapter: after each text on the screen and the prompt behind it the keys beside it are typed.
#[cfg(target_os = "linux")]
fn on_a_terminal(dialog: &[(&str, &str)], dir: &std::path::Path) -> Option<(Option<i32>, String)> {
    let lora = arg(&fixture("lora/attn.gguf"));
    let mut chat = Terminal::chat(&format!("-n 8 --temp 0 --ignore-eos --lora '{lora}'"), dir)?;
    for (shown, keys) in dialog {
        chat.see(shown);
        chat.see_prompt();
        chat.type_keys(keys);
    }
    Some(chat.end())
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_on_a_terminal_stops_an_answer_and_the_conversation_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut chat) = Terminal::chat("-n -1 --ignore-eos -c 100000", dir.path()) else { return };
    chat.see_prompt();
    chat.type_keys("hello\r");
    // The line as it was typed, which is shorter, and the beginning of its answer.
    chat.see("hello");
    chat.screen.read_exact(&mut [0; 300]).unwrap();
    chat.type_keys("\x03");
    chat.see("stopped]");
    chat.see_prompt();
    chat.type_keys("\x04");
    assert_eq!(chat.end().0, Some(0));
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_at_the_prompt_drops_what_is_typed_and_twice_in_a_row_ends() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut chat) = Terminal::chat("-n 8 --ignore-eos", dir.path()) else { return };
    let again = "Ctrl+C again or Ctrl+D ends";
    chat.see_prompt();
    chat.type_keys("dropped\x03\x03");
    chat.see(again);
    chat.see_prompt();
    chat.type_keys("kept\r");
    chat.see("[prompt");
    chat.see_prompt();
    // Inside of several lines.
    chat.type_keys("\"\"\"dropped\r");
    chat.see(". ");
    chat.type_keys("\x03");
    chat.see_prompt();
    chat.type_keys("\x03");
    chat.see(again);
    chat.see_prompt();
    chat.type_keys("\x03");
    let (code, text) = chat.end();
    assert_eq!(code, Some(130), "{text}");
    let history = fs::read_to_string(dir.path().join("lory/history")).unwrap();
    assert!(history.lines().any(|line| line == "kept") && !history.contains("dropped"), "{history}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_signal_at_the_prompt_leaves_the_terminal_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    for (signal, code) in [(libc::SIGTERM, 143), (libc::SIGHUP, 129)] {
        let Some(mut chat) = Terminal::chat("-n 8", dir.path()) else { return };
        let process = chat.process();
        chat.see("/help lists");
        chat.see_prompt();
        program::send(process, signal);
        let (ended, text) = chat.end();
        assert_eq!(ended, Some(code), "{text}");
        let modes: Vec<&str> = text.split_whitespace().collect();
        assert!(modes.contains(&"icanon") && modes.contains(&"echo"), "{signal}: {text}");
    }
}

#[test]
fn a_pipe_whose_lines_failed_ends_with_1() {
    let ran = chat(&[], "/load nope.json\n/adapter nope\n");
    assert_eq!((ran.code, ran.stderr.matches("error: ").count()), (1, 2), "{ran:?}");
    let ran = chat(&[], "/adapter nope\nhello\n/exit\n");
    assert_eq!((ran.code, speeds(&ran).len()), (1, 1), "{ran:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn an_answer_that_cannot_be_printed_ends_the_chat() {
    let model = model();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let mut child = command(&["chat", "-m", &model, "-n", "4", "--ignore-eos"]);
    let mut child = child.stdin(Stdio::piped()).stdout(full).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"hello\nhello\n").unwrap();
    assert!(finish(child).one_line_error(1).contains("standard output"));
}

#[cfg(target_os = "linux")]
#[test]
fn on_a_terminal_keys_complete_remember_and_end() {
    let dir = tempfile::tempdir().unwrap();
    let dialog = [
        ("/help lists", "/ad\tno\t\r"),
        // Tab completes the command with its space, and the name.
        ("now speaking: base", "/ad\tat\t\r"),
        ("now speaking: attn", "hello\r"),
        ("[prompt", "/compare attn none hello\r"),
        ("[both", "\x04"),
    ];
    let Some((code, text)) = on_a_terminal(&dialog, dir.path()) else { return };
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains(" │ base"), "columns: {text}");
    assert!(text.contains("\x1b[1;32m> "), "colours: {text}");
    let history = fs::read_to_string(dir.path().join("lory/history")).unwrap();
    assert!(history.contains("/adapter attn") && history.contains("hello"), "{history}");
}

#[test]
fn conversations_are_saved_and_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("my talk.json");
    let file = path.to_string_lossy();
    let adapters = silent();
    let adapters: Vec<&str> = adapters.iter().map(String::as_str).collect();
    let first =
        chat(&adapters, &format!("/adapter attn 0.5\n/system Be brief.\nhello\n/save {file}\nmore\n"));
    assert!(first.stderr.contains("2 messages saved"), "{first:?}");
    let saved: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let before = saved["messages"][1]["content"].as_str().unwrap();
    let after = first.success().strip_prefix(before).expect("what was printed is what was saved");
    let after = if before.ends_with('\n') { after } else { after.strip_prefix('\n').unwrap() };
    assert_eq!((&saved["adapters"][0]["name"], &saved["system"]), (&"attn".into(), &"Be brief.".into()));
    // The loaded conversation goes on as the saved one did.
    let second = chat(&adapters, &format!("/adapter none\n/load {file}\nmore\n"));
    assert_eq!(second.success(), after);
    assert!(second.stderr.contains("2 messages loaded; now speaking: attn:0.5"), "{second:?}");
    // Without the adapter, and damaged: one line, and the conversation is as it was.
    let lone = chat(&[], &format!("/load {file}\n/load {}\n/load none.json\nhello\n", dir.path().display()));
    let errors: Vec<&str> = lone.stderr.lines().filter(|l| l.starts_with("error: ")).collect();
    assert!(errors.len() == 3 && errors[0].contains("`attn`") && errors[2].contains("none.json"), "{lone:?}");
    assert_eq!(lone.went_on(), chat(&[], "hello\n").stdout);
    fs::write(&path, "{\"format\"").unwrap();
    let damaged = chat(&[], &format!("/load {file}\n"));
    assert!(damaged.stderr.contains("no saved conversation") && damaged.code == 1, "{damaged:?}");
}

#[test]
fn forgotten_messages_are_told() {
    let ran = chat(&["-c", "64"], &"hello hello hello\n".repeat(8));
    ran.success();
    assert!(
        ran.stderr.lines().any(|l| l.contains("oldest messages were forgotten (-c raises it)")),
        "{ran:?}"
    );
    let short = chat(&[], "hello\nhello\n");
    assert!(!short.stderr.contains("forgotten"), "{short:?}");
}

#[test]
fn chat_answers_keep_to_a_grammar() {
    let ran = chat(&["--grammar", "root ::= \" \"? \"yes\" | \" \"? \"no\""], "hello\nagain\n");
    let answers: Vec<&str> = ran.success().lines().map(str::trim).collect();
    assert!(answers.len() == 2 && answers.iter().all(|a| ["yes", "no"].contains(a)), "{ran:?}");
}
