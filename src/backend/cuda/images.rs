//! The kernels' code as the library has it: of each file of `kernels/*.cu` PTX, which a driver compiles for its device, and
//! native code for the common ones, compressed by `build.rs`. A file is decompressed when it is loaded, into memory of the
//! size that the committed file has.

use miniz_oxide::inflate::decompress_slice_iter_to_slice;

use crate::error::{Error, Result, Status};
use crate::memory::Buffer;

/// What code is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Any device from compute capability 8.0 on.
    Ptx,
    /// 8.x, but for 8.7.
    Sm80,
    /// 9.0. These kernels alone wait for the grid before them, so they may be launched while it runs.
    Sm90a,
}

impl Target {
    /// Of the native code that a device of this compute capability runs, where there is any.
    pub fn native(capability: (u32, u32)) -> Option<Target> {
        match capability {
            // Tegra: native code is not shared with it.
            (8, 7) => None,
            (8, _) => Some(Target::Sm80),
            (9, 0) => Some(Target::Sm90a),
            _ => None,
        }
    }
}

/// Code as a driver takes it: a text that ends with a zero byte, or a file in ELF, which says itself how long it is.
pub struct Image(Buffer<u8>);

impl Image {
    /// Where it begins.
    pub fn as_ptr(&self) -> *const u8 {
        self.0.as_slice().as_ptr()
    }
}

#[cfg(feature = "bench")]
impl Image {
    /// A copy of a text in PTX.
    pub fn of_text(text: &std::ffi::CStr) -> Result<Image> {
        let bytes = text.to_bytes_with_nul();
        let mut image = Buffer::zeroed("the kernels' code", bytes.len())?;
        image.as_mut_slice().copy_from_slice(bytes);
        Ok(Image(image))
    }
}

/// A file of `kernels/*.cu`, for each target.
pub struct Code {
    /// Its name without the ending.
    pub name: &'static str,
    ptx: Compressed,
    sm_80: Compressed,
    sm_90a: Compressed,
}

impl Code {
    pub const fn new(name: &'static str, ptx: Compressed, sm_80: Compressed, sm_90a: Compressed) -> Code {
        Code { name, ptx, sm_80, sm_90a }
    }

    /// The code for a target. Fails with `OutOfMemory`, or `Internal` where what is embedded was damaged.
    pub fn image(&self, target: Target) -> Result<Image> {
        let compressed = match target {
            Target::Ptx => &self.ptx,
            Target::Sm80 => &self.sm_80,
            Target::Sm90a => &self.sm_90a,
        };
        compressed.decompress(self.name).map(Image)
    }
}

/// A zlib stream of a file, and the file's size.
pub struct Compressed {
    pub stream: &'static [u8],
    pub bytes: usize,
}

impl Compressed {
    /// The file and a zero byte.
    fn decompress(&self, name: &str) -> Result<Buffer<u8>> {
        let mut file = Buffer::zeroed("the kernels' code", self.bytes + 1)?;
        let place = &mut file.as_mut_slice()[..self.bytes];
        let damaged = |why| Error::new(Status::Internal, format!("the code of the kernels in \"{name}\" {why}"));
        match decompress_slice_iter_to_slice(place, std::iter::once(self.stream), true, false) {
            Ok(bytes) if bytes == self.bytes => Ok(file),
            Ok(bytes) => Err(damaged(format!("has {bytes} bytes, expected {}", self.bytes))),
            Err(error) => Err(damaged(format!("is damaged: {error:?}"))),
        }
    }
}

/// A file of `kernels/*.cu` by its name without the ending. Of the files themselves only the sizes stay.
macro_rules! generated {
    ($name:literal) => {
        generated!($name; concat!($name, ".ptx"), concat!("sm_80/", $name, ".cubin"), concat!("sm_90a/", $name, ".cubin"))
    };
    ($name:literal; $($path:expr),*) => {
        $crate::backend::cuda::images::Code::new($name, $($crate::backend::cuda::images::Compressed {
            stream: include_bytes!(concat!(env!("OUT_DIR"), "/kernels/", $path, ".zlib")),
            bytes: include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/generated/", $path)).len(),
        }),*)
    };
}

pub(super) use generated;

#[cfg(test)]
mod tests {
    use super::*;

    const NORM: Code = generated!("norm");
    const TARGETS: [(Target, &[u8]); 3] = [
        (Target::Ptx, include_bytes!("../../../kernels/generated/norm.ptx")),
        (Target::Sm80, include_bytes!("../../../kernels/generated/sm_80/norm.cubin")),
        (Target::Sm90a, include_bytes!("../../../kernels/generated/sm_90a/norm.cubin")),
    ];

    #[test]
    fn an_image_is_the_committed_file_and_a_zero_byte() {
        for (target, file) in TARGETS {
            let Image(image) = NORM.image(target).unwrap();
            assert!(image.as_slice().strip_suffix(&[0]) == Some(file), "{target:?}");
        }
    }

    #[test]
    fn a_device_runs_native_code_of_its_own_kind_and_ptx_where_there_is_none() {
        for minor in [0, 6, 8, 9] {
            assert_eq!(Target::native((8, minor)), Some(Target::Sm80));
        }
        assert_eq!(Target::native((9, 0)), Some(Target::Sm90a));
        for other in [(7, 5), (8, 7), (9, 1), (10, 0), (10, 3), (12, 0), (12, 1)] {
            assert_eq!(Target::native(other), None, "{other:?}");
        }
    }

    /// What decompressing this says.
    fn refused(stream: Vec<u8>, bytes: usize) -> String {
        let error = Compressed { stream: stream.leak(), bytes }.decompress("norm").err().unwrap();
        assert_eq!(error.status(), Status::Internal);
        error.to_string()
    }

    #[test]
    fn damaged_code_is_an_internal_error_that_names_its_file() {
        let (stream, bytes) = (NORM.sm_80.stream, NORM.sm_80.bytes);
        // From the header to the checksum; a single bit can be one that does not matter.
        for at in (0..stream.len() - 8).step_by(97).chain([stream.len() - 8]) {
            let mut damaged = stream.to_vec();
            damaged[at..at + 8].iter_mut().for_each(|byte| *byte ^= 0xa5);
            let text = refused(damaged, bytes);
            assert!(text.contains("\"norm\" is damaged"), "byte {at}: {text}");
        }
        for length in [0, 1, 2, stream.len() / 2, stream.len() - 1] {
            assert!(refused(stream[..length].to_vec(), bytes).contains("\"norm\" is damaged"), "{length} bytes");
        }
    }

    #[test]
    fn code_that_is_longer_or_shorter_than_its_file_is_an_internal_error() {
        let (stream, bytes) = (NORM.ptx.stream, NORM.ptx.bytes);
        assert!(refused(stream.to_vec(), bytes - 1).contains("HasMoreOutput"));
        let text = refused(stream.to_vec(), bytes + 1);
        assert_eq!(text, format!("the code of the kernels in \"norm\" has {bytes} bytes, expected {}", bytes + 1));
    }
}
