//! Mixing: from fine-tuned Gemmas of one geometry to a GemMoE whose experts they are (Branch-Train-MiX, arXiv 2403.07816),
//! tensor by tensor. `docs/mix.md` has the method and the recipe.

mod merge;
mod recipe;
mod ridge;
mod router;
mod sources;
mod tensors;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

pub use recipe::{Base, Expert, Method, Recipe, Router};

use crate::backend::cpu::ThreadOptions;
use crate::error::{Error, Result, Status};
use crate::model::writer::NewTensor;
use crate::model::{Config, Formats, ModelWriter, Progress, Quantization, config, quantization};
use crate::quant::Rounded;
use merge::Merge;
use router::{Making, Texts, read_texts};
use sources::Sources;
use tensors::{From, Planned};

/// The coefficient of the balancing loss that published GemMoEs have in their configuration.
const PUBLISHED_AUX_LOSS: f64 = 0.02;

/// What a host may choose beside the recipe. The result does not depend on it.
#[derive(Clone, Copy, Debug, Default)]
pub struct MixOptions {
    /// Threads that quantise, and run the base for routers; 0 is one per core the process may use, at most 256.
    pub threads: usize,
    /// Follow symbolic links inside the models' directories, as a download cache's layout needs.
    pub follow_links: bool,
}

/// What a recipe makes.
#[derive(Clone, Debug)]
pub struct MixPlan {
    /// The mixture's configuration.
    pub config: Config,
    /// Its parameters.
    pub parameters: u64,
    /// Parameters one token meets.
    pub active_parameters: u64,
    /// Bytes of all tensors that are read.
    pub bytes_read: u64,
    /// Bytes of all tensors that are written.
    pub bytes_written: u64,
    /// The dtypes of what is not quantised, each once.
    pub dtypes: Vec<String>,
    /// What parts are quantised to.
    pub formats: Formats,
    /// Bytes of the dense mean that is written beside the target for a while, where routers need it run; 0 without.
    pub scratch_bytes: u64,
    /// Models that norms, attention and embedding are the mean of, each with its share; one alone is the base.
    pub base: Vec<(PathBuf, f64)>,
    /// Tokens of the texts that routers are made from, BOS left out, for each expert; empty where they are random.
    pub text_tokens: Vec<usize>,
}

/// What mixing did.
#[derive(Clone, Debug)]
pub struct MixReport {
    /// What was made.
    pub plan: MixPlan,
    /// How far off the quantised matrices are from the mixture; none without any.
    pub rounded: Option<Rounded>,
}

/// Fails where `mix` would before its first tensor, apart from weights that are not finite, and tells what would be made;
/// writes nothing.
pub fn check(recipe: &Recipe, target: &Path, options: &MixOptions) -> Result<MixPlan> {
    Ok(Prepared::new(recipe, target, options)?.plan)
}

/// Mixes the models of a recipe and writes the result to `target`, which must not be there or be an empty directory, whose
/// permissions are kept.
///
/// Memory for about 80 MB of a tensor is taken, however many models there are; with routers of method hidden or ridge the base,
/// or the dense mean of all experts' models, which is written to `TARGET.mean` and deleted again, is loaded and run before, and
/// ridge takes `4 * hidden_size^2` bytes for each layer. `progress` counts bytes of what is read, from 0 again for each of these
/// steps, and may be watched and cancelled from another thread; after a cancel or an error nothing of the target is left.
///
/// Fails as loading the models does, with the file's directory, and with `RecipeValue` and `ModelsDiffer`, which name the recipe's
/// line or the model's file and key; with `TensorValue` for numbers that are not finite or do not fit the dtype; with
/// `AlreadyExists`, `InvalidArgument` (the target is a mount point), `DiskFull`, `WriteFailed`, `Cancelled`, `OutOfMemory`.
pub fn mix(recipe: &Recipe, target: &Path, options: &MixOptions, progress: &Progress) -> Result<MixReport> {
    let Prepared { sources, planned, own_head, texts, plan } = Prepared::new(recipe, target, options)?;
    let making = Making { recipe, sources: &sources, planned: &planned, texts: &texts, options, progress };
    let routers = making.routers(&scratch_of(target))?;
    let mut changes = config_changes(recipe, &planned, own_head);
    if !sources.has_key("router_aux_loss_coef")? {
        changes.insert(0, ("router_aux_loss_coef", Some(json!(PUBLISHED_AUX_LOSS))));
    }
    let config = sources.changed_config(changes)?;
    let directory = NewDirectory { target, shard_bytes: recipe.shard_bytes, config: &config, planned: &planned };
    let rounded = directory.write(&sources, options.threads, progress, &|layer| routers.layer(layer))?;
    Ok(MixReport { plan, rounded })
}

/// The mean of all experts' models as a dense model, for routers that are made by running it.
fn write_dense_mean(
    recipe: &Recipe,
    sources: &Sources,
    target: &Path,
    options: &MixOptions,
    progress: &Progress,
) -> Result<()> {
    let planned = tensors::dense_mean(recipe, sources)?;
    let changes = vec![("tie_word_embeddings", Some(json!(!tensors::has_own_head(sources))))];
    let config = sources.changed_config(changes)?;
    let directory = NewDirectory { target, shard_bytes: recipe.shard_bytes, config: &config, planned: &planned };
    let none = |_| Err(Error::new(Status::Internal, "a dense model has no routers"));
    directory.write(sources, options.threads, progress, &none).map(drop)
}

/// Where the dense mean is written.
fn scratch_of(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(".mean");
    target.with_file_name(name)
}

/// A model directory to be written.
struct NewDirectory<'a> {
    target: &'a Path,
    shard_bytes: u64,
    config: &'a [u8],
    planned: &'a [Planned],
}

