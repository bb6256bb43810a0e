//! Keeps the C functions of dependencies out of the shared library: it exports its own and nothing else. And compresses the
//! kernels' code, for `src/backend/cuda/images.rs` to embed.

use std::fs;
use std::path::Path;

use miniz_oxide::deflate::compress_to_vec_zlib;

/// The smallest result there is; a few seconds, whenever kernels change.
const LEVEL: u8 = 10;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,--exclude-libs,ALL");
    }
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        println!("cargo::rerun-if-changed=kernels/generated");
        let out = std::env::var_os("OUT_DIR").expect("cargo names a folder for results");
        compress_all(Path::new("kernels/generated"), &Path::new(&out).join("kernels"));
    }
}

/// Every file of a folder, and of those in it, to one of the same name with `.zlib` after it.
fn compress_all(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("the folder for results can be written to");
    for entry in fs::read_dir(from).expect("kernels/generated is in the repository") {
        let path = entry.expect("kernels/generated can be read").path();
        let name = path.file_name().expect("a file has a name").to_str().expect("and a plain one");
        if path.is_dir() {
            compress_all(&path, &to.join(name));
        } else {
            let code = fs::read(&path).expect("kernels/generated can be read");
            let compressed = compress_to_vec_zlib(&code, LEVEL);
            fs::write(to.join(format!("{name}.zlib")), compressed).expect("the folder for results can be written to");
        }
    }
}
