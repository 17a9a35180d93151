//! `lory compress` and `lory pack` as a user meets them: two hundred adapters there and back, a disk that is full,
//! Ctrl+C.

mod program;

use std::{fs, path::Path};

use program::{Ran, arg, command, finish, fixture, lory};
use tempfile::TempDir;

fn model() -> String {
    arg(&fixture("models/llama.gguf"))
}

/// A folder with `adapters/`, made by the program.
fn collection(n: usize) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (n, adapters) = (n.to_string(), arg(&dir.path().join("adapters")));
    lory(&["synth", "adapters", "-m", &model(), "--n", &n, "--rank", "4", "-o", &adapters]).success();
    dir
}

/// `lory compress` of that folder into `out/pack.gguf`.
fn compress_args(dir: &Path, more: &[&str]) -> Vec<String> {
    let out = dir.join("out");
    let _ = fs::create_dir(&out);
    let (model, pack, adapters) = (model(), arg(&out.join("pack.gguf")), arg(&dir.join("adapters")));
    let args = ["compress", "-m", &model, "-o", &pack, &adapters];
    args.iter().chain(more).map(|a| a.to_string()).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn two_hundred_adapters_answer_alike_from_the_pack_and_from_both_kinds_of_extract() {
    let dir = collection(200);
    let at = |name: &str| arg(&dir.path().join(name));
    let formats = ["--basis-type", "F16", "--core-type", "F16"];
    let shape = ["--rank", "8", "--clusters", "4", "--report"];
    let report = at("report");
    lory(&compress_args(dir.path(), &[&formats[..], &shape, &[&report]].concat())).success();
    assert!(names(&dir.path().join("report")).contains(&"report.json".to_owned()));
    let pack = at("out/pack.gguf");
    let list = lory(&["pack", "list", &pack]);
    assert_eq!(list.success().lines().count(), 200);
    lory(&["pack", "verify", &pack, "-m", &model()]).success();
    let answer = |more: &[&str]| {
        let model = model();
        let args = ["run", "-m", &model, "-p", "the hen sat", "-n", "16", "--temp", "0", "--ignore-eos"];
        lory(&[&args[..], more].concat()).success().to_owned()
    };
    let plain = answer(&[]);
    let mut moved = 0;
    for name in ["adapter-00000", "adapter-00057", "adapter-00199"] {
        let file = at(&format!("{name}.gguf"));
        lory(&["pack", "extract", &pack, name, "-o", &file]).success();
        let from_pack = answer(&["--pack", &pack, "--adapter", name]);
        assert_eq!(answer(&["--lora", &file]), from_pack, "{name}");
        moved += usize::from(from_pack != plain);
        // A PEFT folder goes the way of all adapters: into another pack, which holds it exactly.
        let folder = at(&format!("{name}/"));
        lory(&["pack", "extract", &pack, name, "-m", &model(), "-o", &folder]).success();
        let again = at(&format!("{name}.pack.gguf"));
        lory(&[&["compress", "-m", &model(), "-o", &again, &folder, "--rank", "16"], &formats[..]].concat())
            .success();
        assert_eq!(answer(&["--pack", &again, "--adapter", name]), from_pack, "{name}");
    }
    assert!(moved > 0, "adapters that change nothing prove nothing");
    let refused = lory(&["pack", "extract", &pack, "adapter-00000", "-o", &at("folder/")]);
    assert!(refused.one_line_error(2).contains("-m MODEL"));
}

/// Runs with files that cannot grow beyond `limit` KiB.
fn with_limit(args: &[String], limit: u64) -> Ran {
    finish(program::command_with_limit(args, limit << 10).spawn().unwrap())
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_nothing_half_written() {
    let dir = collection(40);
    let out = dir.path().join("out");
    let args = compress_args(dir.path(), &["--rank", "8", "--clusters", "2"]);
    let whole = {
        lory(&args).success();
        let pack = fs::read(out.join("pack.gguf")).unwrap();
        fs::remove_file(out.join("pack.gguf")).unwrap();
        pack
    };
    let kib = whole.len() as u64 / 1024;
    // Too little for the bases that wait to be written, for the pack, and for its last bytes.
    for limit in [1, kib / 2, kib - 2] {
        let line = with_limit(&args, limit).one_line_error(1).to_owned();
        assert!(line.contains("out") && line.contains("File too large"), "{limit}: {line}");
        assert!(names(&out).is_empty(), "{limit}: {:?}", names(&out));
    }
    // A pack that was there stays as it was; a change to it fails in one piece too.
    lory(&args).success();
    assert_eq!(fs::read(out.join("pack.gguf")).unwrap(), whole, "the same pack every time");
    with_limit(&args, kib / 2).one_line_error(1);
    let pack = arg(&out.join("pack.gguf"));
    let strings = |args: &[&str]| args.iter().map(|a| a.to_string()).collect::<Vec<_>>();
    let change = strings(&["pack", "rename", &pack, "adapter-00001", "poet"]);
    assert!(with_limit(&change, 1).one_line_error(1).contains("seg-0001"));
    let extract = strings(&["pack", "extract", &pack, "adapter-00002", "-o", &arg(&out.join("x.gguf"))]);
    assert!(with_limit(&extract, 1).one_line_error(1).contains("x.gguf"));
    let folder = strings(&["pack", "extract", &pack, "adapter-00002", "-m", &model(), "-o"]);
    let folder = [&folder[..], &[arg(&out.join("x/"))]].concat();
    assert!(with_limit(&folder, 1).one_line_error(1).contains("x/"));
    assert_eq!(names(&out), ["pack.gguf"]);
    assert_eq!(fs::read(out.join("pack.gguf")).unwrap(), whole);
}

/// Runs with `out` on a file system of its own of `kib` KiB, which is full thereafter or not; then lists what is in it, on
/// standard output. `None`, with a line that says so, where this system lets nobody mount one.
#[cfg(target_os = "linux")]
fn on_a_small_disk(out: &Path, args: &[String], kib: u64) -> Option<Ran> {
    use std::process::{Command, Stdio};
    let mount = format!("mount -t tmpfs -o size={kib}k none '{}'", arg(out));
    let may = Command::new("unshare").args(["-rm", "sh", "-c", &mount]).stderr(Stdio::null()).status();
    if !may.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no file system can be mounted here (unshare -rm, mount -t tmpfs)");
        return None;
    }
    let script = format!("{mount}; \"$0\" \"$@\"; code=$?; ls -A '{}'; exit $code", arg(out));
    let mut shell = Command::new("unshare");
    shell.args(["-rm", "sh", "-c", &script, env!("CARGO_BIN_EXE_lory")]).args(args);
    Some(finish(shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()))
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_is_really_full_leaves_nothing_half_written() {
    let dir = collection(40);
    let out = dir.path().join("out");
    let args = compress_args(dir.path(), &["--rank", "8", "--clusters", "2"]);
    lory(&args).success();
    let whole = fs::read(out.join("pack.gguf")).unwrap();
    let kib = whole.len() as u64 / 1024;
    // Too little for the bases that wait, and enough for those but not for the pack beside them.
    for kib in [8, kib] {
        let Some(ran) = on_a_small_disk(&out, &args, kib) else { return };
        assert!(ran.one_line_error(1).contains("No space left on device"), "{kib}: {ran:?}");
        assert_eq!(ran.stdout, "", "{kib}: nothing is left there");
    }
    let enough = on_a_small_disk(&out, &args, 3 * kib).unwrap();
    assert_eq!(enough.success(), "pack.gguf\n");
    assert_eq!(fs::read(out.join("pack.gguf")).unwrap(), whole, "what lies below was never touched");
}

#[test]
fn places_where_no_pack_can_stand_are_refused_before_the_work() {
    let dir = collection(8);
    let at = |name: &str| arg(&dir.path().join(name));
    let (folder, lost) = (arg(dir.path()), at("nowhere/pack.gguf"));
    for place in ["/dev/null", &folder, &lost] {
        let ran = lory(&["compress", "-m", &model(), "-o", place, &at("adapters")]);
        assert!(ran.one_line_error(1).contains(place.trim_end_matches("/pack.gguf")), "{ran:?}");
    }
    assert!(!fs::metadata("/dev/null").unwrap().is_file(), "a device is not replaced");
    assert_eq!(names(dir.path()), ["adapters"]);
}

/// Waits until the program has opened the nameless file in which bases wait, so that it is in the midst of it.
#[cfg(target_os = "linux")]
fn wait_for_work(child: &std::process::Child) {
    let open = format!("/proc/{}/fd", child.id());
    loop {
        let files = fs::read_dir(&open).expect("the program runs").filter_map(Result::ok);
        let links = files.filter_map(|f| fs::read_link(f.path()).ok());
        if links.into_iter().any(|l| l.to_string_lossy().contains("/out/")) {
            return;
        }
        std::thread::yield_now();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_ends_a_run_without_a_trace_and_the_next_one_starts_afresh() {
    let dir = collection(64);
    let out = dir.path().join("out");
    let args = compress_args(dir.path(), &["--rank", "16", "--clusters", "8"]);
    for (signal, code) in [(libc::SIGINT, 130), (libc::SIGTERM, 143)] {
        let child = command(&args).spawn().unwrap();
        wait_for_work(&child);
        program::signal(&child, signal);
        let ran = finish(child);
        assert_eq!((ran.code, ran.stderr.as_str()), (code, ""), "{signal}");
        assert!(names(&out).is_empty(), "{:?}", names(&out));
        assert_eq!(names(dir.path()), ["adapters", "out"]);
    }
    lory(&args).success();
    let pack = arg(&out.join("pack.gguf"));
    assert_eq!(lory(&["pack", "list", &pack]).success().lines().count(), 64);
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_leaves_a_pack_that_was_there_alone() {
    let dir = collection(64);
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("pack.gguf"), "what was there").unwrap();
    let child = command(&compress_args(dir.path(), &["--rank", "16", "--clusters", "8"])).spawn().unwrap();
    wait_for_work(&child);
    program::signal(&child, libc::SIGINT);
    assert_eq!(finish(child).code, 130);
    assert_eq!(fs::read(out.join("pack.gguf")).unwrap(), b"what was there");
    assert_eq!(names(&out), ["pack.gguf"]);
}

/// Waits until `folder` holds an unfinished file; whether it did before the program ended.
#[cfg(target_os = "linux")]
fn saw_unfinished(folder: &Path, child: &mut std::process::Child) -> bool {
    loop {
        if names(folder).iter().any(|n| n.ends_with(".lory-tmp")) {
            return true;
        }
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::yield_now();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_while_a_large_file_is_written_leaves_nothing_and_a_killed_writer_is_cleaned_up_after() {
    let dir = tempfile::tempdir().unwrap();
    let (model, small) = (arg(&dir.path().join("large.gguf")), arg(&dir.path().join("pack.gguf")));
    // Hundreds of megabytes: nobody writes them between two looks at the folder.
    let large = ["synth", "model", "llama-1b", "-o", &model];
    let mut child = command(&large).spawn().unwrap();
    assert!(saw_unfinished(dir.path(), &mut child));
    program::signal(&child, libc::SIGINT);
    assert_eq!(finish(child).code, 130);
    assert!(names(dir.path()).is_empty(), "{:?}", names(dir.path()));

    let mut child = command(&large).spawn().unwrap();
    assert!(saw_unfinished(dir.path(), &mut child));
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(names(dir.path()).len(), 1, "nobody can clean up after SIGKILL …");
    let base = arg(&fixture("models/llama.gguf"));
    lory(&["synth", "pack", "-m", &base, "--adapters", "2", "-o", &small]).success();
    assert_eq!(names(dir.path()), ["pack.gguf"], "… but the next writer");
}

#[cfg(target_os = "linux")]
#[test]
fn a_second_signal_while_the_pack_is_written_leaves_nothing() {
    let dir = collection(200);
    let out = dir.path().join("out");
    let args = compress_args(dir.path(), &["--rank", "4"]);
    let mut caught = 0;
    for _ in 0..20 {
        let mut child = command(&args).spawn().unwrap();
        if saw_unfinished(&out, &mut child) {
            // Two signals that do not become one, while it stands still.
            for signal in [libc::SIGSTOP, libc::SIGINT, libc::SIGTERM, libc::SIGCONT] {
                program::signal(&child, signal);
            }
        }
        let ran = finish(child);
        caught += usize::from(ran.code != 0);
        // It may have been done before the signals reached it; half-done it is never.
        let left = names(&out);
        assert!(left.iter().all(|n| n == "pack.gguf"), "{left:?}");
        if caught == 2 {
            return;
        }
    }
    eprintln!("the pack was written {} times of 20 before a signal could reach it", 20 - caught);
}

#[test]
fn a_pack_changes_under_a_program_that_has_it_open() {
    use std::io::Write;
    let dir = collection(12);
    let at = |name: &str| arg(&dir.path().join(name));
    lory(&compress_args(dir.path(), &["--rank", "8", "--clusters", "2"])).success();
    let (model, pack) = (model(), at("out/pack.gguf"));
    let more = at("more");
    lory(&["synth", "adapters", "-m", &model, "--n", "1", "--rank", "4", "--seed", "9", "-o", &more])
        .success();
    fs::rename(Path::new(&more).join("adapter-00000.gguf"), at("more/newcomer.gguf")).unwrap();
    let chat = |change: &dyn Fn()| {
        let args = ["chat", "-m", &model, "-n", "12", "--temp", "0", "--ignore-eos", "--pack", &pack];
        let args = [&args[..], &["--adapter", "adapter-00003"]].concat();
        let mut child = command(&args).stdin(std::process::Stdio::piped()).spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        let mut errors = child.stderr.take().unwrap();
        writeln!(input, "hello").unwrap();
        program::read_until(&mut errors, "[prompt");
        change();
        // The second adapter was not read before the change.
        writeln!(input, "/clear\nhello\n/adapter adapter-00005\nhello").unwrap();
        drop(input);
        child.stderr = Some(errors);
        finish(child).success().to_owned()
    };
    let undisturbed = chat(&|| ());
    let disturbed = chat(&|| {
        lory(&["pack", "add", &pack, "-m", &model, &at("more/newcomer.gguf")]).success();
        lory(&["pack", "remove", &pack, "adapter-00005"]).success();
        lory(&["pack", "merge", &pack]).success();
    });
    assert_eq!(disturbed, undisturbed);
    assert_eq!(names(&dir.path().join("out")), ["pack.gguf"]);
    lory(&["pack", "remove", &pack, "newcomer", "newcomer"]).success();
    let now = lory(&["pack", "list", &pack]);
    assert!(!now.success().contains("newcomer"), "{now:?}");
    lory(&["pack", "add", &pack, "-m", &model, &at("more/newcomer.gguf")]).success();
    let now = lory(&["pack", "list", &pack]);
    assert!(now.success().contains("newcomer") && !now.stdout.contains("adapter-00005"), "{now:?}");
}

#[test]
fn what_would_end_badly_is_told() {
    let dir = collection(8);
    let at = |name: &str| arg(&dir.path().join(name));
    let (model, pack) = (model(), at("out/pack.gguf"));
    // A goal that leaves nothing of the adapters.
    let little = lory(&compress_args(dir.path(), &["--auto", "--max-bytes", "1k"]));
    assert!(
        little.code == 0 && little.stderr.contains("little is left of the adapters: allow more bytes"),
        "{little:?}"
    );
    let enough = lory(&compress_args(dir.path(), &["--rank", "16"]));
    assert!(enough.code == 0 && !enough.stderr.contains("little is left"), "{enough:?}");
    // `none` is the base.
    let renamed = lory(&["pack", "rename", &pack, "adapter-00001", "none"]);
    assert!(renamed.one_line_error(2).contains("stands for the base"), "{renamed:?}");
    fs::copy(at("adapters/adapter-00001.gguf"), at("none.gguf")).unwrap();
    let added = lory(&["pack", "add", &pack, "-m", &model, &at("none.gguf")]);
    assert!(added.one_line_error(1).contains("none.gguf: an adapter cannot be called"), "{added:?}");
    // Fewer adapters among those of before.
    let again = lory(&["synth", "adapters", "-m", &model, "--n", "2", "-o", &at("adapters")]);
    assert!(again.one_line_error(1).contains("adapter-0000"), "{again:?}");
    assert_eq!(names(&dir.path().join("adapters")).len(), 8);
}

#[test]
fn an_adapter_of_which_little_is_left_is_a_poor_fit_also_where_nothing_is_known() {
    let dir = collection(2);
    let at = |name: &str| arg(&dir.path().join(name));
    let (model, pack) = (model(), at("random.gguf"));
    // A random pack does not say how well its adapters fit.
    lory(&["synth", "pack", "-m", &model, "--adapters", "3", "--rank", "4", "-o", &pack]).success();
    let ran = lory(&["pack", "add", &pack, "-m", &model, &at("adapters")]);
    assert!(ran.code == 0 && ran.stderr.matches("a poor fit").count() == 2, "{ran:?}");
}
