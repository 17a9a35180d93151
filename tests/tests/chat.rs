//! Chat templates of real models, rendered as Python's Jinja renders them. Skips where the data folder is absent.

use lory_models::chat::{ChatTemplate, Message, RenderOptions};
use lory_tests::fixtures::shared_data;
use serde_json::{Value, json};

fn messages(value: &Value) -> Vec<Message> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn cases_render_as_in_python() {
    let Some(path) = shared_data("chat-templates/cases.json") else { return };
    let cases: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let conversation = messages(&cases["messages"]);
    let options = RenderOptions {
        add_generation_prompt: cases["add_generation_prompt"].as_bool().unwrap(),
        ..RenderOptions::default()
    };
    let (mut passed, mut wrong) = (0, Vec::new());
    for case in cases["cases"].as_array().unwrap() {
        if case["python_jinja2_equals_expected"] != true {
            continue;
        }
        let name = case["name"].as_str().unwrap();
        let template = ChatTemplate::new(case["template"].as_str().unwrap(), name)
            .unwrap()
            .with_tokens(case["bos_token"].as_str(), case["eos_token"].as_str());
        let expected =
            case["expected_jinja"].as_str().unwrap_or_else(|| case["expected_builtin"].as_str().unwrap());
        match template.render(&conversation, &options) {
            Ok(text) if text == expected => passed += 1,
            other => wrong.push(format!("{name}\n  expected {expected:?}\n  got {other:?}")),
        }
    }
    println!("{passed} cases equal Python's");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(passed >= 15);
}

#[test]
fn every_template_of_the_folder_renders_a_conversation() {
    let Some(folder) = shared_data("chat-templates") else { return };
    let plain = [
        Message::new("user", "How are you?"),
        Message::new("assistant", "Well."),
        Message::new("user", "Fine."),
    ];
    let tools = json!([{"type": "function", "function": {
        "name": "weather", "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Its name"}}, "required": ["city"]},
    }}]);
    let mut n = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "jinja") {
            continue;
        }
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let template = ChatTemplate::new(&std::fs::read_to_string(&path).unwrap(), &name)
            .unwrap()
            .with_tokens(Some("<s>"), Some("</s>"));
        for tools in [None, Some(tools.clone())] {
            // The tool template of Hermes has no meaning without tools: Python fails on it, too.
            if tools.is_none() && name.contains("tool_use") {
                continue;
            }
            let options = RenderOptions {
                add_generation_prompt: true,
                tools,
                now: Some(1_721_995_200),
                ..RenderOptions::default()
            };
            let text = template.render(&plain, &options).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(text.contains("How are you?") && text.contains("Fine."), "{name}: {text}");
        }
        n += 1;
    }
    println!("{n} templates");
    assert!(n >= 12);
}
