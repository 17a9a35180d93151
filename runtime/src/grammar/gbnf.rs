//! GBNF, the grammar notation of llama.cpp, to rules.
//!
//! Source of the syntax: llama.cpp `grammars/README.md` and its parser `src/llama-grammar.cpp`. Differences: a repetition
//! above [`MAX_REPEAT`] is refused rather than taken as unlimited, and so is a range whose end lies before its beginning.
//! The parser keeps its own stack, so nesting costs memory in proportion to the text and no call depth.

use std::collections::HashMap;

use super::GrammarError;

/// Longest grammar in bytes.
pub(super) const MAX_SOURCE: usize = 1 << 20;
/// Most rules, groups and repeated strings.
pub(super) const MAX_RULES: usize = 20_000;
/// Highest number in `{m,n}`.
pub(super) const MAX_REPEAT: u32 = 100_000;

/// A set of characters: sorted ranges that neither touch nor overlap, surrogates left out.
pub(super) type Chars = Vec<(u32, u32)>;

/// What stands at one place of a rule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Symbol {
    /// Index in [`Gbnf::rules`].
    Rule(usize),
    /// One character of a set: index in [`Gbnf::sets`].
    Chars(usize),
    /// A token by its id, whatever its text.
    Token(u32),
    /// Any token but this one.
    NotToken(u32),
}

/// A symbol and how often it occurs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Item {
    pub symbol: Symbol,
    pub min: u32,
    /// `None` is any number.
    pub max: Option<u32>,
}

/// Sequences of which one is chosen.
pub(super) type Alternatives = Vec<Vec<Item>>;

/// A parsed grammar; every rule that is referred to has its alternatives.
#[derive(Debug)]
pub(super) struct Gbnf {
    pub rules: Vec<Alternatives>,
    pub sets: Vec<Chars>,
    pub root: usize,
}

/// What token a `<text>` is; `None` if it is not exactly one.
pub(super) type TokenOf<'a> = &'a dyn Fn(&str) -> Option<u32>;

/// Parses `text`. `vocab` is the number of tokens.
pub(super) fn parse(text: &str, vocab: u32, token_of: TokenOf<'_>) -> Result<Gbnf, GrammarError> {
    if text.len() > MAX_SOURCE {
        let message = format!("has {} bytes, more than {MAX_SOURCE}", text.len());
        return Err(GrammarError::TooLarge(message));
    }
    let mut parser = Parser {
        text,
        at: 0,
        vocab,
        token_of,
        names: HashMap::new(),
        rules: Vec::new(),
        sets: Vec::new(),
        set_ids: HashMap::new(),
    };
    parser.space(true);
    while parser.at < text.len() {
        parser.rule()?;
    }
    parser.finish()
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    vocab: u32,
    token_of: TokenOf<'a>,
    /// Rule by name, with the place of its first mention.
    names: HashMap<&'a str, (usize, usize)>,
    rules: Vec<Option<Alternatives>>,
    sets: Vec<Chars>,
    set_ids: HashMap<Chars, usize>,
}

/// A rule or group whose end has not been reached.
#[derive(Default)]
struct Open {
    done: Alternatives,
    items: Vec<Item>,
    /// Where in `items` the symbol begins that a following `*` would repeat.
    last: Option<usize>,
    /// Place of the parenthesis.
    at: usize,
}

impl<'a> Parser<'a> {
    fn error(&self, at: usize, message: impl Into<String>) -> GrammarError {
        let before = self.text.get(..at).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        GrammarError::Syntax {
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            message: message.into(),
        }
    }

    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn take(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn eat(&mut self, token: &str) -> bool {
        let found = self.text[self.at..].starts_with(token);
        self.at += if found { token.len() } else { 0 };
        found
    }

    /// What is here, for messages.
    fn here(&self) -> String {
        self.peek().map_or("the end of the grammar".into(), |c| format!("`{}`", c.escape_debug()))
    }

    /// Skips blanks and comments, and line ends where they mean nothing.
    fn space(&mut self, line_ends: bool) {
        while let Some(c) = self.peek() {
            match c {
                ' ' | '\t' => self.at += 1,
                '\r' | '\n' if line_ends => self.at += 1,
                '#' => {
                    let rest = &self.text[self.at..];
                    self.at += rest.find(['\r', '\n']).unwrap_or(rest.len());
                }
                _ => return,
            }
        }
    }

    fn span(&mut self, belongs: impl Fn(char) -> bool) -> &'a str {
        let rest = &self.text[self.at..];
        let word = &rest[..rest.find(|c| !belongs(c)).unwrap_or(rest.len())];
        self.at += word.len();
        word
    }

