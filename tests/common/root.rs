//! Where the repository is.

use std::path::PathBuf;

/// The repository these tests were built in; where they have been taken elsewhere, `GEMMOE_TEST_ROOT` names a folder with
/// what they read of it, under the same paths (`tools/gpu/bundle.py` makes one).
pub fn repository() -> PathBuf {
    std::env::var_os("GEMMOE_TEST_ROOT").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from)
}
