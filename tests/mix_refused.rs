//! Recipes and models that cannot be mixed, each told by its own message with file, key and line; and mixes that are cut off.

mod common;
#[path = "common/tokenizer.rs"]
mod tokenizer;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::Directory;
use gemmoe::mix::{self, MixOptions, Recipe};
use gemmoe::{Error, Progress, Status};
use safetensors::Dtype;
use serde_json::{Value, json};
use tokenizer::VOCAB_SIZE;

/// Two dense models, `a` and `b`, a GemMoE of four experts, `moe`, and places for what is broken.
struct Place(tempfile::TempDir);

fn dense(seed: u64) -> Directory {
    let mut directory = Directory::random_with(
        seed,
        json!({"model_type": "gemma", "vocab_size": VOCAB_SIZE, "num_local_experts": 1, "num_experts_per_tok": 1}),
    );
    let names: Vec<String> =
        directory.tensors.keys().filter(|name| name.contains("block_sparse_moe")).cloned().collect();
    for name in names {
        let tensor = directory.tensors.remove(&name).unwrap();
        let renamed = name
            .replace("block_sparse_moe.experts.0.w1", "mlp.gate_proj")
            .replace("block_sparse_moe.experts.0.w3", "mlp.up_proj")
            .replace("block_sparse_moe.experts.0.w2", "mlp.down_proj");
        if !renamed.contains("gate.weight") {
            directory.tensors.insert(renamed, tensor);
        }
    }
    directory
}

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        place.add("a", &dense(1));
        place.add("b", &dense(2));
        place.add("moe", &Directory::random_with(3, json!({"vocab_size": VOCAB_SIZE})));
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn add(&self, name: &str, directory: &Directory) {
        std::fs::create_dir(self.path(name)).unwrap();
        directory.write(&self.path(name));
        self.write(&format!("{name}/tokenizer.json"), tokenizer::sample().to_string());
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn mix_to(&self, recipe: &str, target: &Path, progress: &Progress) -> gemmoe::Result<mix::MixReport> {
        self.write("recipe.toml", recipe);
        let recipe = Recipe::read(&self.path("recipe.toml"))?;
        mix::mix(&recipe, target, &MixOptions { threads: 1, ..Default::default() }, progress)
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != "recipe.toml");
        names.sort();
        names
    }

    /// The error of a recipe, which leaves nothing behind; checking alone says the same unless weights are looked at.
    fn refused(&self, recipe: &str) -> Error {
        let before = self.names();
        let Err(error) = self.mix_to(recipe, &self.path("mixed"), &Progress::default()) else {
            panic!("it was mixed:\n{recipe}");
        };
        if error.status() != Status::TensorValue && !error.to_string().contains("cancel out") {
            let checked = Recipe::read(&self.path("recipe.toml"))
                .and_then(|recipe| mix::check(&recipe, &self.path("mixed"), &MixOptions::default()).map(drop));
            assert_eq!(checked.unwrap_err(), error);
        }
        assert_eq!(self.names(), before, "{error}");
        error
    }
}

const TWO: &str = "[[experts]]\nmodel = \"a\"\n[[experts]]\nmodel = \"b\"\n";

