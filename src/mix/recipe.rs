//! A recipe: what a GemMoE is mixed from, read from TOML and checked as far as it can be by itself.
//! `docs/mix.md` lists every key.

use std::path::{Path, PathBuf};

use safetensors::Dtype;

use crate::error::{Error, Result, Status};
use crate::model::Formats;
use crate::model::config::MAX_EXPERTS;
use crate::model::writer::DEFAULT_SHARD_BYTES;
use crate::toml_table::{Place, Table, parse, read_formats, read_text};

/// What a GemMoE is mixed from.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// What errors call it.
    pub name: String,
    /// Where everything but experts and routers is from.
    pub base: Base,
    /// The experts, in the order they get in every layer; 2 to 64.
    pub experts: Vec<Expert>,
    /// How the routers begin.
    pub router: Router,
    /// Experts each token is sent to; at most as many as there are.
    pub num_experts_per_tok: usize,
    /// What weights are stored in: BF16, F16 or F32; none is as the experts have them.
    pub dtype: Option<Dtype>,
    /// What matrices are rounded to; none of them stays as it is.
    pub formats: Formats,
    /// Bytes of one weight file, about.
    pub shard_bytes: u64,
    /// Whose chat template is taken, as an index of `experts`, where they have several.
    pub chat_template_from: Option<usize>,
    pub(super) places: Places,
}

/// Where keys stand that are found wrong only with the models.
#[derive(Clone, Debug, Default)]
pub(super) struct Places {
    pub base: Place,
    pub dtype: Place,
    pub router: Place,
    pub chat_template_from: Place,
}

/// Where everything but experts and routers is from.
#[derive(Clone, Debug, PartialEq)]
pub enum Base {
    /// The mean over all experts' models, by their weights (Branch-Train-MiX).
    Mean,
    /// A model directory (GemMoE's own recipe).
    Model(PathBuf),
}

/// One expert.
#[derive(Clone, Debug)]
pub struct Expert {
    /// What it is called in plans.
    pub name: String,
    /// The model directory its feed-forwards are from.
    pub model: PathBuf,
    /// Which expert of that model, where it is a GemMoE.
    pub expert: Option<usize>,
    /// Its share in the mean, by the sum of all.
    pub weight: f64,
    /// Texts it should be chosen for; markup in them counts.
    pub prompts: Vec<String>,
    /// Texts it should not be chosen for.
    pub negative_prompts: Vec<String>,
    /// Files of text it should be chosen for.
    pub texts: Vec<PathBuf>,
    pub(super) place: Place,
    pub(super) text_places: Vec<Place>,
}

/// How routers begin, `[num_local_experts, hidden_size]` in each layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Router {
    /// From what.
    pub method: Method,
    /// What all numbers are multiplied by.
    pub scale: f64,
}

/// What routers begin from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Random numbers of U(-1/sqrt(d), 1/sqrt(d)), d being hidden_size.
    Uniform {
        /// Of the random numbers.
        seed: u64,
    },
    /// Random numbers of N(0, 1).
    Normal {
        /// Of the random numbers.
        seed: u64,
    },
    /// The mean router input of each expert's prompts, less that of its negative ones, divided by its length.
    Hidden,
    /// The sum of the embeddings of each expert's prompts, less that of its negative ones, divided by its length.
    Embedding,
    /// The ridge regression from router inputs to the expert whose texts they are of.
    Ridge {
        /// The penalty, by the mean square of a router input's numbers.
        lambda: f64,
    },
}

impl Method {
    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Method::Uniform { .. } => "uniform",
            Method::Normal { .. } => "normal",
            Method::Hidden => "hidden",
            Method::Embedding => "embedding",
            Method::Ridge { .. } => "ridge",
        }
    }

    /// Whether it takes texts of each expert.
    pub fn needs_texts(self) -> bool {
        matches!(self, Method::Hidden | Method::Embedding | Method::Ridge { .. })
    }

    /// Whether a model is run over them.
    pub fn needs_a_run(self) -> bool {
        matches!(self, Method::Hidden | Method::Ridge { .. })
    }
}

