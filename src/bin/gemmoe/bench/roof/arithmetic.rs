//! Multiply-adds on data in registers: the roofs of prefill.
//!
//! Each probe runs independent chains, enough of them to cover an instruction's latency on every unit that executes it.

use super::{shortest, times};

const ITEMS: usize = 256;
const ROUNDS: usize = 5;

/// Runs a number of steps; each does a number of multiply-adds.
#[derive(Clone, Copy)]
struct Chains {
    multiply_adds: usize,
    run: fn(steps: usize),
}

/// Multiply-adds per second of `threads` threads: the best of some rounds, each about as long as a pass over memory.
fn rate(threads: usize, chains: Chains) -> f64 {
    const STEPS: usize = 1 << 13;
    let times = times(threads, ROUNDS, ITEMS, &|_, _| (chains.run)(STEPS));
    (ITEMS * STEPS * chains.multiply_adds) as f64 / shortest(&times)
}

/// f32 multiply-adds per second that `threads` threads do together.
pub fn multiply_adds(threads: usize) -> f64 {
    rate(threads, f32_chains())
}

/// Products of bf16 added into f32, per second; none where the processor has no instruction for them.
pub fn bf16_dot_products(threads: usize) -> Option<f64> {
    bf16_chains().map(|chains| rate(threads, chains))
}

/// Products of unsigned and signed bytes added into i32, per second, by the best instructions for them; none where
/// there are none.
pub fn int8_dot_products(threads: usize) -> Option<f64> {
    int8_chains().map(|chains| rate(threads, chains))
}

#[cfg(target_arch = "x86_64")]
fn f32_chains() -> Chains {
    if is_x86_feature_detected!("avx512f") {
        return x86::F32_AVX512;
    }
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return x86::F32_FMA;
    }
    F32_PORTABLE
}

#[cfg(not(target_arch = "x86_64"))]
fn f32_chains() -> Chains {
    F32_PORTABLE
}

fn bf16_chains() -> Option<Chains> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512f") {
        return Some(x86::BF16_AVX512);
    }
    None
}

fn int8_chains() -> Option<Chains> {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512f") {
            return Some(x86::INT8_AVX512_VNNI);
        }
        if is_x86_feature_detected!("avxvnni") && is_x86_feature_detected!("avx2") {
            return Some(x86::INT8_AVX_VNNI);
        }
        if is_x86_feature_detected!("avx2") {
            return Some(x86::INT8_AVX2);
        }
    }
    None
}

/// Sums of the portable probe, vectors of four lanes: as many as there are registers for.
const SUMS: usize = 4 * if cfg!(target_arch = "aarch64") { 24 } else { 12 };

const F32_PORTABLE: Chains = Chains { multiply_adds: SUMS, run: f32_portable };