#[test]
fn every_broken_recipe_has_its_own_message_with_the_key_and_its_line() {
    let place = Place::new();
    place.write("empty.txt", "");
    place.write("latin.txt", b"caf\xe9");
    let many = "[[experts]]\nmodel = \"a\"\n".repeat(65);
    let twice = format!("{TWO}name = \"0\"\n");
    let rows: Vec<(String, Status, Option<&str>, &str)> = [
        // (recipe, status, key, how the message goes on after the recipe's path)
        ("base = ".to_owned(), Status::RecipeSyntax, None, "line 1: "),
        (format!("{TWO}[router]\nmethod = \"hidden"), Status::RecipeSyntax, None, "line 6: "),
        (format!("dtype = \"f16\"\ndtype = \"f32\"\n{TWO}"), Status::RecipeSyntax, None, "line 2: duplicate key"),
        (
            "\n\nbases = \"mean\"".to_owned(),
            Status::RecipeValue,
            Some("bases"),
            "line 3: \"bases\" is no key of a recipe: is \"base\" meant?",
        ),
        (
            format!("{TWO}\n[ruoter]\n"),
            Status::RecipeValue,
            Some("ruoter"),
            "line 6: \"ruoter\" is no key of a recipe: is \"router\" meant?",
        ),
        (
            format!("{TWO}[router]\nsede = 3"),
            Status::RecipeValue,
            Some("router.sede"),
            "line 6: \"router.sede\" is no key of a recipe: is \"seed\" meant?",
        ),
        (
            format!("{TWO}wieght = 3"),
            Status::RecipeValue,
            Some("experts[1].wieght"),
            "line 5: \"experts[1].wieght\" is no key of a recipe: is \"weight\" meant?",
        ),
        (
            format!("{TWO}xyzzy = 3"),
            Status::RecipeValue,
            Some("experts[1].xyzzy"),
            "line 5: \"experts[1].xyzzy\" is no key of a recipe, expected one of model, name, ",
        ),
        (format!("base = 3\n{TWO}"), Status::RecipeValue, Some("base"), "line 1: \"base\" is 3, expected a text"),
        (
            format!("base = \"\"\n{TWO}"),
            Status::RecipeValue,
            Some("base"),
            "line 1: \"base\" is empty, expected a text",
        ),
        (
            "base = \"mean\"".to_owned(),
            Status::RecipeValue,
            Some("experts"),
            "line 1: \"experts\" has 0 entries, expected 2 to 64 experts",
        ),
        (
            "[[experts]]\nmodel = \"a\"".to_owned(),
            Status::RecipeValue,
            Some("experts"),
            "line 1: \"experts\" has 1 entries, expected 2 to 64",
        ),
        (many, Status::RecipeValue, Some("experts"), "line 1: \"experts\" has 65 entries, expected 2 to 64"),
        (
            "experts = \"a, b\"".to_owned(),
            Status::RecipeValue,
            Some("experts"),
            "line 1: \"experts\" is \"a, b\", expected a list of tables",
        ),
        (
            "experts = [\n\"a\", \"b\"]".to_owned(),
            Status::RecipeValue,
            Some("experts[0]"),
            "line 2: \"experts[0]\" is \"a\", expected a table",
        ),
        (
            "[[experts]]\nmodel = \"a\"\n[[experts]]\nname = \"b\"".to_owned(),
            Status::RecipeValue,
            Some("experts[1].model"),
            "line 3: \"experts[1].model\" is missing, expected a model directory",
        ),
        (
            twice,
            Status::RecipeValue,
            Some("experts[1].name"),
            "line 5: \"experts[1].name\" is \"0\", as is that of experts[0]",
        ),
        (
            format!("{TWO}name = \"base\""),
            Status::RecipeValue,
            Some("experts[1].name"),
            "line 5: \"experts[1].name\" is \"base\", which is no name",
        ),
        (
            format!("{TWO}weight = -1"),
            Status::RecipeValue,
            Some("experts[1].weight"),
            "line 5: \"experts[1].weight\" is -1, expected a number from 0",
        ),
        (
            format!("{TWO}weight = nan"),
            Status::RecipeValue,
            Some("experts[1].weight"),
            "line 5: \"experts[1].weight\" is nan, expected a number",
        ),
        (
            format!("base = \"a\"\n{TWO}weight = 2"),
            Status::RecipeValue,
            Some("experts[1].weight"),
            "line 6: \"experts[1].weight\" is given, but nothing is averaged",
        ),
        (
            "[[experts]]\nmodel=\"a\"\nweight=0\n[[experts]]\nmodel=\"b\"\nweight=0.0".to_owned(),
            Status::RecipeValue,
            Some("experts[0].weight"),
            "line 3: \"experts[0].weight\" is 0, and so are all others",
        ),
        (
            format!("{TWO}expert = 64"),
            Status::RecipeValue,
            Some("experts[1].expert"),
            "line 5: \"experts[1].expert\" is 64, expected a whole number from 0 to 63",
        ),
        (format!("{TWO}expert = 1"), Status::RecipeValue, Some("experts[1].expert"), "has 1 experts, from 0 on"),
        (
            format!("{TWO}[[experts]]\nmodel = \"moe\"\nexpert = 4"),
            Status::RecipeValue,
            Some("experts[2].expert"),
            "has 4 experts, from 0 on",
        ),
        (
            format!("{TWO}[[experts]]\nmodel = \"moe\""),
            Status::RecipeValue,
            Some("experts[2].expert"),
            "has 4 experts, say which",
        ),
        (
            format!("num_experts_per_tok = 3\n{TWO}"),
            Status::RecipeValue,
            Some("num_experts_per_tok"),
            "line 1: \"num_experts_per_tok\" is 3, and there are only 2 experts",
        ),
        (
            format!("num_experts_per_tok = 0\n{TWO}"),
            Status::RecipeValue,
            Some("num_experts_per_tok"),
            "line 1: \"num_experts_per_tok\" is 0, expected a whole number from 1 to 64",
        ),
        (
            format!("num_experts_per_tok = 1.5\n{TWO}"),
            Status::RecipeValue,
            Some("num_experts_per_tok"),
            "line 1: \"num_experts_per_tok\" is 1.5, expected a whole number",
        ),
        (
            format!("dtype = \"fp16\"\n{TWO}"),
            Status::RecipeValue,
            Some("dtype"),
            "line 1: \"dtype\" is \"fp16\", expected one of bf16, f16, f32",
        ),
        (
            format!("shard_bytes = \"5 GB\"\n{TWO}"),
            Status::RecipeValue,
            Some("shard_bytes"),
            "line 1: \"shard_bytes\" is \"5 GB\", expected a whole number",
        ),
        (
            format!("chat_template_from = \"c\"\n{TWO}"),
            Status::RecipeValue,
            Some("chat_template_from"),
            "line 1: \"chat_template_from\" is \"c\", expected the name of an expert: 0, 1",
        ),
        (
            format!("chat_template_from = \"1\"\n{TWO}"),
            Status::RecipeValue,
            Some("chat_template_from"),
            "which has no chat template",
        ),
        (
            format!("router = \"hidden\"\n{TWO}"),
            Status::RecipeValue,
            Some("router"),
            "line 1: \"router\" is \"hidden\", expected a table",
        ),
        (
            format!("{TWO}[router]\nmethod = \"random\""),
            Status::RecipeValue,
            Some("router.method"),
            "line 6: \"router.method\" is \"random\", expected one of uniform, normal, hidden, embedding, ridge",
        ),
        (
            format!("{TWO}[router]\nmethod = \"hidden\""),
            Status::RecipeValue,
            Some("experts[0].prompts"),
            "line 2: \"experts[0].prompts\" is missing, and so is \"texts\": the router method \"hidden\" takes them",
        ),
        (
            format!("{TWO}[router]\nseed = -1"),
            Status::RecipeValue,
            Some("router.seed"),
            "line 6: \"router.seed\" is -1, expected a whole number",
        ),
        (
            format!("{TWO}[router]\nscale = 0"),
            Status::RecipeValue,
            Some("router.scale"),
            "line 6: \"router.scale\" is 0, expected a number above 0",
        ),
        (
            format!("{TWO}[router]\nlambda = 1"),
            Status::RecipeValue,
            Some("router.lambda"),
            "line 6: \"router.lambda\" is given, but the method \"uniform\" takes none",
        ),
        (format!("{TWO}[quantize]\n"), Status::RecipeValue, Some("quantize"), "line 5: \"quantize\" asks for nothing"),
        (
            format!("{TWO}[quantize]\nexperts = \"int3\""),
            Status::RecipeValue,
            Some("quantize.experts"),
            "line 6: \"quantize.experts\" is \"int3\", expected one of int8, int4, stored",
        ),
        (
            format!("{TWO}[quantize]\nhead = \"int8\"\ngroup_size = 48"),
            Status::RecipeValue,
            Some("quantize.group_size"),
            "line 7: \"quantize.group_size\" is 48, expected 32, 64 or 128",
        ),
        (
            format!("{TWO}[quantize]\nhead = \"int8\"\nscales = \"f32\""),
            Status::RecipeValue,
            Some("quantize.scales"),
            "line 7: \"quantize.scales\" is \"f32\", expected one of bf16, f16",
        ),
        (
            format!("{TWO}prompts = 7"),
            Status::RecipeValue,
            Some("experts[1].prompts"),
            "line 5: \"experts[1].prompts\" is 7, expected a list of texts",
        ),
        (
            format!("{TWO}prompts = [\"a\",\n\"\"]"),
            Status::RecipeValue,
            Some("experts[1].prompts[1]"),
            "line 6: \"experts[1].prompts[1]\" is empty, expected a text",
        ),
        (
            "[[experts]]\nmodel=\"a\"\n[[experts]]\nmodel=\"nowhere\"".to_owned(),
            Status::DirectoryNotFound,
            Some("experts[1].model"),
            "line 4: \"experts[1].model\" cannot be used: ",
        ),
        (
            format!("base = \"nowhere\"\n{TWO}"),
            Status::DirectoryNotFound,
            Some("base"),
            "line 1: \"base\" cannot be used: ",
        ),
        (texts("texts = \"absent.txt\""), Status::RecipeValue, Some("experts[0].texts"), "absent.txt: cannot be read"),
        (texts("texts = [\"empty.txt\"]"), Status::RecipeValue, Some("experts[0].texts[0]"), "empty.txt: is empty"),
        (texts("texts = \"latin.txt\""), Status::RecipeValue, Some("experts[0].texts"), "latin.txt: cannot be read"),
        (
            texts("prompts = \"hell\"\nnegative_prompts = \"hell\""),
            Status::RecipeValue,
            Some("experts[0].prompts"),
            "and the negative prompts cancel out",
        ),
    ]
    .into();
    let mut messages = std::collections::BTreeSet::new();
    let count = rows.len();
    for (recipe, status, key, text) in rows {
        let error = place.refused(&recipe);
        let message = error.to_string();
        assert_eq!((error.status(), error.key()), (status, key), "{message}\n{recipe}");
        assert_eq!(error.file(), Some(&*place.path("recipe.toml").display().to_string()), "{message}");
        let start = format!("{}: ", place.path("recipe.toml").display());
        let rest = message.strip_prefix(&start).unwrap_or_else(|| panic!("{message}"));
        assert!(rest.starts_with("line "), "{message}");
        assert!(rest.contains(text) && (!text.starts_with("line ") || rest.starts_with(text)), "{message}\n{text}");
        messages.insert(message);
    }
    assert!(count >= 50 && messages.len() == count, "{} of {count} messages differ", messages.len());
}