    fn add_rule(&mut self, rule: Option<Alternatives>) -> Result<usize, GrammarError> {
        if self.rules.len() == MAX_RULES {
            return Err(GrammarError::TooLarge(format!("has more than {MAX_RULES} rules and groups")));
        }
        self.rules.push(rule);
        Ok(self.rules.len() - 1)
    }

    /// The rule of this name, which may still have to be defined.
    fn name(&mut self) -> Result<usize, GrammarError> {
        let at = self.at;
        let name = self.span(is_word);
        if name.is_empty() {
            return Err(self.error(at, format!("expected a rule's name, found {}", self.here())));
        }
        if let Some((id, _)) = self.names.get(name) {
            return Ok(*id);
        }
        let id = self.add_rule(None)?;
        self.names.insert(name, (id, at));
        Ok(id)
    }

    fn rule(&mut self) -> Result<(), GrammarError> {
        let id = self.name()?;
        self.space(false);
        if !self.eat("::=") {
            return Err(self.error(self.at, format!("expected ::=, found {}", self.here())));
        }
        self.space(true);
        // As in llama.cpp, a second definition replaces the first.
        self.rules[id] = Some(self.alternatives()?);
        match self.peek() {
            None | Some('\r' | '\n') => {}
            Some(_) => {
                return Err(self.error(self.at, format!("expected the line's end, found {}", self.here())));
            }
        }
        self.space(true);
        Ok(())
    }

    fn alternatives(&mut self) -> Result<Alternatives, GrammarError> {
        let mut outer: Vec<Open> = Vec::new();
        let mut open = Open::default();
        loop {
            let start = self.at;
            match self.peek() {
                Some('(') => {
                    self.at += 1;
                    outer.push(std::mem::take(&mut open));
                    open.at = start;
                    self.space(true);
                    continue;
                }
                Some(')') if !outer.is_empty() => {
                    self.at += 1;
                    open.done.push(std::mem::take(&mut open.items));
                    let group = self.group(std::mem::take(&mut open.done))?;
                    open = outer.pop().unwrap_or_default();
                    open.last = Some(open.items.len());
                    open.items.push(group);
                }
                Some('|') => {
                    self.at += 1;
                    open.done.push(std::mem::take(&mut open.items));
                    open.last = None;
                    self.space(true);
                    continue;
                }
                Some('*' | '+' | '?' | '{') => {
                    let (min, max) = self.repetition(!outer.is_empty())?;
                    self.repeat(&mut open, min, max, start)?;
                }
                Some(c) if is_word(c) || ['"', '[', '.', '<', '!'].contains(&c) => {
                    open.last = Some(open.items.len());
                    self.symbols(&mut open.items)?;
                }
                _ => break,
            }
            self.space(!outer.is_empty());
        }
        if !outer.is_empty() {
            return Err(self.error(open.at, "this group is not closed: a `)` is missing"));
        }
        open.done.push(open.items);
        Ok(open.done)
    }

    /// A group as one item; needless parentheses leave no trace.
    fn group(&mut self, alternatives: Alternatives) -> Result<Item, GrammarError> {
        if let [only] = alternatives.as_slice()
            && let [item] = only.as_slice()
        {
            return Ok(*item);
        }
        Ok(once(Symbol::Rule(self.add_rule(Some(alternatives))?)))
    }

