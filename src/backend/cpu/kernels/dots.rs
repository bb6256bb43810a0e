//! Every format's dot products, over the sixteen lanes of any instruction set.

use std::marker::PhantomData;

use super::activations::Precision;
use super::lanes::Lanes;
#[cfg(target_arch = "x86_64")]
use super::lanes::avx512::{self, Avx512};
use super::tile::{BlockScale, Dot};
use crate::quant::{BLOCK, INT4_BIAS_BITS, INT8_BIAS_BITS, LINE_BYTES};

/// f32 weights, f32 activations.
pub struct F32<L>(PhantomData<L>);
/// f16 weights, f32 activations.
pub struct F16<L>(PhantomData<L>);
/// bf16 weights, f32 activations.
pub struct Bf16<L>(PhantomData<L>);
/// bf16 weights, bf16 activations, where the processor multiplies them.
#[cfg(target_arch = "x86_64")]
pub struct Bf16Pairs;
/// int8 weights, int8 activations; HALF says that scales are f16, not bf16.
pub struct Int8<L, const HALF: bool>(PhantomData<L>);
/// int4 weights, int8 activations; HALF says that scales are f16, not bf16.
pub struct Int4<L, const HALF: bool>(PhantomData<L>);

// In all impls: SAFETY is the caller's promise that L's instruction set is present, and that the pointers are good for what
// `Dot` says, which is what the methods of `Lanes` ask for.

impl<L: Lanes> Dot for F32<L> {
    const PRECISION: Precision = Precision::F32;
    const WORDS: usize = 1;
    const BLOCK_LINES: usize = usize::MAX;
    type Lanes = L;
    type Block = L;
    type Line = L;

    #[inline(always)]
    unsafe fn open(sums: L, _negated_sum: i32) -> Self::Block {
        sums
    }
    #[inline(always)]
    unsafe fn line(from: *const u8) -> Self::Line {
        // SAFETY: see above.
        unsafe { L::load(from.cast()) }
    }
    #[inline(always)]
    unsafe fn multiply(block: Self::Block, line: Self::Line, words: *const u32, _stride: usize) -> Self::Block {
        // SAFETY: see above.
        unsafe { line.scale_add(f32::from_bits(*words), block) }
    }
    #[inline(always)]
    unsafe fn close(_sums: L, block: L, _scales: *const u8, _x: BlockScale) -> L {
        block
    }
}

impl<L: Lanes> Dot for F16<L> {
    const PRECISION: Precision = Precision::F32;
    const WORDS: usize = 2;
    const BLOCK_LINES: usize = usize::MAX;
    type Lanes = L;
    type Block = L;
    type Line = [L; 2];

    #[inline(always)]
    unsafe fn open(sums: L, _negated_sum: i32) -> Self::Block {
        sums
    }
    #[inline(always)]
    unsafe fn line(from: *const u8) -> Self::Line {
        // SAFETY: see above.
        unsafe { [L::load_f16(from), L::load_f16(from.add(LINE_BYTES / 2))] }
    }
    #[inline(always)]
    unsafe fn multiply(block: Self::Block, line: Self::Line, words: *const u32, stride: usize) -> Self::Block {
        // SAFETY: see above.
        unsafe {
            line[1].scale_add(f32::from_bits(*words.add(stride)), line[0].scale_add(f32::from_bits(*words), block))
        }
    }
    #[inline(always)]
    unsafe fn close(_sums: L, block: L, _scales: *const u8, _x: BlockScale) -> L {
        block
    }
}

impl<L: Lanes> Dot for Bf16<L> {
    const PRECISION: Precision = Precision::F32;
    const WORDS: usize = 2;
    const BLOCK_LINES: usize = usize::MAX;
    type Lanes = L;
    type Block = L;
    type Line = [L; 2];

    #[inline(always)]
    unsafe fn open(sums: L, _negated_sum: i32) -> Self::Block {
        sums
    }
    #[inline(always)]
    unsafe fn line(from: *const u8) -> Self::Line {
        // SAFETY: see above.
        unsafe { L::load_bf16_pairs(from) }
    }
    #[inline(always)]
    unsafe fn multiply(block: Self::Block, line: Self::Line, words: *const u32, stride: usize) -> Self::Block {
        // SAFETY: see above.
        unsafe {
            line[1].scale_add(f32::from_bits(*words.add(stride)), line[0].scale_add(f32::from_bits(*words), block))
        }
    }
    #[inline(always)]
    unsafe fn close(_sums: L, block: L, _scales: *const u8, _x: BlockScale) -> L {
        block
    }
}

