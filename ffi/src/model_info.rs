//! What is known about a model.

use std::ffi::c_char;

use lory_runtime::Engine;

use crate::{
    args::{object, out, text},
    engine::lory_engine,
    memory::lory_text,
    status::{Failure, Result, guard, lory_status, lory_status::*},
    structs::{init, place, versioned},
};

/// Numbers of a model. Initialise it with `lory_model_info_init`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lory_model_info {
    /// Set by `lory_model_info_init`.
    pub struct_size: usize,
    /// Longest sequence of a session, in tokens.
    pub n_ctx: u32,
    /// Longest sequence that the model was trained on.
    pub n_ctx_train: u32,
    /// Entries of the vocabulary.
    pub n_vocab: u32,
    /// Layers.
    pub n_layers: u32,
    /// Width of a layer.
    pub n_embd: u32,
    /// Attention heads.
    pub n_heads: u32,
    /// Heads of keys and values.
    pub n_kv_heads: u32,
    /// Zero.
    pub reserved: u32,
    /// Bytes of the model's files.
    pub file_bytes: u64,
}

versioned!(lory_model_info, last_of_first = file_bytes);

/// Empties the struct; `struct_size` is `sizeof(lory_model_info)`.
///
/// # Safety
/// `struct_size` bytes at `place` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_model_info_init(
    place: *mut lory_model_info,
    struct_size: usize,
) -> lory_status {
    // SAFETY: the caller's word.
    guard(|| unsafe { init(place, struct_size) })
}

impl lory_model_info {
    fn of(engine: &Engine) -> lory_model_info {
        let model = engine.model();
        let config = model.decoder.config();
        lory_model_info {
            n_ctx: engine.n_ctx() as u32,
            n_ctx_train: config.n_ctx_train,
            n_vocab: model.tokenizer.vocab_size() as u32,
            n_layers: config.n_layers() as u32,
            n_embd: config.n_embd as u32,
            n_heads: config.n_heads as u32,
            n_kv_heads: config.n_kv_heads as u32,
            file_bytes: model.files.iter().map(|f| (**f).as_ref().len() as u64).sum(),
            ..crate::structs::Versioned::defaults()
        }
    }
}

/// The model's numbers. `info` must be initialised.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_model_info(
    engine: *const lory_engine,
    info: *mut lory_model_info,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, info) = (object(engine, "engine")?, place(info)?);
        info.set(&lory_model_info::of(&engine.engine));
        Ok(())
    })
}

/// The value of a key of the model file, such as `general.name`, as text; `LORY_E_NOT_FOUND` if it
/// has none, `LORY_E_ARGUMENT` if it is an array.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_metadata(
    engine: *const lory_engine,
    key: *const c_char,
    key_len: usize,
    value: *mut lory_text,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, value) = (object(engine, "engine")?, out(value, "value")?);
        value.set(lory_text::new(metadata(&engine.engine, text(key, key_len, "key")?)?));
        Ok(())
    })
}

fn metadata(engine: &Engine, key: &str) -> Result<String> {
    use lory_models::gguf::Value as V;
    let metadata = engine.model().gguf.metadata();
    let missing = || Failure::new(LORY_E_NOT_FOUND, format!("{}: has no key `{key}`", metadata.file()));
    Ok(match metadata.get(key).ok_or_else(missing)? {
        V::String(s) => s.clone(),
        V::Bool(v) => v.to_string(),
        V::F32(v) => v.to_string(),
        V::F64(v) => v.to_string(),
        V::U64(v) => v.to_string(),
        V::Array(_) => {
            let text = format!("{}: key `{key}` is an array", metadata.file());
            return Err(Failure::new(LORY_E_ARGUMENT, text));
        }
        integer => integer.as_i64().ok_or_else(missing)?.to_string(),
    })
}

/// The device in words.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_device(
    engine: *const lory_engine,
    device: *mut lory_text,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, device) = (object(engine, "engine")?, out(device, "device")?);
        device.set(lory_text::new(engine.engine.device()));
        Ok(())
    })
}
