//! Read bandwidth: the roof of decode.

use std::hint::black_box;
use std::sync::Mutex;

use gemmoe::Result;
use gemmoe::memory::Buffer;

use super::{shortest, times};

/// What a thread takes at a time.
const BLOCK_BYTES: usize = 4 << 20;
const LINE_WORDS: usize = 8;
const BLOCK_WORDS: usize = BLOCK_BYTES / 8;

/// An order in which a thread reads its block. Which is best depends on the machine and the hour, so all are tried.
struct Order {
    /// Places that are read side by side, as the rows of a matrix are.
    streams: usize,
    /// Words from one of them to the next.
    pitch: usize,
    /// Lines read at one place before the next has its turn.
    run: usize,
    /// How many words ahead the processor is asked for; 0 leaves that to its own prefetching.
    ahead: usize,
}

const ORDERS: [Order; 8] = [
    Order { streams: 1, pitch: BLOCK_WORDS, run: 4, ahead: 0 },
    Order { streams: 1, pitch: BLOCK_WORDS, run: 4, ahead: 512 },
    Order { streams: 4, pitch: BLOCK_WORDS / 4, run: 1, ahead: 0 },
    Order { streams: 4, pitch: BLOCK_WORDS / 4, run: 1, ahead: 256 },
    Order { streams: 8, pitch: BLOCK_WORDS / 8, run: 1, ahead: 64 },
    Order { streams: 8, pitch: 1024, run: 1, ahead: 0 },
    Order { streams: 16, pitch: 1024, run: 1, ahead: 0 },
    Order { streams: 16, pitch: BLOCK_WORDS / 16, run: 1, ahead: 0 },
];

/// Passes over the memory in each order. They go round, so that a busy moment does not meet all of one order's.
const PASSES: usize = 3;

/// Bytes per second that `threads` threads read together from `bytes` of fresh memory in huge pages: the best of
/// several passes in several orders. Fails where there is no such memory.
pub fn read_bandwidth(threads: usize, bytes: usize) -> Result<f64> {
    let blocks = (bytes / BLOCK_BYTES).max(1);
    let mut words = Buffer::<u64>::zeroed("the bandwidth probe", blocks * BLOCK_WORDS)?;
    // Written first, by the threads that read: untouched zero pages are one page in the cache.
    let unwritten = Mutex::new(words.chunks_exact_mut(BLOCK_WORDS));
    times(threads, 1, blocks, &|_, _| {
        let block = unwritten.lock().ok().and_then(|mut blocks| blocks.next());
        block.into_iter().for_each(|block| block.fill(1));
    });
    let words = &words[..];
    let times = times(threads, ORDERS.len() * PASSES, blocks, &|round, item| {
        black_box(read(&words[item * BLOCK_WORDS..(item + 1) * BLOCK_WORDS], &ORDERS[round % ORDERS.len()]));
    });
    Ok((blocks * BLOCK_BYTES) as f64 / shortest(&times))
}

fn read(block: &[u64], order: &Order) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the instruction set was just detected.
            return unsafe { read_avx512(block, order) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the instruction set was just detected.
            return unsafe { read_avx2(block, order) };
        }
    }
    read_portable(block, order)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn read_avx512(block: &[u64], order: &Order) -> u64 {
    read_portable(block, order)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn read_avx2(block: &[u64], order: &Order) -> u64 {
    read_portable(block, order)
}

#[inline(always)]
fn read_portable(block: &[u64], order: &Order) -> u64 {
    match order.streams {
        1 => read_streams::<1>(block, order),
        4 => read_streams::<4>(block, order),
        8 => read_streams::<8>(block, order),
        _ => read_streams::<16>(block, order),
    }
}

#[inline(always)]
fn read_streams<const STREAMS: usize>(block: &[u64], order: &Order) -> u64 {
    let mut sums = [[0u64; LINE_WORDS]; STREAMS];
    for group in block.chunks_exact(STREAMS * order.pitch) {
        for at in (0..order.pitch).step_by(order.run * LINE_WORDS) {
            for (stream, sums) in sums.iter_mut().enumerate() {
                let first = stream * order.pitch + at;
                let run = &group[first..first + order.run * LINE_WORDS];
                for line in run.chunks_exact(LINE_WORDS) {
                    if order.ahead > 0 {
                        prefetch(line.as_ptr().wrapping_add(order.ahead));
                    }
                    for (sum, word) in sums.iter_mut().zip(line) {
                        *sum ^= word;
                    }
                }
            }
        }
    }
    sums.as_flattened().iter().fold(0, |all, sum| all ^ sum)
}

#[inline(always)]
fn prefetch(address: *const u64) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and a prefetch reads nothing, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