/// A recipe whose first expert has texts for a router of method embedding.
fn texts(first: &str) -> String {
    let experts = format!("[[experts]]\nmodel = \"a\"\n{first}\n[[experts]]\nmodel = \"b\"\nprompts = \"b\"");
    format!("{experts}\n[router]\nmethod = \"embedding\"")
}

#[test]
fn recipes_that_cannot_be_read_are_told_by_their_path() {
    let place = Place::new();
    let read = |name: &str| Recipe::read(&place.path(name)).unwrap_err();
    assert_eq!(read("absent.toml").status(), Status::FileNotFound);
    assert_eq!(read("a").status(), Status::ReadFailed);
    place.write("latin.toml", b"base = \"caf\xe9\"");
    let error = read("latin.toml");
    assert_eq!(error.status(), Status::InvalidUtf8);
    assert!(error.to_string().ends_with("latin.toml: is not UTF-8 from byte 11 on"), "{error}");
    place.write("large.toml", "#".repeat((1 << 20) + 1));
    assert_eq!(read("large.toml").status(), Status::FileTooLarge);
    // Nested as deep as a file can be.
    place.write("deep.toml", format!("a = {}", "[".repeat(200_000)));
    assert_eq!(read("deep.toml").status(), Status::RecipeSyntax);
}

