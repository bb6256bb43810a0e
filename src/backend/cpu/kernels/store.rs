//! One head's key or value into its slot of a page.
//!
//! In: `row: [head_dim]` f32. Out: the slot's `head_dim` elements in the page's dtype and, for int8, its scale; 4
//! bytes read and 1 to 4 written per element, once per token, head and layer: nothing beside the projection that
//! gave the row. Plain arithmetic without branches, so that loops vectorise and every instruction set stores the same bits.
//!
//! Rounding is to nearest, ties to even. Infinities and what is not a number stay so in f32, bf16 and f16. An int8 row
//! with one of them gets a scale that is not a number: whatever attends to it is not a number either.

use half::{bf16, f16};

use crate::backend::kv::{KvBlock, KvDtype, KvElement, KvPage};

const INFINITY: u32 = f32::INFINITY.to_bits();
const MAGNITUDE: u32 = !(1 << 31);

/// Stores `row: [head_dim]` at position `slot` of a page's block.
#[inline(always)]
pub fn store(row: &[f32], page: &mut KvPage, block: KvBlock, slot: usize) {
    match page.geometry().dtype {
        KvDtype::F32 => elements::<f32>(row, page, block, slot).copy_from_slice(row),
        KvDtype::Bf16 => narrow(row, elements(row, page, block, slot), to_bf16),
        KvDtype::F16 => narrow(row, elements(row, page, block, slot), to_f16),
        KvDtype::Int8 => {
            let scale = to_int8(row, elements(row, page, block, slot));
            page.scales_mut(block)[slot] = scale;
        }
    }
}

/// The elements of a slot, as many as the row has.
#[inline(always)]
fn elements<'a, E: KvElement>(row: &[f32], page: &'a mut KvPage, block: KvBlock, slot: usize) -> &'a mut [E] {
    assert!(row.len() == page.geometry().head_dim);
    &mut page.elements_mut(block)[slot * row.len()..(slot + 1) * row.len()]
}

#[inline(always)]
fn narrow<E>(row: &[f32], out: &mut [E], to: impl Fn(f32) -> E) {
    for (out, value) in out.iter_mut().zip(row) {
        *out = to(*value);
    }
}

/// Numbers past the largest bf16 become infinite, as IEEE rounds; in f32 they were a rounding step away from it.
#[inline(always)]
pub fn to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    bf16::from_bits(if bits & MAGNITUDE > INFINITY { quiet } else { rounded } as u16)
}

/// Numbers past 65504, the largest f16, become 65504.
#[inline(always)]
pub fn to_f16(value: f32) -> f16 {
    const LARGEST: u32 = 65504f32.to_bits();
    const SMALLEST_NORMAL: u32 = (127 - 14) << 23;
    let sign = value.to_bits() >> 16 & 0x8000;
    let magnitude = value.to_bits() & MAGNITUDE;
    let finite = magnitude.min(LARGEST);
    // Moves the exponent's bias from 127 to 15, then rounds the 13 mantissa bits away.
    let normal = finite.wrapping_sub((127 - 15) << 23).wrapping_add(0xfff + (finite >> 13 & 1)) >> 13;
    // Adding 1/2 makes the processor round to multiples of 2^-24, the subnormals' step; the sum's low bits count them.
    let subnormal = (f32::from_bits(finite) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let rounded = if finite < SMALLEST_NORMAL { subnormal } else { normal };
    let special = if magnitude > INFINITY { 0x7e00 } else { 0x7c00 };
    f16::from_bits((sign | if magnitude >= INFINITY { special } else { rounded }) as u16)
}

/// Symmetric int8: returns the scale, absmax / 127. Zeros, and rows whose absmax is below 1.5e-36, where the scale
/// would lose its digits, have scale 0.
#[inline(always)]
pub fn to_int8(row: &[f32], out: &mut [i8]) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding and subtracting it rounds to a whole number.
    // As whole numbers, magnitudes have the same order, and what is not a number comes last.
    let largest = row.iter().fold(0, |max, value| (value.to_bits() & MAGNITUDE).max(max));
    let absmax = f32::from_bits(largest);
    let (scale, inverse) = match absmax / 127.0 {
        _ if largest >= INFINITY => (f32::NAN, 0.0),
        scale if scale < f32::MIN_POSITIVE => (0.0, 0.0),
        scale => (scale, 127.0 / absmax),
    };
    for (out, value) in out.iter_mut().zip(row) {
        *out = ((value * inverse + ROUND) - ROUND) as i32 as i8;
    }
    scale
}
