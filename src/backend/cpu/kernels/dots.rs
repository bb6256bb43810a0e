//! Every format's dot products, over the sixteen lanes of any instruction set.

use std::marker::PhantomData;

use super::activations::Precision;
#[cfg(target_arch = "x86_64")]
use super::lanes::avx512::{self, Avx512};
use super::lanes::{Lanes, Products};
use super::tile::{BlockScale, Dot};
use crate::quant::{BLOCK, INT4_BIAS_BITS, INT8_BIAS_BITS, LINE_BYTES};

/// Weights that are widened to f32 before they meet f32 activations, N columns a line; W says how.
pub struct Widened<W, const N: usize>(PhantomData<W>);

/// How a line becomes f32.
///
/// # Safety
/// As for [`Dot`].
pub trait Widen<const N: usize> {
    /// The instruction set.
    type Lanes: Lanes;
    /// Loads LINE_BYTES bytes: a column each.
    unsafe fn widen(from: *const u8) -> [Self::Lanes; N];
}

/// f32 weights.
pub struct F32<L>(PhantomData<L>);
/// f16 weights.
pub struct F16<L>(PhantomData<L>);
/// bf16 weights.
pub struct Bf16<L>(PhantomData<L>);
/// bf16 weights, bf16 activations, where the processor multiplies them.
#[cfg(target_arch = "x86_64")]
pub struct Bf16Pairs;
/// int8 weights, int8 activations; HALF says that scales are f16, not bf16.
pub struct Int8<P, const HALF: bool>(PhantomData<P>);
/// int4 weights, int8 activations; HALF says that scales are f16, not bf16.
pub struct Int4<P, const HALF: bool>(PhantomData<P>);

// In all impls: SAFETY is the caller's promise that the instruction set is present, and that the pointers are good for what
// `Dot` says, which is what the methods of `Lanes` and `Products` ask for.

impl<L: Lanes> Widen<1> for F32<L> {
    type Lanes = L;
    #[inline(always)]
    unsafe fn widen(from: *const u8) -> [L; 1] {
        // SAFETY: see above.
        [unsafe { L::load(from.cast()) }]
    }
}

impl<L: Lanes> Widen<2> for F16<L> {
    type Lanes = L;
    #[inline(always)]
    unsafe fn widen(from: *const u8) -> [L; 2] {
        // SAFETY: see above.
        unsafe { [L::load_f16(from), L::load_f16(from.add(LINE_BYTES / 2))] }
    }
}

impl<L: Lanes> Widen<2> for Bf16<L> {
    type Lanes = L;
    #[inline(always)]
    unsafe fn widen(from: *const u8) -> [L; 2] {
        // SAFETY: see above.
        unsafe { L::load_bf16_pairs(from) }
    }
}

impl<W: Widen<N>, const N: usize> Dot for Widened<W, N> {
    const PRECISION: Precision = Precision::F32;
    const WORDS: usize = N;
    const BLOCK_LINES: usize = usize::MAX;
    type Lanes = W::Lanes;
    type Block = W::Lanes;
    type Line = [W::Lanes; N];

    #[inline(always)]
    unsafe fn open(sums: W::Lanes, _negated_sum: i32) -> Self::Block {
        sums
    }
    #[inline(always)]
    unsafe fn line(from: *const u8) -> Self::Line {
        // SAFETY: see above.
        unsafe { W::widen(from) }
    }
    #[inline(always)]
    unsafe fn multiply(block: Self::Block, line: Self::Line, words: *const u32, stride: usize) -> Self::Block {
        let mut block = block;
        for (column, weights) in line.iter().enumerate() {
            // SAFETY: see above.
            block = unsafe { weights.scale_add(f32::from_bits(*words.add(column * stride)), block) };
        }
        block
    }
    #[inline(always)]
    unsafe fn close(_sums: W::Lanes, block: W::Lanes, _scales: *const u8, _x: BlockScale) -> W::Lanes {
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

/// The scales of sixteen rows.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
unsafe fn load_scales<L: Lanes, const HALF: bool>(from: *const u8) -> L {
    // SAFETY: the caller's promise.
    unsafe { if HALF { L::load_f16(from) } else { L::load_bf16(from) } }
}

impl<P: Products, const HALF: bool> Dot for Int8<P, HALF> {
    const PRECISION: Precision = Precision::Int8;
    const WORDS: usize = 1;
    const BLOCK_LINES: usize = BLOCK / 4;
    type Lanes = P::Lanes;
    type Block = P::Sum8;
    type Line = P::Line8;

    #[inline(always)]
    unsafe fn open(_sums: P::Lanes, negated_sum: i32) -> Self::Block {
        // SAFETY: see above.
        unsafe { P::open8(negated_sum << INT8_BIAS_BITS) }
    }
    #[inline(always)]
    unsafe fn line(from: *const u8) -> Self::Line {
        // SAFETY: see above.
        unsafe { P::line8(from) }
    }
    #[inline(always)]
    unsafe fn multiply(block: Self::Block, line: Self::Line, words: *const u32, _stride: usize) -> Self::Block {
        // SAFETY: see above.
        unsafe { P::add8(block, line, *words) }
    }
    #[inline(always)]
    unsafe fn close(sums: P::Lanes, block: Self::Block, scales: *const u8, x: BlockScale) -> P::Lanes {
        // SAFETY: see above.
        unsafe {
            let scales = load_scales::<P::Lanes, HALF>(scales);
            P::close8(block, x.negated_sum << INT8_BIAS_BITS).mul_add(scales.scale(x.scale), sums)
        }
    }
}

impl<P: Products, const HALF: bool> Dot for Int4<P, HALF> {
    const PRECISION: Precision = Precision::Int8;
    const WORDS: usize = 2;
    const BLOCK_LINES: usize = BLOCK / 8;
    type Lanes = P::Lanes;
    type Block = P::Sum4;
    type Line = P::Line4;

    #[inline(always)]
    unsafe fn open(_sums: P::Lanes, negated_sum: i32) -> Self::Block {
        // SAFETY: see above.
        unsafe { P::open4(negated_sum << INT4_BIAS_BITS) }
    }
    #[inline(always)]
    unsafe fn line(from: *const u8) -> Self::Line {
        // SAFETY: see above.
        unsafe { P::line4(from) }
    }
    #[inline(always)]
    unsafe fn multiply(block: Self::Block, line: Self::Line, words: *const u32, stride: usize) -> Self::Block {
        // SAFETY: see above.
        unsafe { P::add4(block, line, [*words, *words.add(stride)]) }
    }
    #[inline(always)]
    unsafe fn close(sums: P::Lanes, block: Self::Block, scales: *const u8, x: BlockScale) -> P::Lanes {
        // SAFETY: see above.
        unsafe {
            let scales = load_scales::<P::Lanes, HALF>(scales);
            P::close4(block, x.negated_sum << INT4_BIAS_BITS).mul_add(scales.scale(x.scale), sums)
        }
    }
}