impl Recipe {
    /// Reads a recipe's file; paths in it are relative to the file's directory.
    pub fn read(path: &Path) -> Result<Recipe> {
        let name = path.display().to_string();
        let text = read_text(path, &name)?;
        Recipe::parse(&text, &name, path.parent().unwrap_or(Path::new("")))
    }

    /// Reads the text of a recipe. Errors call it `name`; relative paths in it begin at `directory`.
    ///
    /// Fails with `RecipeSyntax`, `RecipeValue` and `FileTooLarge`; the error names the key and its line.
    pub fn parse(text: &str, name: &str, directory: &Path) -> Result<Recipe> {
        parse(text, |root| read(&root, name, directory)).map_err(|error| error.in_file(name))
    }

    /// The error of a key that is wrong.
    pub(super) fn fault(&self, place: &Place, status: Status, text: &str) -> Error {
        place.fault_of(status, text).in_file(&*self.name)
    }
}

const KEYS: [&str; 8] =
    ["base", "num_experts_per_tok", "dtype", "shard_bytes", "chat_template_from", "experts", "router", "quantize"];

fn read(root: &Table, name: &str, directory: &Path) -> Result<Recipe> {
    root.check_keys(&KEYS)?;
    let base = match root.text("base")? {
        None | Some("mean") => Base::Mean,
        Some(path) => Base::Model(directory.join(path)),
    };
    let experts = read_experts(root, &base, directory)?;
    let router = match root.table("router")? {
        Some(table) => read_router(&table)?,
        None => Router { method: Method::Uniform { seed: 0 }, scale: 1.0 },
    };
    check_texts(&experts, router.method)?;
    let num_experts_per_tok = root.count("num_experts_per_tok", 1, MAX_EXPERTS as u64)?.unwrap_or(2) as usize;
    if num_experts_per_tok > experts.len() {
        let text = format!("is {num_experts_per_tok}, and there are only {} experts", experts.len());
        return Err(root.place("num_experts_per_tok").fault(&text));
    }
    let dtype =
        root.choice("dtype", &["bf16", "f16", "f32"])?.map(|choice| [Dtype::BF16, Dtype::F16, Dtype::F32][choice]);
    let chat_template_from = match root.text("chat_template_from")? {
        None => None,
        Some(wanted) => Some(experts.iter().position(|expert| expert.name == wanted).ok_or_else(|| {
            let names: Vec<&str> = experts.iter().map(|expert| &*expert.name).collect();
            let text = format!("is {wanted:?}, expected the name of an expert: {}", names.join(", "));
            root.place("chat_template_from").fault(&text)
        })?),
    };
    Ok(Recipe {
        name: name.to_owned(),
        base,
        experts,
        router,
        num_experts_per_tok,
        dtype,
        formats: root.table("quantize")?.map_or(Ok(Formats::default()), |table| read_formats(&table))?,
        shard_bytes: root.count("shard_bytes", 1, i64::MAX as u64)?.unwrap_or(DEFAULT_SHARD_BYTES),
        chat_template_from,
        places: Places {
            base: root.place("base"),
            dtype: root.place("dtype"),
            router: root.place("router"),
            chat_template_from: root.place("chat_template_from"),
        },
    })
}

