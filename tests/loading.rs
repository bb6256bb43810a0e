//! Loading: large matrices are read by several threads, take no second copy in memory, and can be mapped.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use common::{Directory, Random, load_options, session};
use gemmoe::backend::cpu::CpuOptions;
use gemmoe::model::{Checkpoint, Config, Description, Weights};
use gemmoe::quant::Format;
use gemmoe::{Formats, LoadOptions, Model, Progress, QuantizeOptions, Result, Status, quantize};
use half::bf16;
use serde_json::json;

const INT4: Formats = everything(Format::INT4);
const INT8: Formats = everything(Format::INT8);

const fn everything(format: Format) -> Formats {
    Formats { experts: Some(format), attention: Some(format), head: Some(format), embedding: None }
}

fn write_quantised(source: &Path, target: &Path, formats: Formats) {
    let options = QuantizeOptions { formats, ..Default::default() };
    quantize(source, target, &options, None, &Progress::default()).unwrap();
}

/// A directory whose headers have been read.
fn open(path: &Path, formats: Formats) -> (Checkpoint, Description) {
    let mut checkpoint = Checkpoint::open(path, false).unwrap();
    let config = Config::from_json(&std::fs::read(path.join("config.json")).unwrap()).unwrap();
    checkpoint.read_headers().unwrap();
    let description = Description::new(&config, &checkpoint, formats).unwrap();
    (checkpoint, description)
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const ROWS: usize = 6011;
const COLUMNS: usize = 512;

/// A model whose embedding is read in six chunks.
fn several_chunks(seed: u64) -> Directory {
    Directory::random_with(seed, json!({"vocab_size": ROWS, "hidden_size": COLUMNS}))
}

#[test]
fn rows_are_where_they_belong_on_any_number_of_threads() {
    let directory = several_chunks(1);
    let values = &directory.tensors[EMBEDDING].1;
    let written = directory.to_temporary();
    let (checkpoint, description) = open(written.path(), Formats::default());
    let (_, rounding) = open(written.path(), INT8);
    let alone = Weights::load(&rounding, &checkpoint, 1, false, &Progress::default()).unwrap();
    for threads in [1, 2, 5] {
        let progress = Progress::default();
        let weights = Weights::load(&description, &checkpoint, threads, false, &progress).unwrap();
        assert_eq!(progress.bytes_read(), progress.bytes_total());
        let mut row = vec![0.0; COLUMNS];
        for (index, expected) in values.chunks(COLUMNS).enumerate() {
            weights.embedding.read_row(index, &mut row);
            assert!(
                row.iter().zip(expected).all(|(found, value)| *found == bf16::from_f32(*value).to_f32()),
                "{index}"
            );
        }
        let rounded = Weights::load(&rounding, &checkpoint, threads, false, &Progress::default()).unwrap();
        for (rounded, alone) in rounded.matrices().zip(alone.matrices()) {
            assert!(rounded.lines() == alone.lines() && rounded.scales() == alone.scales());
        }
    }
}

#[test]
fn of_several_numbers_that_cannot_be_rounded_the_first_is_named() {
    let mut directory = several_chunks(2);
    for row in [2999, 3001, 4500, 6010] {
        directory.tensors.get_mut(EMBEDDING).unwrap().1[row * COLUMNS + 7] = f32::NAN;
    }
    let written = directory.to_temporary();
    for threads in [1, 2, 5] {
        let cpu = CpuOptions { threads: threads.into(), ..Default::default() };
        let options = LoadOptions { cpu, formats: INT4, ..Default::default() };
        let error = Model::load(written.path(), &options, &Progress::default()).map(drop).unwrap_err();
        assert_eq!((error.status(), error.key()), (Status::TensorValue, Some(EMBEDDING)));
        assert!(error.to_string().contains("row 2999, column 7"), "{error}");
    }
}

#[test]
fn a_file_cut_off_after_its_header_was_read_is_an_error() {
    let source = several_chunks(3).to_temporary();
    for (quantised, map) in [(true, false), (true, true), (false, false)] {
        let target = tempfile::tempdir().unwrap();
        let path = if quantised { target.path() } else { source.path() };
        if quantised {
            write_quantised(source.path(), path, INT8);
        }
        let (checkpoint, description) = open(path, Formats::default());
        let file = File::options().write(true).open(path.join("model.safetensors")).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        let loaded = Weights::load(&description, &checkpoint, 3, map, &Progress::default());
        assert_eq!(loaded.map(drop).unwrap_err().status(), Status::FileLength, "mapped: {map}");
    }
}

fn logits(model: &Arc<Model>) -> Vec<u32> {
    let mut session = session(model);
    session.prefill(&Random::new(3).tokens(9, 97)).unwrap();
    session.logits().unwrap().iter().map(|logit| logit.to_bits()).collect()
}

/// Whether a file of the directory is mapped into this process.
fn is_mapped(directory: &Path) -> bool {
    let directory = directory.canonicalize().unwrap();
    std::fs::read_to_string("/proc/self/maps").unwrap().contains(directory.to_str().unwrap())
}

/// Moves all tensors of a file by so many bytes.
fn shift(directory: &Path, bytes: usize) {
    let path = directory.join("model.safetensors");
    let mut file = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap());
    file[..8].copy_from_slice(&(length + bytes as u64).to_le_bytes());
    let end = 8 + length as usize;
    file.splice(end..end, vec![b' '; bytes]);
    // Another file: the old one may be mapped.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(path, file).unwrap();
}