#[cfg(target_arch = "x86_64")]
impl Dot for Bf16Pairs {
    const PRECISION: Precision = Precision::Bf16;
    const WORDS: usize = 1;
    const BLOCK_LINES: usize = usize::MAX;
    type Lanes = Avx512;
    type Block = Avx512;
    type Line = std::arch::x86_64::__m512i;

    #[inline(always)]
    unsafe fn open(sums: Avx512, _negated_sum: i32) -> Self::Block {
        sums
    }
    #[inline(always)]
    unsafe fn line(from: *const u8) -> Self::Line {
        // SAFETY: see above.
        unsafe { avx512::load_line(from) }
    }
    #[inline(always)]
    unsafe fn multiply(block: Self::Block, line: Self::Line, words: *const u32, _stride: usize) -> Self::Block {
        // SAFETY: see above.
        unsafe { avx512::add_bf16_pairs(block, line, *words) }
    }
    #[inline(always)]
    unsafe fn close(_sums: Avx512, block: Avx512, _scales: *const u8, _x: BlockScale) -> Avx512 {
        block
    }
}

impl<L: Lanes, const HALF: bool> Dot for Int8<L, HALF> {
    const PRECISION: Precision = Precision::Int8;
    const WORDS: usize = 1;
    const BLOCK_LINES: usize = BLOCK / 4;
    type Lanes = L;
    type Block = L::Sum8;
    type Line = L::Line8;

    #[inline(always)]
    unsafe fn open(_sums: L, negated_sum: i32) -> Self::Block {
        // SAFETY: see above.
        unsafe { L::open8(negated_sum << INT8_BIAS_BITS) }
    }
    #[inline(always)]
    unsafe fn line(from: *const u8) -> Self::Line {
        // SAFETY: see above.
        unsafe { L::line8(from) }
    }
    #[inline(always)]
    unsafe fn multiply(block: Self::Block, line: Self::Line, words: *const u32, _stride: usize) -> Self::Block {
        // SAFETY: see above.
        unsafe { L::add8(block, line, *words) }
    }
    #[inline(always)]
    unsafe fn close(sums: L, block: Self::Block, scales: *const u8, x: BlockScale) -> L {
        // SAFETY: see above.
        unsafe {
            let scales = if HALF { L::load_f16(scales) } else { L::load_bf16(scales) };
            L::close8(block, x.negated_sum << INT8_BIAS_BITS).mul_add(scales.scale(x.scale), sums)
        }
    }
}

impl<L: Lanes, const HALF: bool> Dot for Int4<L, HALF> {
    const PRECISION: Precision = Precision::Int8;
    const WORDS: usize = 2;
    const BLOCK_LINES: usize = BLOCK / 8;
    type Lanes = L;
    type Block = L::Sum4;
    type Line = L::Line4;

    #[inline(always)]
    unsafe fn open(_sums: L, negated_sum: i32) -> Self::Block {
        // SAFETY: see above.
        unsafe { L::open4(negated_sum << INT4_BIAS_BITS) }
    }
    #[inline(always)]
    unsafe fn line(from: *const u8) -> Self::Line {
        // SAFETY: see above.
        unsafe { L::line4(from) }
    }
    #[inline(always)]
    unsafe fn multiply(block: Self::Block, line: Self::Line, words: *const u32, stride: usize) -> Self::Block {
        // SAFETY: see above.
        unsafe { L::add4(block, line, [*words, *words.add(stride)]) }
    }
    #[inline(always)]
    unsafe fn close(sums: L, block: Self::Block, scales: *const u8, x: BlockScale) -> L {
        // SAFETY: see above.
        unsafe {
            let scales = if HALF { L::load_f16(scales) } else { L::load_bf16(scales) };
            L::close4(block, x.negated_sum << INT4_BIAS_BITS).mul_add(scales.scale(x.scale), sums)
        }
    }
}
