//! Recipes, checkpoints and patches that training cannot use, each told by its own message with file, key and line.

mod common;
#[path = "common/training.rs"]
mod training;

use std::path::Path;
use std::sync::Arc;

use common::{Directory, load};
use gemmoe::model::RouterPatch;
use gemmoe::train::{Advance, Begin, RecordedRun, Run, TrainRecipe};
use gemmoe::{Error, Model, Progress, Status};
use serde_json::json;
use training::{add_model, recipe, tokenizer, work_directory};

/// A recipe's error; its text has to name the recipe, the line and the key.
fn refusal(text: &str) -> Error {
    TrainRecipe::parse(text, "recipe.toml", Path::new("")).map(|_| text.to_owned()).unwrap_err()
}

#[test]
fn a_recipe_that_cannot_be_is_refused_with_its_line_and_key() {
    let all = "model = \"m\"\nobjective = \"dpo\"\ndevice = \"cpu\"\n[data]\nfiles = [\"d\"]\n[train]\nepochs = 2\n[dpo]\nbeta = 0.2\n\
               [output]\npath = \"o\"\n";
    TrainRecipe::parse(all, "recipe.toml", Path::new("")).unwrap();
    // What is replaced, by what, and what the message says.
    let cases = [
        ("model = \"m\"", "", "line 1: \"model\" is missing"),
        ("model = \"m\"", "model = 7", "line 1: \"model\" is 7, expected a text"),
        ("model = \"m\"", "model = \"\"", "line 1: \"model\" is empty"),
        ("model = \"m\"", "modell = \"m\"", "line 1: \"modell\" is no key of a recipe: is \"model\" meant?"),
        ("\"dpo\"", "\"ppo\"", "line 2: \"objective\" is \"ppo\", expected one of sft, dpo"),
        ("\"cpu\"", "\"tpu\"", "line 3: \"device\" is \"tpu\", expected cpu, auto, cuda or cuda:N"),
        ("device", "threads = 1000\ndevice", "line 3: \"threads\" is 1000, expected a whole number from 0 to 256"),
        ("device", "follow_links = 1\ndevice", "line 3: \"follow_links\" is 1, expected true or false"),
        ("device", "quantize = {}\ndevice", "line 3: \"quantize\" asks for nothing"),
        ("device", "router = [\"a\"]\ndevice", "line 3: \"router\" is a list, expected a text"),
        ("[data]", "[date]", "line 4: \"date\" is no key of a recipe: is \"data\" meant?"),
        ("[data]\nfiles = [\"d\"]\n", "", "\"data\" is missing, expected a table [data] with files"),
        ("[\"d\"]", "[]", "line 5: \"data.files\" is missing or empty"),
        ("[\"d\"]", "[\"d\", 3]", "line 5: \"data.files[1]\" is 3, expected a text"),
        (
            "[train]",
            "max_tokens = 3\n[train]",
            "line 6: \"data.max_tokens\" is 3, expected a whole number from 4 to 1048576",
        ),
        (
            "[train]",
            "long_rows = \"drop\"\n[train]",
            "line 6: \"data.long_rows\" is \"drop\", expected one of cut, skip, refuse",
        ),
        (
            "[train]",
            "bad_rows = \"cut\"\n[train]",
            "line 6: \"data.bad_rows\" is \"cut\", expected one of refuse, skip",
        ),
        ("[train]", "learn_prompts = true\n[train]", "line 6: \"data.learn_prompts\" is true, but a pair's"),
        ("[train]", "seed = -1\n[train]", "line 6: \"data.seed\" is -1"),
        ("epochs = 2", "epochs = 0", "line 7: \"train.epochs\" is 0, expected a whole number from 1"),
        ("epochs = 2", "epochs = 1.5", "line 7: \"train.epochs\" is 1.5"),
        ("epochs = 2", "epochs = 2\nsteps = 3", "line 8: \"train.steps\" is given beside \"epochs\""),
        ("epochs = 2", "rows_per_step = 0", "line 7: \"train.rows_per_step\" is 0"),
        ("epochs = 2", "learning_rate = 0", "line 7: \"train.learning_rate\" is 0, expected a number above 0"),
        ("epochs = 2", "learning_rate = nan", "line 7: \"train.learning_rate\" is nan, expected a number"),
        ("epochs = 2", "learning_rate = \"1\"", "line 7: \"train.learning_rate\" is \"1\", expected a number"),
        ("epochs = 2", "warmup_share = 1", "line 7: \"train.warmup_share\" is 1, expected 0 to below 1"),
        ("epochs = 2", "warmup_share = 0.1\nwarmup_steps = 1", "is given beside"),
        (
            "epochs = 2",
            "schedule = \"linear\"",
            "line 7: \"train.schedule\" is \"linear\", expected one of cosine, constant",
        ),
        ("epochs = 2", "schedule = \"constant\"\nfinal_share = 0.5", "line 8: \"train.final_share\" is given, but"),
        ("epochs = 2", "final_share = 2", "line 7: \"train.final_share\" is 2, expected 0 to 1"),
        ("epochs = 2", "betas = 0.9", "line 7: \"train.betas\" is 0.9, expected a list of numbers"),
        ("epochs = 2", "betas = [0.9]", "line 7: \"train.betas\" has 1 numbers, expected 2"),
        ("epochs = 2", "betas = [0.9, 1]", "line 7: \"train.betas\" has 1 in it, expected 0 to below 1"),
        ("epochs = 2", "clip = -1", "line 7: \"train.clip\" is -1, expected 0 (none) or more"),
        ("epochs = 2", "noise = -0.5", "line 7: \"train.noise\" is -0.5"),
        ("epochs = 2", "balance = -1", "line 7: \"train.balance\" is -1"),
        ("epochs = 2", "z_loss = -1", "line 7: \"train.z_loss\" is -1"),
        (
            "epochs = 2",
            "balance_form = \"local\"",
            "line 7: \"train.balance_form\" is \"local\", expected one of global, layer",
        ),
        ("epochs = 2", "soft = \"yes\"", "line 7: \"train.soft\" is \"yes\", expected true or false"),
        ("epochs = 2", "epoch = 2", "line 7: \"train.epoch\" is no key of a recipe: is \"epochs\" meant?"),
        ("beta = 0.2", "beta = 0", "line 9: \"dpo.beta\" is 0, expected a number above 0"),
        ("beta = 0.2", "loss = \"hinge\"", "line 9: \"dpo.loss\" is \"hinge\", expected one of sigmoid, ipo"),
        ("beta = 0.2", "label_smoothing = 0.5", "line 9: \"dpo.label_smoothing\" is 0.5, expected 0 to below 0.5"),
        ("beta = 0.2", "loss = \"ipo\"\nlabel_smoothing = 0.1", "line 10: \"dpo.label_smoothing\" has no meaning"),
        ("\"dpo\"", "\"sft\"", "line 8: \"dpo\" is given, but the objective is \"sft\""),
        ("path = \"o\"", "path = \"..\"", "line 11: \"output.path\" has no name"),
        (
            "path = \"o\"",
            "path = \"o\"\nkind = \"gguf\"",
            "line 12: \"output.kind\" is \"gguf\", expected one of patch, model",
        ),
        (
            "path = \"o\"",
            "path = \"o\"\ncheckpoint = \"o\"",
            "line 12: \"output.checkpoint\" is the same file as \"path\"",
        ),
        ("path = \"o\"", "path = \"o\"\nmetrics = \"o\"", "line 12: \"output.metrics\" is the same file as \"path\""),
        (
            "path = \"o\"",
            "path = \"o\"\nshard_bytes = 9",
            "line 12: \"output.shard_bytes\" is given, but a patch is one file",
        ),
        ("[output]", "[output", "line 10: "),
        ("path = \"o\"", "path = \"o\"\npath = \"p\"", "line 12: duplicate key"),
    ];
    let mut messages = Vec::new();
    for (from, to, expected) in cases {
        assert!(all.contains(from));
        let error = refusal(&all.replacen(from, to, 1));
        let said = error.to_string();
        assert!(said.starts_with("recipe.toml: line ") && said.contains(expected), "{from} -> {to}: {said}");
        assert!([Status::RecipeValue, Status::RecipeSyntax].contains(&error.status()));
        messages.push(said);
    }
    messages.sort();
    messages.dedup();
    assert_eq!(messages.len(), cases.len(), "two faults have one message");
    let absent = TrainRecipe::read(Path::new("/nowhere/recipe.toml")).unwrap_err();
    assert_eq!((absent.status(), absent.file()), (Status::FileNotFound, Some("/nowhere/recipe.toml")));
    let too_long = refusal(&"#".repeat((1 << 20) + 1));
    assert_eq!(too_long.status(), Status::FileTooLarge);
}

