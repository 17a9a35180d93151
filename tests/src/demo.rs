//! The built-in demo: a trained base and the adapters of its skills, as they ship.

use std::sync::Arc;

use lory_demo::{BASE, PACK, skills};
use lory_models::{
    chat::{ChatTemplate, Message, RenderOptions},
    tokenizer::EncodeOptions,
};
use lory_runtime::{
    AdapterId, Engine, EngineOptions, LoadedModel, OpenOptions,
    mapping::{self, File, OpenGguf},
};

/// One of the two files, opened where it lies in the program.
pub fn in_memory(bytes: &'static [u8], name: &str) -> OpenGguf {
    mapping::parse(vec![Arc::new(File::from_owner(Box::new(bytes), name))]).unwrap_or_else(|e| panic!("{e}"))
}

/// The base alone.
pub fn base(options: &EngineOptions) -> Engine {
    let open = OpenOptions { n_ctx: options.n_ctx, loading: options.loading };
    LoadedModel::from_gguf(in_memory(BASE, "base.gguf"), &open)
        .and_then(|model| Engine::with_model(model, options))
        .unwrap_or_else(|e| panic!("{e}"))
}

/// The base with all skills, and the adapters' ids in the skills' order.
pub fn engine(options: &EngineOptions) -> (Engine, Vec<AdapterId>) {
    let engine = base(options);
    let store = engine.adapters();
    let pack = in_memory(PACK, "skills.gguf");
    let count = store.open_pack_files(pack, Vec::new()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(count, skills().all.len(), "an adapter for every skill");
    let ids = skills().all.iter().map(|s| store.resolve(&s.name).unwrap_or_else(|e| panic!("{e}"))).collect();
    (engine, ids)
}

/// `<s>{prompt}<|sep|>`, as the template in the base's file makes it at the end of a conversation.
pub fn tokens(engine: &Engine, prompt: &str) -> Vec<u32> {
    let template =
        ChatTemplate::from_metadata(engine.model().gguf.metadata()).expect("Jinja").expect("in the file");
    let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
    let said = [("user", "not this one"), ("assistant", "nor that"), ("user", prompt)];
    let messages: Vec<Message> = said.iter().map(|(role, text)| Message::new(*role, *text)).collect();
    let text = template.render(&messages, &options).expect("rendered");
    engine.model().tokenizer.encode(&text, EncodeOptions { add_special: false, parse_special: true })
}
