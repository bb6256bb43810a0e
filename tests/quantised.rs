//! Quantised weights: what rounding costs on text the demo model has not seen, and that files hold exactly what rounding
//! on load gives.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::held_out::{check_rise, demo_model, perplexities, promises};
use common::{Directory, Random, load, load_options, session};
use gemmoe::backend::KvDtype;
use gemmoe::model::names::Layout;
use gemmoe::quant::{Format, GROUP_SIZES, Groups, ScaleDtype};
use gemmoe::{Formats, Importance, LoadOptions, Model, Progress, QuantizeOptions, QuantizeReport, Status, quantize};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

fn formats(experts: Format, others: Format) -> Formats {
    Formats { experts: Some(experts), attention: Some(others), head: Some(others), embedding: None }
}

fn load_in(directory: &Path, formats: Formats) -> Arc<Model> {
    load_options(directory, &LoadOptions { formats, ..Default::default() })
}

fn write(source: &Path, target: &Path, formats: Formats) -> QuantizeReport {
    let options = QuantizeOptions { formats, ..Default::default() };
    quantize(source, target, &options, None, &Progress::default()).unwrap_or_else(|error| panic!("{error}"))
}

/// The logits of some tokens, with keys and values in f32.
fn logits(model: &Arc<Model>) -> Vec<f32> {
    let mut session = common::session_with(model, KvDtype::F32);
    session.prefill(&Random::new(3).tokens(9, model.config().vocab_size.min(97))).unwrap();
    session.logits().unwrap().to_vec()
}

#[test]
fn rounding_raises_the_perplexity_of_unseen_text_by_less_than_its_bound() {
    let before = perplexities(&load(&demo_model()));
    for (name, formats, most) in promises() {
        check_rise(name, &before, &perplexities(&load_in(&demo_model(), formats)), most);
    }
}

#[test]
fn a_quantised_directory_gives_the_bits_of_rounding_on_load() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("quantised");
    let formats = formats(Format::INT4, Format::INT8);
    let report = write(&demo_model(), &target, formats);
    let (stored, rounded) = (load(&target), load_in(&demo_model(), formats));
    assert_eq!(stored.fingerprint(), rounded.fingerprint());
    assert_eq!(stored.formats(), rounded.formats());
    assert_eq!(stored.backend().weight_bytes(), rounded.backend().weight_bytes());
    assert_eq!(stored.backend().default_kv_dtype(), KvDtype::Bf16);
    assert_eq!(logits(&stored), logits(&rounded));
    let text = "Die Datei wird";
    assert_eq!(stored.encode(text, true, false).unwrap(), rounded.encode(text, true, false).unwrap());
    // Asking for what is stored is nothing new.
    let again = load_in(&target, formats);
    assert_eq!(again.fingerprint(), stored.fingerprint());
    assert!(report.bytes_after * 10 < report.bytes_before * 4);
}

