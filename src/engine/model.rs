//! A loaded model: weights on a device and the tokenizer, shared by any number of sessions and threads.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;

use super::kv::KvAccount;
use super::placement::Placement;
use crate::backend::cpu::{CpuBackend, CpuOptions};
#[cfg(feature = "cuda")]
use crate::backend::cuda::{CudaBackend, CudaOptions};
use crate::backend::gates::AppliedGates;
use crate::backend::{Backend, Device, LentContext, OffloadCounts, Variants, WeightResidency};
use crate::error::{Error, Result, Status};
use crate::model::{Checkpoint, Config, Description, Formats, Progress, Weights, config, names::Layout};
use crate::text::grammar::GrammarVocabulary;
use crate::text::{ChatTemplate, Message, Tokenizer, chat};

/// The tokenizer's file name in a model directory.
const TOKENIZER_FILE: &str = "tokenizer.json";
/// The largest tokenizer.json the library parses, in bytes.
const MAX_TOKENIZER_BYTES: u64 = 64 << 20;

/// What a host may choose when it loads a model.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// Where the model runs.
    pub device: Device,
    /// A context of the host's, and a stream, to use on a [`Device::Cuda`].
    pub cuda_context: Option<LentContext>,
    /// Threads and instruction set of the processor; on a GPU, of loading, and of experts in host memory.
    pub cpu: CpuOptions,
    /// Where published GemMoEs differ in their arithmetic.
    pub variants: Variants,
    /// A sequence's bits do not depend on what else is in the batch or how a prompt was cut. So it always is on the processor; a
    /// GPU then does without its tensor cores, and takes longer for batches of more than a few tokens, prompts above all.
    pub exact: bool,
    /// What weights are held in, where not as the checkpoint has them.
    pub formats: Formats,
    /// Follow symbolic links inside the directory, as a download cache's layout needs.
    pub follow_links: bool,
    /// Map quantised matrices instead of reading them. They are shared with other processes and take no memory that could not be
    /// given back, and the first tokens are slower: parts are read from the disk when they are first needed. The
    /// price: whoever changes the files changes results, and whoever cuts them off kills this process.
    pub map: bool,
    /// Most bytes of keys and values that all sessions of the model hold together; 0 is no limit.
    pub kv_limit_bytes: usize,
    /// On a GPU, most bytes of its memory that weights take; 0 is no limit. Experts that do not fit stay in host memory: few
    /// tokens have them computed on the processor, for more than 16, and in exact mode, they are copied to the GPU each
    /// time, through buffers that the limit counts. What sessions take is not counted.
    pub device_memory_limit: u64,
}

impl LoadOptions {
    /// Fails with `InvalidArgument` where options are out of range, or do not go together.
    pub(crate) fn check(&self) -> Result<()> {
        if self.cuda_context.is_some() && !matches!(self.device, Device::Cuda(_)) {
            let text = "cuda_context is given, and the device is not an NVIDIA GPU: choose the one it is of";
            return Err(Error::new(Status::InvalidArgument, text).at_key("cuda_context"));
        }
        self.cpu.check()
    }

    /// What they are for the GPU of this index.
    #[cfg(feature = "cuda")]
    fn of_cuda(&self, device: usize, memory_limit: u64, exact: bool) -> CudaOptions {
        let LoadOptions { cuda_context: lent, variants, cpu, map, .. } = *self;
        CudaOptions { device, lent, variants, exact, dependent_launch: true, cpu, map, memory_limit }
    }

    /// An account with the limit for keys and values.
    pub(super) fn kv_account(&self) -> KvAccount {
        KvAccount::new((self.kv_limit_bytes > 0).then_some(self.kv_limit_bytes))
    }
}

/// Immutable but for the gates that a router patch replaces; usable from any thread.
pub struct Model {
    config: Config,
    layout: Layout,
    formats: Formats,
    tokenizer: Option<Tokenizer>,
    stop_tokens: Vec<u32>,
    /// The error is returned when the template is used: models without one are used as well.
    chat_template: Result<ChatTemplate>,
    backend: Box<dyn Backend>,
    kv: Arc<KvAccount>,
    fingerprint: OnceLock<u64>,
    /// The gates in force where a patch is applied.
    pub(super) gates: RwLock<Option<Arc<AppliedGates>>>,
    /// Of the stored gates.
    pub(super) gates_fingerprint: OnceLock<u64>,
    grammar_vocabulary: OnceLock<Result<Arc<GrammarVocabulary>>>,
}

