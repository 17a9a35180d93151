//! A fixture with some of its keys and tensors changed, as a new file in memory.

use std::{collections::BTreeMap, sync::Arc};

use lory_kernels::QuantType;
use lory_models::{
    Bytes,
    gguf::{Gguf, Value, Writer},
};

struct Data {
    ty: QuantType,
    dims: Vec<usize>,
    bytes: Vec<u8>,
}

/// A model file to be changed.
pub struct Edited {
    keys: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Data>,
}

impl Edited {
    /// All keys and tensors of `gguf`.
    pub fn of(gguf: &Gguf) -> Self {
        let keys = gguf.metadata().iter().map(|(k, v)| (k.to_owned(), v.clone())).collect();
        let tensor = |info: &lory_models::gguf::TensorInfo| {
            let bytes = gguf.tensor(&info.name).expect("listed").matrix().bytes().to_vec();
            (info.name.to_string(), Data { ty: info.ty, dims: info.dims.clone(), bytes })
        };
        Edited { keys, tensors: gguf.tensors().map(tensor).collect() }
    }

    /// Sets a key.
    pub fn set(mut self, key: &str, value: Value) -> Self {
        self.keys.insert(key.into(), value);
        self
    }

    /// Removes a key that must be there.
    pub fn without_key(mut self, key: &str) -> Self {
        self.keys.remove(key).unwrap_or_else(|| panic!("no key {key}"));
        self
    }

    /// Removes a tensor that must be there.
    pub fn without_tensor(mut self, name: &str) -> Self {
        self.tensors.remove(name).unwrap_or_else(|| panic!("no tensor {name}"));
        self
    }

    /// Adds or replaces a tensor.
    pub fn tensor(mut self, name: &str, ty: QuantType, dims: &[usize], bytes: Vec<u8>) -> Self {
        self.tensors.insert(name.into(), Data { ty, dims: dims.to_vec(), bytes });
        self
    }

    /// The bytes of the new file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        for (key, value) in &self.keys {
            writer.set(key, value.clone());
        }
        for (name, t) in &self.tensors {
            writer.tensor(name, t.ty, &t.dims);
        }
        let mut data = writer.start(Vec::new()).expect("a Vec takes everything");
        for (name, t) in &self.tensors {
            data.tensor(name, &t.bytes).expect("as declared");
        }
        data.finish().expect("all were written")
    }

    /// The new file, parsed under the name `edited.gguf`.
    pub fn gguf(&self) -> Gguf {
        let bytes: Bytes = Arc::new(self.bytes());
        Gguf::parse(vec![("edited.gguf".into(), bytes)]).unwrap_or_else(|e| panic!("{e}"))
    }
}
