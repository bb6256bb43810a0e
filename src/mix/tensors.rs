//! Which tensors the mixture has, and what each is made from.

use safetensors::Dtype;

use super::recipe::Recipe;
use super::sources::Sources;
use crate::error::{Result, Status};
use crate::model::names::{self, ExpertParts, LayerParts, Layout, Part};
use crate::model::weights::dtype_of;
use crate::model::writer::NewTensor;
use crate::model::{Config, Description, Formats};
use crate::quant::{Format, Shape};
use crate::quantize::matrix::stored_tensors;

/// A model's part in a tensor.
#[derive(Clone)]
pub struct Share {
    /// Of `Sources::all`.
    pub source: usize,
    /// What of it.
    pub part: Part,
    /// What its numbers are divided by before all are added up.
    pub divisor: f32,
}

/// What a tensor is made from.
pub enum From {
    /// The sum of these; a single one as it is.
    Shares(Vec<Share>),
    /// The router of a layer, made anew.
    Router(usize),
}

/// A tensor to be written, or the two a quantised matrix has.
pub struct Planned {
    /// What it is made from.
    pub from: From,
    /// Its name and shape.
    pub target: Part,
    /// What its numbers are rounded to, before they are quantised.
    pub dtype: Dtype,
    /// What it is quantised to.
    pub format: Option<Format>,
}

impl Planned {
    /// Its shape, where it is quantised.
    pub fn quantised_shape(&self) -> Option<Shape> {
        let Part { rows, columns, .. } = self.target;
        self.format.map(|format| Shape { rows, columns, format })
    }

    /// The tensors it becomes.
    pub fn new_tensors(&self) -> Vec<NewTensor> {
        let Part { tensor, shape, .. } = &self.target;
        let matrix = NewTensor { name: tensor.clone(), dtype: self.dtype, shape: shape.clone() };
        stored_tensors(matrix, self.quantised_shape().as_ref())
    }
}

/// Makes plans.
struct Planner<'a> {
    recipe: &'a Recipe,
    sources: &'a Sources,
    formats: Formats,
    planned: Vec<Planned>,
}

impl Planner<'_> {
    /// The shares of all averaged models.
    fn averaged(&self, pick: &dyn Fn(&Description) -> &Part) -> Vec<Share> {
        let share = |(source, divisor): &(usize, f32)| {
            let part = pick(&self.sources.all[*source].description).clone();
            Share { source: *source, part, divisor: *divisor }
        };
        self.sources.averaged.iter().map(share).collect()
    }

    /// What parts are written in: the recipe's dtype, or the one they all have.
    fn dtype_of(&self, shares: &[Share]) -> Result<Dtype> {
        let stored = |share: &Share| dtype_of(&share.part, &self.sources.all[share.source].checkpoint);
        let first = stored(&shares[0])?;
        if let Some(dtype) = self.recipe.dtype {
            return Ok(dtype);
        }
        for share in &shares[1..] {
            let dtype = stored(share)?;
            if dtype != first {
                let [one, other] = [&shares[0], share].map(|share| self.sources.all[share.source].directory.display());
                let text = format!(
                    "is missing: \"{}\" is {first} in {one} and {dtype} in {other}, say which is written, bf16, f16 or f32",
                    share.part.tensor
                );
                return Err(self.recipe.fault(&self.recipe.places.dtype, Status::ModelsDiffer, &text));
            }
        }
        Ok(first)
    }

    /// Adds a tensor made from shares, in the dtype that all of `alike` have.
    fn add(&mut self, target: Part, shares: Vec<Share>, alike: &[Share]) -> Result<()> {
        let dtype = self.dtype_of(if alike.is_empty() { &shares } else { alike })?;
        let format = self.formats.of_matrix(target.role);
        self.planned.push(Planned { from: From::Shares(shares), target, dtype, format });
        Ok(())
    }

    fn add_averaged(&mut self, target: Part, pick: &dyn Fn(&Description) -> &Part) -> Result<()> {
        self.add(target, self.averaged(pick), &[])
    }

    /// Norms and attention of a layer, up to the second norm.
    fn add_layer(&mut self, target: LayerParts, layer: usize) -> Result<()> {
        type Pick = fn(&LayerParts) -> &Part;
        let parts: [(Part, Pick); 6] = [
            (target.input_norm, |layer| &layer.input_norm),
            (target.query, |layer| &layer.query),
            (target.key, |layer| &layer.key),
            (target.value, |layer| &layer.value),
            (target.output, |layer| &layer.output),
            (target.post_attention_norm, |layer| &layer.post_attention_norm),
        ];
        for (target, pick) in parts {
            self.add_averaged(target, &|description| pick(description.layer_parts(layer)))?;
        }
        Ok(())
    }

    /// Experts of a layer; `of` says from which models the one with an index is.
    fn add_experts(
        &mut self,
        targets: Vec<ExpertParts>,
        layer: usize,
        of: &dyn Fn(usize) -> Vec<(usize, usize, f32)>,
    ) -> Result<()> {
        const PICKS: [fn(&ExpertParts) -> &Part; 3] = [|parts| &parts.gate, |parts| &parts.up, |parts| &parts.down];
        let sources = self.sources;
        let share = |(source, expert, divisor): (usize, usize, f32), pick: fn(&ExpertParts) -> &Part| {
            let part = pick(&sources.all[source].description.layer_parts(layer).experts[expert]).clone();
            Share { source, part, divisor }
        };
        let all = |pick| sources.experts.iter().map(|from| share((from.source, from.expert, 1.0), pick)).collect();
        let alike: [Vec<Share>; 3] = PICKS.map(all);
        for (index, target) in targets.into_iter().enumerate() {
            for ((target, pick), alike) in [target.gate, target.up, target.down].into_iter().zip(PICKS).zip(&alike) {
                let shares = of(index).into_iter().map(|from| share(from, pick)).collect();
                self.add(target, shares, alike)?;
            }
        }
        Ok(())
    }

    fn add_ends(&mut self, config: &Config) -> Result<()> {
        self.add_averaged(names::final_norm(config), &|description| description.final_norm_part())?;
        let own_head = self.own_head();
        if own_head {
            let pick =
                |description: &Description| description.head_part().unwrap_or(description.embedding_part()).clone();
            let share = |(source, divisor): &(usize, f32)| Share {
                source: *source,
                part: pick(&self.sources.all[*source].description),
                divisor: *divisor,
            };
            let shares = self.sources.averaged.iter().map(share).collect();
            self.add(names::head(config), shares, &[])?;
        }
        Ok(())
    }

    /// Whether a head is stored beside the embedding: one of the models', or the embedding in another format.
    fn own_head(&self) -> bool {
        has_own_head(self.sources) || self.formats.head != self.formats.embedding
    }
}