    fn repeat(&mut self, open: &mut Open, min: u32, max: Option<u32>, at: usize) -> Result<(), GrammarError> {
        let tail = open.last.map(|last| open.items.split_off(last)).unwrap_or_default();
        let symbol = match tail.as_slice() {
            [] => return Err(self.error(at, "there is nothing before it that could be repeated")),
            [Item { symbol, min: 1, max: Some(1) }] => *symbol,
            _ => Symbol::Rule(self.add_rule(Some(vec![tail]))?),
        };
        open.items.push(Item { symbol, min, max });
        Ok(())
    }

    /// `*`, `+`, `?`, `{m}`, `{m,}`, `{m,n}`.
    fn repetition(&mut self, nested: bool) -> Result<(u32, Option<u32>), GrammarError> {
        match self.take() {
            Some('*') => return Ok((0, None)),
            Some('+') => return Ok((1, None)),
            Some('?') => return Ok((0, Some(1))),
            _ => self.space(nested),
        }
        let min = self.number()?;
        self.space(nested);
        let mut max = Some(min);
        if self.eat(",") {
            self.space(nested);
            let digits = self.peek().is_some_and(|c| c.is_ascii_digit());
            max = if digits { Some(self.number()?) } else { None };
            self.space(nested);
        }
        if !self.eat("}") {
            return Err(self.error(self.at, format!("expected }}, found {}", self.here())));
        }
        match max {
            Some(max) if max < min => {
                Err(self.error(self.at, format!("{{{min},{max}}}: {max} is below {min}")))
            }
            _ => Ok((min, max)),
        }
    }

    fn number(&mut self) -> Result<u32, GrammarError> {
        let at = self.at;
        let digits = self.span(|c| c.is_ascii_digit());
        if digits.is_empty() {
            return Err(self.error(at, format!("expected a number, found {}", self.here())));
        }
        digits.parse().ok().filter(|n| *n <= MAX_REPEAT).ok_or_else(|| {
            self.error(at, format!("repeats up to {digits} times; at most {MAX_REPEAT} are possible"))
        })
    }

    /// A string, a set of characters, a token or a rule's name.
    fn symbols(&mut self, items: &mut Vec<Item>) -> Result<(), GrammarError> {
        let at = self.at;
        match self.peek() {
            Some('"') => {
                self.at += 1;
                while !self.eat("\"") {
                    let c = self.character(at)?;
                    let set = self.set(vec![(c, c)]);
                    items.push(once(Symbol::Chars(set)));
                }
            }
            Some('[') => {
                let set = self.brackets()?;
                items.push(once(Symbol::Chars(set)));
            }
            Some('.') => {
                self.at += 1;
                let set = self.set(negate(&[]));
                items.push(once(Symbol::Chars(set)));
            }
            Some('<' | '!') => {
                let negated = self.eat("!");
                let token = self.token()?;
                items.push(once(if negated { Symbol::NotToken(token) } else { Symbol::Token(token) }));
            }
            _ => {
                let rule = self.name()?;
                items.push(once(Symbol::Rule(rule)));
            }
        }
        Ok(())
    }