fn parsed(directory: &Path, text: &str) -> TrainRecipe {
    TrainRecipe::parse(text, "recipe.toml", directory).unwrap()
}

fn run_of(model: &Arc<Model>, recipe: &TrainRecipe) -> Result<Run, Error> {
    Run::new(Arc::clone(model), recipe, &Progress::default())
}

#[test]
fn a_warm_up_that_takes_all_steps_is_refused_once_they_are_known() {
    let directory = work_directory(1, json!({}));
    let model = load(&directory.path().join("model"));
    let text = recipe("sft", "epochs = 1\nwarmup_steps = 4", "");
    let error = run_of(&model, &parsed(directory.path(), &text)).err().unwrap();
    let said = error.to_string();
    assert!(said.starts_with("recipe.toml: line 13: \"train.warmup_steps\" makes 4 steps"), "{said}");
}

#[test]
fn a_checkpoint_of_another_course_is_refused_with_the_key_that_differs() {
    let directory = work_directory(2, json!({}));
    let model = load(&directory.path().join("model"));
    let usual = recipe("dpo", "steps = 6\nschedule = \"constant\"", "");
    let checkpoint = directory.path().join("checkpoint");
    let mut run = run_of(&model, &parsed(directory.path(), &usual)).unwrap();
    run.step().unwrap();
    run.step().unwrap();
    run.save(&checkpoint).unwrap();
    run.patch().unwrap().write(&directory.path().join("patch")).unwrap();
    let original = std::fs::read_to_string(directory.path().join("pairs.jsonl")).unwrap();
    let mut messages = Vec::new();
    let mut check = |text: &str, status: Status, key: &str, part: &str| {
        let mut run = run_of(&model, &parsed(directory.path(), text)).unwrap();
        let before = run.trainer().state().unwrap();
        let error = run.resume(&checkpoint).unwrap_err();
        let said = error.to_string();
        assert_eq!((error.status(), error.key()), (status, Some(key)), "{said}");
        assert!(said.starts_with("checkpoint: ") && said.contains(part) && said.contains(key), "{said}");
        assert_eq!(run.trainer().state().unwrap(), before);
        messages.push(said);
    };
    let train = |keys: &str| usual.replace("schedule = \"constant\"", &format!("schedule = \"constant\"\n{keys}"));
    let value = Status::RecipeValue;
    check(
        &usual.replace("0.01", "0.02"),
        value,
        "train.learning_rate",
        "was 0.01 when the checkpoint was begun and is 0.02",
    );
    check(&usual.replace("rows_per_step = 3", "rows_per_step = 2"), value, "train.rows_per_step", "was 3");
    check(&usual.replace("seed = 7", "seed = 8"), value, "data.seed", "was 7");
    check(&usual.replace("max_tokens = 96", "max_tokens = 95"), value, "data.max_tokens", "was 96");
    check(&usual.replace("schedule = \"constant\"", ""), value, "train.schedule", "cosine to 0.1 at step 6");
    check(&train("warmup_share = 0.5"), value, "train.warmup_steps", "is 3 now");
    check(
        &train("warmup_share = 0\nfinal_share = 0.5").replace("constant", "cosine"),
        value,
        "train.schedule",
        "cosine to 0.5 at step 6",
    );
    check(&train("betas = [0.9, 0.99]"), value, "train.betas", "[0.9, 0.999]");
    check(&train("weight_decay = 0.1"), value, "train.weight_decay", "was 0 ");
    check(&train("clip = 0"), value, "train.clip", "was 1 ");
    check(&train("noise = 0.25"), value, "train.noise", "is 0.25");
    check(&train("soft = true"), value, "train.soft", "was false");
    check(&train("balance = 0.5"), value, "train.balance", "was 0.02");
    check(&train("balance_form = \"layer\""), value, "train.balance_form", "was global");
    check(&train("z_loss = 0.1"), value, "train.z_loss", "is 0.1");
    check(&train("epsilon = 1e-6"), value, "train.epsilon", "");
    check(&format!("{usual}[dpo]\nbeta = 0.3\n"), value, "dpo.beta", "was 0.1");
    check(&format!("{usual}[dpo]\nloss = \"ipo\"\n"), value, "dpo.loss", "was sigmoid");
    check(&format!("{usual}[dpo]\nmean = true\n"), value, "dpo.mean", "was false");
    check(&format!("{usual}[dpo]\nreference = \"patch\"\n"), value, "dpo.reference", "other gates");
    check(&format!("router = \"patch\"\n{usual}"), value, "router", "other gates");
    check(&usual.replace("[data]\n", "[data]\nlong_rows = \"skip\"\n"), value, "data.long_rows", "was cut");
    check(&usual.replace("[data]\n", "[data]\nbad_rows = \"skip\"\n"), value, "data.bad_rows", "was refuse");
    check(
        &usual.replace("steps = 6", "steps = 1"),
        value,
        "train.steps",
        "is at step 2, and the recipe ends at step 1",
    );
    check(&recipe("sft", "steps = 6\nschedule = \"constant\"", ""), value, "objective", "was dpo");
    std::fs::write(
        directory.path().join("pairs.jsonl"),
        original.replacen("prompt", "prompt ", 0) + "\n{\"prompt\":\"a\",\"chosen\":\"b\",\"rejected\":\"c\"}\n",
    )
    .unwrap();
    check(&usual, Status::DataChanged, "data.files", "other rows (12)");
    let swapped: Vec<&str> = original.lines().rev().collect();
    std::fs::write(directory.path().join("pairs.jsonl"), swapped.join("\n")).unwrap();
    check(&usual, Status::DataChanged, "data.files", "other rows (11)");
    messages.sort();
    messages.dedup();
    assert_eq!(messages.len(), 27);
    // What changes nothing is taken: the metrics' interval, threads, files' names, and a longer run.
    std::fs::write(directory.path().join("renamed.jsonl"), &original).unwrap();
    let other =
        train("evaluate_every = 1").replace("pairs.jsonl", "renamed.jsonl").replace("threads = 2", "threads = 1");
    let mut run = run_of(&model, &parsed(directory.path(), &other.replace("steps = 6", "steps = 9"))).unwrap();
    run.resume(&checkpoint).unwrap();
    assert_eq!((run.steps(), run.total_steps()), (2, 9));
}

