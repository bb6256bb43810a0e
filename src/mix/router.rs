//! How routers begin: `[num_local_experts, hidden_size]` in each layer.

use std::path::Path;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use super::merge::Pieces;
use super::recipe::{Base, Expert, Method, Recipe};
use super::ridge::Moments;
use super::sources::Sources;
use super::tensors::{From, Planned, Share};
use super::{MixOptions, write_dense_mean};
use crate::backend::cpu::{CpuOptions, ThreadOptions};
use crate::backend::observer::Observer;
use crate::engine::{Budget, LoadOptions, Model, Session, SessionOptions};
use crate::error::{Error, Result, Status};
use crate::memory::{try_vec, try_with_capacity};
use crate::model::names::Part;
use crate::model::{Progress, beside};
use crate::parallel::share_out;
use crate::quant::Source;
use crate::random::{normal, uniform};
use crate::text::{EncodeOptions, Tokenizer};

/// Longest piece of a text that a model is run over, BOS included, in tokens.
const WINDOW: usize = 512;

/// The largest text, in bytes.
const MAX_TEXT_BYTES: u64 = 256 << 20;

/// How long a model runs before a cancel is noticed.
const SLICE: Duration = Duration::from_millis(50);

/// An expert's texts as tokens, each beginning with BOS and at most WINDOW long.
pub struct Texts {
    wanted: Vec<Vec<u32>>,
    unwanted: Vec<Vec<u32>>,
}

impl Texts {
    /// Tokens of all, BOS left out.
    pub fn tokens(&self) -> usize {
        self.wanted.iter().chain(&self.unwanted).map(|tokens| tokens.len() - 1).sum()
    }
}

/// Reads the texts of all experts; empty where the method takes none. Fails with the recipe's line.
pub fn read_texts(recipe: &Recipe, sources: &Sources) -> Result<Vec<Texts>> {
    if !recipe.router.method.needs_texts() {
        return Ok(Vec::new());
    }
    let no_tokenizer = || {
        let text = format!(
            "takes texts of each expert ({:?}), and no model has a tokenizer.json",
            recipe.router.method.name()
        );
        recipe.fault(&recipe.places.router, Status::NoTokenizer, &text)
    };
    let source = &sources.all[sources.tokenizer.ok_or_else(no_tokenizer)?];
    let in_model = |error: Error| error.in_file("tokenizer.json").in_directory(&source.directory);
    let bytes = source.checkpoint.read_small_file("tokenizer.json", beside::MAX_BYTES).map_err(in_model)?;
    let config = sources.config();
    let tokenizer = Tokenizer::from_json(&bytes.unwrap_or_default(), config.vocab_size).map_err(in_model)?;
    let window = WINDOW.min(config.max_position_embeddings);
    let encode = |text: &str, parse_special: bool, windows: &mut Vec<Vec<u32>>| -> Result<usize> {
        let tokens = tokenizer.encode(text, EncodeOptions { bos: None, parse_special })?;
        for part in tokens.chunks((window - 1).max(1)) {
            windows.push([&[config.bos_token_id], part].concat());
        }
        Ok(tokens.len())
    };
    let read = |expert: &Expert| {
        let mut texts = Texts { wanted: Vec::new(), unwanted: Vec::new() };
        for prompt in &expert.prompts {
            encode(prompt, true, &mut texts.wanted)?;
        }
        for prompt in &expert.negative_prompts {
            encode(prompt, true, &mut texts.unwanted)?;
        }
        for (path, place) in expert.texts.iter().zip(&expert.text_places) {
            let fault = |text: &str| recipe.fault(place, Status::RecipeValue, text);
            let unreadable = |error: std::io::Error| fault(&format!("{}: cannot be read: {error}", path.display()));
            if std::fs::metadata(path).map_err(unreadable)?.len() > MAX_TEXT_BYTES {
                return Err(fault(&format!("{}: is more than {MAX_TEXT_BYTES} bytes", path.display())));
            }
            let text = std::fs::read_to_string(path).map_err(unreadable)?;
            if encode(&text, false, &mut texts.wanted)? == 0 {
                return Err(fault(&format!("{}: is empty", path.display())));
            }
        }
        Ok(texts)
    };
    if window < 2 && recipe.router.method.needs_a_run() {
        let text = "takes texts, and the models have room for one token";
        return Err(recipe.fault(&recipe.places.router, Status::RecipeValue, text));
    }
    recipe.experts.iter().map(read).collect()
}

/// The routers of all layers.
pub enum Routers {
    /// Random, made when they are written.
    Random { method: Method, scale: f64, experts: usize, hidden: usize },
    /// The same in all layers: `[experts, hidden_size]`.
    Same(Vec<f32>),
    /// One for each layer.
    Layers(Vec<Vec<f32>>),
}