#[test]
fn mapped_matrices_give_the_bits_of_those_that_were_read() {
    let mapped = LoadOptions { map: true, ..Default::default() };
    let source = several_chunks(4).to_temporary();
    let plain = load_options(source.path(), &mapped);
    assert!(!is_mapped(source.path()), "what is stored row by row is read");
    drop(plain);
    for formats in [INT4, INT8] {
        let target = tempfile::tempdir().unwrap();
        write_quantised(source.path(), target.path(), formats);
        let read = load_options(target.path(), &LoadOptions::default());
        let expected = (logits(&read), read.fingerprint(), read.backend().weight_bytes());
        assert!(!is_mapped(target.path()), "mapping is never the default");
        // Every tensor aligned; scales only; none at all.
        for (bytes, some) in [(0, true), (2, true), (1, false)] {
            shift(target.path(), bytes);
            let progress = Progress::default();
            let model = Model::load(target.path(), &mapped, &progress).unwrap();
            assert_eq!(is_mapped(target.path()), some, "moved by {bytes} more");
            assert_eq!(progress.bytes_read(), progress.bytes_total());
            assert_eq!((logits(&model), model.fingerprint(), model.backend().weight_bytes()), expected);
            drop(model);
            assert!(!is_mapped(target.path()), "a mapping lives as long as its model");
        }
    }
}

/// Names the directory, and what is done with it, to another process that runs the same test.
const MEMORY: &str = "GEMMOE_LOADING_MEMORY";
const THIS_TEST: &str = "loading_takes_little_more_memory_than_the_weights";

/// Bytes above the weights that a load may take. 256 MB are promised, for any number of threads and tokenizer.
const MORE: u64 = 48 << 20;
const THREADS: usize = 4;

/// Writes 0.3 GB: every other MiB random, the others holes, which are zeros.
fn write_large(path: &Path) {
    let (hidden, inner, layers, experts, vocabulary, query) = (1024, 4096, 2, 4, 32_000, 1024);
    let config = json!({
        "model_type": "gemmoe", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": query / 8,
        "num_local_experts": experts, "num_experts_per_tok": 2
    });
    std::fs::write(path.join("config.json"), config.to_string()).unwrap();
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    let mut add = |name: String, shape: &[usize]| {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    };
    add(EMBEDDING.into(), &[vocabulary, hidden]);
    add("model.norm.weight".into(), &[hidden]);
    for layer in 0..layers {
        let name = |rest: &str| format!("model.layers.{layer}.{rest}.weight");
        ["input_layernorm", "post_attention_layernorm"].iter().for_each(|norm| add(name(norm), &[hidden]));
        ["q_proj", "k_proj", "v_proj"]
            .iter()
            .for_each(|part| add(name(&format!("self_attn.{part}")), &[query, hidden]));
        add(name("self_attn.o_proj"), &[hidden, query]);
        add(name("block_sparse_moe.gate"), &[experts, hidden]);
        for expert in 0..experts {
            let name = |part: &str| name(&format!("block_sparse_moe.experts.{expert}.{part}"));
            add(name("w1"), &[inner, hidden]);
            add(name("w3"), &[inner, hidden]);
            add(name("w2"), &[hidden, inner]);
        }
    }
    let header = serde_json::Value::from(header).to_string();
    let begin = 8 + header.len() as u64;
    let file = File::create(path.join("model.safetensors")).unwrap();
    file.write_all_at(&(header.len() as u64).to_le_bytes(), 0).unwrap();
    file.write_all_at(header.as_bytes(), 8).unwrap();
    file.set_len(begin + end as u64).unwrap();
    let mut random = Random::new(5);
    let block: Vec<u8> = (0..1 << 19).flat_map(|_| bf16::from_f32(random.unit() / 16.0).to_le_bytes()).collect();
    for start in (0..end - block.len()).step_by(2 * block.len()) {
        file.write_all_at(&block, begin + start as u64).unwrap();
    }
}

