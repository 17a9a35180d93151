//! `ffi/abi/N.txt`: what programs built for ABI version N rely on, one fact per line.
//!
//! Lines may come, as new functions and new fields at the end of structs that begin with their size;
//! a line that goes is another ABI, and needs another `LORY_ABI_VERSION`.

use std::{collections::BTreeSet, fs, path::PathBuf};

use crate::{bindings, header, root};

/// The list of the version that the header declares.
///
/// # Errors
/// A file that cannot be read.
pub fn path() -> Result<PathBuf, String> {
    let header = read(header::path())?;
    let version = header.lines().find_map(|l| l.strip_prefix("#define LORY_ABI_VERSION "));
    let version = version.ok_or("lory.h declares no LORY_ABI_VERSION")?;
    Ok(root().join(format!("ffi/abi/{version}.txt")))
}

fn read(path: PathBuf) -> Result<String, String> {
    fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
}

/// The facts of the committed header and of bindgen's layouts of it.
///
/// # Errors
/// A file that cannot be read.
pub fn generate() -> Result<String, String> {
    let header = read(header::path())?;
    let bindings = read(bindings::path())?;
    let mut lines: BTreeSet<String> = declarations(&header);
    let grows = |name: &str| bindings.contains(&format!("\"Offset of field: {name}::struct_size\""));
    let words = bindings.split_whitespace().collect::<Vec<_>>().join(" ");
    for fact in words.split("[\"").skip(1) {
        let Some((what, rest)) = fact.split_once("\"]") else { continue };
        let Some(number) = rest.split("usize]").next().and_then(|r| r.rsplit(' ').next()) else { continue };
        match what.split_once(": ").or(what.split_once(" of ")) {
            Some(("Offset of field", field)) => {
                lines.insert(format!("offset {} {number}", field.replace("::", ".")))
            }
            Some((kind, name)) if !grows(name) => {
                lines.insert(format!("{} {name} {number}", kind.to_lowercase()))
            }
            _ => false,
        };
    }
    Ok(lines.into_iter().map(|l| l + "\n").collect())
}

/// Functions, types of functions, constants: everything of the header but comments and structs.
fn declarations(header: &str) -> BTreeSet<String> {
    let mut code = String::new();
    let mut rest = header;
    while let Some((before, after)) = rest.split_once("/*") {
        code += before;
        rest = after.split_once("*/").map_or("", |(_, rest)| rest);
    }
    code += rest;
    let defines = code.lines().filter(|l| l.starts_with("#define LORY_") && l.split_whitespace().count() > 2);
    let mut lines: BTreeSet<String> = defines.map(|l| squeeze(l.trim_start_matches('#'))).collect();
    let values = code.lines().map(str::trim).filter(|l| l.starts_with("LORY_") && l.contains(" = "));
    lines.extend(values.map(|l| format!("value {}", l.trim_end_matches(','))));
    let plain: String = code.lines().filter(|l| !l.starts_with('#')).flat_map(|l| [l, "\n"]).collect();
    let whole = plain.split(';').map(squeeze).filter(|s| s.contains("lory_") && !s.contains(['{', '}']));
    // Fields are told by their offsets; what is left has parentheses or is a typedef.
    lines.extend(whole.filter(|s| s.contains('(') || s.starts_with("typedef")));
    lines
}

fn squeeze(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