impl Routers {
    /// The router of a layer.
    pub fn layer(&self, layer: usize) -> Result<Vec<f32>> {
        match self {
            Routers::Random { method, scale, experts, hidden } => {
                let count = experts * hidden;
                let bound = 1.0 / (*hidden as f64).sqrt();
                let mut numbers = try_with_capacity("a router", count)?;
                for at in (layer * count) as u64..((layer + 1) * count) as u64 {
                    let number = match method {
                        Method::Uniform { seed } => bound * (2.0 * uniform(*seed, at) - 1.0),
                        Method::Normal { seed } => normal(*seed, at),
                        _ => 0.0,
                    };
                    numbers.push((scale * number) as f32);
                }
                Ok(numbers)
            }
            Routers::Same(numbers) => Ok(numbers.clone()),
            Routers::Layers(layers) => Ok(layers[layer].clone()),
        }
    }
}

/// What routers are made from.
pub struct Making<'a> {
    pub recipe: &'a Recipe,
    pub sources: &'a Sources,
    pub planned: &'a [Planned],
    pub texts: &'a [Texts],
    pub options: &'a MixOptions,
    pub progress: &'a Progress,
}

impl Making<'_> {
    /// Makes them; a model that has to be written for it is at `scratch`, and is deleted.
    pub fn routers(&self, scratch: &Path) -> Result<Routers> {
        let recipe = self.recipe;
        match recipe.router.method {
            method @ (Method::Uniform { .. } | Method::Normal { .. }) => Ok(Routers::Random {
                method,
                scale: recipe.router.scale,
                experts: recipe.experts.len(),
                hidden: self.sources.config().hidden_size,
            }),
            Method::Embedding => self.embedding().map(Routers::Same),
            Method::Hidden => self.run(scratch, |run| run.hidden()).map(Routers::Layers),
            Method::Ridge { lambda } => self.run(scratch, |run| run.ridge(lambda)).map(Routers::Layers),
        }
    }

    /// Rows of length `scale`; fails where there is nothing to be scaled. `[experts][hidden_size]` to `[experts, hidden_size]`.
    fn normalised(&self, rows: &[Vec<f64>]) -> Result<Vec<f32>> {
        let mut numbers = try_with_capacity("a router", rows.len() * rows[0].len())?;
        for (row, expert) in rows.iter().zip(&self.recipe.experts) {
            let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            if !(length > 0.0 && length.is_finite()) {
                let place = expert.place.at(expert.place.key().replace(".model", ".prompts"));
                let text = "and the negative prompts cancel out: nothing is left for the router";
                return Err(self.recipe.fault(&place, Status::RecipeValue, text));
            }
            let factor = self.recipe.router.scale / length;
            numbers.extend(row.iter().map(|x| (x * factor) as f32));
        }
        Ok(numbers)
    }

    /// For each expert the sum of the embeddings of its prompts' tokens, less that of its negative ones, of length `scale`.
    fn embedding(&self) -> Result<Vec<f32>> {
        let hidden = self.sources.config().hidden_size;
        let From::Shares(shares) = &self.planned[0].from else {
            return Err(Error::new(Status::Internal, "the embedding is not the first tensor"));
        };
        let dtype = self.planned[0].dtype;
        let mut number = try_vec("an embedding", hidden, 0f32)?;
        let mut add = |sum: &mut [f64], windows: &[Vec<u32>], sign: f64| {
            // BOS, which all texts have, says nothing.
            for token in windows.iter().flat_map(|tokens| &tokens[1..]) {
                let row = |share: &Share| {
                    let part =
                        Part { first_row: share.part.first_row + *token as usize, rows: 1, ..share.part.clone() };
                    Share { part, ..share.clone() }
                };
                let shares: Vec<Share> = shares.iter().map(row).collect();
                let mut pieces = Pieces::new(self.sources, &shares, dtype, hidden)?;
                let bytes = pieces.read(0, self.progress)?;
                Source { dtype, bytes, columns: hidden, importance: None }.read(0, 0, &mut number);
                sum.iter_mut().zip(&number).for_each(|(sum, x)| *sum += sign * *x as f64);
            }
            Ok::<(), Error>(())
        };
        let mut rows = Vec::new();
        for texts in self.texts {
            let mut row = try_vec("an embedding", hidden, 0f64)?;
            add(&mut row, &texts.wanted, 1.0)?;
            add(&mut row, &texts.unwanted, -1.0)?;
            rows.push(row);
        }
        self.normalised(&rows)
    }

    /// Loads the base, or writes the dense mean of all experts' models to `scratch` and loads that, and lets `make` run it.
    fn run<T>(&self, scratch: &Path, make: impl FnOnce(&mut Run) -> Result<T>) -> Result<T> {
        let threads = ThreadOptions::from(self.options.threads);
        let load = |directory: &Path, follow_links: bool| {
            let cpu = CpuOptions { threads, ..Default::default() };
            let options = LoadOptions { cpu, follow_links, ..Default::default() };
            Model::load(directory, &options, self.progress).map_err(|error| error.in_directory(directory))
        };
        let model = match &self.recipe.base {
            Base::Model(directory) => load(directory, self.options.follow_links)?,
            Base::Mean => {
                let _deleted = Deleted(scratch);
                write_dense_mean(self.recipe, self.sources, scratch, self.options, self.progress)?;
                load(scratch, false)?
            }
        };
        let observer = model.backend().observe()?;
        let longest =
            self.texts.iter().flat_map(|texts| texts.wanted.iter().chain(&texts.unwanted)).map(Vec::len).max();
        let longest = longest.unwrap_or(1);
        observer.keep_router_inputs(longest)?;
        let options = SessionOptions { context_size: longest, prefill_chunk: longest.min(256), ..Default::default() };
        let session = Session::new(Arc::clone(&model), &options)?;
        make(&mut Run { making: self, session, observer })
    }
}

