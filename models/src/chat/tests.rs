//! Python's results for small templates, and the classes of hostile templates.

use serde_json::json;

use super::*;

fn render(source: &str) -> Result<String> {
    let messages = [Message::new("user", "Hi"), Message::new("assistant", "Ho")];
    ChatTemplate::new(source, "t.gguf")?.render(&messages, &RenderOptions::default())
}

/// The text of a template error, which must name the file.
fn refusal(source: &str) -> String {
    match render(source) {
        Err(Error::Template { file, message }) => {
            assert_eq!(file, "t.gguf");
            message
        }
        other => panic!("{source}: {other:?}"),
    }
}

#[test]
fn small_templates_render_as_in_python() {
    let cases: Value = serde_json::from_str(include_str!("python_cases.json")).unwrap();
    let messages: Vec<Message> = serde_json::from_value(cases["messages"].clone()).unwrap();
    let options = RenderOptions {
        add_generation_prompt: true,
        tools: Some(cases["tools"].clone()),
        now: Some(1_721_995_200),
        ..RenderOptions::default()
    };
    let cases = cases["cases"].as_array().unwrap();
    assert!(cases.len() >= 10);
    for case in cases {
        let template = ChatTemplate::new(case["template"].as_str().unwrap(), "t.gguf").unwrap();
        let text = template.with_tokens(Some("<s>"), Some("</s>")).render(&messages, &options).unwrap();
        assert_eq!(text, case["expected"].as_str().unwrap(), "{}", case["template"]);
    }
}

/// Python's definition: the indices start, start + step, … that lie in the sequence and before stop.
fn sliced(len: i64, start: Option<i64>, stop: Option<i64>, step: i64) -> String {
    let place = |bound: i64| if bound < 0 { bound + len } else { bound };
    let (first, end) = if step > 0 { (0, len) } else { (len - 1, -1) };
    let start = start.map_or(first, |s| if step > 0 { place(s).max(0) } else { place(s).min(len - 1) });
    let stop = stop.map_or(end, |s| place(s).max(-1));
    let before_stop = |i: &i64| if step > 0 { *i < stop } else { *i > stop };
    let all = (0..100).map(|n| start + n * step).take_while(before_stop).filter(|i| (0..len).contains(i));
    all.map(|i| char::from(b'a' + i as u8)).collect()
}

