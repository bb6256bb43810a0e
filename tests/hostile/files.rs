//! Files that are no files, and directories that are none.

use std::path::{Path, PathBuf};

use gemmoe::Status;

use crate::case::{
    CONFIG, Case, INDEX, TOKENIZER, WEIGHTS, case, config, folder, link, moved_behind_link, pipe, sparse, write_good,
};

pub fn cases() -> Vec<Case> {
    let mut cases = kinds();
    cases.extend(directories());
    cases.extend(large_files());
    if is_root() {
        println!("files without read permission: not tested, the superuser reads everything");
    } else {
        cases.extend(forbidden());
    }
    cases
}

fn kinds() -> Vec<Case> {
    let mut cases = vec![
        case("config.json is missing", remove(CONFIG), Status::FileNotFound).file(CONFIG).says(&["not found"]),
        case("model.safetensors is missing", remove(WEIGHTS), Status::FileNotFound).file(WEIGHTS).says(&[INDEX]),
    ];
    for file in [CONFIG, WEIGHTS, TOKENIZER, INDEX] {
        let without_weights = move |path: &Path| {
            if file == INDEX {
                std::fs::remove_file(path.join(WEIGHTS)).unwrap();
            }
        };
        type Make = (&'static str, Box<dyn Fn(&Path) + Send>, bool, &'static str);
        let ways: Vec<Make> = vec![
            ("a pipe", Box::new(pipe(file)), false, "not a regular file"),
            ("a folder", Box::new(folder(file)), false, "not a regular file"),
            ("a socket", Box::new(move |path: &Path| socket(&path.join(file))), false, "not a regular file"),
            ("a link to a file outside", Box::new(link(file, "/etc/passwd")), false, "symbolic link"),
            ("a link to a device", Box::new(link(file, "/dev/zero")), false, "symbolic link"),
            ("a link to nothing", Box::new(link(file, "nothing")), false, "symbolic link"),
            ("a link to itself", Box::new(link(file, file)), false, "symbolic link"),
            ("a followed link to a device", Box::new(link(file, "/dev/zero")), true, "not a regular file"),
            ("a followed link to a folder", Box::new(link(file, "/etc")), true, "not a regular file"),
            ("a followed link to itself", Box::new(link(file, file)), true, "symbolic link"),
        ];
        for (what, make, follow, says) in ways {
            let break_it = move |path: &Path| {
                without_weights(path);
                make(path);
            };
            let mut case = case(format!("{file} is {what}"), break_it, Status::FileNotAllowed).file(file).says(&[says]);
            case.follow_links = follow;
            cases.push(case);
        }
    }
    for file in [CONFIG, WEIGHTS] {
        cases.push(
            case(format!("{file} is a link to a file inside"), moved_behind_link(file), Status::FileNotAllowed)
                .file(file)
                .says(&["symbolic link"]),
        );
    }
    cases
}

fn directories() -> Vec<Case> {
    let nothing = |_: &Path| ();
    let status = Status::DirectoryNotFound;
    let says: &[&str] = &["cannot be opened as a directory"];
    let cases = [
        case("the directory is missing", nothing, status).at(|path| path.join("missing")),
        case("the directory is a file", nothing, status).at(|path| path.join(CONFIG)),
        case("the directory is inside a file", nothing, status).at(|path| path.join(CONFIG).join("model")),
        case("the directory is a pipe", pipe("pipe"), status).at(|path| path.join("pipe")),
        case("the directory is a link to itself", link("loop", "loop"), status).at(|path| path.join("loop")),
        case("the directory is a device", nothing, status).at(|_| PathBuf::from("/dev/null")),
        case("the directory's path is empty", nothing, status).at(|_| PathBuf::new()),
        case("the directory's path has a NUL", nothing, status).at(|path| path.join("a\0b")),
        case("the directory's path is too long", nothing, status).at(|path| path.join("x/".repeat(5000))),
    ];
    let mut cases: Vec<Case> = cases.into_iter().map(|case| case.says(says)).collect();
    let empty = |path: &Path| std::fs::create_dir(path.join("empty")).unwrap();
    let empty = case("the directory is empty", empty, Status::FileNotFound).at(|path| path.join("empty"));
    cases.push(empty.file(CONFIG).says(&["not found"]));
    cases
}

