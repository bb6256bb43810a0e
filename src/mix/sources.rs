//! The models of a recipe: opened, and checked to fit each other.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::recipe::{Base, Recipe};
use crate::error::{Error, Result, Status};
use crate::model::config::FILE;
use crate::model::{Checkpoint, Config, Description, Formats, ModelWriter, beside};
use crate::text::chat::{self, stored_template};
use crate::text::difference;
use crate::toml_table::Place;

/// A model that tensors are taken from.
pub struct Source {
    /// Its directory, as the recipe has it.
    pub directory: PathBuf,
    /// Its files.
    pub checkpoint: Checkpoint,
    /// What its tensors are.
    pub description: Description,
    /// Its config.json.
    pub config: Vec<u8>,
    /// The directory without links, by which a model that is named twice is known.
    resolved: PathBuf,
}

/// Which expert of which source.
#[derive(Clone, Copy)]
pub struct FromExpert {
    /// Of `Sources::all`.
    pub source: usize,
    /// In each of its layers; 0 in a dense model.
    pub expert: usize,
}

/// All models of a recipe, each opened once.
pub struct Sources {
    /// The base's is the first; without one, that of expert 0.
    pub all: Vec<Source>,
    /// The experts, in the recipe's order.
    pub experts: Vec<FromExpert>,
    /// Sources the mean is taken over, each with what its numbers are divided by; the base alone where it is a model.
    pub averaged: Vec<(usize, f32)>,
    /// Whose tokenizer is taken; none has one where there is none.
    pub tokenizer: Option<usize>,
    /// Whose chat template is taken.
    chat_template: Option<usize>,
}

impl Source {
    fn open(directory: &Path, follow_links: bool) -> Result<Source> {
        let mut checkpoint = Checkpoint::open(directory, follow_links)?;
        let opened = (|| {
            let config_bytes = beside::read_config(&checkpoint, directory)?;
            let config = Config::from_json(&config_bytes)?;
            if config.quantization.is_some() {
                let text = "the model is quantised: mix the models it was made from, and have the result quantised";
                return Err(Error::new(Status::ModelsDiffer, text).in_file(FILE).at_key("quantization_config"));
            }
            checkpoint.read_headers()?;
            let description = Description::new(&config, &checkpoint, Formats::default())?;
            Ok((config_bytes, description))
        })();
        let (config, description) = opened.map_err(|error: Error| error.in_directory(directory))?;
        let resolved = std::fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned());
        Ok(Source { directory: directory.to_owned(), checkpoint, description, config, resolved })
    }

    fn small_file(&self, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>> {
        self.checkpoint.read_small_file(name, max_bytes).map_err(|error| error.in_directory(&self.directory))
    }

    fn chat_template(&self) -> Result<Option<String>> {
        let template = self.small_file(chat::TEMPLATE_FILE, chat::MAX_TEMPLATE_FILE_BYTES)?;
        let settings = self.small_file(chat::SETTINGS_FILE, chat::MAX_SETTINGS_FILE_BYTES)?;
        stored_template(template.as_deref(), settings.as_deref())
            .map_err(|error| error.in_file(chat::SETTINGS_FILE).in_directory(&self.directory))
    }
}

