//! AVX-VNNI: AVX2 with a product of bytes. EVEX chooses the encoding of the same instruction that AVX-512 VNNI with VL brought
//! before: tests run it on processors that have only that.

use std::arch::x86_64::*;

use super::Products;
use super::avx2::{Avx2, halves, load_line, to_f32};

/// Products with AVX-VNNI, or with EVEX AVX-512 VNNI and VL; needs what AVX2's lanes need too.
pub struct AvxVnni<const EVEX: bool>;

// In all methods: SAFETY is the caller's promise that the processor has what the type says, and that the pointers are good
// for what `Products` says.
impl<const EVEX: bool> Products for AvxVnni<EVEX> {
    type Lanes = Avx2;

    type Line8 = [__m256i; 2];
    type Sum8 = [__m256i; 2];
    #[inline(always)]
    unsafe fn line8(from: *const u8) -> Self::Line8 {
        // SAFETY: see above the impl.
        unsafe { load_line(from) }
    }
    #[inline(always)]
    unsafe fn open8(start: i32) -> Self::Sum8 {
        // SAFETY: see above the impl.
        [unsafe { _mm256_set1_epi32(start) }; 2]
    }
    #[inline(always)]
    unsafe fn add8(sums: Self::Sum8, line: Self::Line8, x: u32) -> Self::Sum8 {
        // SAFETY: see above the impl.
        unsafe {
            let x = _mm256_set1_epi32(x as i32);
            match EVEX {
                true => [_mm256_dpbusd_epi32(sums[0], line[0], x), _mm256_dpbusd_epi32(sums[1], line[1], x)],
                false => [_mm256_dpbusd_avx_epi32(sums[0], line[0], x), _mm256_dpbusd_avx_epi32(sums[1], line[1], x)],
            }
        }
    }
    #[inline(always)]
    unsafe fn close8(sums: Self::Sum8, _start: i32) -> Avx2 {
        // SAFETY: see above the impl.
        unsafe { to_f32(sums) }
    }

    type Line4 = [[__m256i; 2]; 2];
    type Sum4 = [__m256i; 2];
    #[inline(always)]
    unsafe fn line4(from: *const u8) -> Self::Line4 {
        // SAFETY: see above the impl.
        unsafe { halves(load_line(from)) }
    }
    #[inline(always)]
    unsafe fn open4(start: i32) -> Self::Sum4 {
        // SAFETY: see above the impl.
        unsafe { Self::open8(start) }
    }
    #[inline(always)]
    unsafe fn add4(sums: Self::Sum4, line: Self::Line4, x: [u32; 2]) -> Self::Sum4 {
        // SAFETY: see above the impl.
        unsafe { Self::add8(Self::add8(sums, line[0], x[0]), line[1], x[1]) }
    }
    #[inline(always)]
    unsafe fn close4(sums: Self::Sum4, start: i32) -> Avx2 {
        // SAFETY: see above the impl.
        unsafe { Self::close8(sums, start) }
    }
}