/// A weight file that describes more than memory holds and takes no room on disk.
fn large_files() -> Vec<Case> {
    const BYTES: u64 = 1 << 40;
    let probe = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(probe.path().join("probe")).unwrap();
    if file.set_len(BYTES).is_err() || gemmoe::memory::Buffer::<u8>::zeroed("a probe", BYTES as usize).is_ok() {
        println!("weights larger than memory: not tested, this system has no sparse files or gives any memory away");
        return Vec::new();
    }
    let weights = |path: &Path| {
        let sizes = serde_json::json!({
            "vocab_size": 1 << 23, "hidden_size": 1 << 16, "intermediate_size": 1, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "num_local_experts": 1,
            "num_experts_per_tok": 1
        });
        config(sizes.clone())(path);
        let layer = |rest: &str| format!("model.layers.0.{rest}.weight");
        let (hidden, rows) = (1u64 << 16, 1u64 << 23);
        let tensors = [
            ("model.embed_tokens.weight".to_owned(), vec![rows, hidden]),
            ("model.norm.weight".to_owned(), vec![hidden]),
            (layer("input_layernorm"), vec![hidden]),
            (layer("post_attention_layernorm"), vec![hidden]),
            (layer("self_attn.q_proj"), vec![2, hidden]),
            (layer("self_attn.k_proj"), vec![2, hidden]),
            (layer("self_attn.v_proj"), vec![2, hidden]),
            (layer("self_attn.o_proj"), vec![hidden, 2]),
            (layer("block_sparse_moe.gate"), vec![1, hidden]),
            (layer("block_sparse_moe.experts.0.w1"), vec![1, hidden]),
            (layer("block_sparse_moe.experts.0.w3"), vec![1, hidden]),
            (layer("block_sparse_moe.experts.0.w2"), vec![hidden, 1]),
        ];
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, shape) in tensors {
            let first = end;
            end += 2 * shape.iter().product::<u64>();
            header.insert(name, serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [first, end]}));
        }
        let header = serde_json::Value::Object(header).to_string();
        let start = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
        std::fs::write(path.join(WEIGHTS), &start).unwrap();
        let file = std::fs::File::options().write(true).open(path.join(WEIGHTS)).unwrap();
        file.set_len(start.len() as u64 + end).unwrap();
    };
    vec![case("the embedding is a tebibyte", weights, Status::OutOfMemory).says(&["model.embed_tokens.weight"])]
}

fn forbidden() -> Vec<Case> {
    let mut cases = Vec::new();
    for file in [CONFIG, WEIGHTS, TOKENIZER] {
        let break_it = move |path: &Path| {
            sparse(TOKENIZER, b"{}", 2)(path);
            set_mode(&path.join(file), 0);
        };
        cases.push(case(format!("{file} may not be read"), break_it, Status::ReadFailed).file(file));
    }
    let closed = |path: &Path| {
        std::fs::create_dir(path.join("closed")).unwrap();
        write_good(&path.join("closed"));
        set_mode(&path.join("closed"), 0);
    };
    cases.push(case("the directory may not be read", closed, Status::DirectoryNotFound).at(|path| path.join("closed")));
    cases
}

fn remove(file: &'static str) -> impl Fn(&Path) + Send {
    move |path| std::fs::remove_file(path.join(file)).unwrap()
}

fn socket(path: &Path) {
    let _ = std::fs::remove_file(path);
    drop(std::os::unix::net::UnixListener::bind(path).unwrap());
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn is_root() -> bool {
    // SAFETY: geteuid has no conditions.
    unsafe { libc::geteuid() == 0 }
}