#[test]
fn every_model_that_does_not_fit_is_named_with_what_sets_it_apart() {
    let changed = |change: &dyn Fn(&mut Directory)| {
        let mut directory = dense(2);
        change(&mut directory);
        directory
    };
    let config = |key: &'static str, value: Value| changed(&|directory| directory.config[key] = value.clone());
    let other_size = |changes: Value| {
        let mut all = json!({"model_type": "gemmoe", "vocab_size": VOCAB_SIZE, "num_local_experts": 2});
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Directory::random_with(4, all)
    };
    type Row<'a> = (Directory, &'a str, Status, &'a str, &'a str);
    let rows: Vec<Row> = vec![
        // (the model, what its expert is, status, file, part of the message)
        (
            other_size(json!({"vocab_size": 330})),
            "expert = 1",
            Status::ModelsDiffer,
            "config.json",
            "\"vocab_size\" is 330, expected 320 as in ",
        ),
        (
            other_size(json!({"hidden_size": 48})),
            "expert = 1",
            Status::ModelsDiffer,
            "config.json",
            "\"hidden_size\" is 48, expected 40 as in ",
        ),
        (
            other_size(json!({"intermediate_size": 32})),
            "expert = 1",
            Status::ModelsDiffer,
            "config.json",
            "\"intermediate_size\" is 32, expected 24",
        ),
        (
            other_size(json!({"num_hidden_layers": 3})),
            "expert = 1",
            Status::ModelsDiffer,
            "config.json",
            "\"num_hidden_layers\" is 3, expected 2",
        ),
        (
            other_size(json!({"num_attention_heads": 8})),
            "expert = 1",
            Status::ModelsDiffer,
            "config.json",
            "\"num_attention_heads\" is 8, expected 4",
        ),
        (
            other_size(json!({"num_key_value_heads": 4})),
            "expert = 1",
            Status::ModelsDiffer,
            "config.json",
            "\"num_key_value_heads\" is 4, expected 2",
        ),
        (
            other_size(json!({"head_dim": 16})),
            "expert = 1",
            Status::ModelsDiffer,
            "config.json",
            "\"head_dim\" is 16, expected 8",
        ),
        (
            config("rope_theta", json!(500000)),
            "",
            Status::ModelsDiffer,
            "config.json",
            "\"rope_theta\" is 500000, expected 10000",
        ),
        (
            config("rms_norm_eps", json!(1e-5)),
            "",
            Status::ModelsDiffer,
            "config.json",
            "\"rms_norm_eps\" is 0.00001, expected 0.000001",
        ),
        (
            config("bos_token_id", json!(3)),
            "",
            Status::ModelsDiffer,
            "config.json",
            "\"bos_token_id\" is 3, expected 2",
        ),
        (
            config("model_type", json!("llama")),
            "",
            Status::UnsupportedModel,
            "config.json",
            "\"model_type\" is \"llama\"",
        ),
        (config("hidden_size", json!("wide")), "", Status::ConfigValue, "config.json", "\"hidden_size\" is \"wide\""),
        (
            changed(&|directory| drop(directory.tensors.remove("model.layers.1.mlp.up_proj.weight"))),
            "",
            Status::TensorMissing,
            "model.safetensors",
            "\"model.layers.1.mlp.up_proj.weight\" is missing",
        ),
        (
            changed(&|directory| drop(directory.tensors.remove("model.norm.weight"))),
            "",
            Status::TensorMissing,
            "model.safetensors",
            "\"model.norm.weight\" is missing",
        ),
        (
            changed(&|directory| directory.tensors.get_mut("model.norm.weight").unwrap().0 = vec![20, 2]),
            "",
            Status::TensorShape,
            "model.safetensors",
            "\"model.norm.weight\" is [20, 2], expected [40]",
        ),
        (
            changed(&|directory| {
                directory.tensors.get_mut("model.layers.0.self_attn.q_proj.weight").unwrap().1[40 * 7 + 3] = f32::NAN
            }),
            "",
            Status::TensorValue,
            "model.safetensors",
            "\"model.layers.0.self_attn.q_proj.weight\" has in row 7, column 3 a number that is not finite",
        ),
        (
            changed(&|directory| {
                directory.tensors.get_mut("model.layers.1.mlp.down_proj.weight").unwrap().1[24 * 39 + 23] =
                    f32::INFINITY
            }),
            "",
            Status::TensorValue,
            "model.safetensors",
            "\"model.layers.1.mlp.down_proj.weight\" has in row 39, column 23 a number that is not finite",
        ),
    ];
    for (directory, expert, status, file, text) in rows {
        let place = Place::new();
        place.add("c", &directory);
        let error = place.refused(&format!("{TWO}[[experts]]\nmodel = \"c\"\n{expert}"));
        assert_eq!(error.status(), status, "{error}");
        assert_eq!(error.file(), Some(&*place.path("c").join(file).display().to_string()), "{error}");
        assert!(error.to_string().contains(text) && error.key().is_some(), "{error}");
    }
}