impl Sources {
    /// Opens the models of a recipe. Fails as opening one does, with the file's directory and the recipe's line; with
    /// `RecipeValue` where an expert is not there, and with `ModelsDiffer`.
    pub fn open(recipe: &Recipe, follow_links: bool) -> Result<Sources> {
        let mut all: Vec<Source> = Vec::new();
        let mut open = |directory: &Path, place: &Place| -> Result<usize> {
            let resolved = std::fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned());
            if let Some(known) = all.iter().position(|source| source.resolved == resolved) {
                return Ok(known);
            }
            let source = Source::open(directory, follow_links).map_err(|error| match error.file() {
                Some(_) => error,
                None => recipe.fault(place, error.status(), &format!("cannot be used: {error}")),
            })?;
            all.push(source);
            Ok(all.len() - 1)
        };
        if let Base::Model(directory) = &recipe.base {
            open(directory, &recipe.places.base)?;
        }
        let opened = recipe.experts.iter().map(|expert| open(&expert.model, &expert.place));
        let opened = opened.collect::<Result<Vec<usize>>>()?;
        let mut experts = Vec::new();
        for (expert, source) in recipe.experts.iter().zip(opened) {
            let count = all[source].description.config.num_local_experts;
            let wrong = |key: &str, text: String| {
                let place = expert.place.at(expert.place.key().replace(".model", key));
                Err(recipe.fault(&place, Status::RecipeValue, &text))
            };
            let shown = expert.model.display();
            let number = match expert.expert {
                Some(number) if number < count => number,
                Some(number) => {
                    return wrong(".expert", format!("is {number}, and {shown} has {count} experts, from 0 on"));
                }
                None if count == 1 => 0,
                None => return wrong(".expert", format!("is missing: {shown} has {count} experts, say which")),
            };
            experts.push(FromExpert { source, expert: number });
        }
        let averaged = match recipe.base {
            Base::Model(_) => vec![(0, 1.0)],
            Base::Mean => {
                let total: f64 = recipe.experts.iter().map(|expert| expert.weight).sum();
                let shares = recipe.experts.iter().zip(&experts).filter(|(expert, _)| expert.weight > 0.0);
                shares.map(|(expert, from)| (from.source, (total / expert.weight) as f32)).collect()
            }
        };
        let mut sources = Sources { all, experts, averaged, tokenizer: None, chat_template: None };
        sources.check_geometry()?;
        sources.tokenizer = sources.check_tokenizers()?;
        sources.chat_template = sources.check_chat_templates(recipe)?;
        Ok(sources)
    }

    /// The configuration of the base.
    pub fn config(&self) -> &Config {
        &self.all[0].description.config
    }

    fn check_geometry(&self) -> Result<()> {
        let fields = |config: &Config| {
            [
                ("vocab_size", config.vocab_size.to_string()),
                ("hidden_size", config.hidden_size.to_string()),
                ("intermediate_size", config.intermediate_size.to_string()),
                ("num_hidden_layers", config.num_hidden_layers.to_string()),
                ("num_attention_heads", config.num_attention_heads.to_string()),
                ("num_key_value_heads", config.num_key_value_heads.to_string()),
                ("head_dim", config.head_dim.to_string()),
                ("rope_theta", config.rope_theta.to_string()),
                ("rms_norm_eps", config.rms_norm_eps.to_string()),
                ("bos_token_id", config.bos_token_id.to_string()),
            ]
        };
        let first = &self.all[0];
        for source in &self.all[1..] {
            let pairs = fields(&source.description.config).into_iter().zip(fields(self.config()));
            for ((key, own), (_, other)) in pairs {
                if own != other {
                    let text = format!("\"{key}\" is {own}, expected {other} as in {}", first.directory.display());
                    return Err(Error::new(Status::ModelsDiffer, text)
                        .in_file(FILE)
                        .in_directory(&source.directory)
                        .at_key(key));
                }
            }
        }
        let has_head = |source: usize| self.all[source].description.head_part().is_some();
        let first = self.averaged[0].0;
        if let Some((other, _)) = self.averaged.iter().find(|(source, _)| has_head(*source) != has_head(first)) {
            let (with, without) = if has_head(first) { (first, *other) } else { (*other, first) };
            let (with, without) = (&self.all[with].directory, &self.all[without].directory);
            let text = format!(
                "the embedding is the head, and {} has a head of its own: there is no mean of the two",
                with.display()
            );
            return Err(Error::new(Status::ModelsDiffer, text)
                .in_file(FILE)
                .in_directory(without)
                .at_key("tie_word_embeddings"));
        }
        Ok(())
    }

    /// The first source with a tokenizer, once all that have one have the same.
    fn check_tokenizers(&self) -> Result<Option<usize>> {
        const NAME: &str = "tokenizer.json";
        let mut first: Option<(usize, Vec<u8>)> = None;
        for (index, source) in self.all.iter().enumerate() {
            let Some(bytes) = source.small_file(NAME, beside::MAX_BYTES)? else { continue };
            let Some((known, other)) = &first else {
                first = Some((index, bytes));
                continue;
            };
            let place = |error: Error| error.in_file(NAME).in_directory(&source.directory);
            if let Some(text) = difference(other, &bytes, self.config().vocab_size).map_err(place)? {
                let text = format!("{text} as {} has", self.all[*known].directory.display());
                return Err(place(Error::new(Status::ModelsDiffer, text)));
            }
        }
        Ok(first.map(|(index, _)| index))
    }

    /// The source whose chat template is taken: the one the recipe names, or the first with one, once all that have one have
    /// the same.
    fn check_chat_templates(&self, recipe: &Recipe) -> Result<Option<usize>> {
        if let Some(expert) = recipe.chat_template_from {
            let source = self.experts[expert].source;
            if self.all[source].chat_template()?.is_none() {
                let text = format!("names {}, which has no chat template", self.all[source].directory.display());
                return Err(recipe.fault(&recipe.places.chat_template_from, Status::RecipeValue, &text));
            }
            return Ok(Some(source));
        }
        let mut first: Option<(usize, String)> = None;
        for (index, source) in self.all.iter().enumerate() {
            let Some(template) = source.chat_template()? else { continue };
            let Some((known, other)) = &first else {
                first = Some((index, template));
                continue;
            };
            if *other != template {
                let text = format!(
                    "has another chat template than {}: say by \"chat_template_from\" in {} which expert's is taken",
                    self.all[*known].directory.display(),
                    recipe.name
                );
                return Err(Error::new(Status::ModelsDiffer, text)
                    .in_file(source.directory.display().to_string())
                    .at_key("chat_template"));
            }
        }
        Ok(first.map(|(index, _)| index))
    }

    /// Copies tokenizer and chat template, and what else lies beside the base's weights.
    pub fn copy_files(&self, writer: &ModelWriter) -> Result<()> {
        for name in beside::FILES {
            let source = match name {
                chat::TEMPLATE_FILE | chat::SETTINGS_FILE => self.chat_template.or(self.tokenizer),
                "LICENSE" | "NOTICE" | "generation_config.json" => None,
                _ => self.tokenizer,
            };
            let source = &self.all[source.unwrap_or(0)];
            beside::copy(&[name], &source.checkpoint, writer).map_err(|error| match error.status() {
                Status::DiskFull | Status::WriteFailed => error,
                _ => error.in_directory(&source.directory),
            })?;
        }
        Ok(())
    }

    /// Whether the base's config.json has a key.
    pub fn has_key(&self, key: &str) -> Result<bool> {
        beside::has_key(&self.all[0].config, key).map_err(|error| error.in_directory(&self.all[0].directory))
    }

    /// The base's config.json with some keys changed.
    pub fn changed_config(&self, changes: Vec<(&str, Option<Value>)>) -> Result<Vec<u8>> {
        beside::changed_config(&self.all[0].config, changes).map_err(|error| error.in_directory(&self.all[0].directory))
    }
}