/// `mul_add` where every processor of the kind has it; else a product and a sum, which is what kernels do there too.
fn f32_portable(steps: usize) {
    let mut sums = std::hint::black_box([1f32; SUMS]);
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = match cfg!(target_arch = "aarch64") {
                true => sum.mul_add(0.999, 0.001),
                false => *sum * 0.999 + 0.001,
            };
        }
    }
    std::hint::black_box(sums);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::Chains;

    /// Chains of a probe: with operands they fit the sixteen registers of AVX2, and cover six cycles on two units.
    const COUNT: usize = 12;

    pub const F32_AVX512: Chains = Chains { multiply_adds: 16 * COUNT, run: f32_avx512 };
    pub const F32_FMA: Chains = Chains { multiply_adds: 8 * COUNT, run: f32_fma };
    pub const BF16_AVX512: Chains = Chains { multiply_adds: 32 * COUNT, run: bf16_avx512 };
    pub const INT8_AVX512_VNNI: Chains = Chains { multiply_adds: 64 * COUNT, run: int8_avx512_vnni };
    pub const INT8_AVX_VNNI: Chains = Chains { multiply_adds: 32 * COUNT, run: int8_avx_vnni };
    pub const INT8_AVX2: Chains = Chains { multiply_adds: 32 * COUNT, run: int8_avx2 };

    /// `step` on each of COUNT sums, `steps` times.
    #[inline(always)]
    fn repeat<V: Copy>(steps: usize, zero: V, step: impl Fn(V) -> V) {
        let mut sums = black_box([zero; COUNT]);
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = step(*sum);
            }
        }
        black_box(sums);
    }

    fn f32_avx512(steps: usize) {
        #[target_feature(enable = "avx512f")]
        fn run(steps: usize) {
            let (a, b) = black_box((_mm512_setzero_ps(), _mm512_setzero_ps()));
            repeat(steps, _mm512_setzero_ps(), |sum| _mm512_fmadd_ps(a, b, sum));
        }
        // SAFETY: `f32_chains` chooses this probe after detecting the instruction set.
        unsafe { run(steps) }
    }

    fn f32_fma(steps: usize) {
        #[target_feature(enable = "avx2,fma")]
        fn run(steps: usize) {
            let (a, b) = black_box((_mm256_setzero_ps(), _mm256_setzero_ps()));
            repeat(steps, _mm256_setzero_ps(), |sum| _mm256_fmadd_ps(a, b, sum));
        }
        // SAFETY: `f32_chains` chooses this probe after detecting the instruction sets.
        unsafe { run(steps) }
    }

    fn bf16_avx512(steps: usize) {
        #[target_feature(enable = "avx512f,avx512bf16")]
        fn run(steps: usize) {
            let zero = _mm512_setzero_si512();
            // SAFETY: both are 64 bytes, and any bits are a value of either.
            let zero = unsafe { std::mem::transmute::<__m512i, __m512bh>(zero) };
            let (a, b) = black_box((zero, zero));
            repeat(steps, _mm512_setzero_ps(), |sum| _mm512_dpbf16_ps(sum, a, b));
        }
        // SAFETY: `bf16_chains` chooses this probe after detecting the instruction sets.
        unsafe { run(steps) }
    }

    fn int8_avx512_vnni(steps: usize) {
        #[target_feature(enable = "avx512f,avx512vnni")]
        fn run(steps: usize) {
            let (a, b) = black_box((_mm512_setzero_si512(), _mm512_setzero_si512()));
            repeat(steps, _mm512_setzero_si512(), |sum| _mm512_dpbusd_epi32(sum, a, b));
        }
        // SAFETY: `int8_chains` chooses this probe after detecting the instruction sets.
        unsafe { run(steps) }
    }

    fn int8_avx_vnni(steps: usize) {
        #[target_feature(enable = "avx2,avxvnni")]
        fn run(steps: usize) {
            let (a, b) = black_box((_mm256_setzero_si256(), _mm256_setzero_si256()));
            repeat(steps, _mm256_setzero_si256(), |sum| _mm256_dpbusd_avx_epi32(sum, a, b));
        }
        // SAFETY: `int8_chains` chooses this probe after detecting the instruction sets.
        unsafe { run(steps) }
    }

    /// Three instructions a step. The products depend on the sum, or they would be taken out of the loop.
    fn int8_avx2(steps: usize) {
        #[target_feature(enable = "avx2")]
        fn run(steps: usize) {
            let (a, b) = black_box((_mm256_setzero_si256(), _mm256_setzero_si256()));
            repeat(steps, _mm256_setzero_si256(), |sum| {
                _mm256_add_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(sum, a), b), sum)
            });
        }
        // SAFETY: `int8_chains` chooses this probe after detecting the instruction set.
        unsafe { run(steps) }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    #[test]
    fn probes_of_lesser_processors_run_on_better_ones_too() {
        use super::{F32_PORTABLE, rate, x86};
        let mut probes = vec![F32_PORTABLE];
        if is_x86_feature_detected!("avx2") {
            probes.push(x86::INT8_AVX2);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            probes.push(x86::F32_FMA);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("avxvnni") {
            probes.push(x86::INT8_AVX_VNNI);
        }
        for probe in probes {
            let found = rate(2, probe);
            assert!(found.is_finite() && found > 0.0);
        }
    }
}
