//! Small tokenizers and random numbers for the tests of this module.

use serde_json::{Map, Value, json};

/// A small, fixed, good enough generator: tests must not differ from run to run.
pub struct Random(u64);

impl Random {
    /// The generator of this seed.
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `limit`, or 0.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit.max(1)
    }
}

/// The rows of the embedding the sample is for: more than it has tokens, as a padded embedding has.
pub const VOCAB_SIZE: usize = 400;

/// A tokenizer file of Gemma's shape. As in Gemma's, the tab has no byte token but a piece, and the first ids are
/// special; merges make `▁hello`, `▁▁`, `\n\n` and halves of `<bos>` that never meet.
pub fn sample() -> Value {
    let mut pieces: Vec<String> = ["<pad>", "<eos>", "<bos>", "<unk>"].map(String::from).to_vec();
    pieces.extend(["<start_of_turn>", "<end_of_turn>", "<b>", "\n", "\n\n"].map(String::from));
    pieces.extend((0..=255u8).filter(|byte| *byte != b'\t').map(|byte| format!("<0x{byte:02X}>")));
    pieces.extend("\t▁helo<bs>t_é".chars().map(String::from));
    let merges = ["▁ h", "▁h e", "l l", "▁he ll", "▁hell o", "▁ ▁", "\n \n", "b o", "bo s", "< bos", "bos >", "o s"];
    let mut products: Vec<String> = merges.iter().map(|merge| merge.replace(' ', "")).collect();
    products.retain(|product| !pieces.contains(product));
    pieces.extend(products);
    let vocabulary: Map<String, Value> =
        pieces.iter().enumerate().map(|(id, piece)| (piece.clone(), json!(id))).collect();
    let added = |id: usize, special: bool| {
        json!({
            "id": id, "content": pieces[id], "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special,
        })
    };
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": (0..9).map(|id| added(id, id < 6)).collect::<Vec<_>>(),
        "normalizer": replace(" ", "▁"),
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false
        },
        "post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
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
