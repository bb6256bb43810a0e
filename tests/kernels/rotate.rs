//! Pages of keys and values, and what is stored there.

use half::{bf16, f16};

use crate::Effort;
use crate::arguments::{CacheArguments, PlaceArguments, RotateArguments};
use crate::device::{Array, Device};
use crate::random::Random;
use crate::tensors::rounded;

pub const KV_DTYPES: [u32; 4] = [0, 1, 2, 3];

/// Pages of some sequences, as `backend/kv.rs` lays them out.
pub struct Cache<'a> {
    pub layers: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub page_tokens: usize,
    sequences: Vec<Sequence>,
    pages: Vec<Array<'a, u8>>,
    table: Array<'a, u64>,
}

struct Sequence {
    kv_dtype: u32,
    first_page: usize,
    /// Of each page.
    bytes: usize,
}

pub struct Geometry {
    pub layers: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub page_tokens: usize,
}

fn element_bytes(kv_dtype: u32) -> usize {
    [4, 2, 2, 1][kv_dtype as usize]
}

/// Numbers as a dtype holds them, the scale beside.
pub fn stored(numbers: &[f32], kv_dtype: u32) -> (Vec<u8>, f32) {
    let bytes =
        |numbers: &[f32], to: fn(f32) -> u16| numbers.iter().flat_map(|number| to(*number).to_le_bytes()).collect();
    match kv_dtype {
        0 => (numbers.iter().flat_map(|number| number.to_le_bytes()).collect(), 1.0),
        1 => (bytes(numbers, |number| bf16::from_f32(number).to_bits()), 1.0),
        // Numbers past the largest become the largest.
        2 => (
            bytes(numbers, |number| {
                f16::from_f32(if number.is_infinite() { number } else { number.clamp(-65504.0, 65504.0) }).to_bits()
            }),
            1.0,
        ),
        _ => {
            let (whole, scale) = rounded(numbers);
            (whole.iter().map(|number| *number as u8).collect(), scale)
        }
    }
}

/// And back.
pub fn loaded(bytes: &[u8], scale: f32, kv_dtype: u32) -> Vec<f64> {
    let half = |bytes: &[u8]| u16::from_le_bytes([bytes[0], bytes[1]]);
    match kv_dtype {
        0 => bytes.chunks(4).map(|bytes| f64::from(f32::from_le_bytes(bytes.try_into().unwrap()))).collect(),
        1 => bytes.chunks(2).map(|bytes| bf16::from_bits(half(bytes)).to_f64()).collect(),
        2 => bytes.chunks(2).map(|bytes| f16::from_bits(half(bytes)).to_f64()).collect(),
        _ => bytes.iter().map(|byte| f64::from(*byte as i8) * f64::from(scale)).collect(),
    }
}