/// Names a directory to another process that runs the same test.
const FEW_ADDRESSES: &str = "GEMMOE_LOADING_FEW_ADDRESSES";

#[cfg(target_os = "linux")]
#[test]
fn a_file_that_no_addresses_are_left_for_is_out_of_memory() {
    if let Ok(path) = std::env::var(FEW_ADDRESSES) {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        let bytes = pages.split(' ').next().unwrap().parse::<u64>().unwrap() * 4096 + (1 << 20);
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
        // SAFETY: a struct that lives as long as the call.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
        let options = LoadOptions {
            cpu: CpuOptions { threads: 1.into(), ..Default::default() },
            map: true,
            ..Default::default()
        };
        let error = Model::load(Path::new(&path), &options, &Progress::default()).map(drop).unwrap_err();
        println!("answered {:?} {error}", error.status());
        return;
    }
    let (source, quantised) = (several_chunks(6).to_temporary(), tempfile::tempdir().unwrap());
    write_quantised(source.path(), quantised.path(), INT8);
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "a_file_that_no_addresses_are_left_for_is_out_of_memory", "--nocapture"]);
    let output = command.env(FEW_ADDRESSES, quantised.path()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("answered OutOfMemory model.safetensors: cannot be mapped"), "{text}");
}

/// The most memory that this process has had, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// In the other process: loads, and tells the bytes of the weights and those that loading took at most.
fn measure(task: &str) -> Result<()> {
    let (format, path) = task.split_once(' ').unwrap();
    let formats = match format {
        "int8" => INT8,
        "int4" => INT4,
        _ => Formats::default(),
    };
    let cpu = CpuOptions { threads: THREADS.into(), ..Default::default() };
    let before = peak();
    let model =
        Model::load(Path::new(path), &LoadOptions { cpu, formats, ..Default::default() }, &Progress::default())?;
    println!("measured {} {}", model.backend().weight_bytes().0, peak() - before);
    Ok(())
}

#[test]
fn loading_takes_little_more_memory_than_the_weights() {
    if let Ok(task) = std::env::var(MEMORY) {
        return measure(&task).unwrap();
    }
    let (source, quantised) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_large(source.path());
    write_quantised(source.path(), quantised.path(), INT4);
    let tasks = [
        ("bf16 as stored", source.path()),
        ("int8 rounded", source.path()),
        ("int4 rounded", source.path()),
        ("stored int4", quantised.path()),
    ];
    for (name, path) in tasks {
        let task = format!("{} {}", name.split(' ').next().unwrap(), path.display());
        let mut command = Command::new(std::env::current_exe().unwrap());
        let output = command.args(["--exact", THIS_TEST, "--nocapture"]).env(MEMORY, task).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let (_, figures) = text.split_once("measured ").unwrap_or_else(|| panic!("{name}: {text}"));
        let mut figures = figures.split_whitespace().map(|figure| figure.parse::<u64>().unwrap_or(0));
        let (weights, peak) = (figures.next().unwrap(), figures.next().unwrap());
        println!(
            "{name}: {:.1} MB of weights, {:.1} MB at most while loading",
            weights as f64 / 1e6,
            peak as f64 / 1e6
        );
        assert!(weights > MORE, "{name}: a second copy would not be seen");
        assert!(peak <= weights + MORE, "{name}");
    }
}