#[test]
fn slices_are_those_of_python() {
    assert_eq!(sliced(4, Some(2), Some(0), -1), "cb");
    assert_eq!(sliced(4, Some(-2), None, -2), "ca");
    let bounds: Vec<Option<i64>> = (-6..=6).map(Some).chain([None]).collect();
    let number = |bound: &Option<i64>| bound.map_or(String::new(), |bound| bound.to_string());
    for len in [0, 1, 4] {
        let (text, list) = (&"abcd"[..len as usize], &r#""a","b","c","d","#[..4 * len as usize]);
        for step in [-7, -3, -2, -1, 1, 2, 3] {
            let (mut source, mut want) = (String::new(), String::new());
            for (start, stop) in bounds.iter().flat_map(|start| bounds.iter().map(move |stop| (start, stop)))
            {
                let at = format!("[{}:{}:{step}]", number(start), number(stop));
                let tuple = if len == 0 { "()".into() } else { format!("({list})") };
                source += &format!(
                    "{{{{ '{text}'{at} }}}} {{{{ [{list}]{at}|join }}}} {{{{ {tuple}{at}|join }}}};"
                );
                let one = sliced(len, *start, *stop, step);
                want += &format!("{one} {one} {one};");
            }
            let template = ChatTemplate::new(&source, "t.gguf").unwrap();
            let text = template.render(&[], &RenderOptions::default()).unwrap();
            let slices = text.split(';').zip(source.split(';')).zip(want.split(';'));
            slices.for_each(|((got, slice), want)| assert_eq!(got, want, "{slice}"));
            assert_eq!(text, want);
        }
    }
    let kept =
        "{{ (1, 2)[::-1] }}{{ [1, 2][::-1] }}{{ [][::-1] }}{{ messages[::-1]|length }}{{ range(4)[::-2] }}";
    let text = ChatTemplate::new(kept, "t.gguf").unwrap().render(&[], &RenderOptions::default()).unwrap();
    assert_eq!(text, "(2, 1)[2, 1][]0[3, 1]");
    for (wrong, why) in [("'a'[::0]", "step"), ("3[::-1]", "sliced"), ("'a'['b'::-1]", "i64")] {
        let text = refusal(&format!("{{{{ {wrong} }}}}"));
        assert!(text.contains(why), "{wrong}: {text}");
    }
}

#[test]
fn what_the_template_raises_is_the_error() {
    let text = refusal("{{ raise_exception('roles must alternate') }}");
    assert!(text.contains("the template refuses: roles must alternate"), "{text}");
}

#[test]
fn variables_reach_the_template() {
    let template = ChatTemplate::new(
        "{{ bos_token }}{{ eos_token is defined }}{{ enable_thinking }}{{ documents[0].text }}{{ strftime_now is defined }}",
        "t.gguf",
    )
    .unwrap()
    .with_tokens(Some("<s>"), None);
    let mut options = RenderOptions { documents: Some(json!([{"text": "doc"}])), ..RenderOptions::default() };
    options.extra.insert("enable_thinking".into(), false.into());
    assert_eq!(template.render(&[], &options).unwrap(), "<s>FalseFalsedocFalse");
}

#[test]
fn metadata_gives_template_and_tokens() {
    let mut meta = Metadata::new("m.gguf".into());
    assert!(ChatTemplate::from_metadata(&meta).unwrap().is_none());
    let text = ChatTemplate::required(&meta).unwrap_err().to_string();
    assert!(text.contains("m.gguf") && text.contains("give a Jinja template"), "{text}");
    let strings =
        |list: &[&str]| gguf::Value::Array(gguf::Array::String(list.iter().map(|s| s.to_string()).collect()));
    meta.insert(KEY, gguf::Value::String("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}".into()))
        .unwrap();
    meta.insert("tokenizer.chat_template.tool_use", gguf::Value::String("tools".into())).unwrap();
    meta.insert("tokenizer.ggml.tokens", strings(&["<unk>", "<s>", "</s>"])).unwrap();
    meta.insert("tokenizer.ggml.bos_token_id", gguf::Value::U32(1)).unwrap();
    meta.insert("tokenizer.ggml.eos_token_id", gguf::Value::U32(7)).unwrap();
    let template = ChatTemplate::required(&meta).unwrap();
    let text = template.render(&[Message::new("user", "Hi")], &RenderOptions::default()).unwrap();
    assert_eq!(text, "<s>Hi");
    assert_eq!(ChatTemplate::named(&meta, "tool_use").unwrap().unwrap().source(), "tools");
    assert!(ChatTemplate::named(&meta, "rag").unwrap().is_none());
}

#[test]
fn broken_source_names_the_line() {
    let text = refusal("a\n{% for %}");
    assert!(text.contains(":2"), "{text}");
    assert!(refusal(&" ".repeat(MAX_SOURCE + 1)).contains("more than"));
}

#[test]
fn t1_builtins_and_attributes_are_out_of_reach() {
    for source in [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ open('/etc/passwd') }}",
        "{{ self.__init__() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends '/etc/passwd' %}",
    ] {
        refusal(source);
    }
    assert_eq!(render("{{ ''.__class__ }}{{ __import__ }}").unwrap(), "");
}

#[test]
fn t2_loops_run_out_of_steps() {
    assert!(refusal("{% for i in range(10**9) %}{% endfor %}").contains("too many"));
    let nested = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    assert!(refusal(nested).contains("too many steps"));
    refusal("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}");
    refusal("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}");
}

#[test]
fn t3_deep_nesting_is_refused_or_survived() {
    let longest = |open: &str, close: &str| {
        let n = (MAX_SOURCE - 16) / (open.len() + close.len());
        format!("{{{{ {}1{} }}}}", open.repeat(n), close.repeat(n))
    };
    refusal(&longest("(", ")"));
    refusal(&longest("[", "]"));
    refusal(&longest("{1:", "}"));
    refusal(&longest("f(", ")"));
    refusal(&"{% if true %}".repeat(MAX_SOURCE / 13));
    refusal(&"{% if true %}{% else %}".repeat(MAX_SOURCE / 23));
    // Chains have no depth for the reader, but do for the compiler: they may fail or not, but must come back.
    let before = ["-", "not ", "1+", "1~", "1**", "1 and ", "1<", "1 if 1 else "];
    let after = [".a", "|e", "[0]", "()", " is none"];
    for chain in before.map(|c| longest(c, "")).into_iter().chain(after.map(|c| longest("", c))) {
        let _ = render(&chain);
    }
    let elif = format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(MAX_SOURCE / 12 - 3));
    let _ = render(&elif);
    let build =
        "{% set ns = namespace(x=[]) %}{% for i in range(20000) %}{% set ns.x = [ns.x] %}{% endfor %}";
    assert!(refusal(build).contains("nests values deeper"));
    let mut deep = json!(1);
    for _ in 0..200 {
        deep = json!([deep]);
    }
    let template = ChatTemplate::new("{{ messages }}", "t.gguf").unwrap();
    let error = template.render(&[Message::new("user", deep)], &RenderOptions::default()).unwrap_err();
    assert!(error.to_string().contains("nested deeper"), "{error}");
}