    /// One character of a string or set that began at `start`.
    fn character(&mut self, start: usize) -> Result<u32, GrammarError> {
        let at = self.at;
        let Some(c) = self.take() else {
            return Err(self.error(start, "what begins here is not closed"));
        };
        if c != '\\' {
            return Ok(c.into());
        }
        let digits = match self.take() {
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some('t') => return Ok('\t'.into()),
            Some('r') => return Ok('\r'.into()),
            Some('n') => return Ok('\n'.into()),
            Some(c @ ('\\' | '"' | '[' | ']' | '-')) => return Ok(c.into()),
            _ => return Err(self.error(at, r#"unknown escape; there are \x \u \U \t \r \n \\ \" \[ \] \-"#)),
        };
        let hex = self.text.get(self.at..self.at + digits).unwrap_or_default();
        let code = u32::from_str_radix(hex, 16).ok().filter(|_| hex.bytes().all(|b| b.is_ascii_hexdigit()));
        let code = code.ok_or_else(|| self.error(at, format!("expected {digits} hexadecimal digits")))?;
        if char::from_u32(code).is_none() {
            return Err(self.error(at, format!("{code:#x} is no Unicode character")));
        }
        self.at += digits;
        Ok(code)
    }

    /// `[...]` or `[^...]`.
    fn brackets(&mut self) -> Result<usize, GrammarError> {
        let start = self.at;
        self.at += 1;
        let negated = self.eat("^");
        let mut ranges = Vec::new();
        while !self.eat("]") {
            let at = self.at;
            let first = self.character(start)?;
            let is_range = self.peek() == Some('-') && !self.text[self.at..].starts_with("-]");
            let last = if is_range {
                self.at += 1;
                self.character(start)?
            } else {
                first
            };
            if last < first {
                return Err(self.error(at, "the range's end lies before its beginning"));
            }
            ranges.push((first, last));
        }
        let ranges = normalize(ranges);
        Ok(self.set(if negated { negate(&ranges) } else { ranges }))
    }

    fn set(&mut self, chars: Chars) -> usize {
        let next = self.sets.len();
        *self.set_ids.entry(chars).or_insert_with_key(|chars| {
            self.sets.push(chars.clone());
            next
        })
    }

    /// `<[id]>` or `<text>`.
    fn token(&mut self) -> Result<u32, GrammarError> {
        let at = self.at;
        let rest = &self.text[at..];
        let end = rest.find('>').filter(|_| rest.starts_with('<'));
        let Some(end) = end else {
            return Err(self.error(at, "expected a token: <text> or <[id]>"));
        };
        let text = &rest[..=end];
        self.at += text.len();
        match text.strip_prefix("<[").and_then(|t| t.strip_suffix("]>")) {
            Some(id) => id.parse().ok().filter(|id| *id < self.vocab).ok_or_else(|| {
                self.error(at, format!("{text} is none of the vocabulary's {} tokens", self.vocab))
            }),
            None => (self.token_of)(text)
                .ok_or_else(|| self.error(at, format!("{text} is not one token of the vocabulary"))),
        }
    }

    fn finish(mut self) -> Result<Gbnf, GrammarError> {
        let Some((root, _)) = self.names.get("root").copied() else {
            return Err(GrammarError::NoRoot);
        };
        let undefined = self.names.iter().filter(|(_, (id, _))| self.rules[*id].is_none());
        if let Some((name, (_, at))) = undefined.min_by_key(|(_, (_, at))| *at) {
            return Err(self.error(*at, format!("the rule `{name}` is not defined")));
        }
        let rules = std::mem::take(&mut self.rules).into_iter().flatten().collect();
        Ok(Gbnf { rules, sets: self.sets, root })
    }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-'
}

fn once(symbol: Symbol) -> Item {
    Item { symbol, min: 1, max: Some(1) }
}

/// Sorted, merged, without surrogates.
fn normalize(mut ranges: Chars) -> Chars {
    ranges.sort_unstable();
    let mut merged: Chars = Vec::new();
    for (first, last) in ranges {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    let split = |(first, last): (u32, u32)| {
        [(first, last.min(0xd7ff)), (first.max(0xe000), last)].into_iter().filter(|(a, b)| a <= b)
    };
    merged.into_iter().flat_map(split).collect()
}

fn negate(ranges: &[(u32, u32)]) -> Chars {
    let mut next = 0;
    let mut rest = Vec::new();
    for &(first, last) in ranges {
        if next < first {
            rest.push((next, first - 1));
        }
        next = last + 1;
    }
    rest.push((next, 0x10ffff));
    rest.retain(|(first, last)| first <= last);
    normalize(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gbnf(text: &str) -> Result<Gbnf, GrammarError> {
        parse(text, 100, &|t| (t == "<think>").then_some(7))
    }

    fn place(text: &str) -> (usize, usize, String) {
        match gbnf(text) {
            Err(GrammarError::Syntax { line, column, message }) => (line, column, message),
            other => panic!("expected a syntax error, got {other:?}"),
        }
    }

    #[test]
    fn llama_cpps_notation_is_read() {
        let g = gbnf(
            "# a comment\nroot ::= (\n  # inside\n  \"1. \" move \"\\n\"\n)+ tail? |\n  other\r\nmove ::= [a-h\\-\\]]{2} [^\\n] .\n\
             tail ::= \"\\x41\\u00e9\\U0001F600\" {2,3}\nother ::= <think> !<[3]> | \n",
        )
        .unwrap();
        assert_eq!(g.rules[g.root].len(), 2, "two alternatives");
        let Item { min: 1, max: None, .. } = g.rules[g.root][0][0] else { panic!("{g:?}") };
        assert!(g.sets.contains(&vec![(45, 45), (93, 93), (97, 104)]));
        assert!(g.sets.contains(&vec![(0, 9), (11, 0xd7ff), (0xe000, 0x10ffff)]));
        let tokens: Vec<_> = g.rules.iter().flatten().flatten().map(|i| i.symbol).collect();
        assert!(tokens.contains(&Symbol::Token(7)) && tokens.contains(&Symbol::NotToken(3)));
    }

    #[test]
    fn errors_have_a_place() {
        assert_eq!(place("root ::= \"a\n").0, 1);
        assert_eq!(place("root ::= a b\na ::= \"x\"\n"), (1, 12, "the rule `b` is not defined".into()));
        assert_eq!(place("root ::= \"é\" *** )").1, 18);
        assert_eq!(place("root ::= \"a\"\n\n  root = 1").0, 3);
        assert_eq!(place("root ::= (\"a\" | (\"b\")").1, 10);
        for (text, part) in [
            ("root ::= *", "nothing before"),
            ("root ::= \"\"*", "nothing before"),
            ("root ::= [z-a]", "before its beginning"),
            ("root ::= [a", "not closed"),
            ("root ::= \"\\q\"", "unknown escape"),
            ("root ::= \"\\x4\"", "hexadecimal"),
            ("root ::= \"\\ud800\"", "no Unicode"),
            ("root ::= \"\\UFFFFFFFF\"", "no Unicode"),
            ("root ::= \"a\"{2,1}", "below"),
            ("root ::= \"a\"{x}", "expected a number"),
            ("root ::= \"a\"{1", "expected }"),
            ("root ::= <[100]>", "none of the vocabulary's 100"),
            ("root ::= <nope>", "not one token"),
            ("root ::= <", "expected a token"),
            ("::= x", "rule's name"),
            ("root : x", "expected ::="),
            ("root ::= x ]", "line's end"),
        ] {
            assert!(place(text).2.contains(part), "{text}: {}", place(text).2);
        }
        assert!(matches!(gbnf("a ::= \"x\""), Err(GrammarError::NoRoot)));
        assert!(matches!(gbnf(""), Err(GrammarError::NoRoot)));
    }

    #[test]
    fn gr2_nesting_costs_no_call_depth() {
        let deep = format!("root ::= {}\"a\"{}", "(".repeat(60_000), ")".repeat(60_000));
        assert_eq!(gbnf(&deep).unwrap().rules.len(), 1);
        let real = format!("root ::= {}\"a\"{}", "(\"b\" ".repeat(60_000), ")".repeat(60_000));
        assert!(matches!(gbnf(&real), Err(GrammarError::TooLarge(_))));
        let open = format!("root ::= {}", "(".repeat(60_000));
        assert!(place(&open).2.contains("not closed"));
    }

    #[test]
    fn gr3_repetitions_are_bounded() {
        for text in ["\"a\"{0,2147483648}", "\"a\"{99999999999999999999}", "((\"a\"{9}){9}){100001}"] {
            assert!(place(&format!("root ::= {text}")).2.contains("at most"), "{text}");
        }
        let long = "x".repeat(MAX_SOURCE + 1);
        assert!(matches!(gbnf(&long), Err(GrammarError::TooLarge(_))));
    }
}
