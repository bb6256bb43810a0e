//! Sixteen lanes in AVX-512.

use std::arch::x86_64::*;

use super::avx2::sums_of_four;
use super::{Vector, bf16, f16};

/// One 512-bit register; needs AVX-512 F, BW, VL and DQ, and what AVX2 needs.
#[derive(Clone, Copy)]
pub struct Avx512(__m512);

impl Avx512 {
    /// `i + (i+8)`, then `i + (i+4)`.
    ///
    /// # Safety
    /// As for [`Vector`].
    #[inline(always)]
    unsafe fn quarter(self) -> __m128 {
        // SAFETY: the caller's promise.
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0));
            _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight))
        }
    }
}

// In all methods: SAFETY is the caller's promise that the processor has the instruction sets named above, and that the
// pointers are good for LANES elements; every load and store used is the unaligned one.
impl Vector for Avx512 {
    const LANES: usize = 16;
    const REGISTERS: usize = 32;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: see above the impl.
        Avx512(unsafe { _mm512_setzero_ps() })
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: see above the impl.
        Avx512(unsafe { _mm512_set1_ps(value) })
    }
    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> Self {
        // SAFETY: see above the impl.
        Avx512(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: see above the impl. A bf16 is the upper half of an f32.
        Avx512(unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
        })
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: see above the impl.
        Avx512(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: see above the impl. The load is of sixteen bytes.
        Avx512(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) })
    }
    #[inline(always)]
    unsafe fn prefetch_far(from: *const u8) {
        // SAFETY: see above the impl; a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) };
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see above the impl.
        unsafe { _mm512_storeu_ps(to, self.0) };
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        // SAFETY: see above the impl.
        Avx512(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see above the impl.
        unsafe {
            let four = self.quarter();
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn store_sums(four: [Self; 4], to: *mut f32) {
        // SAFETY: see above the impl; four are written.
        unsafe {
            let [a, b, c, d] = four;
            _mm_storeu_ps(to, sums_of_four([a.quarter(), b.quarter(), c.quarter(), d.quarter()]));
        }
    }
}