impl Model {
    /// Opens a model directory. `progress` may be watched, and cancelled, from another thread.
    pub fn load(directory: &Path, options: &LoadOptions, progress: &Progress) -> Result<Arc<Model>> {
        options.check()?;
        let opened = Opened::new(directory, options, progress)?;
        let Opened { checkpoint, description, .. } = &opened;
        let backend: Box<dyn Backend> = match Placement::choose(options, description)? {
            #[cfg(feature = "cuda")]
            Placement::Cuda { device, memory_limit, exact } => {
                let options = options.of_cuda(device, memory_limit, exact);
                Box::new(CudaBackend::load(&options, description, checkpoint, progress)?)
            }
            Placement::Cpu => {
                let threads = options.cpu.threads.resolved_count();
                let weights = Weights::load(description, checkpoint, threads, options.map, progress)?;
                Box::new(CpuBackend::new(description.config.clone(), weights, &options.cpu, options.variants)?)
            }
        };
        Ok(opened.into_model(backend, options))
    }

    /// As `load`, on the GPU of this index, with weights that `fill` makes there; the weight files may be nothing but their
    /// headers.
    #[cfg(feature = "bench")]
    pub fn generate(
        directory: &Path,
        options: &LoadOptions,
        device: usize,
        fill: crate::backend::cuda::bench::Fill,
    ) -> Result<Arc<Model>> {
        let opened = Opened::new(directory, options, &Progress::default())?;
        let options_of_cuda = options.of_cuda(device, 0, options.exact);
        let backend = CudaBackend::generate(&options_of_cuda, &opened.description, &opened.checkpoint, fill)?;
        Ok(opened.into_model(Box::new(backend), options))
    }

    /// Checks a model directory as `load` does and tells what is in it, without reading the weights.
    pub fn inspect(directory: &Path, options: &LoadOptions) -> Result<(Description, Option<Tokenizer>)> {
        let opened = Opened::new(directory, options, &Progress::default())?;
        Ok((opened.description, opened.tokenizer))
    }

    /// Geometry and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// How the checkpoint stored its experts.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// What its parts are held in; none where a part's matrices are of several formats.
    pub fn formats(&self) -> &Formats {
        &self.formats
    }

    /// The tokenizer, or a `NoTokenizer` error for a directory without one.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(no_tokenizer)
    }

    /// How conversations are written; see `ChatTemplate::choose` for where it comes from and how it fails.
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        self.chat_template.as_ref().map_err(Error::clone)
    }

    /// Ids of a conversation with BOS in front; with `add_generation_prompt` the model's turn has begun. No markup in
    /// a message's text counts. Errors: those of `chat_template`, and of `ChatTemplate::encode`.
    pub fn encode_chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>> {
        let bos = self.config.bos_token_id;
        self.chat_template()?.encode(self.tokenizer()?, bos, messages, add_generation_prompt)
    }

    /// Tokens that end a generation: EOS, and the end of a chat turn where the tokenizer has one.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// The device that holds the weights.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Where its weights are.
    pub fn residency(&self) -> WeightResidency {
        self.backend.residency()
    }

    /// What experts in host memory have cost all its sessions, where it runs on a GPU.
    pub fn offload_counts(&self) -> OffloadCounts {
        self.backend.offload_counts()
    }

    /// Changes [`LoadOptions::device_memory_limit`] while sessions go on: experts move to host memory, and their memory on the
    /// GPU is freed, or they come back. On the CPU any limit holds. Fails with `InvalidArgument` for a limit below the least,
    /// which the error names, `OutOfMemory`, `DeviceOutOfMemory` and as devices do; the model then works with some of them
    /// moved.
    pub fn set_device_memory_limit(&self, bytes: u64) -> Result<()> {
        self.backend.set_device_memory_limit(bytes)
    }

    /// Keys and values of all its sessions.
    pub fn kv_account(&self) -> &Arc<KvAccount> {
        &self.kv
    }

    /// Differs between models that give different results, and with the gates in force; computed when first asked for, in
    /// milliseconds.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint_under(self.gates().as_deref())
    }

    /// The same as it was loaded, whatever patch is applied.
    pub fn loaded_fingerprint(&self) -> u64 {
        *self.fingerprint.get_or_init(|| self.backend.fingerprint())
    }

    /// What grammars of this model are compiled for; made when first asked for, in up to a second (256,000 tokens).
    pub fn grammar_vocabulary(&self) -> Result<&Arc<GrammarVocabulary>> {
        let vocabulary = self.grammar_vocabulary.get_or_init(|| {
            let eos = self.config.eos_token_ids.iter().chain(&self.stop_tokens).next().ok_or_else(|| {
                let text = "the model has no token that ends a text, which a grammar must be able to draw";
                Error::new(Status::UnsupportedModel, text).at_key("eos_token_id")
            })?;
            GrammarVocabulary::new(self.tokenizer()?, self.config.vocab_size, &self.stop_tokens, *eos)
        });
        vocabulary.as_ref().map_err(Error::clone)
    }

    /// Ids of `text`, with BOS in front if asked for. `parse_special` lets turn markers in trusted text become tokens.
    pub fn encode(&self, text: &str, add_bos: bool, parse_special: bool) -> Result<Vec<u32>> {
        let bos = add_bos.then_some(self.config.bos_token_id);
        self.tokenizer()?.encode(text, crate::text::EncodeOptions { bos, parse_special })
    }
}