/// Scales of the other dtype are other weights, whatever their bits.
#[test]
fn directories_of_the_same_bytes_in_another_format_have_another_fingerprint() {
    let source = source(7, Dtype::BF16, Layout::BlockSparseMoe, false);
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("quantised");
    write(source.path(), &target, formats(Format::INT4, Format::INT8));
    let fingerprint = load(&target).fingerprint();
    let rewrite = |name: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>| {
        std::fs::write(target.join(name), change(std::fs::read(target.join(name)).unwrap())).unwrap();
    };
    rewrite("config.json", &|text| {
        String::from_utf8(text).unwrap().replace(r#""scales": "bf16""#, r#""scales": "f16""#).into_bytes()
    });
    rewrite("model.safetensors", &|mut file| {
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
        for (_, tensor) in header.as_object_mut().unwrap().iter_mut().filter(|(name, _)| name.ends_with("_scale")) {
            tensor["dtype"] = json!("F16");
        }
        file[8..8 + length].fill(b' ');
        let header = header.to_string();
        file[8..8 + header.len()].copy_from_slice(header.as_bytes());
        file
    });
    assert_eq!(load(&target).formats().head, Some(Format::Int8(Groups { size: 32, scales: ScaleDtype::F16 })));
    assert_ne!(load(&target).fingerprint(), fingerprint);
}

#[test]
fn every_layout_dtype_and_choice_of_parts_comes_back_with_the_same_bits() {
    let fine = |size: usize| Format::Int4(Groups { size, scales: ScaleDtype::F16 });
    let none = Formats::default();
    let choices = [
        formats(Format::INT4, Format::INT8),
        Formats { experts: Some(fine(64)), ..none },
        Formats { attention: Some(Format::INT8), ..none },
        Formats { head: Some(fine(128)), ..none },
        Formats { embedding: Some(Format::INT8), ..none },
        Formats { head: Some(Format::INT8), embedding: Some(fine(32)), ..none },
    ];
    for (index, formats) in choices.into_iter().enumerate() {
        for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
            for layout in [Layout::BlockSparseMoe, Layout::Fused, Layout::Dense] {
                for own_head in [false, true] {
                    let source = source(index as u64, dtype, layout, own_head);
                    let directory = tempfile::tempdir().unwrap();
                    let target = directory.path().join("quantised");
                    let report = write(source.path(), &target, formats);
                    let (stored, rounded) = (load(&target), load_in(source.path(), formats));
                    let name = format!("{formats:?}, {dtype}, {layout:?}, own head: {own_head}");
                    assert_eq!(logits(&stored), logits(&rounded), "{name}");
                    assert_eq!(stored.formats(), rounded.formats(), "{name}");
                    let dtypes = [&stored, &rounded].map(|model| model.backend().default_kv_dtype());
                    assert_eq!(dtypes[0], dtypes[1], "{name}");
                    let kept = if layout == Layout::Dense { Layout::Dense } else { Layout::BlockSparseMoe };
                    assert_eq!(stored.layout(), kept, "{name}");
                    let sizes: u64 = report.tensors.iter().map(|tensor| tensor.bytes_after).sum();
                    assert!(sizes <= report.bytes_after && !report.tensors.is_empty(), "{name}");
                }
            }
        }
    }
}

/// A small random model in a layout.
fn source(seed: u64, dtype: Dtype, layout: Layout, own_head: bool) -> tempfile::TempDir {
    let mut directory = Directory::random_with(seed, json!({"tie_word_embeddings": !own_head}));
    directory.dtype = dtype;
    if own_head {
        let head = Directory::random(seed + 100).tensors["model.embed_tokens.weight"].clone();
        directory.tensors.insert("lm_head.weight".into(), head);
    }
    let take = |directory: &mut Directory, name: &str| directory.tensors.remove(name).unwrap().1;
    for layer in 0..2 {
        let name = |rest: &str| format!("model.layers.{layer}.{rest}");
        let experts = |weight: &str| -> Vec<String> {
            (0..4).map(|expert| name(&format!("block_sparse_moe.experts.{expert}.{weight}.weight"))).collect()
        };
        match layout {
            Layout::BlockSparseMoe => {}
            Layout::Fused => {
                let (mut gate_up, mut down) = (Vec::new(), Vec::new());
                for expert in 0..4 {
                    gate_up.extend(take(&mut directory, &experts("w1")[expert]));
                    gate_up.extend(take(&mut directory, &experts("w3")[expert]));
                    down.extend(take(&mut directory, &experts("w2")[expert]));
                }
                directory.tensors.insert(name("mlp.experts.gate_up_proj"), (vec![4, 48, 40], gate_up));
                directory.tensors.insert(name("mlp.experts.down_proj"), (vec![4, 40, 24], down));
                let router = directory.tensors.remove(&name("block_sparse_moe.gate.weight")).unwrap();
                directory.tensors.insert(name("mlp.gate.weight"), router);
            }
            Layout::Dense => {
                for (old, new) in [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")] {
                    let weight = directory.tensors[&experts(old)[0]].clone();
                    directory.tensors.insert(name(&format!("mlp.{new}.weight")), weight);
                }
                let moe = name("block_sparse_moe.");
                directory.tensors.retain(|name, _| !name.starts_with(&moe));
            }
        }
    }
    directory.to_temporary()
}

