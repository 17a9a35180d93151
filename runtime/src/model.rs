//! A model opened from its file: weights, tokenizer, chat template.

use std::{path::Path, sync::Arc};

use lory_kernels::{
    Backend, Device, DeviceChoice,
    backend::BackendError,
    cpu::{Cpu, Isa, ThreadOptions},
};
use lory_models::{
    Tensor,
    adapter::BaseInfo,
    decoder::Decoder,
    gguf::Gguf,
    tokenizer::{EncodeOptions, Tokenizer},
    weights::Layer,
};

use crate::{
    Error, GpuLayers, Grammar, GrammarError, GrammarSource, Repacking, Result, grammar,
    mapping::{self, File, Loading, OpenGguf},
    placement::{Needs, Placement},
    sampler::BreakerCache,
};

/// Context that is taken when nobody asks for one, unless the model was trained on less.
const DEFAULT_CTX: u32 = 4096;

/// The share of a device's memory, one in so many, that is left at least for adapters where as many layers as fit are asked for.
const KEPT_FREE: usize = 8;

/// Where a model is computed.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceOptions {
    /// On what.
    pub choice: DeviceChoice,
    /// How many layers of it, if it has memory of its own.
    pub gpu_layers: GpuLayers,
    /// Threads of the processor (`None`: the physical cores).
    pub threads: Option<usize>,
    /// Where they run, and how they wait.
    pub thread_options: ThreadOptions,
    /// Whether the processor's weights are repacked.
    pub repacking: Repacking,
    /// Bytes of a layer's keys and values, and of working memory: where as many layers as fit are asked for, they must fit too.
    pub cache_bytes: usize,
    /// See `cache_bytes`.
    pub working_bytes: usize,
    /// Bytes that copies of adapters may have there; see [`crate::EngineOptions::device_adapter_bytes`].
    pub adapter_bytes: Option<usize>,
}

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
        let layers = self.decoder.weights().layers.len();
        self.cpu_for(threads, &ThreadOptions::default(), layers, repacking)
    }

    /// The same for the first layers and the output.
    fn cpu_for(
        &self,
        threads: Option<usize>,
        options: &ThreadOptions,
        layers: usize,
        repacking: Repacking,
    ) -> Result<Cpu> {
        let mut cpu = Cpu::with_options(threads, options, Isa::from_env().map_err(Error::Request)?);
        self.check_types(&cpu)?;
        let weights = self.decoder.weights();
        let first = weights.layers.iter().take(layers).flat_map(Layer::factors);
        let factors: Vec<_> = first.chain([weights.output_factor()]).map(Tensor::matrix).collect();
        if repacking.decide(factors.iter().map(|matrix| matrix.bytes().len()).sum()) {
            cpu = cpu.with_repacking();
        }
        for matrix in factors {
            cpu.load(matrix).map_err(lory_models::Error::from)?;
        }
        Ok(cpu)
    }

    /// The chosen device, ready to run this model.
    ///
    /// # Errors
    /// As [`LoadedModel::cpu`]; a device that is not there, or has too little memory for what it is to have.
    pub fn device(&self, options: &DeviceOptions) -> Result<Device> {
        let DeviceOptions { choice, gpu_layers, threads, repacking, adapter_bytes, .. } = *options;
        let cpu = |layers| self.cpu_for(threads, &options.thread_options, layers, repacking);
        let processor = || Ok(Device::Cpu(Box::new(cpu(self.decoder.weights().layers.len())?)));
        if !matches!(choice, DeviceChoice::Cuda(_)) || gpu_layers == GpuLayers::Last(0) {
            return processor();
        }
        let isa = Isa::from_env().map_err(Error::Request)?;
        let device =
            Device::open(choice, threads, &options.thread_options, isa).map_err(lory_models::Error::from)?;
        let room = device.memory().map_err(lory_models::Error::from)?.map_or(usize::MAX, |(free, total)| {
            free.saturating_sub((total / KEPT_FREE).max(adapter_bytes.unwrap_or(0)))
        });
        let placement = self.needs(options).place(gpu_layers, room).map_err(|bytes| {
            let what = "a single layer, its cache and working memory";
            lory_models::Error::from(BackendError::OutOfMemory { device: device.label(), what, bytes })
        })?;
        let (device, weights): (_, Vec<_>) = match placement {
            Placement::Host => return processor(),
            Placement::Device => {
                self.check_types(&device)?;
                (device, self.decoder.weights().matrices().collect())
            }
            Placement::From(first) => {
                let device = device.behind(cpu(first)?, first);
                let last = self.decoder.weights().layers.iter().skip(first);
                (device, last.flat_map(Layer::factors).collect())
            }
        };
        device.set_adapter_budget(adapter_bytes);
        for tensor in weights {
            device.load(tensor.matrix()).map_err(lory_models::Error::from)?;
        }
        Ok(device)
    }

    /// What the whole model takes on a device.
    fn needs(&self, options: &DeviceOptions) -> Needs {
        let weights = self.decoder.weights();
        let bytes =
            |tensors: &mut dyn Iterator<Item = &Tensor>| tensors.map(|t| t.matrix().bytes().len()).sum();
        let layers: Vec<usize> = weights.layers.iter().map(|layer| bytes(&mut layer.factors())).collect();
        let all: usize = bytes(&mut weights.matrices());
        let rest = all - layers.iter().sum::<usize>();
        Needs { layers, cache: options.cache_bytes, rest, working: options.working_bytes }
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