/// A directory whose small files are parsed and whose weight files' headers are checked.
struct Opened {
    checkpoint: Checkpoint,
    description: Description,
    tokenizer: Option<Tokenizer>,
}

impl Opened {
    fn new(directory: &Path, options: &LoadOptions, progress: &Progress) -> Result<Opened> {
        let mut checkpoint = Checkpoint::open(directory, options.follow_links)?;
        let bytes = checkpoint.read_small_file(config::FILE, config::MAX_BYTES)?.ok_or_else(|| {
            Error::new(Status::FileNotFound, format!("not found in {}", directory.display())).in_file(config::FILE)
        })?;
        let config = Config::from_json(&bytes)?;
        progress.check()?;
        // Before the tokenizer, whose tables have room for vocab_size tokens: the tensors bear that size out.
        checkpoint.read_headers()?;
        let description = Description::new(&config, &checkpoint, options.formats)?;
        let tokenizer = checkpoint
            .read_small_file(TOKENIZER_FILE, MAX_TOKENIZER_BYTES)?
            .map(|bytes| Tokenizer::from_json(&bytes, config.vocab_size))
            .transpose()
            .map_err(|error| error.in_file(TOKENIZER_FILE))?;
        progress.check()?;
        Ok(Opened { checkpoint, description, tokenizer })
    }

    /// The model of it whose weights are loaded.
    fn into_model(self, backend: Box<dyn Backend>, options: &LoadOptions) -> Arc<Model> {
        let Opened { checkpoint, description, tokenizer } = self;
        let chat_template = match &tokenizer {
            Some(tokenizer) => read_chat_template(&checkpoint, &description.config, tokenizer),
            None => Err(no_tokenizer()),
        };
        let Description { config, layout, formats, .. } = description;
        Arc::new(Model {
            stop_tokens: stop_tokens(&config, tokenizer.as_ref()),
            config,
            layout,
            formats,
            tokenizer,
            chat_template,
            backend,
            kv: Arc::new(options.kv_account()),
            fingerprint: OnceLock::new(),
            gates: RwLock::default(),
            gates_fingerprint: OnceLock::new(),
            grammar_vocabulary: OnceLock::new(),
        })
    }
}

fn no_tokenizer() -> Error {
    let text = "the model directory has no tokenizer.json: use token ids, or add the file";
    Error::new(Status::NoTokenizer, text).in_file(TOKENIZER_FILE)
}

fn read_chat_template(checkpoint: &Checkpoint, config: &Config, tokenizer: &Tokenizer) -> Result<ChatTemplate> {
    let template = checkpoint.read_small_file(chat::TEMPLATE_FILE, chat::MAX_TEMPLATE_FILE_BYTES)?;
    let settings = checkpoint.read_small_file(chat::SETTINGS_FILE, chat::MAX_SETTINGS_FILE_BYTES)?;
    let eos = config.eos_token_ids.first().copied();
    ChatTemplate::choose(template.as_deref(), settings.as_deref(), tokenizer, config.bos_token_id, eos)
}

fn stop_tokens(config: &Config, tokenizer: Option<&Tokenizer>) -> Vec<u32> {
    let mut stop = config.eos_token_ids.clone();
    if let Some(tokenizer) = tokenizer {
        for marker in ["<end_of_turn>", "<|im_end|>"] {
            stop.extend(tokenizer.token_id(marker).filter(|id| tokenizer.is_special(*id)));
        }
    }
    stop.sort_unstable();
    stop.dedup();
    stop
}
