//! A small tokenizer.json of the shape Gemma's has, for an embedding of at least `VOCAB_SIZE` rows.

use serde_json::{Map, Value, json};

/// Rows of the embedding the sample is for: more than it has pieces, as a padded embedding has.
pub const VOCAB_SIZE: usize = 320;

/// Special tokens, one token for every byte, a few characters, and merges up to `▁hello`.
pub fn sample() -> Value {
    let mut pieces: Vec<String> = ["<pad>", "<eos>", "<bos>", "<unk>"].map(String::from).to_vec();
    pieces.extend(["<start_of_turn>", "<end_of_turn>"].map(String::from));
    pieces.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    pieces.extend("▁helo".chars().map(String::from));
    let merges = ["▁ h", "▁h e", "l l", "▁he ll", "▁hell o"];
    pieces.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let vocabulary: Map<String, Value> =
        pieces.iter().enumerate().map(|(id, piece)| (piece.clone(), json!(id))).collect();
    let added = |id: usize| {
        json!({
            "id": id, "content": pieces[id], "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": (0..6).map(added).collect::<Vec<_>>(),
        "normalizer": replace(" ", "▁"),
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}
        ]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary, "merges": merges,
        },
    })
}