#[test]
fn t4_output_is_bounded() {
    let loud = "{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}";
    assert!(refusal(loud).contains("more than"));
    let captured = "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}";
    assert!(refusal(captured).contains("more than"));
    refusal("{{ ('a' * 100000).replace('a', 'b' * 100000) }}");
    refusal("{{ 'a' * 10**12 }}");
}

#[test]
fn t4_values_are_bounded_however_they_grow() {
    for (start, step) in [
        ("'ab'", "ns.x ~ ns.x"),
        ("'ab'", "ns.x + ns.x"),
        ("'ab'", "ns.x * 1000"),
        ("'ab'", "1000 * ns.x"),
        ("['a']", "ns.x + ns.x"),
        ("['a']", "ns.x * 1000"),
        ("(1, 2)", "ns.x + ns.x"),
        ("(1, 2)", "ns.x * 1000"),
        ("['a']", "[ns.x, ns.x]"),
        ("'a'", "(ns.x, ns.x)"),
        ("'a'", "{'a': ns.x, 'b': ns.x}"),
        ("'a'", "{ns.x: [ns.x], 'b': ns.x}"),
        ("'a'", "[ns.x, ns.x]|join(ns.x)"),
        ("'a'", "[ns.x, ns.x]|join"),
        ("'a'", "ns.x|replace('a', 'aa')"),
        ("'a'", "ns.x.replace('a', 'aa')"),
        ("'a'", "ns.x.join([ns.x, ns.x, 'b'])"),
        ("'a'", "(ns.x ~ '\\n' ~ ns.x)|indent(9, true)"),
        ("'a'", "'%s%s'|format(ns.x, ns.x)"),
        ("'a'", "'{}{}'.format(ns.x, ns.x)"),
        ("'a'", "ns.x|list + ns.x|list"),
        ("'\"'", "ns.x|tojson"),
        ("[[1]]", "[ns.x|sum(start=[]), ns.x|sum(start=[])]"),
        ("'a'", "(ns.x|upper ~ ns.x)|lower"),
        ("[1]", "ns.x|list|batch(10000, 'a')|list"),
    ] {
        let template = format!(
            "{{% set ns = namespace(x={start}) %}}{{% for i in range(64) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
        );
        let error = refusal(&template);
        assert!(error.contains("more than") || error.contains("deeper"), "{step}: {error}");
        let line = format!(
            "{{% set ns = namespace(x={start}) %}}{}",
            format!("{{% set ns.x = {step} %}}").repeat(64)
        );
        assert_eq!(
            refusal(&line).contains("more than"),
            error.contains("more than"),
            "{step} in a straight line"
        );
    }
    for one in [
        "'a' * 10**12",
        "[1] * 10**12",
        "'%999999999d'|format(1)",
        "'%*d'|format(999999999, 1)",
        "'{:999999999}'.format(1)",
        "'{:>{}}'.format(1, 999999999)",
        "'a'|indent(999999999, true)",
        "'a'|indent(width=999999999, first=true)",
        "[1]|slice(999999999)|list",
        "[1]|batch(999999999, 0)|list",
        "('a' * 4000)|list|map('replace', 'a', 'b' * 4000)|list",
        "['a' * 1000000] * 1000",
    ] {
        let error = refusal(&format!("{{{{ {one} }}}}"));
        assert!(error.contains("more than"), "{one}: {error}");
    }
    // Values that no operator builds but a copy, and operands that are read whole for one bit.
    let text = "{% set a = 'a' * 8000000 %}{% set b = a ~ '' %}";
    for one in [
        "a[1:]",
        "a[::-1]",
        "a < b",
        "a <= b",
        "a > b",
        "a >= b",
        "a == b",
        "a != b",
        "a in b",
        "a not in b",
        "a <= b <= a",
    ] {
        let error = refusal(&format!("{text}{}", format!("{{% set x = {one} %}}").repeat(200)));
        assert!(error.contains("too many values"), "{one}: {error}");
    }
    // What is held in pieces, and text of the template that is captured again and again.
    let pieces = "{% set a = 'a' * 6000000 %}{% for i in range(1000) %}{% set x = a ~ i %}{% endfor %}";
    let error = refusal(pieces);
    assert!(error.contains("too many values"), "{error}");
    let raw = format!(
        "{{% set x %}}{{% for i in range(90000) %}}{}{{% endfor %}}{{% endset %}}",
        "raw ".repeat(1000)
    );
    assert!(refusal(&raw).contains("more than"));
}