#[test]
fn a_run_of_epochs_that_has_ended_with_a_short_step_cannot_be_made_longer() {
    let directory = work_directory(3, json!({}));
    let model = load(&directory.path().join("model"));
    let usual = recipe("sft", "epochs = 1\nschedule = \"constant\"\nwarmup_steps = 0", "");
    let checkpoint = directory.path().join("checkpoint");
    let mut run = run_of(&model, &parsed(directory.path(), &usual)).unwrap();
    while run.step().unwrap().is_some() {}
    run.save(&checkpoint).unwrap();
    let mut longer = run_of(&model, &parsed(directory.path(), &usual.replace("epochs = 1", "epochs = 2"))).unwrap();
    let error = longer.resume(&checkpoint).unwrap_err();
    assert!(error.to_string().contains("has taken 11 rows in 4 steps, where a run of this length takes 12"), "{error}");
}

#[test]
fn a_checkpoint_that_is_damaged_or_another_models_is_refused_and_changes_nothing() {
    let directory = work_directory(4, json!({}));
    let model = load(&directory.path().join("model"));
    let recipe = parsed(directory.path(), &recipe("sft", "steps = 6", ""));
    let path = directory.path().join("checkpoint");
    let mut run = run_of(&model, &recipe).unwrap();
    run.step().unwrap();
    run.save(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let state = run.trainer().state().unwrap();
    let mut refused = |bytes: &[u8], status: Status, part: &str| {
        std::fs::write(&path, bytes).unwrap();
        let error = run.resume(&path).unwrap_err();
        assert!(error.status() == status && error.to_string().contains(part), "{:?}: {error}", error.status());
        assert_eq!(error.file(), Some("checkpoint"));
        assert_eq!(run.trainer().state().unwrap(), state);
    };
    for length in [0, 5, 8, 300, bytes.len() - 1] {
        refused(&bytes[..length], Status::SnapshotDamaged, "this is no training state");
    }
    let replaced = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = bytes.windows(from.len()).position(|found| found == from.as_bytes()).unwrap();
        let mut changed = bytes.clone();
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        changed
    };
    let damaged = Status::SnapshotDamaged;
    refused(&replaced("gemmoe_router_training", "gemmoe_rooter_training"), damaged, "its header lacks");
    refused(&replaced("\\\"run\\\":", "\\\"ran\\\":"), damaged, "but no checkpoint of a run");
    refused(&replaced("\\\"rows\\\":3", "\\\"rows\\\":x"), damaged, "cannot be read");
    refused(&replaced("\\\"rows\\\":3", "\\\"rowz\\\":3"), damaged, "cannot be read");
    refused(&replaced("\\\"rows\\\":3", "\\\"rows\\\":4"), Status::RecipeValue, "has taken 4 rows in 1 steps");
    refused(&replaced("first_moment", "third_moment"), damaged, "lacks \"model.layers.");
    refused(&vec![0; bytes.len() * 3 + (2 << 20)], damaged, "at most");
    let mut not_finite = bytes.clone();
    let end = not_finite.len();
    not_finite[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    refused(&not_finite, damaged, "is not finite");
    refused(&state, damaged, "but no checkpoint of a run");
    let other = directory.path().join("other");
    add_model(&other, &Directory::random_with(9, json!({"vocab_size": tokenizer::VOCAB_SIZE})));
    let theirs = directory.path().join("theirs");
    run_of(&load(&other), &recipe).unwrap().save(&theirs).unwrap();
    refused(&std::fs::read(&theirs).unwrap(), Status::SnapshotModel, "of another model");
    std::fs::remove_file(&path).unwrap();
    let missing = run.resume(&path).unwrap_err();
    assert_eq!((missing.status(), missing.file()), (Status::ReadFailed, Some("checkpoint")));
}

#[test]
fn a_patch_to_begin_from_that_is_damaged_or_another_models_is_refused() {
    let directory = work_directory(5, json!({}));
    let model = load(&directory.path().join("model"));
    let path = directory.path().join("patch");
    let usual = recipe("dpo", "steps = 1", "");
    let texts = [format!("router = \"patch\"\n{usual}"), format!("{usual}[dpo]\nreference = \"patch\"\n")];
    let refused = |status: Status, part: &str| {
        for text in &texts {
            let error = run_of(&model, &parsed(directory.path(), text)).err().unwrap();
            assert!(error.status() == status && error.to_string().contains(part), "{error}");
            assert_eq!(error.file(), Some(&*path.display().to_string()));
        }
    };
    refused(Status::FileNotFound, "not found");
    std::fs::write(&path, "no patch").unwrap();
    refused(Status::PatchDamaged, "");
    let gates = model.stored_gates().unwrap();
    let patch = |base: u64| RouterPatch::new(model.config(), &gates, base).unwrap();
    patch(7).write(&path).unwrap();
    refused(Status::PatchModel, "0000000000000007");
    let mut bytes = patch(model.gates_fingerprint().unwrap()).to_bytes().unwrap();
    let end = bytes.len();
    bytes[end - 1] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    refused(Status::PatchDamaged, "checksum");
    bytes[end - 1] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    run_of(&model, &parsed(directory.path(), &texts[0])).unwrap();
    let larger = Directory::random_with(5, json!({"vocab_size": tokenizer::VOCAB_SIZE, "num_local_experts": 5}));
    let other = load(larger.to_temporary().path());
    RouterPatch::new(other.config(), &other.stored_gates().unwrap(), other.gates_fingerprint().unwrap())
        .unwrap()
        .write(&path)
        .unwrap();
    refused(Status::PatchModel, "5 experts");
}

#[test]
fn files_that_are_in_the_way_or_cannot_be_written_are_refused_before_the_first_step() {
    let directory = work_directory(6, json!({}));
    let model = load(&directory.path().join("model"));
    let path = |name: &str| directory.path().join(name);
    let open = |output: &str, begin: Begin| {
        let recipe = parsed(directory.path(), &recipe("sft", "steps = 1", output));
        RecordedRun::open(run_of(&model, &recipe).unwrap(), begin)
    };
    let refused = |output: &str, begin: Begin, status: Status, part: &str| {
        let error = open(output, begin).err().unwrap();
        assert!(error.status() == status && error.to_string().contains(part), "{:?}: {error}", error.status());
    };
    refused("", Begin::Resume, Status::FileNotFound, "out.checkpoint: is not there");
    refused("metrics = \"no/where\"", Begin::New, Status::WriteFailed, "the directory it is to be in is not there");
    refused("checkpoint = \"model\"", Begin::New, Status::AlreadyExists, "is a directory, and a file");
    std::fs::create_dir(path("out")).unwrap();
    refused("", Begin::New, Status::AlreadyExists, "out: is a directory, and a file");
    std::fs::write(path("out/file"), "precious").unwrap();
    refused("kind = \"model\"", Begin::New, Status::AlreadyExists, "is not an empty directory");
    assert!(!path("out.metrics.jsonl").exists());
    std::fs::remove_dir_all(path("out")).unwrap();
    std::fs::create_dir(path("out.partial")).unwrap();
    refused("kind = \"model\"", Begin::New, Status::AlreadyExists, "is in the way");
    std::fs::remove_dir(path("out.partial")).unwrap();
    let mut run = open("kind = \"model\"", Begin::New).unwrap();
    while run.advance().unwrap() != Advance::Finished {}
    drop(run);
    refused("", Begin::New, Status::AlreadyExists, "--resume");
    open("", Begin::Restart).unwrap();
}

#[test]
fn no_file_is_written_over_what_a_run_reads_or_into_its_model() {
    let directory = work_directory(12, json!({}));
    let at = |name: &str| directory.path().join(name);
    let model = load(&at("model"));
    std::fs::write(at("recipe.toml"), recipe("sft", "steps = 1", "")).unwrap();
    std::fs::write(at("notes"), "what somebody wrote").unwrap();
    std::fs::create_dir(at("results")).unwrap();
    let name = at("recipe.toml").display().to_string();
    let refused = |text: &str, begin: Begin| {
        let recipe = TrainRecipe::parse(text, &name, directory.path()).unwrap();
        RecordedRun::open(run_of(&model, &recipe).unwrap(), begin).err().unwrap()
    };
    let before = |path: &str| std::fs::read(at(path)).unwrap();
    let read = ["texts.jsonl", "recipe.toml", "notes", "model/config.json", "model/model.safetensors"].map(before);
    for output in [
        "metrics = \"texts.jsonl\"",
        "metrics = \"model/../texts.jsonl\"",
        "checkpoint = \"texts.jsonl\"",
        "metrics = \"recipe.toml\"",
        "metrics = \"model/config.json\"",
        "checkpoint = \"model/model.safetensors\"",
        "metrics = \"model/metrics.jsonl\"",
        // Two of one run's files.
        "checkpoint = \"results/../out\"",
    ] {
        let error = refused(&recipe("sft", "steps = 1", output), Begin::Restart);
        assert_eq!(error.status(), Status::FileNotAllowed, "{output}: {error}");
    }
    let path = |path: &str| recipe("sft", "steps = 1", "").replace("\"out\"", path);
    assert_eq!(refused(&path("\"texts.jsonl\""), Begin::New).status(), Status::FileNotAllowed);
    assert_eq!(refused(&path("\"absent/\""), Begin::New).status(), Status::AlreadyExists);
    let error = refused(&recipe("sft", "steps = 1", "metrics = \"notes\""), Begin::Restart);
    assert_eq!(error.status(), Status::AlreadyExists);
    assert!(error.to_string().contains("has no metrics in it"), "{error}");
    assert_eq!(
        ["texts.jsonl", "recipe.toml", "notes", "model/config.json", "model/model.safetensors"].map(before),
        read
    );
}

#[cfg(unix)]
#[test]
fn two_runs_do_not_share_files() {
    let directory = work_directory(13, json!({}));
    let model = load(&directory.path().join("model"));
    let recipe = parsed(directory.path(), &recipe("sft", "steps = 2", ""));
    let open = |begin: Begin| RecordedRun::open(run_of(&model, &recipe).unwrap(), begin);
    let mut first = open(Begin::New).unwrap();
    while first.advance().unwrap() != Advance::Finished {}
    let metrics = std::fs::read(&recipe.output.metrics).unwrap();
    for begin in [Begin::Restart, Begin::Resume] {
        let error = open(begin).err().unwrap();
        assert_eq!(error.status(), Status::Busy, "{error}");
    }
    assert_eq!(std::fs::read(&recipe.output.metrics).unwrap(), metrics);
    drop(first);
    open(Begin::Restart).unwrap();
}
