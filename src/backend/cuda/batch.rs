//! What a batch is, as kernels see it: one block of memory, filled by the host and copied to the device at once.

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;

use super::arguments::{PlaceArguments, TileArguments};
use super::kernels::{ATTENTION_TILE, FEWEST_TILED_TOKENS, MAX_TENSOR_HEAD_DIM};
use crate::backend::kv::{KvDtype, KvGeometry, PAGE_TOKENS, shared_page};
use crate::backend::logits::LogitsPlace;
use crate::backend::ops::{Batch, NO_TARGET, PassLimits, every_expert};
use crate::error::{Error, Result, Status};
use crate::memory::{Plain, try_with_capacity, view_mut};
use crate::model::Config;

/// Parts begin at a multiple of this.
const ALIGNMENT: usize = 64;

/// Where each part of the block is, in bytes. Places are the same for every batch of a pass; the longest part is last, so
/// that only what is used of it is copied.
#[derive(Debug)]
pub struct BatchLayout {
    /// `[max_tokens]` u32: ids.
    pub tokens: Range<usize>,
    /// `[max_tokens]` PlaceArguments.
    pub places: Range<usize>,
    /// `[max_tokens + max_sequences]` u32: tokens with a target, then those whose logits are wanted.
    pub rows: Range<usize>,
    /// `[max_tokens]` u32: targets, of the tokens that have one.
    pub targets: Range<usize>,
    /// `[most_tiles(max_tokens)]` TileArguments: slices whose attention is made on tensor cores.
    pub tiles: Range<usize>,
    /// `[max_tokens]` u32: the tokens of other slices, where there are tiles.
    pub apart: Range<usize>,
    /// `[max_sequences]` u64: where logits that are wanted go.
    pub logits: Range<usize>,
    /// `[max_sequences, layers]` u64.
    pub allowed: Range<usize>,
    /// `[max_sequences, layers, experts]` f32.
    pub bias: Range<usize>,
    /// `[max_sequences * pages of max_context]` u64: the page table.
    pub pages: Range<usize>,
}

impl BatchLayout {
    /// For batches of these limits; products that are too large are `OutOfMemory`.
    pub fn new(config: &Config, limits: &PassLimits) -> Result<BatchLayout> {
        let mut end = 0usize;
        let mut part = |factors: &[usize], size: usize| -> Result<Range<usize>> {
            let too_large = || Error::out_of_memory("a batch", usize::MAX);
            let bytes =
                factors.iter().try_fold(size, |bytes, factor| bytes.checked_mul(*factor)).ok_or_else(too_large)?;
            let range = end..end.checked_add(bytes).ok_or_else(too_large)?;
            end = range.end.checked_next_multiple_of(ALIGNMENT).ok_or_else(too_large)?;
            Ok(range)
        };
        let PassLimits { max_tokens, max_sequences, max_context, .. } = *limits;
        let (layers, experts) = (config.num_hidden_layers, config.num_local_experts);
        Ok(BatchLayout {
            tokens: part(&[max_tokens], 4)?,
            places: part(&[max_tokens], size_of::<PlaceArguments>())?,
            rows: part(&[max_tokens.saturating_add(max_sequences)], 4)?,
            targets: part(&[max_tokens], 4)?,
            tiles: part(&[most_tiles(max_tokens)], size_of::<TileArguments>())?,
            apart: part(&[max_tokens], 4)?,
            logits: part(&[max_sequences], 8)?,
            allowed: part(&[max_sequences, layers], 8)?,
            bias: part(&[max_sequences, layers, experts], 4)?,
            pages: part(&[max_sequences, KvGeometry::pages_for(max_context)], 8)?,
        })
    }

    /// Bytes of the whole block.
    pub fn bytes(&self) -> usize {
        self.pages.end
    }
}

/// Tiles that so many tokens may have: most in slices of the fewest tokens that have one.
fn most_tiles(tokens: usize) -> usize {
    tokens / FEWEST_TILED_TOKENS
}