#[test]
fn a_file_is_ordinary_safetensors_with_every_tensor_where_it_can_be_mapped() {
    let directory = tempfile::tempdir().unwrap();
    for shard_bytes in [0, 20_000] {
        let source = source(1, Dtype::BF16, Layout::BlockSparseMoe, false);
        let extra = json!({"model_type": "gemmoe", "z_last": {"b": [1, 2.5], "a": null}, "a_first": "x"});
        let mut config: Value =
            serde_json::from_slice(&std::fs::read(source.path().join("config.json")).unwrap()).unwrap();
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        std::fs::write(source.path().join("config.json"), config.to_string()).unwrap();
        std::fs::write(source.path().join("chat_template.jinja"), "{{ messages }}").unwrap();
        let target = directory.path().join(format!("of-{shard_bytes}"));
        // An empty directory is as good as none.
        std::fs::create_dir(&target).unwrap();
        let options =
            QuantizeOptions { formats: formats(Format::INT4, Format::INT8), shard_bytes, ..Default::default() };
        quantize(source.path(), &target, &options, None, &Progress::default()).unwrap();

        let mut written: Value = serde_json::from_slice(&std::fs::read(target.join("config.json")).unwrap()).unwrap();
        let part = |format: &str| json!({"format": format, "group_size": 32, "scales": "bf16"});
        let expected = json!({
            "quant_method": "gemmoe", "version": 1, "source_dtype": "bf16", "experts": part("int4"),
            "attention": part("int8"), "head": part("int8"), "embedding": part("int8"),
        });
        assert_eq!(written.as_object_mut().unwrap().remove("quantization_config"), Some(expected));
        assert_eq!(written, config);
        assert_eq!(std::fs::read_to_string(target.join("chat_template.jinja")).unwrap(), "{{ messages }}");

        let weights: Vec<_> = std::fs::read_dir(&target)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
            .collect();
        assert_eq!(weights.len() > 1, shard_bytes > 0);
        assert_eq!(target.join("model.safetensors.index.json").exists(), shard_bytes > 0);
        let (mut names, mut total) = (Vec::new(), 0);
        for path in &weights {
            let bytes = std::fs::read(path).unwrap();
            let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            assert_eq!(start % 64, 0);
            let file = SafeTensors::deserialize(&bytes).unwrap();
            for (name, tensor) in file.tensors() {
                let offset = tensor.data().as_ptr().addr() - bytes.as_ptr().addr();
                let size = tensor.data().len();
                assert_eq!(offset % (1 << size.trailing_zeros().min(6)), 0, "{name} of {size} bytes is at {offset}");
                if tensor.dtype() == Dtype::U8 {
                    assert_eq!((offset % 64, tensor.shape()[2]), (0, 64), "{name}");
                }
                names.push(name);
                total += size;
            }
            if shard_bytes > 0 {
                assert!(bytes.len() < 20_000 + 8_000, "{} bytes", bytes.len());
            }
        }
        // Of 2 layers with 4 experts of 3 matrices: two tensors for each matrix, and norms and routers.
        assert_eq!(names.len(), 2 * (2 * (4 + 12) + 1) + 2 * 3 + 1);
        assert_eq!(total as u64, Model::inspect(&target, &LoadOptions::default()).unwrap().0.bytes);
        assert_eq!(logits(&load(&target)), logits(&load_in(source.path(), formats(Format::INT4, Format::INT8))));
    }
}

#[test]
fn the_report_tells_each_tensors_error() {
    let source = source(5, Dtype::BF16, Layout::BlockSparseMoe, false);
    let directory = tempfile::tempdir().unwrap();
    let report = write(source.path(), &directory.path().join("q"), formats(Format::INT4, Format::INT8));
    assert_eq!(report.tensors.len(), 1 + 2 * (4 + 12));
    let original: Directory = Directory::random_with(5, json!({"tie_word_embeddings": true}));
    for tensor in &report.tensors {
        let (shape, _) = &original.tensors[&tensor.name];
        assert_eq!(tensor.rounded.count, shape.iter().product::<usize>() as u64);
        let error = tensor.rounded.relative();
        let range = if tensor.format == Format::INT4 { 0.03..0.12 } else { 0.002..0.008 };
        assert!(range.contains(&error), "{}: {error}", tensor.name);
        assert_eq!(tensor.bytes_before, 2 * tensor.rounded.count);
    }
    let experts = report.rounded(|tensor| tensor.expert.is_some()).unwrap();
    assert_eq!(experts.count, 2 * 4 * 3 * 24 * 40);
    assert!(report.rounded(|tensor| tensor.layer == Some(2)).is_none());
}

