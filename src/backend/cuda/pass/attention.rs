//! Queries, keys and values, attention, and its output projection.

use super::{BLOCKS_PER_MULTIPROCESSOR, CudaPass};
use crate::backend::cuda::arguments::*;
use crate::backend::cuda::context::Current;
use crate::backend::cuda::driver::Address;
use crate::backend::cuda::workspace::{SPLIT_TOKENS, at, spans_of};
use crate::backend::kv::PAGE_TOKENS;
use crate::error::Result;

/// Parts of the context that attention is split into, each a block of its own: where tokens and heads alone are too few to keep
/// the device busy.
fn splits_of(tokens: usize, heads: usize, longest: usize, multiprocessors: usize) -> usize {
    if tokens == 0 || tokens > SPLIT_TOKENS {
        return 1;
    }
    let wanted = (BLOCKS_PER_MULTIPROCESSOR * multiprocessors).div_ceil(tokens * heads);
    wanted.clamp(1, spans_of(longest).max(1))
}

impl CudaPass {
    pub(super) fn cache(&self) -> CacheArguments {
        let config = &self.shared.config;
        CacheArguments {
            pages: at(self.batch_part(&self.workspace.layout.pages)),
            layers: config.num_hidden_layers as u32,
            key_value_heads: config.num_key_value_heads as u32,
            head_dim: config.head_dim as u32,
            page_tokens: PAGE_TOKENS as u32,
        }
    }

    pub(super) fn project_and_store(&self, current: &Current, layer: usize) -> Result<()> {
        let (parts, shared) = (&self.workspace.parts, &self.shared);
        let (config, weights, tokens) = (&shared.config, &shared.weights.layers[layer], self.shape.tokens);
        let matrices = [&weights.query, &weights.key, &weights.value];
        let wanted = self.wanted(matrices.into_iter(), tokens);
        self.norm(current, &weights.input_norm, 0, tokens, wanted)?;
        let products = [
            (&weights.query, parts.query, config.query_size()),
            (&weights.key, parts.key, config.key_value_size()),
            (&weights.value, parts.value, config.key_value_size()),
        ];
        self.multiply(current, &products, parts.normed.arguments(0), (tokens, wanted), false)?;
        let arguments = RotateArguments {
            query: at(parts.query),
            key: at(parts.key),
            value: at(parts.value),
            frequencies: at(shared.weights.rotary_frequencies),
            places: at(self.batch_part(&self.workspace.layout.places)),
            cache: self.cache(),
            layer: layer as u32,
            heads: config.num_attention_heads as u32,
        };
        // SAFETY: as in `norm`; the pages are the batch's, which has them all and alone.
        unsafe { shared.kernels.rotate_and_store.launch(current, [tokens, 1, 1], &arguments) }
    }

    pub(super) fn attend(&self, current: &Current, layer: usize) -> Result<()> {
        let (parts, shared) = (&self.workspace.parts, &self.shared);
        let (config, kernels, tokens) = (&shared.config, &shared.kernels, self.shape.tokens);
        let (heads, layout) = (config.num_attention_heads, &self.workspace.layout);
        let (tiles, apart) = (&self.shape.tiles, self.shape.apart);
        let multiprocessors = shared.device.multiprocessors();
        // A graph is for all contexts to come.
        let longest = if self.stream.is_recording() { self.limits.max_context } else { self.shape.longest };
        let splits = splits_of(apart, heads, longest, multiprocessors);
        let is_split = splits > 1;
        let arguments = AttentionArguments {
            query: at(parts.query),
            places: at(self.batch_part(&layout.places)),
            index: at(if apart < tokens { self.batch_part(&layout.apart) } else { 0 }),
            tiles: std::ptr::null(),
            cache: self.cache(),
            partial: at(if is_split { parts.partial } else { 0 }),
            attended: at(parts.attended.numbers),
            stride: parts.attended.stride as u32,
            spans: if is_split { spans_of(self.limits.max_context) as u32 } else { 0 },
            layer: layer as u32,
            heads: heads as u32,
        };
        for (kernel, tiles) in kernels.attention_tensor.iter().zip(tiles).filter(|(_, tiles)| !tiles.is_empty()) {
            let first = self.batch_part(&layout.tiles) + (tiles.start * size_of::<TileArguments>()) as Address;
            let arguments = AttentionArguments { tiles: at(first), ..arguments };
            // SAFETY: as in `norm`; tiles are of this batch's tokens, whose sequences have the kernel's dtype.
            unsafe { kernel.launch(current, [heads, tiles.len(), 1], &arguments) }?;
        }
        if apart > 0 {
            // SAFETY: as above; `partial` has room for all spans of a context where tokens are few enough to be split.
            unsafe { kernels.attention.launch(current, [apart, heads, splits], &arguments) }?;
        }
        if is_split {
            // SAFETY: as above.
            unsafe { kernels.attention_merge.launch(current, [apart, heads, 1], &arguments) }?;
        }
        let output = &shared.weights.layers[layer].output;
        let wanted = self.wanted(std::iter::once(output), tokens);
        self.round(current, &parts.attended, tokens, 0, wanted)?;
        let product = [(output, parts.x, config.hidden_size)];
        self.multiply(current, &product, parts.attended.arguments(0), (tokens, wanted), true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_is_split_where_blocks_are_few_and_spans_are_many() {
        // (tokens, positions) and the splits of 16 heads on 132 multiprocessors.
        for (tokens, longest, splits) in [(1, 1, 1), (1, 256, 1), (1, 257, 2), (1, 8192, 32), (1, 100_000, 33)] {
            assert_eq!(splits_of(tokens, 16, longest, 132), splits, "{tokens} tokens, {longest} positions");
        }
        for (tokens, longest, splits) in [(4, 8192, 9), (16, 8192, 3), (17, 8192, 1), (512, 8192, 1), (0, 8192, 1)] {
            assert_eq!(splits_of(tokens, 16, longest, 132), splits, "{tokens} tokens, {longest} positions");
        }
    }
}
