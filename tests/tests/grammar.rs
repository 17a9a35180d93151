//! Constrained generation: what a grammar accepts, what it refuses to be, and that models keep to it.

use lory_runtime::{
    Engine, EngineOptions, Error, FinishReason, Grammar, GrammarError, GrammarSource, Request, Sampler,
    SamplerError, SamplerOptions, SessionOptions, sampler::DryBreakers,
};
use lory_tests::{
    demo,
    fixtures::{fixture, shared_data},
};
use serde_json::{Value, json};

/// Its byte-level vocabulary turns every text into tokens of exactly its bytes.
fn qwen2() -> Engine {
    open(&fixture("models/qwen2.gguf"))
}

fn open(path: &std::path::Path) -> Engine {
    let options = EngineOptions { threads: Some(2), n_ctx: Some(2048), ..EngineOptions::default() };
    Engine::open(path, &options).unwrap_or_else(|e| panic!("{e}"))
}

fn gbnf(engine: &Engine, text: &str) -> Result<Grammar, GrammarError> {
    engine.model().grammar(&GrammarSource::Gbnf(text.into()))
}

fn schema(engine: &Engine, schema: &Value) -> Result<Grammar, GrammarError> {
    engine.model().grammar(&GrammarSource::JsonSchema(schema.to_string()))
}

fn sampler(grammar: &Grammar) -> Sampler {
    let mut sampler = Sampler::with_breakers(&SamplerOptions::greedy(), DryBreakers::default()).unwrap();
    sampler.constrain(grammar.constraint(true));
    sampler
}

/// Whether the token is possible next; if so, it is taken.
fn takes(engine: &Engine, sampler: &mut Sampler, token: u32) -> bool {
    let mut logits = vec![0.0; engine.model().tokenizer.vocab_size()];
    logits[token as usize] = 1.0;
    match sampler.sample(&mut logits) {
        Ok(choice) if choice.token == token => sampler.accept(token),
        Ok(_) => return false,
        Err(e) => panic!("{e}"),
    }
    true
}

/// Whether `text` as a whole matches.
fn accepts(engine: &Engine, grammar: &Grammar, text: &str) -> bool {
    let mut sampler = sampler(grammar);
    let tokens = engine.model().tokenizer.encode(text, Default::default());
    let eos = engine.model().tokenizer.eos().expect("the fixture has one");
    tokens.into_iter().all(|t| !sampler.is_complete() && takes(engine, &mut sampler, t))
        && (sampler.is_complete() || takes(engine, &mut sampler, eos))
}

#[track_caller]
fn assert_language(engine: &Engine, text: &str, good: &[&str], bad: &[&str]) {
    let grammar = gbnf(engine, text).unwrap_or_else(|e| panic!("{text}: {e}"));
    for good in good {
        assert!(accepts(engine, &grammar, good), "{text} accepts {good:?}");
    }
    for bad in bad {
        assert!(!accepts(engine, &grammar, bad), "{text} refuses {bad:?}");
    }
}

#[test]
fn gbnf_means_what_it_says() {
    let e = qwen2();
    assert_language(&e, "root ::= \"yes\" | \"no\"", &["yes", "no"], &["", "ye", "yess", "maybe"]);
    assert_language(&e, "root ::= [a-c]{2,3} [^x]", &["abé", "cccc", "aa\n"], &["ab", "abx", "aaaaa"]);
    assert_language(&e, "root ::= .+ \"\\u00e9\"?", &["é", "🦙\n", "a"], &[""]);
    assert_language(&e, "root ::= \"(\" root \")\" root | ", &["", "()", "(()())()"], &["(", "())", "(()"]);
    // No match may be decided by the longest piece that fits.
    assert_language(&e, "root ::= \"ab\" \"c\" | \"a\" \"bd\"", &["abc", "abd"], &["ab", "abcd"]);
    assert_language(&e, "root ::= [a-z]+ \"x1\"", &["xx1", "ax1", "xxxx1"], &["x1", "xx", "ax11"]);
    assert_language(&e, "root ::= \"a\"* \"ab\"", &["ab", "aaab"], &["aab b", "b", "aaa"]);
    assert_language(&e, "root ::= \"\"", &[""], &["a"]);
}