#[test]
fn calibration_lowers_the_error_of_what_the_text_uses() {
    let source = source(6, Dtype::BF16, Layout::BlockSparseMoe, false);
    let model = load(source.path());
    let tokens: Vec<Vec<u32>> = (0..4).map(|seed| Random::new(seed).tokens(300, 97)).collect();
    let mut seen = 0;
    let importance = Importance::collect(&model, &tokens, &mut |count| seen += count).unwrap();
    assert_eq!(seen, 4 * 299);
    let directory = tempfile::tempdir().unwrap();
    let options = QuantizeOptions { formats: formats(Format::INT4, Format::INT4), ..Default::default() };
    let mut distances = Vec::new();
    for (name, importance) in [("plain", None), ("calibrated", Some(&importance))] {
        let target = directory.path().join(name);
        quantize(source.path(), &target, &options, importance, &Progress::default()).unwrap();
        let rounded = load(&target);
        let mut sum = 0.0;
        for tokens in &tokens {
            let (mut one, mut other) = (session(&model), session(&rounded));
            for session in [&mut one, &mut other] {
                session.prefill(&tokens[..64]).unwrap();
            }
            let pairs = one.logits().unwrap().iter().zip(other.logits().unwrap());
            sum += pairs.map(|(a, b)| (*a as f64 - *b as f64).powi(2)).sum::<f64>();
        }
        distances.push(sum);
    }
    println!("squared distance of logits: {distances:?}");
    // What the model is used for afterwards is no calibration.
    session(&model).prefill(&Random::new(99).tokens(200, 3)).unwrap();
    let target = directory.path().join("afterwards");
    quantize(source.path(), &target, &options, Some(&importance), &Progress::default()).unwrap();
    assert_eq!(load(&target).fingerprint(), load(&directory.path().join("calibrated")).fingerprint());
    assert_ne!(distances[0], distances[1]);
    let none = Importance::collect(&model, &[], &mut |_| ()).err().unwrap();
    assert_eq!(none.status(), Status::InvalidArgument);
}

#[test]
fn the_importance_of_another_model_is_refused_before_anything_is_written() {
    let own = Directory::random(1).to_temporary();
    let tokens = [Random::new(1).tokens(20, 97)];
    let importance = Importance::collect(&load(own.path()), &tokens, &mut |_| ()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("quantised");
    let quantize_with =
        |source: &Path| quantize(source, &target, &QuantizeOptions::default(), Some(&importance), &Progress::default());
    for (key, size) in [
        ("num_hidden_layers", 3),
        ("num_local_experts", 8),
        ("num_local_experts", 3),
        ("hidden_size", 80),
        ("intermediate_size", 25),
        ("num_attention_heads", 8),
    ] {
        let other = Directory::random_with(1, json!({key: size})).to_temporary();
        let error = quantize_with(other.path()).expect_err("it was quantised");
        assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("importance")), "{key}: {error}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "{key}");
    }
    quantize_with(own.path()).unwrap();
}

