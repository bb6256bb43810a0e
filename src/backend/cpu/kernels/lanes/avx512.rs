//! AVX-512 (F, BW, VL, VNNI): one register of sixteen rows.

use std::arch::x86_64::*;

use super::{Lanes, Products};

/// One 512-bit register of f32; needs AVX-512 F, BW, VL and VNNI.
#[derive(Clone, Copy)]
pub struct Avx512(__m512);

/// The sums plus the products of `[16 rows][2 columns]` bf16 with two bf16.
///
/// # Safety
/// AVX-512 F and BF16 are present; `from` is readable for 64 bytes.
#[inline(always)]
pub unsafe fn add_bf16_pairs(sums: Avx512, line: __m512i, x: u32) -> Avx512 {
    // SAFETY: the caller's promise; both types are 512 bits of any pattern.
    unsafe {
        let x = _mm512_set1_epi32(x as i32);
        let (line, x) = (std::mem::transmute::<__m512i, __m512bh>(line), std::mem::transmute::<__m512i, __m512bh>(x));
        Avx512(_mm512_dpbf16_ps(sums.0, line, x))
    }
}

/// Loads 64 bytes.
///
/// # Safety
/// AVX-512 F is present; `from` is readable.
#[inline(always)]
pub unsafe fn load_line(from: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_loadu_si512(from.cast()) }
}

// In all methods: SAFETY is the caller's promise that the processor has AVX-512 F, BW, VL and VNNI, and that the pointers are
// good for what the traits say; every load and store used is the unaligned one, and a prefetch may be of any address.
impl Lanes for Avx512 {
    const TILE: (usize, usize) = (2, 8);

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see above the impls.
        Avx512(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see above the impls.
        unsafe { _mm512_storeu_ps(to, self.0) };
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self {
        // SAFETY: see above the impls.
        Avx512(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self {
        // SAFETY: see above the impls. A bf16 is the upper half of an f32.
        Avx512(unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        })
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(from: *const u8) -> [Self; 2] {
        // SAFETY: see above the impls.
        unsafe {
            let pairs = load_line(from);
            let second = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000u32 as i32));
            [_mm512_slli_epi32::<16>(pairs), second].map(|words| Avx512(_mm512_castsi512_ps(words)))
        }
    }
    #[inline(always)]
    unsafe fn scale(self, x: f32) -> Self {
        // SAFETY: see above the impls.
        Avx512(unsafe { _mm512_mul_ps(self.0, _mm512_set1_ps(x)) })
    }
    #[inline(always)]
    unsafe fn mul_add(self, factors: Self, sums: Self) -> Self {
        // SAFETY: see above the impls.
        Avx512(unsafe { _mm512_fmadd_ps(self.0, factors.0, sums.0) })
    }
    #[inline(always)]
    unsafe fn scale_add(self, x: f32, sums: Self) -> Self {
        // SAFETY: see above the impls.
        Avx512(unsafe { _mm512_fmadd_ps(self.0, _mm512_set1_ps(x), sums.0) })
    }
    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        // SAFETY: see above the impls.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) };
    }
}

// SAFETY in all methods as above.
impl Products for Avx512 {
    type Lanes = Self;

    type Line8 = __m512i;
    type Sum8 = __m512i;
    #[inline(always)]
    unsafe fn line8(from: *const u8) -> Self::Line8 {
        // SAFETY: see above the impls.
        unsafe { load_line(from) }
    }
    #[inline(always)]
    unsafe fn open8(start: i32) -> Self::Sum8 {
        // SAFETY: see above the impls.
        unsafe { _mm512_set1_epi32(start) }
    }
    #[inline(always)]
    unsafe fn add8(sums: Self::Sum8, line: Self::Line8, x: u32) -> Self::Sum8 {
        // SAFETY: see above the impls.
        unsafe { _mm512_dpbusd_epi32(sums, line, _mm512_set1_epi32(x as i32)) }
    }
    #[inline(always)]
    unsafe fn close8(sums: Self::Sum8, _start: i32) -> Self {
        // SAFETY: see above the impls.
        Avx512(unsafe { _mm512_cvtepi32_ps(sums) })
    }

    type Line4 = [__m512i; 2];
    type Sum4 = __m512i;
    #[inline(always)]
    unsafe fn line4(from: *const u8) -> Self::Line4 {
        // SAFETY: see above the impls.
        unsafe {
            let (bytes, mask) = (load_line(from), _mm512_set1_epi8(0x0f));
            [_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask)]
        }
    }
    #[inline(always)]
    unsafe fn open4(start: i32) -> Self::Sum4 {
        // SAFETY: see above the impls.
        unsafe { Self::open8(start) }
    }
    #[inline(always)]
    unsafe fn add4(sums: Self::Sum4, line: Self::Line4, x: [u32; 2]) -> Self::Sum4 {
        // SAFETY: see above the impls.
        unsafe { Self::add8(Self::add8(sums, line[0], x[0]), line[1], x[1]) }
    }
    #[inline(always)]
    unsafe fn close4(sums: Self::Sum4, start: i32) -> Self {
        // SAFETY: see above the impls.
        unsafe { Self::close8(sums, start) }
    }
}