/// A directory that is deleted when it has been read.
struct Deleted<'a>(&'a Path);

impl Drop for Deleted<'_> {
    fn drop(&mut self) {
        // It may not be there, where writing it failed.
        let _ = std::fs::remove_dir_all(self.0);
    }
}

/// A model that is run over texts, and what its routers, or the places for them, are given.
struct Run<'a, 'b> {
    making: &'b Making<'a>,
    session: Session,
    observer: Arc<Observer>,
}

impl Run<'_, '_> {
    /// Runs the model over a text that begins with BOS; afterwards the observer has the router inputs of its tokens.
    fn see(&mut self, tokens: &[u32]) -> Result<()> {
        self.session.rewind(0)?;
        let budget = Budget::of_time(SLICE);
        let mut given = tokens;
        loop {
            self.making.progress.check()?;
            match self.session.prefill_within(std::mem::take(&mut given), &budget) {
                Poll::Ready(result) => return result,
                Poll::Pending => {}
            }
        }
    }

    /// For each layer and expert, `[layers][experts][hidden_size]`, the mean over texts of the mean router input of each text's
    /// tokens but BOS, times `sign`, is added to `means`.
    fn add_means(&mut self, windows: &[Vec<u32>], sign: f64, means: &mut [Vec<f64>]) -> Result<()> {
        let hidden = means[0].len();
        for tokens in windows {
            self.see(tokens)?;
            for (layer, mean) in means.iter_mut().enumerate() {
                let factor = sign / (windows.len() * (tokens.len() - 1)) as f64;
                self.observer.take_router_inputs(layer, |rows| {
                    for row in rows.chunks_exact(hidden).skip(1) {
                        mean.iter_mut().zip(row).for_each(|(sum, x)| *sum += factor * *x as f64);
                    }
                });
            }
        }
        Ok(())
    }

    /// For each expert the mean router input of its prompts, less that of its negative ones, of length `scale`.
    fn hidden(&mut self) -> Result<Vec<Vec<f32>>> {
        let config = self.making.sources.config();
        let mut layers: Vec<Vec<Vec<f64>>> = (0..config.num_hidden_layers).map(|_| Vec::new()).collect();
        for texts in self.making.texts {
            let mean = |_| try_vec("the mean of hidden states", config.hidden_size, 0f64);
            let mut means: Vec<Vec<f64>> = (0..config.num_hidden_layers).map(mean).collect::<Result<_>>()?;
            self.add_means(&texts.wanted, 1.0, &mut means)?;
            self.add_means(&texts.unwanted, -1.0, &mut means)?;
            layers.iter_mut().zip(means).for_each(|(layer, mean)| layer.push(mean));
        }
        layers.iter().map(|rows| self.making.normalised(rows)).collect()
    }

    /// The ridge regression from router inputs, all tokens but BOS, to the expert whose texts they are of. Each expert's texts
    /// count the same together.
    fn ridge(&mut self, lambda: f64) -> Result<Vec<Vec<f32>>> {
        let (config, texts) = (self.making.sources.config(), self.making.texts);
        let (hidden, threads) = (config.hidden_size, ThreadOptions::from(self.making.options.threads).resolved_count());
        let moments = |_| Moments::new(hidden, texts.len());
        let mut layers: Vec<Moments> = (0..config.num_hidden_layers).map(moments).collect::<Result<_>>()?;
        for (expert, texts) in texts.iter().enumerate() {
            let tokens: usize = texts.wanted.iter().map(|tokens| tokens.len() - 1).sum();
            for window in &texts.wanted {
                self.see(window)?;
                let (observer, progress) = (&self.observer, self.making.progress);
                share_out(threads, layers.iter_mut().enumerate(), |_: &mut (), (layer, moments)| {
                    progress.check()?;
                    observer.take_router_inputs(layer, |rows| {
                        moments.add(expert, rows.get(hidden..).unwrap_or_default(), 1.0 / tokens as f64);
                    });
                    Ok::<(), Error>(())
                })?;
            }
        }
        let mut routers: Vec<Vec<f32>> = layers.iter().map(|_| Vec::new()).collect();
        let (progress, scale) = (self.making.progress, self.making.recipe.router.scale);
        let work: Vec<(Moments, &mut Vec<f32>)> = layers.into_iter().zip(&mut routers).collect();
        share_out(threads, work.into_iter(), |_: &mut (), (moments, router)| {
            let rows = moments.solve(lambda, progress)?;
            router.extend(rows.iter().flatten().map(|x| (scale * x) as f32));
            Ok::<(), Error>(())
        })?;
        Ok(routers)
    }
}