#[test]
fn what_cannot_be_quantised_is_refused_and_leaves_nothing_behind() {
    let source = source(2, Dtype::BF16, Layout::BlockSparseMoe, false);
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("quantised");
    let try_with = |source: &Path, formats: Formats, progress: &Progress| {
        let options = QuantizeOptions { formats, ..Default::default() };
        let error = quantize(source, &target, &options, None, progress).expect_err("it was quantised");
        let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(left.iter().all(|path| *path == target || path.extension().is_none()), "{left:?}");
        (error.status(), error.to_string())
    };
    let usual = formats(Format::INT4, Format::INT8);
    let fresh = Progress::default();
    let groups = Groups { size: 48, scales: ScaleDtype::Bf16 };
    for wrong in [
        Formats::default(),
        Formats { experts: Some(Format::Bf16), ..Formats::default() },
        Formats { experts: Some(Format::Int4(groups)), ..Formats::default() },
    ] {
        assert_eq!(try_with(source.path(), wrong, &fresh).0, Status::InvalidArgument);
    }
    let cancelled = Progress::default();
    cancelled.cancel();
    assert_eq!(try_with(source.path(), usual, &cancelled).0, Status::Cancelled);
    assert_eq!(try_with(Path::new("/nonexistent-model"), usual, &fresh).0, Status::DirectoryNotFound);

    // A number that is not finite is named.
    let mut broken = Directory::random(2);
    let name = "model.layers.1.block_sparse_moe.experts.2.w2.weight";
    broken.tensors.get_mut(name).unwrap().1[24 * 33 + 5] = f32::INFINITY;
    let broken = broken.to_temporary();
    let (status, text) = try_with(broken.path(), usual, &fresh);
    assert_eq!(status, Status::TensorValue);
    for part in ["model.safetensors: ", name, "row 33", "column 5"] {
        assert!(text.contains(part), "{text}");
    }
    let options = LoadOptions { formats: usual, ..Default::default() };
    let error = Model::load(broken.path(), &options, &Progress::default()).err().unwrap();
    assert_eq!((error.status(), error.to_string()), (status, text));
    assert!(!target.exists());

    // Nothing is overwritten, neither a finished directory nor one that was cut off.
    let partial = directory.path().join("quantised.partial");
    std::fs::create_dir(&partial).unwrap();
    let options = QuantizeOptions { formats: usual, ..Default::default() };
    let in_the_way = quantize(source.path(), &target, &options, None, &fresh).err().unwrap();
    assert_eq!(in_the_way.status(), Status::AlreadyExists);
    assert!(in_the_way.to_string().contains("quantised.partial"), "{in_the_way}");
    std::fs::remove_dir(&partial).unwrap();
    write(source.path(), &target, usual);
    assert_eq!(try_with(source.path(), usual, &fresh).0, Status::AlreadyExists);
    assert_eq!(try_with(&target, usual, &fresh).0, Status::InvalidArgument);
    let file = directory.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let error = quantize(source.path(), &file, &options, None, &fresh).err().unwrap();
    assert_eq!(error.status(), Status::AlreadyExists);

    // A link is told apart from a directory that is not empty, also where its path ends in a separator.
    let (empty, link) = (directory.path().join("empty"), directory.path().join("link"));
    std::fs::create_dir(&empty).unwrap();
    std::os::unix::fs::symlink(&empty, &link).unwrap();
    for link in [link.clone(), link.join("")] {
        let error = quantize(source.path(), &link, &options, None, &fresh).err().unwrap();
        assert_eq!(error.status(), Status::AlreadyExists);
        assert!(error.to_string().contains("is a symbolic link"), "{error}");
    }
    assert!(!directory.path().join("link.partial").exists());
    let options = QuantizeOptions { threads: 257, ..options };
    let error = quantize(source.path(), &directory.path().join("new"), &options, None, &fresh).err().unwrap();
    assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("threads")));
}

#[cfg(target_os = "linux")]
#[test]
fn a_directory_on_a_disk_of_its_own_is_no_target_whatever_is_in_it() {
    let source = source(2, Dtype::BF16, Layout::BlockSparseMoe, false);
    let error = quantize(source.path(), Path::new("/proc"), &QuantizeOptions::default(), None, &Progress::default());
    let error = error.expect_err("it was quantised");
    assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("target")));
    assert_eq!(error.to_string(), "/proc: is a mount point: name a directory inside it");
}

#[test]
fn an_empty_directory_is_replaced_by_one_with_its_permissions() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let source = source(2, Dtype::BF16, Layout::BlockSparseMoe, false);
    let directory = tempfile::tempdir().unwrap();
    for mode in [0o700, 0o2750, 0o777] {
        let target = directory.path().join(format!("{mode:o}"));
        std::fs::create_dir(&target).unwrap();
        std::fs::set_permissions(&target, std::fs::Permissions::from_mode(mode)).unwrap();
        let empty = std::fs::metadata(&target).unwrap();
        // A write that fails leaves the directory as it was.
        let options = QuantizeOptions { shard_bytes: 1, ..Default::default() };
        std::fs::write(source.path().join("tokenizer.model"), vec![0; (64 << 20) + 1]).unwrap();
        quantize(source.path(), &target, &options, None, &Progress::default()).expect_err("a file is too large");
        let left = std::fs::metadata(&target).unwrap();
        assert_eq!((left.ino(), left.mode()), (empty.ino(), empty.mode()));
        assert_eq!(std::fs::read_dir(&target).unwrap().count(), 0);
        std::fs::remove_file(source.path().join("tokenizer.model")).unwrap();
        quantize(source.path(), &target, &options, None, &Progress::default()).unwrap();
        assert_eq!(std::fs::metadata(&target).unwrap().mode() & 0o7777, mode);
    }
}