/// Whether the models that are averaged have a head beside the embedding.
pub fn has_own_head(sources: &Sources) -> bool {
    sources.all[sources.averaged[0].0].description.head_part().is_some()
}

/// All tensors of the mixture, in the order a token meets them, and whether it has a head of its own.
pub fn mixture(recipe: &Recipe, sources: &Sources) -> Result<(Vec<Planned>, bool)> {
    let formats = recipe.formats.resolved(!has_own_head(sources));
    let mut planner = Planner { recipe, sources, formats, planned: Vec::new() };
    let config = Config {
        num_local_experts: recipe.experts.len(),
        num_experts_per_tok: recipe.num_experts_per_tok,
        ..sources.config().clone()
    };
    planner.add_averaged(names::embedding(&config), &|description| description.embedding_part())?;
    let dtype = planner.planned[0].dtype;
    for layer in 0..config.num_hidden_layers {
        let mut target = names::layer(&config, Layout::BlockSparseMoe, layer);
        let (experts, router) = (std::mem::take(&mut target.experts), target.router.take());
        planner.add_layer(target, layer)?;
        let router = router.into_iter();
        planner.planned.extend(router.map(|target| Planned { from: From::Router(layer), target, dtype, format: None }));
        let of = |index: usize| {
            let from = sources.experts[index];
            vec![(from.source, from.expert, 1.0)]
        };
        planner.add_experts(experts, layer, &of)?;
    }
    planner.add_ends(&config)?;
    let own_head = planner.own_head();
    Ok((planner.planned, own_head))
}

/// All tensors of the dense mean of the experts' models, feed-forwards too.
pub fn dense_mean(recipe: &Recipe, sources: &Sources) -> Result<Vec<Planned>> {
    let mut planner = Planner { recipe, sources, formats: Formats::default(), planned: Vec::new() };
    let config = sources.config().as_dense();
    planner.add_averaged(names::embedding(&config), &|description| description.embedding_part())?;
    let weighed = recipe.experts.iter().zip(&sources.experts).filter(|(expert, _)| expert.weight > 0.0);
    let weighed: Vec<(usize, usize, f32)> =
        weighed.zip(&sources.averaged).map(|((_, from), (_, divisor))| (from.source, from.expert, *divisor)).collect();
    for layer in 0..config.num_hidden_layers {
        let mut target = names::layer(&config, Layout::Dense, layer);
        let experts = std::mem::take(&mut target.experts);
        planner.add_layer(target, layer)?;
        planner.add_experts(experts, layer, &|_| weighed.clone())?;
    }
    planner.add_ends(&config)?;
    Ok(planner.planned)
}
