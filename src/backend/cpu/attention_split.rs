//! How attention is shared out: ranges of positions, blocks of tokens, heads.

use std::ops::Range;

use super::kernels::attention::{MAX_ROWS, SPAN};
use crate::model::Config;

/// Multiply-adds of one item of few rows, which waits for memory: 0.1 to 0.2 milliseconds.
const ITEM_MULTIPLY_ADDS: usize = 1 << 20;
/// Multiply-adds of one item of many rows, which share what is read: as long.
const MAX_ITEM_MULTIPLY_ADDS: usize = 1 << 23;

/// Splits attention over one range of positions after the other into units, each a block of tokens and the query heads
/// that share a key-value head, or some of those heads; and the units into items.
pub struct AttentionSplit {
    /// Positions in a range, a multiple of SPAN.
    pub positions: usize,
    blocks: usize,
    heads_per_key: usize,
    heads_per_unit: usize,
    units: usize,
    units_per_item: usize,
}

impl AttentionSplit {
    /// Most tokens of a block.
    pub fn most_tokens(config: &Config) -> usize {
        (MAX_ROWS / (config.num_attention_heads / config.num_key_value_heads)).max(1)
    }

    /// For `blocks` of up to `tokens` tokens that look at up to `longest` positions. A unit is at most an item: of many
    /// rows one of MAX_ITEM_MULTIPLY_ADDS, since they share what is read from memory.
    pub fn new(config: &Config, blocks: usize, tokens: usize, longest: usize, threads: usize) -> AttentionSplit {
        let key_value_heads = config.num_key_value_heads;
        let heads_per_key = config.num_attention_heads / key_value_heads;
        // Where there are fewer key-value heads than threads, the query heads of one are shared out.
        let parts = threads.div_ceil((blocks * key_value_heads).max(1));
        let heads_per_unit = heads_per_key.div_ceil(parts).min(MAX_ROWS);
        let multiply_adds = 2 * config.head_dim * heads_per_unit * tokens.max(1);
        let has_many_rows = heads_per_unit * tokens > MAX_ROWS / 2;
        let most = if has_many_rows { MAX_ITEM_MULTIPLY_ADDS } else { ITEM_MULTIPLY_ADDS };
        let positions = (most / multiply_adds / SPAN).max(1) * SPAN;
        let units = blocks * key_value_heads * heads_per_key.div_ceil(heads_per_unit);
        // Small ones share an item, as long as every thread has one.
        let small = ITEM_MULTIPLY_ADDS / (multiply_adds * positions.min(longest.max(1)));
        let units_per_item = small.min(units.div_ceil(threads)).max(1);
        AttentionSplit { positions, blocks, heads_per_key, heads_per_unit, units, units_per_item }
    }

    /// Items of a range.
    pub fn items(&self) -> usize {
        self.units.div_ceil(self.units_per_item)
    }

    /// The units of an item.
    pub fn units_of(&self, item: usize) -> Range<usize> {
        item * self.units_per_item..((item + 1) * self.units_per_item).min(self.units)
    }

    /// A unit's block, key-value head and query heads. The blocks of a head follow each other: they read the same keys.
    pub fn parts_of(&self, unit: usize) -> (usize, usize, Range<usize>) {
        let (block, part) = (unit % self.blocks, unit / self.blocks);
        let parts = self.heads_per_key.div_ceil(self.heads_per_unit);
        let (key_value_head, part) = (part / parts, part % parts);
        let first = part * self.heads_per_unit;
        let heads = first..self.heads_per_key.min(first + self.heads_per_unit);
        let before = key_value_head * self.heads_per_key;
        (block, key_value_head, before + heads.start..before + heads.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(heads: usize, key_value_heads: usize, head_dim: usize) -> Config {
        let text = serde_json::json!({
            "model_type": "gemmoe", "vocab_size": 10, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": heads, "num_key_value_heads": key_value_heads, "head_dim": head_dim,
            "max_position_embeddings": 10_000, "num_local_experts": 1, "num_experts_per_tok": 1,
        });
        Config::from_json(text.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn every_head_of_every_block_is_in_one_unit_and_every_unit_in_one_item() {
        for (heads, key_value_heads) in [(16, 16), (8, 1), (12, 4), (64, 1), (5, 5)] {
            for (blocks, threads, longest) in [(1, 1, 1), (1, 7, 9000), (3, 2, 100), (22, 16, 5000)] {
                let config = config(heads, key_value_heads, 256);
                let tokens = AttentionSplit::most_tokens(&config);
                let split = AttentionSplit::new(&config, blocks, tokens, longest, threads);
                let mut taken = vec![0; blocks * heads];
                for unit in (0..split.items()).flat_map(|item| split.units_of(item)) {
                    let (block, key_value_head, heads_of_unit) = split.parts_of(unit);
                    assert!(heads_of_unit.len() * tokens <= MAX_ROWS);
                    for head in heads_of_unit {
                        assert_eq!(head / (heads / key_value_heads), key_value_head);
                        taken[block * heads + head] += 1;
                    }
                }
                assert_eq!(taken, vec![1; blocks * heads], "{heads} {key_value_heads} {blocks} {threads}");
                assert!(split.items() >= threads.min(blocks * heads) || split.units_per_item == 1);
            }
        }
    }

    #[test]
    fn no_unit_takes_longer_than_an_item() {
        for (heads, key_value_heads, head_dim) in [(16, 16, 256), (8, 1, 256), (6, 6, 32), (32, 8, 128)] {
            let config = config(heads, key_value_heads, head_dim);
            for tokens in 1..=AttentionSplit::most_tokens(&config) {
                let split = AttentionSplit::new(&config, 4, tokens, 9000, 2);
                let rows = tokens * (heads / key_value_heads);
                let multiply_adds = 2 * head_dim * rows * split.positions;
                let most = if rows > MAX_ROWS / 2 { MAX_ITEM_MULTIPLY_ADDS } else { ITEM_MULTIPLY_ADDS };
                assert!(split.positions.is_multiple_of(SPAN));
                assert!(multiply_adds <= most && 2 * multiply_adds >= most, "{rows} {} {most}", split.positions);
            }
        }
    }
}