impl<'a> Cache<'a> {
    /// Room for `(dtype, positions)` of each sequence; nothing is written yet.
    pub fn new(device: &'a Device, geometry: &Geometry, sequences: &[(u32, usize)]) -> Cache<'a> {
        let Geometry { layers, heads, head_dim, page_tokens } = *geometry;
        let (mut pages, mut of_sequences) = (Vec::new(), Vec::new());
        for (kv_dtype, positions) in sequences {
            let row_bytes = head_dim * element_bytes(*kv_dtype) + if *kv_dtype == 3 { 4 } else { 0 };
            let bytes = layers * 2 * heads * page_tokens * row_bytes;
            of_sequences.push(Sequence { kv_dtype: *kv_dtype, first_page: pages.len(), bytes });
            pages.extend((0..positions.div_ceil(page_tokens)).map(|_| device.room(bytes)));
        }
        let table = device.array(&pages.iter().map(Array::address).collect::<Vec<_>>());
        Cache { layers, heads, head_dim, page_tokens, sequences: of_sequences, pages, table }
    }

    pub fn arguments(&self) -> CacheArguments {
        CacheArguments {
            pages: self.table.pointer().cast(),
            layers: self.layers as u32,
            key_value_heads: self.heads as u32,
            head_dim: self.head_dim as u32,
            page_tokens: self.page_tokens as u32,
        }
    }

    pub fn place(&self, sequence: usize, position: usize) -> PlaceArguments {
        let Sequence { kv_dtype, first_page, .. } = self.sequences[sequence];
        PlaceArguments { position: position as u32, sequence: sequence as u32, first_page: first_page as u32, kv_dtype }
    }

    /// Where a row's elements and its scale are in its page.
    fn offsets(&self, sequence: usize, layer: usize, half: usize, head: usize, position: usize) -> (usize, usize) {
        let row_bytes = self.head_dim * element_bytes(self.sequences[sequence].kv_dtype);
        let row = ((layer * 2 + half) * self.heads + head) * self.page_tokens + position % self.page_tokens;
        let rows = self.layers * 2 * self.heads * self.page_tokens;
        (row * row_bytes, rows * row_bytes + row * 4)
    }

    /// All bytes of a sequence's pages.
    pub fn read(&self, sequence: usize) -> Vec<Vec<u8>> {
        let next = self.sequences.get(sequence + 1).map_or(self.pages.len(), |next| next.first_page);
        self.pages[self.sequences[sequence].first_page..next].iter().map(Array::read).collect()
    }

    pub fn write(&self, sequence: usize, pages: &[Vec<u8>]) {
        for (page, bytes) in self.pages[self.sequences[sequence].first_page..].iter().zip(pages) {
            page.write(bytes);
        }
    }

    /// Pages of a sequence that nobody wrote.
    pub fn blank(&self, sequence: usize, positions: usize) -> Vec<Vec<u8>> {
        vec![vec![0xff; self.sequences[sequence].bytes]; positions.div_ceil(self.page_tokens)]
    }

    /// Puts a row where it belongs in pages: `[layer, half, head, position]`.
    pub fn put(&self, pages: &mut [Vec<u8>], sequence: usize, at: [usize; 4], numbers: &[f32]) {
        let [layer, half, head, position] = at;
        let kv_dtype = self.sequences[sequence].kv_dtype;
        let (bytes, scale) = stored(numbers, kv_dtype);
        let (elements, scale_at) = self.offsets(sequence, layer, half, head, position);
        let page = &mut pages[position / self.page_tokens];
        page[elements..elements + bytes.len()].copy_from_slice(&bytes);
        if kv_dtype == 3 {
            page[scale_at..scale_at + 4].copy_from_slice(&scale.to_le_bytes());
        }
    }
}

pub fn check_rotate(device: &Device, random: &mut Random, effort: Effort) {
    for (heads, key_value_heads, head_dim, page_tokens) in
        [(4, 2, 8, 16), (2, 2, 40, 16), (3, 1, 256, 4), (5, 5, 7, 16), (1, 1, 512, 2)]
    {
        if effort == Effort::Sample && head_dim == 256 {
            continue;
        }
        let (layers, layer) = (2, random.below(2));
        let geometry = Geometry { layers, heads: key_value_heads, head_dim, page_tokens };
        // A sequence of each dtype, tokens in any order, one at a position where angles are large.
        let sequences = KV_DTYPES.map(|kv_dtype| (kv_dtype, 40));
        let cache = Cache::new(device, &geometry, &sequences);
        let spots: Vec<(usize, usize)> = vec![(1, 3), (0, 0), (2, 17), (3, 39), (3, 38), (2, 16), (0, 15), (1, 20)];
        let mut places: Vec<_> = spots.iter().map(|(sequence, position)| cache.place(*sequence, *position)).collect();
        let mut numbers = |count: usize| -> Vec<f32> { (0..count).map(|_| random.unit() * 2.0).collect() };
        let (query, key) = (numbers(spots.len() * heads * head_dim), numbers(spots.len() * key_value_heads * head_dim));
        let mut value = numbers(key.len());
        // What every dtype has its rule for.
        let specials = [f32::NAN, f32::INFINITY, -1e9, 1e-8, 65520.0, -0.0, 1e-40];
        for (at, special) in specials.into_iter().enumerate() {
            value[at * key_value_heads * head_dim + at % head_dim] = special;
        }
        let frequencies: Vec<f32> =
            (0..head_dim / 2).map(|pair| 10000f64.powf(-2.0 * pair as f64 / head_dim as f64) as f32).collect();
        let (query_there, key_there) = (device.array(&query), device.array(&key));
        let (value_there, frequencies_there) = (device.array(&value), device.array(&frequencies));
        let places_there = device.array(&places);
        let arguments = RotateArguments {
            query: query_there.pointer_mut(),
            key: key_there.pointer_mut(),
            value: value_there.pointer(),
            frequencies: frequencies_there.pointer(),
            places: places_there.pointer(),
            cache: cache.arguments(),
            layer: layer as u32,
            heads: heads as u32,
        };
        device.launch("rotate_and_store", [spots.len(), 1, 1], &arguments);
        let (query_there, key_there) = (query_there.read(), key_there.read());
        check_heads(&query, &query_there, heads, head_dim, &frequencies, &places);
        check_heads(&key, &key_there, key_value_heads, head_dim, &frequencies, &places);

        for sequence in 0..sequences.len() {
            let mut expected = cache.blank(sequence, 40);
            for (token, (its, position)) in spots.iter().enumerate().filter(|(_, (its, _))| *its == sequence) {
                for (half, rows) in [(0, &key_there), (1, &value)] {
                    for head in 0..key_value_heads {
                        let row = &rows[(token * key_value_heads + head) * head_dim..][..head_dim];
                        cache.put(&mut expected, *its, [layer, half, head, *position], row);
                    }
                }
            }
            let stored = cache.read(sequence);
            assert!(same_but_nan(&stored, &expected, sequence), "dtype {sequence}, head_dim {head_dim}: pages differ");
        }
        places.clear();
    }
}

/// Whether pages have the same bytes, but for which NaN it is: a scale of int8, or an element of another dtype.
fn same_but_nan(a: &[Vec<u8>], b: &[Vec<u8>], kv_dtype: usize) -> bool {
    let is_nan = |bytes: &[u8]| match kv_dtype {
        1 => bf16::from_bits(u16::from_le_bytes([bytes[0], bytes[1]])).is_nan(),
        2 => f16::from_bits(u16::from_le_bytes([bytes[0], bytes[1]])).is_nan(),
        _ => f32::from_le_bytes(bytes.try_into().unwrap()).is_nan(),
    };
    let size = if kv_dtype == 1 || kv_dtype == 2 { 2 } else { 4 };
    a.iter().zip(b).all(|(a, b)| {
        let mut pairs = a.chunks(size).zip(b.chunks(size));
        a.len() == b.len() && pairs.all(|(a, b)| a == b || a.len() == size && is_nan(a) && is_nan(b))
    })
}

fn check_heads(
    before: &[f32],
    after: &[f32],
    heads: usize,
    head_dim: usize,
    frequencies: &[f32],
    places: &[PlaceArguments],
) {
    let pairs = head_dim / 2;
    for (token, place) in places.iter().enumerate() {
        for head in 0..heads {
            let at = (token * heads + head) * head_dim;
            let (x, y) = (&before[at..at + head_dim], &after[at..at + head_dim]);
            for pair in 0..pairs {
                let angle = f64::from(place.position as f32 * frequencies[pair]);
                let (sine, cosine) = angle.sin_cos();
                let (a, b) = (f64::from(x[pair]), f64::from(x[pair + pairs]));
                for (result, expected) in [(y[pair], a * cosine - b * sine), (y[pair + pairs], b * cosine + a * sine)] {
                    assert!((f64::from(result) - expected).abs() < 1e-6, "{result} for {expected}");
                }
            }
            if head_dim % 2 == 1 {
                assert_eq!(x[head_dim - 1], y[head_dim - 1]);
            }
        }
    }
}
