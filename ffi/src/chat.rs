//! Conversations to the text that the model was trained to continue.

use lory_models::chat::{ChatTemplate, Message, RenderOptions};
use serde_json::Value;

use crate::{
    args::{object, out, slice},
    engine::lory_engine,
    memory::{lory_str, lory_text},
    status::{Failure, Result, guard, lory_status, lory_status::*},
    structs::{init, read, versioned},
};

/// One message of a conversation.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lory_chat_message {
    /// `system`, `user`, `assistant`, `tool`.
    pub role: lory_str,
    /// Its text.
    pub content: lory_str,
}

/// A conversation and how it is rendered. Initialise it with `lory_chat_options_init`. Empty texts
/// are as if not given.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lory_chat_options {
    /// Set by `lory_chat_options_init`.
    pub struct_size: usize,
    /// The conversation.
    pub messages: *const lory_chat_message,
    /// Elements of `messages`.
    pub n_messages: usize,
    /// Instead of `messages`: a JSON array of objects as in the chat APIs, with tool calls and
    /// whatever else the template knows.
    pub messages_json: lory_str,
    /// Tool definitions in JSON, usually an array of schemas.
    pub tools_json: lory_str,
    /// Documents for retrieval-augmented templates, in JSON.
    pub documents_json: lory_str,
    /// A JSON object of further variables, such as `{"enable_thinking": false}`.
    pub extra_json: lory_str,
    /// A Jinja template instead of the model's.
    pub template_source: lory_str,
    /// Local time in seconds since 1970-01-01 00:00, if `has_now` is 1.
    pub now: i64,
    /// 1 lets the template know the time. Default 0.
    pub has_now: u32,
    /// 1, the default, ends with the beginning of an answer of the assistant.
    pub add_generation_prompt: u32,
}

versioned!(lory_chat_options, last_of_first = add_generation_prompt, |zeroed| lory_chat_options {
    add_generation_prompt: 1,
    ..zeroed
});

/// Fills in the defaults; `struct_size` is `sizeof(lory_chat_options)`.
///
/// # Safety
/// `struct_size` bytes at `options` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_chat_options_init(
    options: *mut lory_chat_options,
    struct_size: usize,
) -> lory_status {
    // SAFETY: the caller's word.
    guard(|| unsafe { init(options, struct_size) })
}

/// Renders a conversation with the model's chat template. Tokenize the text with
/// `LORY_PARSE_SPECIAL` and without `LORY_ADD_SPECIAL`: templates write special tokens themselves.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_chat_render(
    engine: *const lory_engine,
    options: *const lory_chat_options,
    text: *mut lory_text,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, text, options) = (object(engine, "engine")?, out(text, "text")?, read(options)?);
        let template = options.template(&engine)?;
        let rendered = template.render(&options.messages()?, &options.render_options()?)?;
        text.set(lory_text::new(rendered));
        Ok(())
    })
}

impl lory_chat_options {
    /// # Safety
    /// What it points to is readable.
    unsafe fn template(&self, engine: &lory_engine) -> Result<ChatTemplate> {
        let metadata = engine.engine.model().gguf.metadata();
        // SAFETY: the caller's word.
        let source = unsafe { self.template_source.read("template_source") }?;
        if source.is_empty() {
            return ChatTemplate::required(metadata)
                .map_err(|e| Failure::new(LORY_E_TEMPLATE, e.to_string()));
        }
        let tokenizer = &engine.engine.model().tokenizer;
        let written = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id));
        let template = ChatTemplate::new(source, "template_source")?;
        Ok(template.with_tokens(written(tokenizer.bos()), written(tokenizer.eos())))
    }

    /// # Safety
    /// What it points to is readable.
    unsafe fn messages(&self) -> Result<Vec<Message>> {
        // SAFETY: the caller's word.
        let json = unsafe { json(self.messages_json, "messages_json") }?;
        if let Some(json) = json {
            let wrong = |e| Failure::new(LORY_E_ARGUMENT, format!("messages_json: {e}"));
            return serde_json::from_value(json).map_err(wrong);
        }
        // SAFETY: the caller's word.
        let messages = unsafe { slice(self.messages, self.n_messages, "messages") }?;
        // SAFETY: the caller's word.
        let message = |m: &lory_chat_message| unsafe {
            Ok(Message::new(m.role.read("role")?, m.content.read("content")?))
        };
        messages.iter().map(message).collect()
    }

    /// # Safety
    /// What it points to is readable.
    unsafe fn render_options(&self) -> Result<RenderOptions> {
        // SAFETY: the caller's word.
        let (tools, documents, extra) = unsafe {
            (
                json(self.tools_json, "tools_json")?,
                json(self.documents_json, "documents_json")?,
                json(self.extra_json, "extra_json")?,
            )
        };
        let extra = match extra {
            None => Default::default(),
            Some(Value::Object(map)) => map,
            Some(_) => return Err(Failure::new(LORY_E_ARGUMENT, "extra_json is not a JSON object")),
        };
        Ok(RenderOptions {
            add_generation_prompt: self.add_generation_prompt != 0,
            tools,
            documents,
            now: (self.has_now != 0).then_some(self.now),
            extra,
        })
    }
}

/// # Safety
/// The text is readable.
unsafe fn json(text: lory_str, name: &str) -> Result<Option<Value>> {
    // SAFETY: the caller's word.
    let text = unsafe { text.read(name) }?;
    if text.is_empty() {
        return Ok(None);
    }
    serde_json::from_str(text).map(Some).map_err(|e| Failure::new(LORY_E_ARGUMENT, format!("{name}: {e}")))
}
