//! The C interface has no logic: its functions are short.

use std::fs;

/// Names and lines between the braces of all `extern "C"` functions of the crate lory-ffi. It is formatted
/// by rustfmt: a function of a module ends with the first line that is a brace alone.
fn bodies() -> Vec<(usize, String)> {
    let mut bodies = Vec::new();
    for entry in fs::read_dir(xtask::root().join("ffi/src")).expect("the crate's sources") {
        let source = fs::read_to_string(entry.expect("a file").path()).expect("UTF-8");
        for function in source.split("extern \"C\" fn ").skip(1) {
            let name = function.split('(').next().unwrap_or_default();
            let (_, body) = function.split_once("{\n").expect("a body");
            let (body, _) = body.split_once("\n}\n").expect("its end");
            bodies.push((body.lines().count(), name.to_owned()));
        }
    }
    bodies.sort();
    bodies
}

#[test]
fn functions_are_short() {
    let bodies = bodies();
    let header = fs::read_to_string(xtask::header::path()).expect("it is committed");
    let missing: Vec<_> = bodies.iter().filter(|(_, f)| !header.contains(&format!("{f}("))).collect();
    assert!(bodies.len() > 70 && missing.is_empty(), "not the functions of the header: {missing:?}");
    let (median, longest) = (bodies[bodies.len() / 2].0, &bodies[bodies.len() - 1]);
    println!("{} functions, median {median} lines, longest {longest:?}", bodies.len());
    assert!(median < 10, "median of {median} lines");
    // A table of names is long and has no logic either.
    let long: Vec<_> = bodies.iter().filter(|(n, f)| *n > 20 && f != "lory_status_name").collect();
    assert!(long.is_empty(), "too long to have no logic: {long:?}");
}