impl NewDirectory<'_> {
    /// Writes it; answers how far off what was quantised is. `router` has the numbers of a layer's.
    fn write(
        &self,
        sources: &Sources,
        threads: usize,
        progress: &Progress,
        router: &dyn Fn(usize) -> Result<Vec<f32>>,
    ) -> Result<Option<Rounded>> {
        progress.begin(bytes_read(self.planned, sources)?);
        progress.check()?;
        let mut writer = ModelWriter::create(self.target, &new_tensors(self.planned), self.shard_bytes)?;
        writer.write_file(config::FILE, self.config)?;
        sources.copy_files(&writer)?;
        let threads = ThreadOptions::from(threads).resolved_count();
        let mut merge = Merge { sources, writer: &mut writer, threads, progress };
        let (mut index, mut rounded) = (0, None::<Rounded>);
        for tensor in self.planned {
            if let Some(of_tensor) = merge.write(tensor, index, router)? {
                rounded.get_or_insert_default().add(&of_tensor);
            }
            index += tensor.new_tensors().len();
        }
        writer.finish()?;
        Ok(rounded)
    }
}

fn new_tensors(planned: &[Planned]) -> Vec<NewTensor> {
    planned.iter().flat_map(Planned::new_tensors).collect()
}

/// Bytes of what tensors are made from.
fn bytes_read(planned: &[Planned], sources: &Sources) -> Result<u64> {
    let mut bytes = 0;
    for tensor in planned {
        let From::Shares(shares) = &tensor.from else { continue };
        for share in shares {
            let dtype = crate::model::weights::dtype_of(&share.part, &sources.all[share.source].checkpoint)?;
            bytes += (share.part.rows * share.part.columns * dtype.bitsize() / 8) as u64;
        }
    }
    Ok(bytes)
}

/// A recipe whose models fit, and what is to be written.
struct Prepared {
    sources: Sources,
    planned: Vec<Planned>,
    own_head: bool,
    texts: Vec<Texts>,
    plan: MixPlan,
}

impl Prepared {
    fn new(recipe: &Recipe, target: &Path, options: &MixOptions) -> Result<Prepared> {
        ThreadOptions::from(options.threads).check()?;
        let sources = Sources::open(recipe, options.follow_links)?;
        let (planned, own_head) = tensors::mixture(recipe, &sources)?;
        let texts = read_texts(recipe, &sources)?;
        ModelWriter::check(target, &new_tensors(&planned), recipe.shard_bytes)?;
        let mut scratch_bytes = 0;
        if recipe.router.method.needs_a_run() && recipe.base == Base::Mean {
            let dense = new_tensors(&tensors::dense_mean(recipe, &sources)?);
            ModelWriter::check(&scratch_of(target), &dense, recipe.shard_bytes)?;
            scratch_bytes = dense.iter().map(NewTensor::bytes).sum();
        }
        let plan = plan_of(recipe, &sources, &planned, &texts, scratch_bytes)?;
        Ok(Prepared { sources, planned, own_head, texts, plan })
    }
}

fn plan_of(
    recipe: &Recipe,
    sources: &Sources,
    planned: &[Planned],
    texts: &[Texts],
    scratch_bytes: u64,
) -> Result<MixPlan> {
    let elements = |planned: &Planned| (planned.target.rows * planned.target.columns) as u64;
    let is_expert = |planned: &&Planned| planned.target.role == crate::model::names::Role::Expert;
    let parameters = planned.iter().map(elements).sum();
    let of_experts: u64 = planned.iter().filter(is_expert).map(elements).sum();
    let (experts, chosen) = (recipe.experts.len(), recipe.num_experts_per_tok);
    let mut dtypes = Vec::new();
    for dtype in planned.iter().filter(|planned| planned.format.is_none()).map(|planned| planned.dtype.to_string()) {
        if !dtypes.contains(&dtype) {
            dtypes.push(dtype);
        }
    }
    let base = sources
        .averaged
        .iter()
        .map(|(source, divisor)| (sources.all[*source].directory.clone(), 1.0 / *divisor as f64));
    Ok(MixPlan {
        config: Config { num_local_experts: experts, num_experts_per_tok: chosen, ..sources.config().clone() },
        parameters,
        active_parameters: parameters - of_experts + of_experts / experts as u64 * chosen as u64,
        bytes_read: bytes_read(planned, sources)?,
        bytes_written: new_tensors(planned).iter().map(NewTensor::bytes).sum(),
        dtypes,
        formats: recipe.formats,
        scratch_bytes,
        base: base.collect(),
        text_tokens: texts.iter().map(Texts::tokens).collect(),
    })
}

/// What the base's config.json has not, or has otherwise.
fn config_changes(recipe: &Recipe, planned: &[Planned], own_head: bool) -> Vec<(&'static str, Option<Value>)> {
    let embedding = &planned[0];
    let dtype_name = match embedding.dtype {
        safetensors::Dtype::BF16 => "bfloat16",
        safetensors::Dtype::F16 => "float16",
        _ => "float32",
    };
    let mut changes = vec![
        ("architectures", Some(json!(["GemmoeForCausalLM"]))),
        ("model_type", Some(json!("gemmoe"))),
        ("num_local_experts", Some(json!(recipe.experts.len()))),
        ("num_experts_per_tok", Some(json!(recipe.num_experts_per_tok))),
        ("tie_word_embeddings", Some(json!(!own_head))),
        // The two names that transformers has had for it.
        ("torch_dtype", Some(json!(dtype_name))),
        ("dtype", None),
    ];
    if recipe.formats != Formats::default() {
        let formats = recipe.formats.resolved(!own_head);
        let quantization = Quantization { source_dtype: embedding.dtype, formats };
        changes.push((quantization::KEY, Some(quantization.to_json())));
    }
    changes
}