#[test]
fn files_and_dtypes_that_do_not_fit_are_named() {
    // Files that are not there or cut off.
    let place = Place::new();
    std::fs::remove_file(place.path("b/config.json")).unwrap();
    let error = place.refused(TWO);
    assert_eq!(
        (error.status(), error.file()),
        (Status::FileNotFound, Some(&*place.path("b/config.json").display().to_string()))
    );
    let place = Place::new();
    let bytes = std::fs::read(place.path("b/model.safetensors")).unwrap();
    place.write("b/model.safetensors", &bytes[..bytes.len() - 1]);
    let error = place.refused(TWO);
    assert_eq!(error.status(), Status::FileLength, "{error}");
    assert!(error.to_string().starts_with(&place.path("b/model.safetensors").display().to_string()), "{error}");

    // Dtypes: bf16 and f16 are not mixed unasked; f16 does not hold everything.
    let place = Place::new();
    place.add("c", &Directory { dtype: Dtype::F16, ..dense(3) });
    let error = place.refused("[[experts]]\nmodel = \"a\"\n[[experts]]\nmodel = \"c\"");
    assert_eq!((error.status(), error.key()), (Status::ModelsDiffer, Some("dtype")), "{error}");
    assert!(error.to_string().contains("is BF16 in") && error.to_string().contains("and F16 in"), "{error}");
    // Experts are alike among themselves, also where the rest is from elsewhere.
    let error = place.refused("base = \"a\"\n[[experts]]\nmodel = \"b\"\n[[experts]]\nmodel = \"c\"");
    assert_eq!((error.status(), error.key()), (Status::ModelsDiffer, Some("dtype")), "{error}");
    assert!(error.to_string().contains("mlp.gate_proj.weight\" is BF16 in"), "{error}");
    let mut large = dense(4);
    large.tensors.get_mut("model.layers.0.mlp.up_proj.weight").unwrap().1[41] = 1e6;
    place.add("large", &large);
    let error = place.refused("dtype = \"f16\"\n[[experts]]\nmodel = \"a\"\n[[experts]]\nmodel = \"large\"");
    assert_eq!(error.status(), Status::TensorValue);
    assert!(error.to_string().contains("in row 1, column 1 a number that F16 cannot hold: 999424"), "{error}");

    // Heads: of one kind.
    let mut own_head = dense(5);
    own_head.config["tie_word_embeddings"] = json!(false);
    let head = own_head.tensors["model.embed_tokens.weight"].clone();
    own_head.tensors.insert("lm_head.weight".into(), head);
    place.add("head", &own_head);
    let error = place.refused(&format!("{TWO}[[experts]]\nmodel = \"head\""));
    assert_eq!((error.status(), error.key()), (Status::ModelsDiffer, Some("tie_word_embeddings")), "{error}");
    // Where the base alone has it, there is nothing to average.
    place.mix_to(&format!("base = \"head\"\n{TWO}"), &place.path("with head"), &Progress::default()).unwrap();

    // Quantised models.
    let options = gemmoe::QuantizeOptions::default();
    gemmoe::quantize(&place.path("a"), &place.path("int4"), &options, None, &Progress::default()).unwrap();
    let error = place.refused(&format!("{TWO}[[experts]]\nmodel = \"int4\""));
    assert_eq!((error.status(), error.key()), (Status::ModelsDiffer, Some("quantization_config")), "{error}");
}