/// What the host keeps of a batch.
#[derive(Debug, Default)]
pub struct BatchShape {
    /// Whether attention may be made on tensor cores.
    takes_tiles: bool,
    /// Tiles of this batch: of a dtype those that see most positions first, as they take longest.
    cut: Vec<TileArguments>,
    /// Where in them are those of bf16, f16 and int8.
    pub tiles: [Range<usize>; 3],
    /// Tokens that are in none.
    pub apart: usize,
    /// Tokens of all sequences.
    pub tokens: usize,
    /// Positions of the sequence that has most, this batch's included.
    pub longest: usize,
    /// Tokens that have a target, in rising order.
    pub scored: Vec<u32>,
    /// The row of logits each sequence gets, where it wants them.
    pub logit_rows: Vec<Option<u32>>,
    /// How many do.
    pub wanted: usize,
    /// Bytes of the block that are used.
    pub bytes: usize,
}

/// The number kernels know a dtype of keys and values by.
fn kv_dtype_number(dtype: KvDtype) -> u32 {
    match dtype {
        KvDtype::F32 => 0,
        KvDtype::Bf16 => 1,
        KvDtype::F16 => 2,
        KvDtype::Int8 => 3,
    }
}

fn elements<'a, T: Plain>(block: &'a mut [u8], range: &Range<usize>) -> &'a mut [T] {
    view_mut(&mut block[range.clone()])
}

impl BatchShape {
    /// One with room for batches of these limits.
    pub fn new(config: &Config, limits: &PassLimits, exact: bool) -> Result<BatchShape> {
        // Of other sizes rows are not whole units of sixteen bytes, or too many for registers.
        let takes_tiles = !exact && config.head_dim.is_multiple_of(8) && config.head_dim <= MAX_TENSOR_HEAD_DIM;
        let cut = try_with_capacity("a batch", most_tiles(limits.max_tokens))?;
        let scored = try_with_capacity("a batch", limits.max_tokens)?;
        let logit_rows = try_with_capacity("a batch", limits.max_sequences)?;
        Ok(BatchShape { takes_tiles, cut, scored, logit_rows, ..Default::default() })
    }

    /// Takes in a batch that was checked, and writes it into `block`, which has the layout's bytes. Fails with `Internal`
    /// for pages that are not on a device.
    pub fn fill(&mut self, batch: &Batch, config: &Config, layout: &BatchLayout, block: &mut [u8]) -> Result<()> {
        let (layers, experts) = (config.num_hidden_layers, config.num_local_experts);
        self.tokens = 0;
        self.longest = 0;
        self.scored.clear();
        self.logit_rows.clear();
        self.wanted = 0;
        let mut page_count = 0;
        for (index, sequence) in batch.sequences.iter().enumerate() {
            let (first, count) = (self.tokens, sequence.tokens.len());
            let end = sequence.start + count;
            let tokens = elements::<u32>(block, &layout.tokens);
            tokens[first..first + count].copy_from_slice(sequence.tokens);
            let kv_dtype = sequence.pages.first().map_or(0, |page| kv_dtype_number(page.geometry().dtype));
            let places = elements::<u32>(block, &layout.places);
            for (place, position) in places.as_chunks_mut().0[first..first + count].iter_mut().zip(sequence.start..) {
                let place_of = PlaceArguments {
                    position: position as u32,
                    sequence: index as u32,
                    first_page: page_count as u32,
                    kv_dtype,
                };
                *place = place_words(place_of);
            }
            for (at, target) in sequence.targets.iter().enumerate().filter(|(_, target)| **target != NO_TARGET) {
                let row = self.scored.len();
                self.scored.push((first + at) as u32);
                elements::<u32>(block, &layout.rows)[row] = (first + at) as u32;
                elements::<u32>(block, &layout.targets)[row] = *target;
            }
            let allowed = &mut elements::<u64>(block, &layout.allowed)[index * layers..(index + 1) * layers];
            match &sequence.router {
                Some(router) => allowed.copy_from_slice(router.allowed),
                None => allowed.fill(every_expert(experts)),
            }
            let range = index * layers * experts..(index + 1) * layers * experts;
            let bias = &mut elements::<f32>(block, &layout.bias)[range];
            match &sequence.router {
                Some(router) => bias.copy_from_slice(router.bias),
                None => bias.fill(0.0),
            }
            let pages = elements::<u64>(block, &layout.pages);
            for page in &sequence.pages[..KvGeometry::pages_for(end)] {
                let elsewhere = || Error::new(Status::Internal, "a page of a batch is not in the device's memory");
                pages[page_count] = page.device_address().ok_or_else(elsewhere)?;
                page_count += 1;
            }
            self.tokens += count;
            self.longest = self.longest.max(end);
        }
        let mut last = 0;
        for sequence in batch.sequences.iter() {
            last += sequence.tokens.len() as u32;
            self.logit_rows.push(sequence.logits.map(|_| self.wanted as u32));
            if let Some(place) = sequence.logits {
                let LogitsPlace::Device(address) = place else {
                    return Err(Error::new(Status::Internal, "logits are wanted outside of the device's memory"));
                };
                // Behind the rows of tokens with targets.
                elements::<u32>(block, &layout.rows)[self.scored.len() + self.wanted] = last - 1;
                elements::<u64>(block, &layout.logits)[self.wanted] = address;
                self.wanted += 1;
            }
        }
        self.bytes = layout.pages.start + page_count * size_of::<u64>();
        self.cut_tiles(batch, layout, block);
        Ok(())
    }

