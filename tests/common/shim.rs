//! The SIMT shim (`kernels/shim`): a CUDA driver that runs the kernels on the CPU. It is built once per content, and loaded
//! before the library looks for `libcuda.so`, so that the library finds this one.
//!
//! ```ignore
//! let Some(shim) = Shim::take() else { return }; // no C++ compiler; says so
//! shim.fail(7, 719);                             // the seventh call from now on
//! let model = Model::load(...);
//! assert_eq!(shim.live_allocations(), 0);
//! ```
#![allow(dead_code)] // Each test file uses its own part.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use parking_lot::{Mutex, MutexGuard};
use xxhash_rust::xxh3::Xxh3;

/// The order in which lanes, warps and blocks run where nothing makes one wait for another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Order {
    Forward,
    Reverse,
    Random(u64),
}

/// Orders that results must not depend on.
pub const ORDERS: [Order; 4] = [Order::Forward, Order::Reverse, Order::Random(1), Order::Random(2)];

/// The loaded driver, for one test at a time: what it is told holds for the whole process.
pub struct Shim {
    loaded: &'static Loaded,
    _turn: MutexGuard<'static, ()>,
}

impl Shim {
    /// Waits for its turn; controls and counters are as in the beginning, work is deferred. None without a C++ compiler.
    pub fn take() -> Option<Shim> {
        static TURN: Mutex<()> = Mutex::new(());
        static LOADED: OnceLock<Option<Loaded>> = OnceLock::new();
        let turn = TURN.lock();
        let loaded = LOADED.get_or_init(|| Some(Loaded::open(&build(Flavour::of_this_process())?))).as_ref()?;
        let shim = Shim { loaded, _turn: turn };
        // SAFETY: the functions have these signatures in kernels/shim/controls.cpp, and the library is never closed.
        unsafe { (shim.loaded.reset)() };
        shim.deferred(true);
        Some(shim)
    }

    /// The `nth` driver call from now on (1 is the next one) fails with a status. After 700, 719, 999 and their like every
    /// later call in the context fails too; frees still free.
    pub fn fail(&self, nth: u64, status: i32) {
        // SAFETY: as in `take`; so in all functions below.
        unsafe { (self.loaded.fail)(nth, status) }
    }

    pub fn order(&self, order: Order) {
        let (kind, seed) = match order {
            Order::Forward => (0, 0),
            Order::Reverse => (1, 0),
            Order::Random(seed) => (2, seed),
        };
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.order)(kind, seed) }
    }

    /// Whether streams work only when somebody waits for them, or at once.
    pub fn deferred(&self, deferred: bool) {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.deferred)(deferred.into()) }
    }

    /// 0 to 8, say; cuInit fails where there are none.
    pub fn device_count(&self, count: i32) {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.device_count)(count) }
    }

    /// 12010 for 12.1, which takes PTX up to 8.1.
    pub fn driver_version(&self, version: i32) {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.driver_version)(version) }
    }

    /// 80 for 8.0.
    pub fn compute_capability(&self, capability: i32) {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.compute_capability)(capability) }
    }

    /// Bytes of each device; allocations past it fail with 2.
    pub fn total_memory(&self, bytes: usize) {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.total_memory)(bytes) }
    }

    /// Driver calls since the shim was taken.
    pub fn calls(&self) -> u64 {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.calls)() }
    }

    /// Launches of kernels since the shim was taken; those in a graph count once, when it is captured.
    pub fn launches(&self) -> u64 {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.launches)() }
    }

    /// Device memory and pinned memory.
    pub fn live_allocations(&self) -> u64 {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.live_allocations)() }
    }

    /// Contexts, modules, streams, events and graphs.
    pub fn live_objects(&self) -> u64 {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.live_objects)() }
    }

    /// Why the last call that failed did, or what a kernel did wrong, with kernel, block and thread.
    pub fn last_error_text(&self) -> String {
        // SAFETY: as in `fail`; the text stays until this thread asks again.
        unsafe { CStr::from_ptr((self.loaded.last_error_text)()) }.to_string_lossy().into_owned()
    }

    /// A function of the driver.
    pub fn symbol(&self, name: &str) -> *mut c_void {
        symbol(self.loaded.library, name)
    }
}

struct Loaded {
    library: *mut c_void,
    fail: unsafe extern "C" fn(u64, c_int),
    order: unsafe extern "C" fn(c_int, u64),
    deferred: unsafe extern "C" fn(c_int),
    device_count: unsafe extern "C" fn(c_int),
    driver_version: unsafe extern "C" fn(c_int),
    compute_capability: unsafe extern "C" fn(c_int),
    total_memory: unsafe extern "C" fn(usize),
    calls: unsafe extern "C" fn() -> u64,
    launches: unsafe extern "C" fn() -> u64,
    live_allocations: unsafe extern "C" fn() -> u64,
    live_objects: unsafe extern "C" fn() -> u64,
    last_error_text: unsafe extern "C" fn() -> *const c_char,
    reset: unsafe extern "C" fn(),
}