#[test]
fn tokenizers_and_chat_templates_must_be_the_same_or_be_chosen() {
    let place = Place::new();
    let tokenizer = |change: &dyn Fn(&mut Value)| {
        let mut sample = tokenizer::sample();
        change(&mut sample);
        place.write("b/tokenizer.json", sample.to_string());
    };
    let file = place.path("b/tokenizer.json").display().to_string();
    // Other spaces and an order of keys are no difference.
    place.write("b/tokenizer.json", format!("{:#}", tokenizer::sample()));
    let recipe = Recipe::parse(TWO, "recipe", place.0.path()).unwrap();
    mix::check(&recipe, &place.path("mixed"), &MixOptions::default()).unwrap();
    type Row<'a> = (&'a dyn Fn(&mut Value), &'a str);
    let rows: [Row; 4] = [
        (
            &|sample| {
                sample["model"]["merges"] = json!(["l l"]);
                let vocabulary = sample["model"]["vocab"].as_object_mut().unwrap();
                let id = vocabulary.remove("h").unwrap();
                vocabulary.insert("H".into(), id);
                for piece in ["▁h", "▁he", "▁hell", "▁hello"] {
                    vocabulary.remove(piece);
                }
            },
            "has \"H\" for token 263, not \"h\" as ",
        ),
        (&|sample| sample["model"]["merges"].as_array_mut().unwrap().truncate(4), "has 4 merges, not 5 as "),
        (
            &|sample| sample["model"]["merges"].as_array_mut().unwrap().swap(0, 2),
            "merges \"l\" and \"l\" where \"▁\" and \"h\" are",
        ),
        (
            &|sample| sample["added_tokens"][4]["special"] = json!(false),
            "has the added token \"<start_of_turn>\" (4, not special), not \"<start_of_turn>\" (4, special) as ",
        ),
    ];
    for (change, text) in rows {
        tokenizer(change);
        let error = place.refused(TWO);
        assert_eq!((error.status(), error.file()), (Status::ModelsDiffer, Some(&*file)), "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
    place.write("b/tokenizer.json", "{");
    let error = place.refused(TWO);
    assert_eq!((error.status(), error.file()), (Status::TokenizerSyntax, Some(&*file)), "{error}");
    tokenizer(&|_| {});

    place.write("a/chat_template.jinja", "{{ bos_token }}a");
    place.write("b/tokenizer_config.json", json!({"chat_template": "{{ bos_token }}b"}).to_string());
    let error = place.refused(TWO);
    assert_eq!((error.status(), error.key()), (Status::ModelsDiffer, Some("chat_template")), "{error}");
    assert!(error.to_string().contains("say by \"chat_template_from\""), "{error}");
    place.mix_to(&format!("chat_template_from = \"1\"\n{TWO}"), &place.path("chosen"), &Progress::default()).unwrap();
    assert!(!place.path("chosen/chat_template.jinja").exists() && place.path("chosen/tokenizer_config.json").exists());
    place.write("a/chat_template.jinja", "{{ bos_token }}b");
    place.mix_to(TWO, &place.path("the same"), &Progress::default()).unwrap();
    place.write("b/tokenizer_config.json", "[");
    let error = place.refused(TWO);
    assert_eq!(error.status(), Status::TemplateSyntax, "{error}");

    // Texts without any tokenizer.
    for model in ["a", "b"] {
        std::fs::remove_file(place.path(model).join("tokenizer.json")).unwrap();
        let _ = std::fs::remove_file(place.path(model).join("tokenizer_config.json"));
    }
    let error = place.refused(&texts("prompts = \"a\""));
    assert_eq!((error.status(), error.key()), (Status::NoTokenizer, Some("router")), "{error}");
}

#[test]
fn targets_that_cannot_be_written_are_told_before_anything_is_read() {
    let place = Place::new();
    let error = |target: &Path| place.mix_to(TWO, target, &Progress::default()).unwrap_err();
    assert_eq!(error(&place.path("a")).status(), Status::AlreadyExists);
    assert_eq!(error(&place.path("nowhere/mixed")).status(), Status::WriteFailed);
    assert_eq!(error(Path::new("/")).status(), Status::InvalidArgument);
    std::fs::create_dir(place.path("mixed.partial")).unwrap();
    assert_eq!(error(&place.path("mixed")).status(), Status::AlreadyExists);
    std::fs::remove_dir(place.path("mixed.partial")).unwrap();
    // The mean that is run for routers has its place too.
    std::fs::create_dir(place.path("mixed.mean")).unwrap();
    place.write("mixed.mean/mine", "kept");
    let hidden = texts("prompts = \"a\"").replace("embedding", "hidden");
    let error = place.mix_to(&hidden, &place.path("mixed"), &Progress::default()).unwrap_err();
    assert_eq!(error.status(), Status::AlreadyExists, "{error}");
    assert!(place.path("mixed.mean/mine").exists());
    let options = MixOptions { threads: 257, ..Default::default() };
    let recipe = Recipe::parse(TWO, "recipe", place.0.path()).unwrap();
    let error = mix::mix(&recipe, &place.path("mixed"), &options, &Progress::default()).unwrap_err();
    assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("threads")));
}

