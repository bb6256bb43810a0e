//! cuBLAS where the machine has it, for the rate it reaches on a prompt's products. Nothing needs it.

use std::ffi::{CString, c_int, c_void};
use std::path::{Path, PathBuf};

use gemmoe::backend::cuda::bench::{BenchDevice, DeviceBlock};
use gemmoe::backend::device_bytes::DeviceBytes;

use super::Result;

/// The constants of cublas_api.h and library_types.h that are used.
const OP_NONE: c_int = 0;
const OP_TRANSPOSED: c_int = 1;
const BF16: c_int = 14;
const COMPUTE_F32: c_int = 68;
const DEFAULT_ALGORITHM: c_int = -1;

const NAMES: [&str; 4] = ["libcublas.so.13", "libcublas.so.12", "libcublas.so.11", "libcublas.so"];
/// Folders of Python's packages and of the toolkit, below what the user names, and where the toolkit is by itself.
const FOLDERS: [&str; 5] = ["", "nvidia/cublas/lib", "nvidia/cu13/lib", "lib64", "lib"];
const TOOLKIT: &str = "/usr/local/cuda";

type Create = unsafe extern "C" fn(*mut *mut c_void) -> c_int;
type SetStream = unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int;
type Destroy = unsafe extern "C" fn(*mut c_void) -> c_int;
/// handle, transa, transb, m, n, k, alpha, A, its type, lda, B, its type, ldb, beta, C, its type, ldc, compute, algorithm
type GemmEx = unsafe extern "C" fn(
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;

/// A handle of the library, on a device's stream.
pub struct Cublas {
    pub name: String,
    handle: *mut c_void,
    gemm: GemmEx,
    destroy: Destroy,
}

/// `out [tokens, rows] = x [tokens, columns] . weights [rows, columns]^T`, all in bf16.
pub struct Product<'a> {
    pub rows: usize,
    pub columns: usize,
    pub tokens: usize,
    pub weights: &'a DeviceBlock,
    pub x: &'a DeviceBlock,
    pub out: &'a DeviceBlock,
}

impl Cublas {
    /// None where there is no such library; one that the user names has to work.
    pub fn open(device: &BenchDevice, given: Option<&Path>) -> Result<Option<Cublas>> {
        let Some((library, name)) = find(given) else {
            return match given {
                Some(path) => Err(format!("there is no cuBLAS that can be loaded in {}", path.display()).into()),
                None => Ok(None),
            };
        };
        // SAFETY: cuBLAS's functions of these names have these signatures.
        let (create, set_stream, destroy, gemm) = unsafe {
            (
                std::mem::transmute::<*mut c_void, Create>(symbol(library, "cublasCreate_v2")?),
                std::mem::transmute::<*mut c_void, SetStream>(symbol(library, "cublasSetStream_v2")?),
                std::mem::transmute::<*mut c_void, Destroy>(symbol(library, "cublasDestroy_v2")?),
                std::mem::transmute::<*mut c_void, GemmEx>(symbol(library, "cublasGemmEx")?),
            )
        };
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one handle; the stream lives as long as the device, which outlives this.
        let status = device.within(|| unsafe {
            match create(&mut handle) {
                0 => set_stream(handle, device.stream()),
                status => status,
            }
        })?;
        match status {
            0 => Ok(Some(Cublas { name, handle, gemm, destroy })),
            // One that happens to be there may be for another driver.
            _ if given.is_none() => Ok(None),
            status => Err(format!("{name} does not start: status {status}").into()),
        }
    }

    /// Enqueues a product.
    pub fn multiply(&self, device: &BenchDevice, product: &Product) -> Result<()> {
        let Product { rows, columns, tokens, weights, x, out } = *product;
        assert!(2 * rows * columns <= weights.bytes() && 2 * tokens * columns <= x.bytes());
        assert!(2 * tokens * rows <= out.bytes());
        let (alpha, beta) = (1f32, 0f32);
        let [rows, columns, tokens] = [rows, columns, tokens].map(|size| size as c_int);
        // Its matrices are column by column: what is [rows, columns] here is transposed there.
        // SAFETY: the blocks have room for the sizes, and stay until the device was waited for.
        let status = device.within(|| unsafe {
            (self.gemm)(
                self.handle,
                OP_TRANSPOSED,
                OP_NONE,
                rows,
                tokens,
                columns,
                std::ptr::from_ref(&alpha).cast(),
                weights.address() as *const c_void,
                BF16,
                columns,
                x.address() as *const c_void,
                BF16,
                columns,
                std::ptr::from_ref(&beta).cast(),
                out.address() as *mut c_void,
                BF16,
                rows,
                COMPUTE_F32,
                DEFAULT_ALGORITHM,
            )
        })?;
        if status == 0 { Ok(()) } else { Err(format!("cublasGemmEx failed with status {status}").into()) }
    }

    /// Gives the handle back.
    pub fn close(self, device: &BenchDevice) -> Result<()> {
        // SAFETY: created by `open`, used no more.
        device.within(|| unsafe { (self.destroy)(self.handle) })?;
        Ok(())
    }
}

/// The library, loaded, and its name.
fn find(given: Option<&Path>) -> Option<(*mut c_void, String)> {
    let mut paths: Vec<PathBuf> = Vec::new();
    match given {
        Some(file) if file.is_file() => paths.push(file.to_owned()),
        Some(folder) => paths.extend(FOLDERS.iter().flat_map(|below| NAMES.map(|name| folder.join(below).join(name)))),
        None => {
            paths.extend(NAMES.map(PathBuf::from));
            paths.extend(NAMES.map(|name| Path::new(TOOLKIT).join("lib64").join(name)));
        }
    }
    paths.into_iter().find_map(|path| {
        if path.parent().is_some_and(|folder| !folder.as_os_str().is_empty()) {
            if !path.exists() {
                return None;
            }
            // What it needs is beside it, where nobody else looks.
            let beside = path.to_string_lossy().replace("libcublas.so", "libcublasLt.so");
            open(Path::new(&beside));
        }
        open(&path).map(|library| (library, path.display().to_string()))
    })
}

fn open(path: &Path) -> Option<*mut c_void> {
    let name = CString::new(path.to_str()?).ok()?;
    // SAFETY: loads NVIDIA's library, which is never unloaded.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    (!library.is_null()).then_some(library)
}

fn symbol(library: *mut c_void, name: &str) -> Result<*mut c_void> {
    let text = CString::new(name)?;
    // SAFETY: the library is open.
    let address = unsafe { libc::dlsym(library, text.as_ptr()) };
    if address.is_null() { Err(format!("cuBLAS has no {name}").into()) } else { Ok(address) }
}
