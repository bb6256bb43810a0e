//! What the machine can do at best: the roofs that figures are reported beside.

use std::time::Instant;

use gemmoe::memory::Buffer;

/// Bytes each thread reads: far past any cache.
const BYTES_PER_THREAD: usize = 1 << 30;
/// Streams a thread reads side by side, STREAM_WORDS apart: rows of a matrix, as the decode kernel reads them. One
/// alone does not fill the memory channels; far apart they would fight over the memory's open rows.
const STREAMS: usize = 8;
const STREAM_WORDS: usize = 2048;

/// Bytes per second that `threads` threads read together: the best of three passes over fresh memory in huge pages.
pub fn read_bandwidth(threads: usize) -> f64 {
    best_of_three(threads, |_| {
        let Ok(mut words) = Buffer::<f32>::zeroed("the bandwidth probe", BYTES_PER_THREAD / 4) else {
            return Probe::empty();
        };
        // Written first: untouched zero pages are one page in the cache.
        words.fill(1.0);
        Probe::new(BYTES_PER_THREAD as f64, move || sum_streams(&words))
    })
}

/// f32 multiply-adds per second of `threads` threads on data in registers.
pub fn multiply_adds(threads: usize) -> f64 {
    const STEPS: usize = 1 << 24;
    best_of_three(threads, |thread| Probe::new((STEPS * CHAINS) as f64, move || chains(STEPS, thread as f32)))
}

/// Independent sums, enough to cover a multiply-add's latency on two units of eight lanes.
const CHAINS: usize = 80;

fn chains(steps: usize, start: f32) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the instruction sets were just detected.
        return unsafe { chains_fma(steps, start) };
    }
    let mut sums = [start; CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = *sum * 0.999 + 0.001;
        }
    }
    std::hint::black_box(sums).iter().sum()
}

/// # Safety
/// The processor has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn chains_fma(steps: usize, start: f32) -> f32 {
    let mut sums = [start; CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = sum.mul_add(0.999, 0.001);
        }
    }
    std::hint::black_box(sums).iter().sum()
}

fn sum_streams(words: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the instruction set was just detected.
        return unsafe { sum_streams_avx2(words) };
    }
    sum_streams_portable(words)
}

/// # Safety
/// The processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn sum_streams_avx2(words: &[f32]) -> f32 {
    sum_streams_portable(words)
}

#[inline(always)]
fn sum_streams_portable(words: &[f32]) -> f32 {
    let mut sums = [[0f32; 8]; STREAMS];
    for block in words.chunks_exact(STREAMS * STREAM_WORDS) {
        for at in (0..STREAM_WORDS).step_by(8) {
            for (stream, sums) in sums.iter_mut().enumerate() {
                let from = stream * STREAM_WORDS + at;
                for (sum, word) in sums.iter_mut().zip(&block[from..from + 8]) {
                    *sum += word;
                }
            }
        }
    }
    sums.as_flattened().iter().sum()
}

/// One thread's share of a measurement: how much it does, and the doing.
struct Probe {
    amount: f64,
    work: Box<dyn FnMut() -> f32>,
}

impl Probe {
    fn new(amount: f64, work: impl FnMut() -> f32 + 'static) -> Self {
        Probe { amount, work: Box::new(work) }
    }

    fn empty() -> Self {
        Probe::new(0.0, || 0.0)
    }
}

/// The highest rate of three rounds in which all threads start together.
fn best_of_three(threads: usize, prepare: impl Fn(usize) -> Probe + Sync) -> f64 {
    let barrier = std::sync::Barrier::new(threads);
    let rates = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let (barrier, prepare) = (&barrier, &prepare);
                scope.spawn(move || {
                    let mut probe = prepare(thread);
                    [(); 3].map(|()| {
                        barrier.wait();
                        let started = Instant::now();
                        std::hint::black_box((probe.work)());
                        probe.amount / started.elapsed().as_secs_f64()
                    })
                })
            })
            .collect();
        workers.into_iter().filter_map(|worker| worker.join().ok()).collect::<Vec<_>>()
    });
    (0..3).map(|round| rates.iter().map(|rates| rates[round]).sum()).fold(0.0, f64::max)
}