#[test]
fn a_mix_cancelled_at_any_moment_leaves_the_target_absent_and_the_sources_whole() {
    let place = Place::new();
    let sources = |place: &Place| -> Vec<Vec<u8>> {
        ["a", "b"].map(|name| std::fs::read(place.path(name).join("model.safetensors")).unwrap()).into()
    };
    let before = sources(&place);
    let ridge = texts("prompts = \"hello hello\"").replace("embedding", "ridge");
    let quantised = format!("{TWO}[quantize]\nexperts = \"int4\"");
    let names = place.names();
    let (mut cancelled, mut finished) = (0, 0);
    for recipe in [TWO, &ridge, &quantised] {
        // After so many bytes have been read, then after so much time.
        for step in 0..60u64 {
            let (progress, over) = (Progress::default(), AtomicBool::new(false));
            if step == 0 {
                progress.cancel();
            }
            let result = std::thread::scope(|scope| {
                scope.spawn(|| {
                    let wait = Duration::from_micros(step * 150);
                    let start = std::time::Instant::now();
                    while !over.load(Ordering::Relaxed) && start.elapsed() < wait {
                        std::hint::spin_loop();
                    }
                    progress.cancel();
                });
                let result = place.mix_to(recipe, &place.path("mixed"), &progress);
                over.store(true, Ordering::Relaxed);
                result
            });
            match result {
                Ok(_) => {
                    finished += 1;
                    assert!(place.path("mixed/config.json").exists());
                    std::fs::remove_dir_all(place.path("mixed")).unwrap();
                }
                Err(error) => {
                    cancelled += 1;
                    assert_eq!(error.status(), Status::Cancelled, "{error}");
                }
            }
            assert_eq!(place.names(), names);
        }
    }
    assert!(sources(&place) == before);
    assert!(cancelled >= 30, "{cancelled} were cancelled, {finished} were not");
}

#[test]
fn a_cancel_does_not_wait_for_the_texts_that_routers_are_made_from() {
    let place = Place::new();
    place.write("long.txt", "abcdefgh ijklm".repeat(150_000));
    let recipe = texts("texts = \"long.txt\"").replace("embedding", "hidden");
    let progress = Progress::default();
    let (error, took) = std::thread::scope(|scope| {
        let canceller = scope.spawn(|| {
            let loaded = || progress.bytes_total() > 0 && progress.bytes_read() == progress.bytes_total();
            while !loaded() {
                std::thread::sleep(Duration::from_millis(5));
            }
            std::thread::sleep(Duration::from_millis(100));
            progress.cancel();
            std::time::Instant::now()
        });
        let error = place.mix_to(&format!("base = \"a\"\n{recipe}"), &place.path("mixed"), &progress).unwrap_err();
        (error, canceller.join().unwrap().elapsed())
    });
    assert_eq!(error.status(), Status::Cancelled, "{error}");
    // Running over all of it takes minutes where nothing is optimised, and many seconds where it is.
    assert!(took < Duration::from_secs(4), "{took:?}");
}
