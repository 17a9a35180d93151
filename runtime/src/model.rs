//! A model opened from its file: weights, tokenizer, chat template.

use std::{path::Path, sync::Arc};

use lory_kernels::{
    Backend, Device, DeviceChoice,
    backend::BackendError,
    cpu::{Cpu, Isa},
};
use lory_models::{
    adapter::BaseInfo,
    decoder::Decoder,
    gguf::Gguf,
    tokenizer::{EncodeOptions, Tokenizer},
};

use crate::{
    Error, Grammar, GrammarError, GrammarSource, Repacking, Result, grammar,
    mapping::{self, File, Loading, OpenGguf},
    sampler::BreakerCache,
};

/// Context that is taken when nobody asks for one, unless the model was trained on less.
const DEFAULT_CTX: u32 = 4096;

/// How a model's file is opened.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Longest sequence; `None` takes the trained context, at most 4096.
    pub n_ctx: Option<u32>,
    /// Whether the file is mapped or read.
    pub loading: Loading,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions { n_ctx: None, loading: Loading::Map }
    }
}

/// A model on which engines can run.
pub struct LoadedModel {
    /// The container: metadata and tensor table.
    pub gguf: Gguf,
    /// The files it lies in.
    pub files: Vec<Arc<File>>,
    /// The forward pass.
    pub decoder: Decoder,
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// What adapters are checked against.
    pub base: Arc<BaseInfo>,
    /// Longest sequence.
    pub n_ctx: u32,
    grammars: grammar::Compiler,
    pub(crate) breakers: BreakerCache,
}

impl LoadedModel {
    /// Opens a GGUF file and all its shards.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<LoadedModel> {
        LoadedModel::from_gguf(mapping::open_gguf(path, options.loading)?, options)
    }

    /// The processor, ready to run this model, with `threads` threads (`None`: the physical cores).
    ///
    /// # Errors
    /// A weight of a format that has no kernel, by name; no memory for repacked weights; a wrong `LORY_ISA`.
    pub fn cpu(&self, threads: Option<usize>, repacking: Repacking) -> Result<Cpu> {
        let mut cpu = Cpu::new(threads, Isa::from_env().map_err(Error::Request)?);
        let weights = self.decoder.weights();
        self.check_types(&cpu)?;
        if repacking.decide(weights.factors().map(|t| t.matrix().bytes().len()).sum()) {
            cpu = cpu.with_repacking();
        }
        for tensor in weights.factors() {
            cpu.load(tensor.matrix()).map_err(lory_models::Error::from)?;
        }
        Ok(cpu)
    }

    /// The chosen device, ready to run this model; `threads` and `repacking` are for the processor.
    ///
    /// # Errors
    /// As [`LoadedModel::cpu`]; a device that is not there, or has too little memory for the weights.
    pub fn device(
        &self,
        choice: DeviceChoice,
        threads: Option<usize>,
        repacking: Repacking,
    ) -> Result<Device> {
        if !matches!(choice, DeviceChoice::Cuda(_)) {
            return Ok(Device::Cpu(Box::new(self.cpu(threads, repacking)?)));
        }
        let isa = Isa::from_env().map_err(Error::Request)?;
        let device = Device::open(choice, threads, isa).map_err(lory_models::Error::from)?;
        self.check_types(&device)?;
        for tensor in self.decoder.weights().matrices() {
            device.load(tensor.matrix()).map_err(lory_models::Error::from)?;
        }
        Ok(device)
    }

    /// An error for a weight of a format that the device has no kernel for.
    fn check_types<B: Backend>(&self, backend: &B) -> Result<()> {
        for tensor in self.decoder.weights().matrices() {
            if !backend.supports(tensor.ty()) {
                let error = BackendError::UnsupportedType { device: backend.label(), ty: tensor.ty() };
                let error = lory_models::Error::tensor(tensor.file(), tensor.name(), error.to_string());
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// A model from a container that is already parsed.
    pub fn from_gguf(open: OpenGguf, options: &OpenOptions) -> Result<LoadedModel> {
        let OpenGguf { gguf, files } = open;
        let trained = lory_models::config::Config::from_metadata(gguf.metadata(), 1)?.n_ctx_train.max(1);
        let n_ctx = match options.n_ctx {
            Some(0) => {
                return Err(Error::Request(
                    "a context of 0 tokens cannot hold anything: give at least 1".into(),
                ));
            }
            Some(n) => n,
            None => trained.min(DEFAULT_CTX),
        };
        let decoder = Decoder::load(&gguf, n_ctx)?;
        let tokenizer = Arc::new(Tokenizer::from_metadata(gguf.metadata())?);
        if tokenizer.vocab_size() > decoder.vocab_size() {
            let message = format!(
                "has {} rows for a vocabulary of {} tokens",
                decoder.vocab_size(),
                tokenizer.vocab_size()
            );
            return Err(
                lory_models::Error::tensor(gguf.metadata().file(), "token_embd.weight", message).into()
            );
        }
        let base = Arc::new(BaseInfo::from_gguf(&gguf)?);
        let (grammars, breakers) = Default::default();
        Ok(LoadedModel { gguf, files, decoder, tokenizer, base, n_ctx, grammars, breakers })
    }

    /// A grammar for this model's vocabulary, to be named in [`crate::Request::grammar`].
    pub fn grammar(&self, source: &GrammarSource) -> std::result::Result<Grammar, GrammarError> {
        self.grammars.compile(&self.tokenizer, source)
    }

    /// A prompt's tokens, with the special tokens that the model wants around a text. Control
    /// tokens written out in `text` are read as such.
    pub fn encode_prompt(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode(text, EncodeOptions { add_special: true, parse_special: true })
    }
}