#[test]
fn t4_namespaces_contain_no_namespaces_and_templates_no_templates() {
    for circle in ["{% set ns.me = ns %}", "{% set ns.me = [ns] %}", "{{ [ns] }}", "{{ {'a': ns} }}"] {
        assert!(refusal(&format!("{{% set ns = namespace() %}}{circle}")).contains("namespace"), "{circle}");
    }
    for other in [
        "{% include 'chat_template' %}",
        "{% extends 'chat_template' %}",
        "{% import 'chat_template' as t %}",
    ] {
        let error = ChatTemplate::new(other, "t.gguf").unwrap_err().to_string();
        assert!(error.contains("another template"), "{error}");
    }
}

#[test]
fn bounds_leave_templates_as_they_are() {
    for (template, text) in [
        ("{% for i in range(5) if i % 2 %}{{ loop.index }}{{ i }},{% else %}x{% endfor %}", "11,23,"),
        (
            "{% for i in [] %}{% else %}none{% endfor %}|{{ 1 if 0 else 2 }}|{{ 0 or 3 and 4 }}|{{ not 1 }}",
            "none|2|4|False",
        ),
        ("{% macro m(a, b='x') %}<{{ a }}{{ b }}{% endmacro %}{{ m(1) }}{{ m(2, b=3) }}", "<1x<23"),
        ("{% macro m() %}[{{ caller() }}]{% endmacro %}{% call m() %}in{% endcall %}", "[in]"),
        ("{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "123"),
        (
            "{% set x %}a{% if true %}b{% endif %}{% endset %}{{ x|upper }}{% filter upper %}q{% endfilter %}",
            "ABQ",
        ),
        ("{% block b %}in {{ 1 + 1 }}{% endblock %}", "in 2"),
        ("{{ 1 < 2 < 3 }}{{ 1 < 3 < 2 }}{{ 'a' in 'abc' }}{{ 2 not in [1] }}", "TrueFalseTrueTrue"),
        (
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        (
            "{{ 3 * 4 }} {{ 1.5 * 2 }} {{ 2 * 2.0 }} {{ 'ab' * 2 }} {{ [1] * 2 }} {{ true * 3 }}",
            "12 3.0 4.0 abab [1, 1] 3",
        ),
        ("{{ 'a' ~ 1 ~ none ~ true ~ [1, 'b'] ~ nope }}", "a1NoneTrue[1, 'b']"),
        (
            "{{ 'a-b'|replace('-', '+') }}{{ [1, 2]|join(', ') }}{{ '%s=%03d'|format('n', 7) }}{{ '{}-{a}'.format(1, a=2) }}",
            "a+b1, 2n=0071-2",
        ),
        ("{{ [1, 2, 3]|batch(2)|list }}{{ 'a\nb'|indent(2) }}", "[[1, 2], [3]]a\n  b"),
        (
            "{% set ns = namespace(x=1, y=[]) %}{% for i in range(3) %}{% set ns.x = ns.x * 2 %}{% set ns.y = ns.y + [i] %}{% endfor %}{{ ns.x }}{{ ns.y }}",
            "8[0, 1, 2]",
        ),
        (
            "{{ 'abcd'[1:3] }} {{ 'abcd'[::-1] }} {{ [1, 2, 3][:-1] }} {{ (1, 2, 3)[::2] }} {{ nope[1:] }} {{ 'b' > 'a' >= 'a' }}",
            "bc dcba [1, 2] (1, 3) [] True",
        ),
        ("{% set a, b = [1, 2] %}{{ b }}{{ a }}{% with c = 3 %}{{ c }}{% endwith %}", "213"),
    ] {
        assert_eq!(render(template).unwrap_or_else(|e| panic!("{template}: {e}")), text, "{template}");
    }
    // Errors still name their line.
    assert!(refusal("a\n\n{{ 1 + 'x' }}").contains(":3"), "{}", refusal("a\n\n{{ 1 + 'x' }}"));
}

#[test]
fn t5_content_of_another_type_is_an_error_or_printed() {
    let template = ChatTemplate::new("{{ 'x' + messages[0]['content'] }}", "t.gguf").unwrap();
    for content in [json!(5), json!(null), json!([{"type": "text", "text": "Hi"}]), json!({"a": 1})] {
        let message = Message::new("user", content);
        let error = template.render(std::slice::from_ref(&message), &RenderOptions::default()).unwrap_err();
        assert!(matches!(error, Error::Template { .. }), "{error:?}");
    }
    let printing = ChatTemplate::new("{{ messages[0].content }}", "t.gguf").unwrap();
    let message = Message::new("user", json!([null, true, {"a": "b'c"}, 1.0]));
    assert_eq!(
        printing.render(&[message], &RenderOptions::default()).unwrap(),
        "[None, True, {'a': \"b'c\"}, 1.0]"
    );
    let roleless: Message = serde_json::from_value(json!({"content": "x"})).unwrap();
    let error = printing.render(&[roleless], &RenderOptions::default()).unwrap_err();
    assert!(error.to_string().contains("message 0 has no `role`"), "{error}");
}