#[test]
fn tokens_can_be_named() {
    let e = qwen2();
    let tokenizer = &e.model().tokenizer;
    let eos = tokenizer.eos().unwrap();
    let control = (0..tokenizer.vocab_size() as u32).find(|t| tokenizer.is_control(*t) && *t != eos);
    let control = control.expect("the fixture has control tokens");
    let text = tokenizer.token_text(control).unwrap();
    for name in [format!("<[{control}]>"), text.to_owned()] {
        let grammar = gbnf(&e, &format!("root ::= \"a\" {name} \"b\"")).unwrap_or_else(|e| panic!("{e}"));
        let mut s = sampler(&grammar);
        let [a] = tokenizer.encode("a", Default::default())[..] else { panic!("one token") };
        assert!(!takes(&e, &mut s.clone(), control));
        assert!(
            takes(&e, &mut s, a) && !takes(&e, &mut s.clone(), a) && takes(&e, &mut s, control),
            "{name}"
        );
    }
    let grammar = gbnf(&e, &format!("root ::= !<[{control}]>")).unwrap();
    assert!(!takes(&e, &mut sampler(&grammar), control) && takes(&e, &mut sampler(&grammar), 5));
}

#[test]
fn gr1_left_recursion_is_followed() {
    let e = qwen2();
    assert_language(&e, "root ::= root \"a\" | \"b\"", &["b", "baaa"], &["", "a", "ab"]);
    assert_language(&e, "root ::= x \"a\" | \"b\"\nx ::= root \"c\"?", &["b", "baca"], &["bc"]);
    let sum = format!("1{}", "+1".repeat(100));
    assert_language(&e, "root ::= root \"+\" root | \"1\"", &["1", "1+1+1", &sum], &["1+", "+1"]);
    assert_language(&e, "root ::= (\"a\"? \"a\"? \"a\"*)*", &[&"a".repeat(300)], &["b"]);
}

#[test]
fn gr2_nested_groups_end_in_bounds() {
    let e = qwen2();
    let nested = |open: &str, n: usize| format!("root ::= {}\"a\"{}", open.repeat(n), ")".repeat(n));
    assert_language(&e, &nested("(", 60_000), &["a"], &["b", ""]);
    assert!(matches!(gbnf(&e, &nested("(\"b\" ", 60_000)), Err(GrammarError::TooLarge(_))));
    let deep = gbnf(&e, &nested("(\"b\" ", 19_000)).unwrap_or_else(|e| panic!("{e}"));
    assert!(accepts(&e, &deep, &format!("{}a", "b".repeat(19_000))));
    assert!(!accepts(&e, &deep, "ba"));
}

#[test]
fn gr3_nested_repetition_ends_in_bounds() {
    let e = qwen2();
    assert!(matches!(gbnf(&e, "root ::= \"a\"{0,2147483648}"), Err(GrammarError::Syntax { column: 16, .. })));
    assert_language(&e, "root ::= \"a\"{0,100000}", &["", "aaa"], &["b"]);
    assert_language(&e, "root ::= ((\"a\"{2,100}){2,100}){2,100}", &["aaaaaaaa"], &["aaaaaaa", "ab"]);
    assert_language(&e, "root ::= (((\"a\"*)*)*)+", &["", "aaaa"], &["b"]);
}

#[test]
fn gr4_long_chains_of_rules_end_in_bounds() {
    let e = qwen2();
    let chain = |n: usize| {
        let rules: String = (0..n).map(|i| format!("r{i} ::= \"a\"? r{} \"b\"?\n", i + 1)).collect();
        format!("root ::= r0\n{rules}r{n} ::= \"x\"")
    };
    assert_language(&e, &chain(5_000), &["x", "aaxbb"], &["", "xa"]);
    let units: String = (0..5_000).map(|i| format!("r{i} ::= r{}\n", i + 1)).collect();
    assert_language(&e, &format!("root ::= r0\n{units}r5000 ::= \"x\""), &["x"], &["", "xx"]);
    assert!(matches!(gbnf(&e, &chain(30_000)), Err(GrammarError::TooLarge(_))));
}