    /// Cuts slices of many tokens into tiles, and lists the tokens of the others.
    fn cut_tiles(&mut self, batch: &Batch, layout: &BatchLayout, block: &mut [u8]) {
        self.cut.clear();
        self.apart = 0;
        let mut first = 0;
        for sequence in batch.sequences.iter() {
            let count = sequence.tokens.len();
            let is_f32 = sequence.pages.first().is_none_or(|page| page.geometry().dtype == KvDtype::F32);
            if self.takes_tiles && count >= FEWEST_TILED_TOKENS && !is_f32 {
                self.cut.extend((0..count).step_by(ATTENTION_TILE).map(|begin| TileArguments {
                    first: (first + begin) as u32,
                    count: ATTENTION_TILE.min(count - begin) as u32,
                }));
            } else {
                let apart = &mut elements::<u32>(block, &layout.apart)[self.apart..self.apart + count];
                apart.iter_mut().zip(first as u32..).for_each(|(place, token)| *place = token);
                self.apart += count;
            }
            first += count;
        }
        let places = elements::<u32>(block, &layout.places).as_chunks::<4>().0;
        let place_of = |tile: &TileArguments| places[tile.first as usize];
        let dtype_of = |tile: &TileArguments| place_of(tile)[3];
        self.cut.sort_unstable_by_key(|tile| (dtype_of(tile), Reverse(place_of(tile)[0] + tile.count), tile.first));
        let below = |kv_dtype: KvDtype| self.cut.partition_point(|tile| dtype_of(tile) < kv_dtype_number(kv_dtype));
        let (f16, int8) = (below(KvDtype::F16), below(KvDtype::Int8));
        self.tiles = [0..f16, f16..int8, int8..self.cut.len()];
        let words = elements::<u32>(block, &layout.tiles).as_chunks_mut::<2>().0;
        for (place, tile) in words.iter_mut().zip(&self.cut) {
            *place = [tile.first, tile.count];
        }
    }

    /// Where among the scored tokens one is.
    pub fn scored_index(&self, token: usize) -> Option<usize> {
        self.scored.binary_search(&(token as u32)).ok()
    }
}

/// A place as four words, in the order of the struct.
fn place_words(place: PlaceArguments) -> [u32; 4] {
    [place.position, place.sequence, place.first_page, place.kv_dtype]
}