// SAFETY: addresses of functions, which any thread may call.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Loaded {
    fn open(path: &Path) -> Loaded {
        let name = CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: the library was built from kernels/shim; its initialisers only fill the list of kernels.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        assert!(!library.is_null(), "{} cannot be loaded", path.display());
        macro_rules! control {
            ($name:literal) => {
                // SAFETY: a function's address; kernels/shim/controls.cpp has its signature.
                unsafe { std::mem::transmute(symbol(library, concat!("gemmoe_shim_", $name))) }
            };
        }
        Loaded {
            library,
            fail: control!("fail"),
            order: control!("order"),
            deferred: control!("deferred"),
            device_count: control!("device_count"),
            driver_version: control!("driver_version"),
            compute_capability: control!("compute_capability"),
            total_memory: control!("total_memory"),
            calls: control!("calls"),
            launches: control!("launches"),
            live_allocations: control!("live_allocations"),
            live_objects: control!("live_objects"),
            last_error_text: control!("last_error_text"),
            reset: control!("reset"),
        }
    }
}

fn symbol(library: *mut c_void, name: &str) -> *mut c_void {
    let c_name = CString::new(name).unwrap();
    // SAFETY: the library is open.
    let address = unsafe { libc::dlsym(library, c_name.as_ptr()) };
    assert!(!address.is_null(), "the shim has no {name}");
    address
}

/// Says which flavour a child is to load.
const FLAVOUR_VARIABLE: &str = "GEMMOE_SHIM_FLAVOUR";

#[derive(Clone, Copy, Debug, PartialEq)]
enum Flavour {
    Plain,
    /// With AddressSanitizer and UndefinedBehaviorSanitizer.
    Sanitized,
}

impl Flavour {
    fn of_this_process() -> Flavour {
        let is_sanitized = std::env::var_os(FLAVOUR_VARIABLE).is_some_and(|value| value == "sanitized");
        if is_sanitized { Flavour::Sanitized } else { Flavour::Plain }
    }
}

/// Runs a test of this binary in a child where kernels are compiled with sanitizers; it has to pass.
pub fn run_sanitized(test: &str) {
    let Some(output) = sanitized(test) else { return };
    let printed = printed(&output);
    assert!(output.status.success(), "{test} under sanitizers: {}\n{printed}", output.status);
    assert!(printed.contains("test result: ok. 1 passed"), "{test} is no test\n{printed}");
}

/// The same of a test that sanitizers have to stop, with these words.
pub fn is_stopped_by_sanitizers(test: &str, words: &str) {
    let Some(output) = sanitized(test) else { return };
    let printed = printed(&output);
    assert!(!output.status.success() && printed.contains(words), "{test}: no {words:?} in\n{printed}");
}

fn printed(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn sanitized(test: &str) -> Option<Output> {
    build(Flavour::Sanitized)?;
    let library = Command::new("c++").arg("-print-file-name=libasan.so").output().unwrap();
    let library = String::from_utf8(library.stdout).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    // Ignored ones too: those that only make sense here.
    child.args(["--exact", test, "--nocapture", "--include-ignored"]);
    // Rust's own threads and the test harness are not to be judged.
    child.env("ASAN_OPTIONS", "detect_leaks=0").env("LD_PRELOAD", library.trim()).env(FLAVOUR_VARIABLE, "sanitized");
    Some(child.output().unwrap())
}

/// The library of all kernels, made of `kernels` as it is now; none without a C++ compiler, which it says.
fn build(flavour: Flavour) -> Option<PathBuf> {
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
    let compiler = Compiler { flags: flags(flavour), kernels, directory, version: version.stdout };

    // A source is compiled again where it or any header has changed.
    let (sources, headers): (Vec<_>, Vec<_>) =
        texts.iter().partition(|(path, _)| path.ends_with(".cu") || path.ends_with(".cpp"));
    let shared = compiler.hash(&headers);
    let objects: Vec<Source> = sources
        .iter()
        .map(|source| Source { path: source.0, object: format!("{shared:016x}-{:016x}", compiler.hash(&[*source])) })
        .collect();
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

fn flags(flavour: Flavour) -> Vec<&'static str> {
    // Kernels read memory as what they were told it is, whatever it was written as.
    let mut flags = vec!["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"];
    flags.extend(["-fno-strict-aliasing", "-Wall", "-Wextra", "-pthread"]);
    match flavour {
        Flavour::Plain => flags.push("-O2"),
        Flavour::Sanitized => flags.extend(["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]),
    }
    // multiply_add is an instruction then, instead of a call.
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("fma") {
        flags.push("-mfma");
    }
    flags
}

struct Compiler {
    flags: Vec<&'static str>,
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
        let flags = self.flags.join(" ");
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
                        command.args(&self.flags).args(["-x", "c++", "-c"]).arg(self.kernels.join(source.path));
                        self.make(command, &self.object(source));
                    }
                });
            }
        });
    }

    fn link(&self, sources: &[Source], library: &Path) {
        std::fs::create_dir_all(library).unwrap();
        let mut command = Command::new("c++");
        command.args(&self.flags).args(["-shared", "-Wl,-soname,libcuda.so", "-Wl,-z,defs"]);
        command.args(sources.iter().map(|source| self.object(source)));
        self.make(command, &library.join("libcuda.so"));
    }

    /// Under another name first: whoever finds the file finds all of it.
    fn make(&self, mut command: Command, path: &Path) {
        let unfinished = tempfile::NamedTempFile::new_in(&self.directory).unwrap().into_temp_path();
        let output = command.arg("-o").arg(&unfinished).output().unwrap();
        assert!(output.status.success(), "{command:?}\n{}", printed(&output));
        print!("{}", printed(&output));
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
