//! Mixing takes memory for a piece of a tensor, not for tensors or models.

mod common;
#[path = "common/counting.rs"]
mod counting;

use common::Directory;
use counting::peak_bytes;
use gemmoe::mix::{self, MixOptions, Recipe};
use gemmoe::{Progress, Result};
use serde_json::json;

#[test]
fn memory_is_that_of_a_piece_whatever_the_number_and_the_size_of_models() {
    let sizes = json!({"vocab_size": 30_000, "hidden_size": 512, "num_local_experts": 2});
    let directory = tempfile::tempdir().unwrap();
    for seed in 0..2 {
        let path = directory.path().join(seed.to_string());
        std::fs::create_dir(&path).unwrap();
        Directory::random_with(seed, sizes.clone()).write(&path);
    }
    let embedding = 30_000 * 512 * 2;
    let mut peaks = Vec::new();
    for count in [2, 12] {
        let experts: String = (0..count)
            .map(|index| format!("[[experts]]\nmodel = \"{}\"\nexpert = {}\n", index % 2, index / 2 % 2))
            .collect();
        let recipe = Recipe::parse(&experts, "recipe", directory.path()).unwrap();
        let target = directory.path().join("mixed");
        let options = MixOptions { threads: 1, ..Default::default() };
        let (result, peak) =
            peak_bytes(|| -> Result<()> { mix::mix(&recipe, &target, &options, &Progress::default()).map(drop) });
        result.unwrap();
        std::fs::remove_dir_all(&target).unwrap();
        peaks.push(peak);
    }
    println!("{peaks:?} bytes, one embedding is {embedding}");
    assert!(peaks[0] < 80_000_000 && peaks[1] < peaks[0] + 1_000_000, "{peaks:?}");
    assert!(peaks[1] < 2 * embedding, "{peaks:?}");
}
