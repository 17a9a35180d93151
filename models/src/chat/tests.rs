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
    assert_eq!(render(build).unwrap(), "");
    refusal(&format!("{build}{{{{ ns.x }}}}"));
    refusal(&format!("{build}{{{{ ns.x|tojson }}}}"));
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