#[test]
fn gr5_schemas_end_in_bounds() {
    let e = qwen2();
    let nested = |n: usize| {
        let text =
            format!(r#"{}{{"type":"null"}}{}"#, r#"{"type":"array","items":"#.repeat(n), "}".repeat(n));
        e.model().grammar(&GrammarSource::JsonSchema(text))
    };
    assert!(accepts(&e, &nested(50).unwrap(), &format!("{}null{}", "[".repeat(50), "]".repeat(50))));
    assert!(matches!(nested(100_000), Err(GrammarError::Schema(_))));
    let list = json!({"$defs": {"list": {"anyOf": [{"type": "null"},
        {"type": "array", "prefixItems": [{"type": "integer"}, {"$ref": "#/$defs/list"}], "items": false, "minItems": 2}]}},
        "$ref": "#/$defs/list"});
    let list = schema(&e, &list).unwrap_or_else(|e| panic!("{e}"));
    assert!(accepts(&e, &list, "[1,[2,null]]") && !accepts(&e, &list, "[1]"));
    // References that lead nowhere, and to other machines.
    let a_and_b =
        json!({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"});
    for bad in
        [json!({"$ref": "#"}), a_and_b, json!({"$ref": "http://localhost/x"}), json!({"$ref": "#/none"})]
    {
        match schema(&e, &bad) {
            Err(GrammarError::Schema(m)) => assert!(!m.is_empty()),
            Err(other) => panic!("{bad}: {other:?}"),
            Ok(grammar) => {
                assert!(sampler(&grammar).sample(&mut [0.0; 8]).is_err(), "{bad} accepts something")
            }
        }
    }
    // Patterns that explode when they are expanded.
    for pattern in
        ["^(((a+)+)+)+$", "^((a{1,30}){1,30}){1,30}$", "^(a?){200}a{200}$", "((a{1000}){1000}){1000}"]
    {
        match schema(&e, &json!({"type": "string", "pattern": pattern})) {
            Ok(grammar) => assert!(!accepts(&e, &grammar, "\"b\""), "{pattern}"),
            Err(other) => assert!(matches!(other, GrammarError::Schema(_)), "{pattern}: {other:?}"),
        }
    }
    for pattern in ["^(?=a)", "(", "(a)\\1"] {
        let refused = schema(&e, &json!({"type": "string", "pattern": pattern}));
        assert!(matches!(refused, Err(GrammarError::Schema(_))), "{pattern}: {refused:?}");
    }
    // Sizes far beyond any answer.
    for large in [
        json!({"type": "array", "items": {"type": "null"}, "minItems": 1_000_000_000}),
        json!({"type": "string", "minLength": 2_147_483_648_u64}),
        json!({"type": "object", "minProperties": 1_000_000_000}),
    ] {
        match schema(&e, &large) {
            Ok(grammar) => assert!(!accepts(&e, &grammar, "[]") && !accepts(&e, &grammar, "\"\""), "{large}"),
            Err(other) => assert!(matches!(other, GrammarError::Schema(_)), "{large}: {other:?}"),
        }
    }
    for (text, part) in
        [("{", "EOF"), ("7", "a schema is"), ("false", "no value"), (r#"{"type":"nope"}"#, "nope")]
    {
        match e.model().grammar(&GrammarSource::JsonSchema(text.into())) {
            Err(GrammarError::Schema(m)) => assert!(m.contains(part), "{text}: {m}"),
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn gr6_a_grammar_that_accepts_nothing_is_refused() {
    let e = qwen2();
    for text in ["root ::= root", "root ::= \"a\" root", "root ::= a\na ::= b\nb ::= a", "root ::= []"] {
        assert!(matches!(gbnf(&e, text), Err(GrammarError::AcceptsNothing)), "{text}");
    }
    assert_language(&e, "root ::= \"a\" | \"b\" dead\ndead ::= dead \"x\"", &["a"], &["b", "bx"]);
}

/// An answer of a request with this grammar, and why it ended.
fn answer(engine: &Engine, grammar: &Grammar, seed: u64, n: usize) -> (String, FinishReason) {
    let mut session = engine.session(&SessionOptions::default()).unwrap();
    let sampler = SamplerOptions { temp: 1.5, seed: Some(seed), ..SamplerOptions::default() };
    let tokens = engine.model().encode_prompt("Once upon a time");
    let request =
        Request { tokens, sampler, grammar: Some(grammar.clone()), max_new_tokens: n, ..Request::default() };
    let mut generation = session.generate(request).unwrap_or_else(|e| panic!("{e}"));
    let text = generation.text().unwrap_or_else(|e| panic!("{e}"));
    (text, generation.finish_reason().expect("ended"))
}

fn every_model() -> Vec<Engine> {
    let mut engines: Vec<_> =
        ["llama", "qwen2", "gemma3"].map(|n| open(&fixture(&format!("models/{n}.gguf")))).into();
    engines.push(demo::base(&EngineOptions::default()));
    engines.extend(shared_data("models/stories260K.gguf").map(|path| open(&path)));
    engines
}

#[test]
fn answers_match_their_grammar() {
    for engine in every_model() {
        let word = gbnf(&engine, "root ::= (\"yes\" | \"no\") (\", \" [0-9]{3} \";\")*").unwrap();
        let closed = gbnf(&engine, "root ::= \" \"? [A-F]{4} (\" \" [0-9]{2}){2}").unwrap();
        for seed in 0..10 {
            let (text, finish) = answer(&engine, &word, seed, 40);
            let rest =
                text.strip_prefix("yes").or(text.strip_prefix("no")).unwrap_or_else(|| panic!("{text:?}"));
            let parts: Vec<&str> = rest.split(';').collect();
            let (last, whole) = parts.split_last().unwrap();
            let is_whole = |p: &&str| {
                p.strip_prefix(", ").is_some_and(|d| d.len() == 3 && d.bytes().all(|b| b.is_ascii_digit()))
            };
            assert!(whole.iter().all(is_whole), "{text:?}");
            // The end may come only where the grammar may end.
            assert!(last.is_empty() || finish == FinishReason::Length, "{text:?} {finish:?}");

            let (text, finish) = answer(&engine, &closed, seed, 40);
            assert_eq!(finish, FinishReason::Stop, "{text:?}");
            let words: Vec<&str> = text.split(' ').filter(|w| !w.is_empty()).collect();
            assert!(
                words.len() == 3
                    && words[0].len() == 4
                    && words[0].bytes().all(|b| (b'A'..=b'F').contains(&b)),
                "{text:?}"
            );
            assert!(
                words[1..].iter().all(|w| w.len() == 2 && w.bytes().all(|b| b.is_ascii_digit())),
                "{text:?}"
            );
        }
    }
}

#[test]
fn answers_are_json_that_obeys_the_schema() {
    let wanted = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": false,
    });
    for engine in every_model() {
        let grammar = schema(&engine, &wanted).unwrap_or_else(|e| panic!("{e}"));
        for seed in 0..5 {
            let (text, finish) = answer(&engine, &grammar, seed, 1500);
            assert_eq!(finish, FinishReason::Stop, "{text:?}");
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
            let object = value.as_object().expect("an object");
            assert_eq!(object.len(), 3, "{text}");
            assert!(object["name"].as_str().is_some_and(|s| s.chars().count() <= 8), "{text}");
            assert!(object["age"].as_u64().is_some_and(|n| n <= 120), "{text}");
            let tags = object["tags"].as_array().expect("an array");
            assert!(
                (1..=3).contains(&tags.len()) && tags.iter().all(|t| t == "red" || t == "blue"),
                "{text}"
            );
        }
    }
}

#[test]
fn a_grammar_keeps_to_its_sequence_and_its_model() {
    let e = qwen2();
    let grammar = gbnf(&e, "root ::= \"abc\"").unwrap();
    // A copy of a sampler goes its own way.
    let tokens = e.model().tokenizer.encode("abc", Default::default());
    let mut one = sampler(&grammar);
    assert!(takes(&e, &mut one, tokens[0]));
    let mut two = one.clone();
    for token in &tokens[1..] {
        assert!(takes(&e, &mut one, *token));
    }
    assert!(one.is_complete() && !two.is_complete());
    assert!(tokens[1..].iter().all(|t| takes(&e, &mut two, *t)) && two.is_complete());
    one.reset();
    assert!(!one.is_complete() && takes(&e, &mut one, tokens[0]));

    let request = |grammar: &Grammar| Request {
        tokens: e.model().encode_prompt("x"),
        grammar: Some(grammar.clone()),
        max_new_tokens: 20,
        sampler: SamplerOptions::greedy(),
        ..Request::default()
    };
    // In one batch with a sequence that has none.
    let mut free = e.session(&SessionOptions::default()).unwrap();
    let mut bound = e.session(&SessionOptions::default()).unwrap();
    let alone = free.generate(Request { grammar: None, ..request(&grammar) }).unwrap().text().unwrap();
    free.clear();
    let mut first = free.generate(Request { grammar: None, ..request(&grammar) }).unwrap();
    let mut second = bound.generate(request(&grammar)).unwrap();
    assert_eq!(second.text().unwrap(), "abc");
    assert_eq!(first.text().unwrap(), alone);
    // End-of-generation tokens that are to be ignored are not chosen in place of text.
    bound.clear();
    let mut third = bound
        .generate(Request { ignore_eos: true, ..request(&gbnf(&e, "root ::= \"a\"{3}").unwrap()) })
        .unwrap();
    assert_eq!((third.text().unwrap().as_str(), third.finish_reason()), ("aaa", Some(FinishReason::Stop)));
    let empty = gbnf(&e, "root ::= \"\"").unwrap();
    let (text, _) = answer(&e, &empty, 0, 9);
    assert_eq!(text, "");

    let other = open(&fixture("models/llama.gguf"));
    let foreign = gbnf(&other, "root ::= \"a\"").unwrap();
    let refused = bound.generate(request(&foreign)).err();
    assert!(matches!(&refused, Some(Error::Request(m)) if m.contains("another model")), "{refused:?}");
}

#[test]
fn a_text_that_cannot_go_on_is_an_error_of_its_request_alone() {
    let e = qwen2();
    let eos = e.model().tokenizer.eos().unwrap();
    let grammar = gbnf(&e, "root ::= \"a\"").unwrap();
    let mut sampler = sampler(&grammar);
    let mut logits = vec![f32::NEG_INFINITY; e.model().tokenizer.vocab_size()];
    logits[eos as usize] = 1.0;
    assert!(matches!(sampler.sample(&mut logits), Err(SamplerError::Grammar(_))));
}
