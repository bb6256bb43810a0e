//! AVX2 with FMA and F16C: two registers of eight rows.

use std::arch::x86_64::*;

use super::{Lanes, Products};

/// Two 256-bit registers of f32; needs AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub struct Avx2([__m256; 2]);

/// Eight bf16 in the low halves of words, widened: a bf16 is the upper half of an f32.
///
/// # Safety
/// AVX2 is present.
#[inline(always)]
unsafe fn widen_bf16(words: __m256i) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)) }
}

/// The whole numbers of a block as f32; shared with `avx_vnni.rs`.
///
/// # Safety
/// AVX2 is present.
#[inline(always)]
pub unsafe fn to_f32(sums: [__m256i; 2]) -> Avx2 {
    // SAFETY: the caller's promise.
    Avx2(sums.map(|sums| unsafe { _mm256_cvtepi32_ps(sums) }))
}

/// Loads 64 bytes.
///
/// # Safety
/// AVX2 is present; `from` is readable.
#[inline(always)]
pub unsafe fn load_line(from: *const u8) -> [__m256i; 2] {
    // SAFETY: the caller's promise.
    unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
}

/// The low and the high halves of bytes.
///
/// # Safety
/// AVX2 is present.
#[inline(always)]
pub unsafe fn halves(bytes: [__m256i; 2]) -> [[__m256i; 2]; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let mask = _mm256_set1_epi8(0x0f);
        let low = bytes.map(|bytes| _mm256_and_si256(bytes, mask));
        let high = bytes.map(|bytes| _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask));
        [low, high]
    }
}

// In all methods: SAFETY is the caller's promise that the processor has AVX2, FMA and F16C, and that the pointers are good
// for what the traits say; every load and store used is the unaligned one, and a prefetch may be of any address.
impl Lanes for Avx2 {
    const TILE: (usize, usize) = (1, 4);

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see above the impls.
        Avx2(unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see above the impls.
        unsafe {
            _mm256_storeu_ps(to, self.0[0]);
            _mm256_storeu_ps(to.add(8), self.0[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self {
        // SAFETY: see above the impls.
        Avx2(unsafe {
            let halves = [_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(16).cast())];
            halves.map(|halves| _mm256_cvtph_ps(halves))
        })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self {
        // SAFETY: see above the impls.
        Avx2(unsafe {
            let halves = [_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(16).cast())];
            halves.map(|halves| widen_bf16(_mm256_cvtepu16_epi32(halves)))
        })
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(from: *const u8) -> [Self; 2] {
        // SAFETY: see above the impls.
        unsafe {
            let pairs = load_line(from);
            let upper = _mm256_set1_epi32(0xffff_0000u32 as i32);
            let second = pairs.map(|pairs| _mm256_castsi256_ps(_mm256_and_si256(pairs, upper)));
            [Avx2(pairs.map(|pairs| widen_bf16(pairs))), Avx2(second)]
        }
    }
    #[inline(always)]
    unsafe fn scale(self, x: f32) -> Self {
        // SAFETY: see above the impls.
        Avx2(self.0.map(|lanes| unsafe { _mm256_mul_ps(lanes, _mm256_set1_ps(x)) }))
    }
    #[inline(always)]
    unsafe fn mul_add(self, factors: Self, sums: Self) -> Self {
        // SAFETY: see above the impls.
        Avx2(unsafe {
            [_mm256_fmadd_ps(self.0[0], factors.0[0], sums.0[0]), _mm256_fmadd_ps(self.0[1], factors.0[1], sums.0[1])]
        })
    }
    #[inline(always)]
    unsafe fn scale_add(self, x: f32, sums: Self) -> Self {
        // SAFETY: see above the impls.
        unsafe { self.mul_add(Avx2([_mm256_set1_ps(x); 2]), sums) }
    }
    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        // SAFETY: see above the impls.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) };
    }
}

// SAFETY in all methods as above.
impl Products for Avx2 {
    type Lanes = Self;

    /// Columns 0 and 2, and 1 and 3, of each row, in words of two u16: there is no product of bytes that cannot overflow.
    type Line8 = [[__m256i; 2]; 2];
    type Sum8 = [__m256i; 2];
    #[inline(always)]
    unsafe fn line8(from: *const u8) -> Self::Line8 {
        // SAFETY: see above the impls.
        unsafe {
            let bytes = load_line(from);
            let low = _mm256_set1_epi16(0xff);
            [bytes.map(|bytes| _mm256_and_si256(bytes, low)), bytes.map(|bytes| _mm256_srli_epi16::<8>(bytes))]
        }
    }
    #[inline(always)]
    unsafe fn open8(start: i32) -> Self::Sum8 {
        // SAFETY: see above the impls.
        [unsafe { _mm256_set1_epi32(start) }; 2]
    }
    #[inline(always)]
    unsafe fn add8(sums: Self::Sum8, line: Self::Line8, x: u32) -> Self::Sum8 {
        // SAFETY: see above the impls.
        unsafe {
            let x = _mm256_set1_epi32(x as i32);
            let odd = _mm256_srai_epi16::<8>(x);
            let even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
            let [mut low, mut high] = sums;
            low = _mm256_add_epi32(low, _mm256_madd_epi16(line[0][0], even));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(line[0][1], even));
            low = _mm256_add_epi32(low, _mm256_madd_epi16(line[1][0], odd));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(line[1][1], odd));
            [low, high]
        }
    }
    #[inline(always)]
    unsafe fn close8(sums: Self::Sum8, _start: i32) -> Self {
        // SAFETY: see above the impls.
        unsafe { to_f32(sums) }
    }

    type Line4 = [[__m256i; 2]; 2];
    /// Two i16 for each row, which a block cannot overflow: 8 additions of two products of 15 by 127 at the most.
    type Sum4 = [__m256i; 2];
    #[inline(always)]
    unsafe fn line4(from: *const u8) -> Self::Line4 {
        // SAFETY: see above the impls.
        unsafe { halves(load_line(from)) }
    }
    #[inline(always)]
    unsafe fn open4(_start: i32) -> Self::Sum4 {
        // SAFETY: see above the impls.
        [unsafe { _mm256_setzero_si256() }; 2]
    }
    #[inline(always)]
    unsafe fn add4(sums: Self::Sum4, line: Self::Line4, x: [u32; 2]) -> Self::Sum4 {
        let [mut low, mut high] = sums;
        for (line, x) in line.iter().zip(x) {
            // SAFETY: see above the impls.
            unsafe {
                let x = _mm256_set1_epi32(x as i32);
                low = _mm256_add_epi16(low, _mm256_maddubs_epi16(line[0], x));
                high = _mm256_add_epi16(high, _mm256_maddubs_epi16(line[1], x));
            }
        }
        [low, high]
    }
    #[inline(always)]
    unsafe fn close4(sums: Self::Sum4, start: i32) -> Self {
        // SAFETY: see above the impls.
        unsafe {
            let (ones, start) = (_mm256_set1_epi16(1), _mm256_set1_epi32(start));
            to_f32(sums.map(|sums| _mm256_add_epi32(_mm256_madd_epi16(sums, ones), start)))
        }
    }
}
