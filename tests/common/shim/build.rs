//! Builds the shim with all kernels: once per content, flags and compiler, in `target/tmp/shim`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use xxhash_rust::xxh3::Xxh3;

use super::checked::Check;

/// The library of all kernels, made of `kernels` as it is now; none without a C++ compiler, which it says.
pub fn library(check: Option<Check>) -> Option<PathBuf> {
    let Ok(version) = Command::new("c++").arg("--version").output() else {
        println!("no C++ compiler: kernels do not run on the CPU");
        return None;
    };
    // Tests of one binary, and several binaries, build at the same time.
    static BUILDING: Mutex<()> = Mutex::new(());
    let _turn = BUILDING.lock();
    let kernels = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("shim");
    std::fs::create_dir_all(&directory).unwrap();
    let texts = texts(&kernels);
    let compiler = Compiler { check, kernels, directory, version: version.stdout };

    // A source is compiled again where it or any header that it may include has changed; the shim includes its own.
    let (sources, headers): (Vec<_>, Vec<_>) =
        texts.iter().partition(|(path, _)| path.ends_with(".cu") || path.ends_with(".cpp"));
    let object = |source: (&String, &Vec<u8>)| {
        let may_include = |header: &str| source.0.ends_with(".cu") || header.starts_with("shim/");
        let headers = headers.iter().filter(|(path, _)| may_include(path)).copied();
        format!("{:016x}", compiler.hash(&headers.chain([source]).collect::<Vec<_>>()))
    };
    let objects: Vec<Source> =
        sources.iter().map(|source| Source { path: source.0, object: object(*source) }).collect();
    let all: Vec<_> = texts.iter().collect();
    let library = compiler.directory.join(format!("{:016x}", compiler.hash(&all)));
    let path = library.join("libcuda.so");
    if !path.exists() {
        compiler.compile(&objects);
        compiler.link(&objects, &library);
        remove_old(&compiler.directory);
    }
    Some(path)
}

/// Every source and header of kernels, by path below `directory`.
fn texts(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut texts = BTreeMap::new();
    let mut folders = vec![directory.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            if path.is_dir() {
                folders.push(path);
            } else if matches!(extension, Some("cu" | "cuh" | "h" | "hpp" | "cpp")) {
                let name = path.strip_prefix(directory).unwrap().to_str().unwrap().to_owned();
                texts.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    texts
}

/// For every file, and for linking.
fn flags(check: Option<Check>) -> Vec<&'static str> {
    // Kernels read memory as what they were told it is, whatever it was written as.
    let mut flags = vec!["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"];
    flags.extend(["-fno-strict-aliasing", "-Wall", "-Wextra", "-pthread"]);
    match check {
        None => flags.push("-O2"),
        Some(Check::Memory) => flags.extend(["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]),
        Some(Check::Races) => flags.extend(["-O1", "-DGEMMOE_SHIM_RACES"]),
    }
    // multiply_add is an instruction then, instead of a call.
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("fma") {
        flags.push("-mfma");
    }
    flags
}

struct Compiler {
    check: Option<Check>,
    kernels: PathBuf,
    directory: PathBuf,
    version: Vec<u8>,
}

struct Source<'a> {
    path: &'a str,
    /// Name of what it is compiled to.
    object: String,
}

impl Compiler {
    fn hash(&self, texts: &[(&String, &Vec<u8>)]) -> u64 {
        let mut hash = Xxh3::new();
        let flags = flags(self.check).join(" ");
        let parts = texts.iter().flat_map(|(path, text)| [path.as_bytes(), text]);
        for part in [flags.as_bytes(), &self.version].into_iter().chain(parts) {
            hash.update(&part.len().to_le_bytes());
            hash.update(part);
        }
        hash.digest()
    }

    fn object(&self, source: &Source) -> PathBuf {
        self.directory.join(format!("{}.o", source.object))
    }

    /// What is not there yet, on all processors.
    fn compile(&self, sources: &[Source]) {
        let missing = sources.iter().filter(|source| !self.object(source).exists()).collect();
        let missing: Mutex<Vec<&Source>> = Mutex::new(missing);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some(source) = { missing.lock().pop() } {
                        let mut command = Command::new("c++");
                        command.args(flags(self.check)).args(["-x", "c++", "-c"]).arg(self.kernels.join(source.path));
                        // The shim itself takes turns where this check expects locks.
                        if self.check == Some(Check::Races) && source.path.ends_with(".cu") {
                            command.arg("-fsanitize=thread");
                        }
                        self.make(command, &self.object(source));
                    }
                });
            }
        });
    }

    fn link(&self, sources: &[Source], library: &Path) {
        std::fs::create_dir_all(library).unwrap();
        let mut command = Command::new("c++");
        command.args(flags(self.check)).args(["-shared", "-Wl,-soname,libcuda.so", "-Wl,-z,defs"]);
        if self.check == Some(Check::Races) {
            command.arg("-fsanitize=thread");
        }
        command.args(sources.iter().map(|source| self.object(source)));
        self.make(command, &library.join("libcuda.so"));
    }

    /// Under another name first: whoever finds the file finds all of it.
    fn make(&self, mut command: Command, path: &Path) {
        let unfinished = tempfile::NamedTempFile::new_in(&self.directory).unwrap().into_temp_path();
        let output = command.arg("-o").arg(&unfinished).output().unwrap();
        assert!(output.status.success(), "{command:?}\n{}", super::checked::printed(&output));
        print!("{}", super::checked::printed(&output));
        unfinished.persist(path).unwrap();
    }
}

/// Objects and libraries of earlier contents, after three days.
fn remove_old(directory: &Path) {
    let oldest = SystemTime::now() - Duration::from_secs(3 * 24 * 60 * 60);
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let is_old = entry.metadata().and_then(|metadata| metadata.modified()).is_ok_and(|time| time < oldest);
        if is_old {
            // Another process may have removed it; whoever has it loaded keeps it.
            let _ = match entry.path().is_dir() {
                true => std::fs::remove_dir_all(entry.path()),
                false => std::fs::remove_file(entry.path()),
            };
        }
    }
}
