//! How fast attention is, beside what one thread of this machine can do at best, in the thread's own processor time: others may
//! use the machine. `cargo test --profile bench --lib attention_speed -- --ignored --nocapture`

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};

use super::*;
use crate::backend::kv::KvBlock;
use crate::memory::Buffer;

const HEAD_DIM: usize = 256;
const HEADS: usize = 16;
const LAYER: usize = 12;
const ROUNDS: usize = 15;
/// As `AttentionSplit` has them for blocks of one token and of many.
const POSITIONS_OF_A_TOKEN: usize = 2048;
const POSITIONS_OF_A_BLOCK: usize = 640;

/// Multiply-adds on registers, as many as it says.
#[target_feature(enable = "avx2,fma")]
fn multiply_adds() -> usize {
    const STEPS: usize = 1 << 17;
    let mut sums = [1f32; 80];
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = sum.mul_add(0.999, 0.001);
        }
    }
    std::hint::black_box(sums);
    80 * STEPS
}

/// Reads the keys and values of a head, each page's values asked for while its keys are read, as attention does it, and
/// returns their bytes.
#[target_feature(enable = "avx2")]
fn read_head(pages: &[Arc<KvPage>], head: usize) -> usize {
    const PART: usize = 256;
    let geometry = pages[0].geometry();
    let length = PAGE_TOKENS * HEAD_DIM * geometry.dtype.bytes_per_element();
    let block = |page: usize, half: usize| {
        let index = (LAYER * 2 + half) * HEADS + head;
        pages.get(page).map(|page| &page.bytes()[index * length..(index + 1) * length])
    };
    let mut sums = [[0u64; 8]; PART / 64];
    for (page, half) in (0..pages.len()).flat_map(|page| [(page, 0), (page, 1)]) {
        let next = if half == 0 { block(page, 1) } else { block(page + 1, 0) };
        for (at, part) in block(page, half).unwrap().as_chunks::<PART>().0.iter().enumerate() {
            for (line, (sums, words)) in sums.iter_mut().zip(part.as_chunks::<64>().0).enumerate() {
                if let Some(next) = next {
                    _mm_prefetch::<_MM_HINT_T1>(next[at * PART + line * 64..].as_ptr().cast());
                }
                for (sum, word) in sums.iter_mut().zip(words.as_chunks::<8>().0) {
                    *sum = sum.wrapping_add(u64::from_le_bytes(*word));
                }
            }
        }
    }
    std::hint::black_box(sums);
    2 * length * pages.len()
}

/// Pages of the real geometry with one layer of keys and values in them.
fn pages(random: &mut Random, dtype: KvDtype, positions: usize) -> Vec<Arc<KvPage>> {
    let geometry = KvGeometry { layers: 28, heads: HEADS, head_dim: HEAD_DIM, dtype };
    let page = |_| {
        let mut page = KvPage::host(&geometry).unwrap();
        for (head, half) in (0..HEADS).flat_map(|head| [(head, KvHalf::Key), (head, KvHalf::Value)]) {
            let row = random.vector(HEAD_DIM);
            for slot in 0..PAGE_TOKENS {
                all_kernels()[0].store(&row, &mut page, KvBlock { layer: LAYER, half, head }, slot);
            }
        }
        Arc::new(page)
    };
    (0..positions / PAGE_TOKENS).map(page).collect()
}

/// The last tokens of as many positions as the pages have.
struct Work<'a> {
    pages: &'a [Arc<KvPage>],
    tokens: usize,
    heads: Range<usize>,
    queries: Buffer<f32>,
    state: Buffer<f32>,
    out: Buffer<f32>,
}

impl Work<'_> {
    fn attend(&mut self, kernels: &Kernels) {
        const QUERY_SIZE: usize = HEADS * HEAD_DIM;
        let (out, state) = (Output::new(&mut self.out, QUERY_SIZE), Output::new(&mut self.state, 2 * HEADS));
        let positions = self.pages.len() * PAGE_TOKENS;
        let range = if self.tokens == 1 { POSITIONS_OF_A_TOKEN } else { POSITIONS_OF_A_BLOCK };
        for (first, head) in (0..positions).step_by(range).flat_map(|at| self.heads.clone().map(move |head| (at, head)))
        {
            for token in (0..self.tokens).step_by(MAX_ROWS) {
                let end = self.tokens.min(token + MAX_ROWS);
                let block = QueryBlock {
                    queries: &self.queries[token * QUERY_SIZE..end * QUERY_SIZE],
                    tokens: end - token,
                    start: positions - self.tokens + token,
                    heads: head..head + 1,
                    pages: self.pages,
                    layer: LAYER,
                    key_value_head: head,
                };
                // SAFETY: this is the only thread, and the buffers live on.
                unsafe { kernels.attend(&block, first..first + range, &state.skip_rows(token), &out.skip_rows(token)) };
            }
        }
    }
}

#[test]
#[ignore = "a measurement"]
fn attention_speed() {
    if Kernels::get(Instructions::Avx2).is_err() {
        return;
    }
    let mut random = Random::fresh();
    for dtype in KvDtype::ALL {
        let pages = pages(&mut random, dtype, 8192);
        // A decoded token goes through all heads, so that the caches have forgotten one when it comes again.
        for (positions, tokens, heads) in [(4096, 1, 0..HEADS), (512, 48, 1..3), (2048, 48, 1..3), (8192, 48, 1..3)] {
            let zeros = |count| Buffer::zeroed("a measurement", count).unwrap();
            let size = tokens * HEADS * HEAD_DIM;
            let (queries, out, state) = (zeros(size), zeros(size), zeros(tokens * HEADS * 2));
            let mut work = Work { pages: &pages[..positions / PAGE_TOKENS], tokens, heads, queries, state, out };
            work.queries.iter_mut().for_each(|query| *query = random.unit());
            let seen: usize = (positions - tokens + 1..=positions).sum();
            let products = (work.heads.len() * seen * 2 * HEAD_DIM) as f64;
            let names = ["roof, multiply-adds", "roof, bytes"].into_iter().map(str::to_owned);
            let mut rates: Vec<(String, Vec<f64>)> =
                names.chain(all_kernels().iter().map(|kernels| kernels.name.to_owned())).map(|n| (n, vec![])).collect();
            for _ in 0..ROUNDS {
                let mut amount = 0;
                // SAFETY: AVX2 and FMA are there: the test has ended otherwise.
                let time = processor_seconds(|| amount = unsafe { multiply_adds() });
                rates[0].1.push(amount as f64 / time / 1e9);
                // SAFETY: as above.
                let read = |head| unsafe { read_head(work.pages, head) };
                let time = processor_seconds(|| amount = work.heads.clone().map(read).sum());
                rates[1].1.push(amount as f64 / time / 1e9);
                for (kernels, (_, rates)) in all_kernels().iter().zip(&mut rates[2..]) {
                    rates.push(products / processor_seconds(|| work.attend(kernels)) / 1e9);
                }
            }
            for (name, mut rates) in rates {
                rates.sort_by(f64::total_cmp);
                let (low, middle, high) = (rates[ROUNDS / 10], rates[ROUNDS / 2], rates[ROUNDS * 9 / 10]);
                print!("{:<4} {tokens:2} tokens at {positions}: {name:<20}", dtype.name());
                println!("{middle:6.1} G/s ({low:.1} to {high:.1})");
            }
        }
    }
}
