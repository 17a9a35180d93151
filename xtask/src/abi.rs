//! `ffi/abi/N.txt`: what programs built for ABI version N rely on, one fact per line.
//!
//! Functions and constants are the header's own words, structs are their fields' types there and their
//! offsets as a C compiler lays them out (by way of bindgen). abidiff is no help here: it reads the types of
//! a library's debug information, which is Rust's and changes with the compiler, and which none of the
//! profiles has.
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
    let code = without_comments(&header);
    let mut lines: BTreeSet<String> = declarations(&code);
    lines.extend(fields(&code));
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

fn without_comments(header: &str) -> String {
    let mut code = String::new();
    let mut rest = header;
    while let Some((before, after)) = rest.split_once("/*") {
        code += before;
        rest = after.split_once("*/").map_or("", |(_, rest)| rest);
    }
    code + rest
}

/// The types of the fields of all structs.
fn fields(code: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for body in code.split("typedef struct {").skip(1) {
        let Some((fields, rest)) = body.split_once('}') else { continue };
        let name = rest.split(';').next().unwrap_or_default().trim();
        let fields = fields.split(';').map(squeeze).filter(|f| !f.is_empty());
        lines.extend(fields.map(|field| format!("field {name}: {field}")));
    }
    lines
}

/// Functions, types of functions, constants: everything of the header but its structs.
fn declarations(code: &str) -> BTreeSet<String> {
    let defines = code.lines().filter(|l| l.starts_with("#define LORY_") && l.split_whitespace().count() > 2);
    let mut lines: BTreeSet<String> = defines.map(|l| squeeze(l.trim_start_matches('#'))).collect();
    let values = code.lines().map(str::trim).filter(|l| l.starts_with("LORY_") && l.contains(" = "));
    lines.extend(values.map(|l| format!("value {}", l.trim_end_matches(','))));
    let code = code.lines().filter(|l| !l.starts_with('#') && *l != "extern \"C\" {");
    let plain: String = code.flat_map(|l| [l, "\n"]).collect();
    let whole = plain.split(';').map(squeeze).filter(|s| s.contains("lory_") && !s.contains(['{', '}']));
    // What is left has parentheses or is a typedef.
    lines.extend(whole.filter(|s| s.contains('(') || s.starts_with("typedef")));
    lines
}

fn squeeze(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
