//! GBNF rules to the Lark notation of the parser that runs them.
//!
//! Every character becomes a terminal of its own. Longer terminals would be quicker, but the parser's lexer takes the
//! longest match and never goes back, which would forbid texts that GBNF allows (`"ab" "c" | "a" "bd"`). On a vocabulary
//! of 128k tokens a mask inside a JSON string takes 5–9 ms this way.

use std::fmt::Write;

use super::{
    GrammarError,
    gbnf::{Gbnf, Item, Symbol},
};

/// The grammar's text. What can never be completed is left out: the parser would walk into it and find no way on.
pub(super) fn from_gbnf(mut gbnf: Gbnf) -> Result<String, GrammarError> {
    let productive = productive(&gbnf);
    if !productive[gbnf.root] {
        return Err(GrammarError::AcceptsNothing);
    }
    let possible = |symbol: Symbol| can_end(symbol, &gbnf.sets, &productive);
    for alternatives in &mut gbnf.rules {
        for items in alternatives.iter_mut() {
            items.retain(|i| i.max != Some(0) && (i.min > 0 || possible(i.symbol)));
        }
        alternatives.retain(|items| items.iter().all(|i| possible(i.symbol)));
    }
    Ok(write(&gbnf))
}

fn can_end(symbol: Symbol, sets: &[Vec<(u32, u32)>], productive: &[bool]) -> bool {
    match symbol {
        Symbol::Rule(rule) => productive[rule],
        Symbol::Chars(set) => !sets[set].is_empty(),
        Symbol::Token(_) | Symbol::NotToken(_) => true,
    }
}

/// Which rules have at least one finite text. Each alternative counts the symbols that are not known to have one yet, and
/// tells its rule when there are none left: linear in the size of the grammar.
fn productive(gbnf: &Gbnf) -> Vec<bool> {
    let mut known = vec![false; gbnf.rules.len()];
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); gbnf.rules.len()];
    let mut missing: Vec<(usize, usize)> = Vec::new();
    let mut ready = Vec::new();
    for (rule, alternatives) in gbnf.rules.iter().enumerate() {
        for items in alternatives {
            let mut count = 0;
            for item in items.iter().filter(|i| i.min > 0) {
                match item.symbol {
                    Symbol::Rule(other) => users[other].push(missing.len()),
                    other if can_end(other, &gbnf.sets, &[]) => continue,
                    _ => {}
                }
                count += 1;
            }
            if count == 0 {
                ready.push(rule);
            }
            missing.push((rule, count));
        }
    }
    while let Some(rule) = ready.pop() {
        if std::mem::replace(&mut known[rule], true) {
            continue;
        }
        for &user in &users[rule] {
            let (owner, count) = &mut missing[user];
            *count -= 1;
            if *count == 0 {
                ready.push(*owner);
            }
        }
    }
    known
}

/// The rules that the root leads to, and their character sets.
fn write(gbnf: &Gbnf) -> String {
    let mut out = format!("start: r{}\n", gbnf.root);
    let mut seen_rules = vec![false; gbnf.rules.len()];
    let mut seen_sets = vec![false; gbnf.sets.len()];
    let mut waiting = vec![gbnf.root];
    seen_rules[gbnf.root] = true;
    while let Some(rule) = waiting.pop() {
        let _ = write!(out, "r{rule}:");
        for (i, items) in gbnf.rules[rule].iter().enumerate() {
            out.push_str(if i > 0 { " |" } else { "" });
            if items.is_empty() {
                out.push_str(" \"\"");
            }
            for item in items {
                write_item(&mut out, item);
                match item.symbol {
                    Symbol::Rule(other) if !seen_rules[other] => {
                        seen_rules[other] = true;
                        waiting.push(other);
                    }
                    Symbol::Chars(set) => seen_sets[set] = true,
                    _ => {}
                }
            }
        }
        out.push('\n');
    }
    for (id, chars) in gbnf.sets.iter().enumerate().filter(|(id, _)| seen_sets[*id]) {
        let _ = write!(out, "C{id}: /[");
        for (first, last) in chars {
            let _ = write!(out, "\\x{{{first:X}}}-\\x{{{last:X}}}");
        }
        out.push_str("]/\n");
    }
    out
}

fn write_item(out: &mut String, item: &Item) {
    let _ = match item.symbol {
        Symbol::Rule(rule) => write!(out, " r{rule}"),
        Symbol::Chars(set) => write!(out, " C{set}"),
        Symbol::Token(id) => write!(out, " <[{id}]>"),
        Symbol::NotToken(id) => write!(out, " <[^{id}]>"),
    };
    let _ = match (item.min, item.max) {
        (1, Some(1)) => Ok(()),
        (0, None) => write!(out, "*"),
        (1, None) => write!(out, "+"),
        (0, Some(1)) => write!(out, "?"),
        (min, None) => write!(out, "{{{min},}}"),
        (min, Some(max)) => write!(out, "{{{min},{max}}}"),
    };
}

#[cfg(test)]
mod tests {
    use super::{super::gbnf::parse, *};

    fn lark(text: &str) -> Result<String, GrammarError> {
        from_gbnf(parse(text, 10, &|_| None)?)
    }

    #[test]
    fn rules_become_rules() {
        assert_eq!(
            lark("root ::= \"a\" x? | [0-9]{2,4}\nx ::= <[3]>* | ").unwrap(),
            "start: r0\nr0: C0 r1? | C1{2,4}\nr1: <[3]>* | \"\"\nC0: /[\\x{61}-\\x{61}]/\nC1: /[\\x{30}-\\x{39}]/\n"
        );
        assert!(!lark("root ::= \"a\"\nunused ::= \"b\"").unwrap().contains("r1"));
    }

    #[test]
    fn gr6_what_accepts_nothing_is_refused_or_left_out() {
        for text in ["root ::= root", "root ::= root \"a\"", "root ::= a\na ::= b\nb ::= a", "root ::= []+"] {
            assert!(matches!(lark(text), Err(GrammarError::AcceptsNothing)), "{text}");
        }
        let rest = lark("root ::= \"a\" | \"b\" dead\ndead ::= dead \"x\"").unwrap();
        assert_eq!(rest, "start: r0\nr0: C0\nC0: /[\\x{61}-\\x{61}]/\n");
        assert!(lark("root ::= dead*\ndead ::= dead \"x\"").unwrap().starts_with("start: r0\nr0: \"\""));
    }
}