/// Fails where a batch would write a page that somebody else sees.
pub fn check_pages_are_own(batch: &mut Batch) -> Result<()> {
    for sequence in batch.sequences.iter_mut() {
        let written = sequence.start / PAGE_TOKENS..KvGeometry::pages_for(sequence.start + sequence.tokens.len());
        if sequence.pages[written].iter_mut().any(|page| Arc::get_mut(page).is_none()) {
            return Err(shared_page());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::device_bytes::DeviceBytes;
    use crate::backend::kv::KvPage;
    use crate::backend::ops::{RouterControl, SequenceSlice};

    /// A page that is nowhere but has an address.
    struct Address(u64);

    impl DeviceBytes for Address {
        fn address(&self) -> u64 {
            self.0
        }
        fn read(&self, _out: &mut [u8]) -> Result<()> {
            Ok(())
        }
        fn write(&mut self, _bytes: &[u8]) -> Result<()> {
            Ok(())
        }
        fn copy_from(&mut self, _address: u64) -> Result<()> {
            Ok(())
        }
    }

    fn config() -> Config {
        let text = serde_json::json!({
            "model_type": "gemmoe", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 4,
            "num_experts_per_tok": 2,
        });
        Config::from_json(text.to_string().as_bytes()).unwrap()
    }

    fn pages(dtype: KvDtype, addresses: Range<u64>) -> Vec<Arc<KvPage>> {
        let geometry = KvGeometry::of(&config(), dtype);
        addresses.map(|address| Arc::new(KvPage::on_device(&geometry, Box::new(Address(address))))).collect()
    }

    fn numbers<T: Plain>(block: &[u8], range: &Range<usize>) -> Vec<T> {
        crate::memory::view::<T>(&block[range.clone()]).to_vec()
    }

    #[test]
    fn parts_are_aligned_and_follow_each_other() {
        let limits = PassLimits { max_tokens: 7, max_sequences: 3, max_context: 100, logit_rows: 3 };
        let layout = BatchLayout::new(&config(), &limits).unwrap();
        let parts = [
            &layout.tokens,
            &layout.places,
            &layout.rows,
            &layout.targets,
            &layout.tiles,
            &layout.apart,
            &layout.logits,
            &layout.allowed,
            &layout.bias,
            &layout.pages,
        ];
        let sizes = [7 * 4, 7 * 16, 10 * 4, 7 * 4, 0, 7 * 4, 3 * 8, 3 * 3 * 8, 3 * 3 * 4 * 4, 3 * 7 * 8];
        assert!(parts.iter().zip(sizes).all(|(part, size)| part.len() == size && part.start % ALIGNMENT == 0));
        assert!(parts.windows(2).all(|pair| pair[0].end <= pair[1].start));
        let huge = PassLimits { max_tokens: usize::MAX / 2, ..limits };
        assert_eq!(BatchLayout::new(&config(), &huge).unwrap_err().status(), Status::OutOfMemory);
    }

    #[test]
    fn a_batch_is_written_as_kernels_read_it() {
        let limits = PassLimits { max_tokens: 8, max_sequences: 3, max_context: 40, logit_rows: 3 };
        let config = config();
        let layout = BatchLayout::new(&config, &limits).unwrap();
        let mut block = crate::memory::Buffer::<u8>::zeroed("a test", layout.bytes()).unwrap();
        let (mut first, mut second) = (pages(KvDtype::F32, 100..103), pages(KvDtype::Int8, 200..202));
        let (allowed, bias) = ([1, 2, 3], [0.5; 12]);
        let mut sequences = [
            SequenceSlice {
                tokens: &[5, 6, 7],
                start: 15,
                pages: &mut first,
                logits: None,
                targets: &[NO_TARGET, 9, 8],
                router: None,
            },
            SequenceSlice {
                tokens: &[11],
                start: 0,
                pages: &mut second,
                logits: Some(LogitsPlace::Device(300)),
                targets: &[],
                router: Some(RouterControl { allowed: &allowed, bias: &bias }),
            },
        ];
        let mut batch = Batch { sequences: &mut sequences, gates: None };
        batch.check(&config, &limits).unwrap();
        let mut shape = BatchShape::default();
        shape.fill(&batch, &config, &layout, &mut block).unwrap();
        assert_eq!((shape.tokens, shape.longest, shape.wanted), (4, 18, 1));
        assert_eq!((&shape.scored[..], &shape.logit_rows[..]), (&[1, 2][..], &[None, Some(0)][..]));
        assert_eq!((shape.scored_index(2), shape.scored_index(0)), (Some(1), None));
        assert_eq!(numbers::<u32>(&block, &layout.tokens)[..4], [5, 6, 7, 11]);
        let places = [15, 0, 0, 0, 16, 0, 0, 0, 17, 0, 0, 0, 0, 1, 2, 3];
        assert_eq!(numbers::<u32>(&block, &layout.places)[..16], places);
        assert_eq!(numbers::<u32>(&block, &layout.rows)[..3], [1, 2, 3]);
        assert_eq!(numbers::<u32>(&block, &layout.targets)[..2], [9, 8]);
        assert_eq!(numbers::<u64>(&block, &layout.logits)[..1], [300]);
        assert_eq!(numbers::<u64>(&block, &layout.allowed)[..6], [15, 15, 15, 1, 2, 3]);
        assert_eq!(numbers::<f32>(&block, &layout.bias)[..24], [[0.0; 12], bias].concat());
        assert_eq!(numbers::<u64>(&block, &layout.pages)[..3], [100, 101, 200]);
        assert_eq!(shape.bytes, layout.pages.start + 3 * 8);
        assert!(check_pages_are_own(&mut batch).is_ok());

        // Of a page that is full nobody needs to be the only owner; of one that is written somebody does.
        let shared = Arc::clone(&first[0]);
        let mut slice = |start| {
            let mut sequences =
                [SequenceSlice { tokens: &[1], start, pages: &mut first, logits: None, targets: &[], router: None }];
            check_pages_are_own(&mut Batch { sequences: &mut sequences, gates: None })
        };
        assert!(slice(PAGE_TOKENS).is_ok());
        assert_eq!(slice(PAGE_TOKENS - 1).unwrap_err().status(), Status::Internal);
        drop(shared);
        assert!(slice(PAGE_TOKENS - 1).is_ok());
    }

    #[test]
    fn slices_of_many_tokens_are_cut_into_tiles_and_the_longest_come_first() {
        let limits = PassLimits { max_tokens: 400, max_sequences: 7, max_context: 400, logit_rows: 1 };
        let config = config();
        let layout = BatchLayout::new(&config, &limits).unwrap();
        let mut block = crate::memory::Buffer::<u8>::zeroed("a test", layout.bytes()).unwrap();
        use KvDtype::{Bf16, F16, F32, Int8};
        let slices = [(Bf16, 0, 65), (F32, 0, 20), (Int8, 9, 17), (Bf16, 0, 16), (F16, 5, 1), (Bf16, 30, 130)];
        let mut of_slices =
            slices.map(|(dtype, start, count)| pages(dtype, 0..KvGeometry::pages_for(start + count) as u64));
        let tokens = [1; 130];
        let mut sequences: Vec<_> = std::iter::zip(slices, &mut of_slices)
            .map(|((_, start, count), pages)| SequenceSlice {
                tokens: &tokens[..count],
                start,
                pages,
                logits: None,
                targets: &[],
                router: None,
            })
            .collect();
        let batch = Batch { sequences: &mut sequences, gates: None };
        let mut shape = BatchShape::new(&config, &limits, false).unwrap();
        shape.fill(&batch, &config, &layout, &mut block).unwrap();
        // First rows of the slices: 0, 65, 85, 102, 118, 119. By what a tile's last token sees: 160, 158, 94, 65, 64.
        let expected = [247, 2, 183, 64, 119, 64, 64, 1, 0, 64, 85, 17];
        assert_eq!(numbers::<u32>(&block, &layout.tiles)[..12], expected);
        assert_eq!(shape.tiles, [0..5, 5..5, 5..6]);
        let apart: Vec<u32> = (65..85).chain(102..119).collect();
        assert_eq!((shape.apart, &numbers::<u32>(&block, &layout.apart)[..37]), (37, &apart[..]));

        // Where bits count, and where rows are no whole units or too long.
        let mut odd = config.clone();
        odd.head_dim = 12;
        let mut long = config.clone();
        long.head_dim = 264;
        for (config, exact) in [(&config, true), (&odd, false), (&long, false)] {
            let mut shape = BatchShape::new(config, &limits, exact).unwrap();
            shape.fill(&batch, config, &layout, &mut block).unwrap();
            assert_eq!((shape.apart, shape.tiles.iter().all(Range::is_empty)), (shape.tokens, true));
        }
    }

    #[test]
    fn room_is_for_as_many_tiles_as_there_can_be() {
        // Slices of 17 tokens have most of them.
        for tokens in 0..300 {
            let of_slices = (17..=64.min(tokens.max(17))).map(|count| tokens / count).max().unwrap_or(0);
            assert!(most_tiles(tokens) >= of_slices.max(if tokens > 16 { tokens.div_ceil(64) } else { 0 }), "{tokens}");
        }
    }

    #[test]
    fn a_page_in_host_memory_is_refused() {
        let limits = PassLimits { max_tokens: 1, max_sequences: 1, max_context: 16, logit_rows: 1 };
        let config = config();
        let layout = BatchLayout::new(&config, &limits).unwrap();
        let mut block = crate::memory::Buffer::<u8>::zeroed("a test", layout.bytes()).unwrap();
        let mut pages = [Arc::new(KvPage::host(&KvGeometry::of(&config, KvDtype::F32)).unwrap())];
        let mut sequences =
            [SequenceSlice { tokens: &[1], start: 0, pages: &mut pages, logits: None, targets: &[], router: None }];
        let batch = Batch { sequences: &mut sequences, gates: None };
        let refused = BatchShape::default().fill(&batch, &config, &layout, &mut block);
        assert_eq!(refused.unwrap_err().status(), Status::Internal);
    }
}
