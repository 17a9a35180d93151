//! GGUF files put together byte by byte, so that any field can be wrong.

/// A string as GGUF stores it.
pub fn string(s: impl AsRef<[u8]>) -> Vec<u8> {
    let s = s.as_ref();
    [&(s.len() as u64).to_le_bytes(), s].concat()
}

/// An array value: element type, count, elements.
pub fn array(element_type: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [&element_type.to_le_bytes()[..], &count.to_le_bytes(), elements].concat()
}

/// A file under construction; what is not set is what a sound file has.
#[derive(Clone, Debug)]
pub struct GgufBytes {
    magic: [u8; 4],
    version: u32,
    n_tensors: Option<u64>,
    n_keys: Option<u64>,
    alignment: usize,
    keys: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: usize,
}

impl Default for GgufBytes {
    fn default() -> Self {
        GgufBytes::new()
    }
}

impl GgufBytes {
    /// An empty version 3 file.
    pub fn new() -> Self {
        let (keys, tensors) = (Vec::new(), Vec::new());
        GgufBytes {
            magic: *b"GGUF",
            version: 3,
            n_tensors: None,
            n_keys: None,
            alignment: 32,
            keys,
            tensors,
            data: 0,
        }
    }

    /// Sets the first four bytes.
    pub fn magic(self, magic: &[u8; 4]) -> Self {
        GgufBytes { magic: *magic, ..self }
    }

    /// Sets the version field.
    pub fn version(self, version: u32) -> Self {
        GgufBytes { version, ..self }
    }

    /// Claims a number of tensors.
    pub fn claim_tensors(self, n: u64) -> Self {
        GgufBytes { n_tensors: Some(n), ..self }
    }

    /// Claims a number of keys.
    pub fn claim_keys(self, n: u64) -> Self {
        GgufBytes { n_keys: Some(n), ..self }
    }

    /// Aligns the data section, without saying so in a key.
    pub fn align(self, alignment: usize) -> Self {
        GgufBytes { alignment, ..self }
    }

    /// Adds a key with its value's type and bytes.
    pub fn key(mut self, name: impl AsRef<[u8]>, ty: u32, value: &[u8]) -> Self {
        self.keys.push([&string(name)[..], &ty.to_le_bytes(), value].concat());
        self
    }

    /// Adds the bytes of a key entry as they are.
    pub fn raw_key(mut self, bytes: &[u8]) -> Self {
        self.keys.push(bytes.into());
        self
    }

    /// Adds a tensor's description.
    pub fn tensor(mut self, name: impl AsRef<[u8]>, dims: &[u64], ty: u32, offset: u64) -> Self {
        let mut t = string(name);
        t.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| t.extend(d.to_le_bytes()));
        t.extend(ty.to_le_bytes());
        t.extend(offset.to_le_bytes());
        self.tensors.push(t);
        self
    }

    /// Adds the bytes of a tensor's description as they are.
    pub fn raw_tensor(mut self, bytes: &[u8]) -> Self {
        self.tensors.push(bytes.into());
        self
    }

    /// Appends so many bytes of tensor data.
    pub fn data(mut self, bytes: usize) -> Self {
        self.data += bytes;
        self
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        if self.data > 0 {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend((0..self.data).map(|i| i as u8));
        }
        out
    }

    /// The file without padding and data.
    pub fn header(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.n_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.n_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        self.keys.iter().chain(&self.tensors).for_each(|part| out.extend(part));
        out
    }
}