/// A model of 2 TB whose weights are not there: only its file's length is.
#[test]
fn a_disk_without_room_is_told_before_anything_is_written() {
    let shape = json!({
        "vocab_size": 3, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 1, "num_experts_per_tok": 1,
    });
    let mut directory = Directory::random_with(9, shape);
    let whole = directory.safetensors(|_| true);
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&whole[8..8 + length]).unwrap();
    directory.config["vocab_size"] = json!(1 << 24);
    directory.config["hidden_size"] = json!(1 << 16);
    let mut end = 0u64;
    for (_, tensor) in header.as_object_mut().unwrap().iter_mut() {
        let shape: Vec<u64> = tensor["shape"].as_array().unwrap().iter().map(|size| size.as_u64().unwrap()).collect();
        let is_inner = |index: usize, size: u64| size == 8 && (index + 1 == shape.len());
        let widened: Vec<u64> = shape
            .iter()
            .enumerate()
            .map(|(index, size)| match *size {
                3 => 1 << 24,
                size if is_inner(index, size) => 1 << 16,
                size => size,
            })
            .collect();
        let bytes = 2 * widened.iter().product::<u64>();
        tensor["shape"] = json!(widened);
        tensor["data_offsets"] = json!([end, end + bytes]);
        end += bytes;
    }
    // The two matrices whose outputs are hidden_size wide are the other way around.
    for name in ["self_attn.o_proj", "block_sparse_moe.experts.0.w2"] {
        header[format!("model.layers.0.{name}.weight")]["shape"] = json!([1 << 16, 8]);
    }
    let written = tempfile::tempdir().unwrap();
    std::fs::write(written.path().join("config.json"), directory.config.to_string()).unwrap();
    let header = header.to_string();
    let path = written.path().join("model.safetensors");
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let free = gemmoe::platform::free_disk_bytes(written.path());
    if file.set_len(8 + header.len() as u64 + end).is_err() || free.is_none_or(|free| free > end / 2) {
        println!("this disk takes no such file, or has room for it");
        return;
    }
    let target = written.path().join("quantised");
    let error = quantize(written.path(), &target, &QuantizeOptions::default(), None, &Progress::default());
    let error = error.expect_err("it was quantised");
    assert_eq!(error.status(), Status::DiskFull, "{error}");
    assert_eq!(std::fs::read_dir(written.path()).unwrap().count(), 2);
}

#[test]
fn another_format_than_the_stored_one_is_refused() {
    let source = source(3, Dtype::BF16, Layout::BlockSparseMoe, false);
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("quantised");
    write(source.path(), &target, Formats { experts: Some(Format::INT4), ..Formats::default() });
    let load_with =
        |formats: Formats| Model::load(&target, &LoadOptions { formats, ..Default::default() }, &Progress::default());
    for wrong in [Format::INT8, Format::Bf16, Format::Int4(Groups { size: 64, scales: ScaleDtype::Bf16 })] {
        let error = load_with(Formats { experts: Some(wrong), ..Formats::default() }).err().unwrap();
        assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("experts")));
        assert!(error.to_string().contains("stored in int4 (groups of 32, bf16 scales)"), "{error}");
    }
    // What is stored as it was can still be rounded on load.
    let model = load_with(Formats { attention: Some(Format::INT8), ..Formats::default() }).unwrap();
    assert_eq!((model.formats().experts, model.formats().attention), (Some(Format::INT4), Some(Format::INT8)));
    let error = Model::load(
        source.path(),
        &LoadOptions { formats: Formats { head: Some(Format::F16), ..Formats::default() }, ..Default::default() },
        &Progress::default(),
    );
    assert_eq!(error.err().unwrap().status(), Status::InvalidArgument);
}

/// Larger groups save memory and round worse.
#[test]
fn larger_groups_are_smaller_and_rounded_worse() {
    let source = source(4, Dtype::BF16, Layout::BlockSparseMoe, false);
    let directory = tempfile::tempdir().unwrap();
    let mut last: Option<(u64, f64)> = None;
    for size in GROUP_SIZES {
        // Rows of 40 columns: the embedding's are filled up, so only errors are compared there.
        let format = Format::Int4(Groups { size, scales: ScaleDtype::Bf16 });
        let report = write(source.path(), &directory.path().join(size.to_string()), formats(format, format));
        let error = report.rounded(|_| true).unwrap().relative();
        if let Some((_, last)) = last {
            assert!(error >= last, "groups of {size}: {error}, smaller ones {last}");
        }
        last = Some((report.bytes_after, error));
    }
}