fn read_experts(root: &Table, base: &Base, directory: &Path) -> Result<Vec<Expert>> {
    const KEYS: [&str; 7] = ["model", "name", "expert", "weight", "prompts", "negative_prompts", "texts"];
    let tables = root.tables("experts")?;
    if !(2..=MAX_EXPERTS).contains(&tables.len()) {
        let text = format!("has {} entries, expected 2 to {MAX_EXPERTS} experts, each as [[experts]]", tables.len());
        return Err(root.place("experts").fault(&text));
    }
    let mut experts: Vec<Expert> = Vec::new();
    for (index, table) in tables.iter().enumerate() {
        table.check_keys(&KEYS)?;
        let Some(model) = table.text("model")? else {
            return Err(table.place("model").fault("is missing, expected a model directory"));
        };
        let name = table.text("name")?.map_or_else(|| index.to_string(), str::to_owned);
        if name.is_empty() || name == "base" || name.contains(char::is_control) {
            return Err(table.place("name").fault(&format!("is {name:?}, which is no name of an expert")));
        }
        if let Some(other) = experts.iter().position(|expert| expert.name == name) {
            return Err(table.place("name").fault(&format!("is {name:?}, as is that of experts[{other}]")));
        }
        let weight = table.number("weight")?;
        if weight.is_some() && *base != Base::Mean {
            let text = "is given, but nothing is averaged: \"base\" is a model of its own";
            return Err(table.place("weight").fault(text));
        }
        let weight = weight.unwrap_or(1.0);
        if !(0.0..=1e6).contains(&weight) {
            return Err(table.place("weight").fault(&format!("is {weight}, expected a number from 0 to 1000000")));
        }
        let texts = table.texts("texts")?;
        experts.push(Expert {
            name,
            model: directory.join(model),
            expert: table.count("expert", 0, MAX_EXPERTS as u64 - 1)?.map(|expert| expert as usize),
            weight,
            prompts: table.texts("prompts")?.into_iter().map(|(text, _)| text.to_owned()).collect(),
            negative_prompts: table.texts("negative_prompts")?.into_iter().map(|(text, _)| text.to_owned()).collect(),
            text_places: texts.iter().map(|(_, place)| place.clone()).collect(),
            texts: texts.iter().map(|(path, _)| directory.join(path)).collect(),
            place: table.place("model"),
        });
    }
    if *base == Base::Mean && experts.iter().all(|expert| expert.weight == 0.0) {
        return Err(tables[0].place("weight").fault("is 0, and so are all others: at least one has to be above"));
    }
    Ok(experts)
}

fn read_router(table: &Table) -> Result<Router> {
    const METHODS: [&str; 5] = ["uniform", "normal", "hidden", "embedding", "ridge"];
    table.check_keys(&["method", "seed", "scale", "lambda"])?;
    let seed = table.count("seed", 0, i64::MAX as u64)?;
    let lambda = table.number("lambda")?;
    let method = match table.choice("method", &METHODS)?.unwrap_or(0) {
        0 => Method::Uniform { seed: seed.unwrap_or(0) },
        1 => Method::Normal { seed: seed.unwrap_or(0) },
        2 => Method::Hidden,
        3 => Method::Embedding,
        _ => Method::Ridge { lambda: lambda.unwrap_or(0.01) },
    };
    let random = matches!(method, Method::Uniform { .. } | Method::Normal { .. });
    let ridge = matches!(method, Method::Ridge { .. });
    for (key, given, taken) in [("seed", seed.is_some(), random), ("lambda", lambda.is_some(), ridge)] {
        if given && !taken {
            return Err(table.place(key).fault(&format!("is given, but the method {:?} takes none", method.name())));
        }
    }
    if let Method::Ridge { lambda } = method
        && !(lambda > 0.0 && lambda <= 1e6)
    {
        return Err(table.place("lambda").fault(&format!("is {lambda}, expected a number above 0, at most 1000000")));
    }
    let scale = table.number("scale")?.unwrap_or(1.0);
    if !(scale > 0.0 && scale <= 1e6) {
        return Err(table.place("scale").fault(&format!("is {scale}, expected a number above 0, at most 1000000")));
    }
    Ok(Router { method, scale })
}

/// A method that takes texts of each expert has some.
fn check_texts(experts: &[Expert], method: Method) -> Result<()> {
    let without = |expert: &&Expert| expert.prompts.is_empty() && expert.texts.is_empty();
    if let Some(expert) = experts.iter().find(without).filter(|_| method.needs_texts()) {
        let key = expert.place.key().replace(".model", ".prompts");
        let text = format!("is missing, and so is \"texts\": the router method {:?} takes them", method.name());
        return Err(expert.place.at(key).fault(&text));
    }
    Ok(())
}
