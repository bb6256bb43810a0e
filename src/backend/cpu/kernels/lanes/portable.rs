//! Plain Rust: loops over sixteen rows, which the compiler vectorises.

use half::f16;

use super::{Lanes, Products};
use crate::quant::PANEL_ROWS;

/// Sixteen numbers; needs no instruction set.
#[derive(Clone, Copy)]
pub struct Portable([f32; PANEL_ROWS]);

/// # Safety
/// `from` is readable for a T, for which any bytes do.
#[inline(always)]
unsafe fn read<T>(from: *const u8) -> T {
    // SAFETY: the caller's promise.
    unsafe { from.cast::<T>().read_unaligned() }
}

#[inline(always)]
fn widen_bf16(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// Adds the products of four unsigned and four signed bytes of each row.
#[inline(always)]
fn add_products(mut sums: [i32; PANEL_ROWS], weights: &[[u8; 4]; PANEL_ROWS], x: u32) -> [i32; PANEL_ROWS] {
    let x = x.to_le_bytes().map(|byte| byte as i8 as i32);
    for (sum, weights) in sums.iter_mut().zip(weights) {
        *sum += (weights[0] as i32 * x[0] + weights[1] as i32 * x[1])
            + (weights[2] as i32 * x[2] + weights[3] as i32 * x[3]);
    }
    sums
}

// In all methods: SAFETY is the caller's promise that the pointers are good for what the traits say.
impl Lanes for Portable {
    const TILE: (usize, usize) = (1, 2);

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see above the impls.
        Portable(unsafe { read(from.cast()) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see above the impls.
        unsafe { to.cast::<[f32; PANEL_ROWS]>().write_unaligned(self.0) };
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self {
        // SAFETY: see above the impls.
        Portable(unsafe { read::<[u16; PANEL_ROWS]>(from) }.map(|bits| f16::from_bits(bits).to_f32()))
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self {
        // SAFETY: see above the impls.
        Portable(unsafe { read::<[u16; PANEL_ROWS]>(from) }.map(widen_bf16))
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(from: *const u8) -> [Self; 2] {
        // SAFETY: see above the impls.
        let pairs: [u32; PANEL_ROWS] = unsafe { read(from) };
        [
            Portable(pairs.map(|pair| widen_bf16(pair as u16))),
            Portable(pairs.map(|pair| widen_bf16((pair >> 16) as u16))),
        ]
    }
    #[inline(always)]
    unsafe fn scale(self, x: f32) -> Self {
        Portable(self.0.map(|lane| lane * x))
    }
    #[inline(always)]
    unsafe fn mul_add(self, factors: Self, sums: Self) -> Self {
        // Not f32::mul_add, which is a slow library call where the processor has no such instruction.
        Portable(std::array::from_fn(|row| sums.0[row] + self.0[row] * factors.0[row]))
    }
    #[inline(always)]
    unsafe fn scale_add(self, x: f32, sums: Self) -> Self {
        Portable(std::array::from_fn(|row| sums.0[row] + self.0[row] * x))
    }
    #[inline(always)]
    unsafe fn prefetch(_from: *const u8) {}
}

// SAFETY in all methods as above.
impl Products for Portable {
    type Lanes = Self;

    type Line8 = [[u8; 4]; PANEL_ROWS];
    type Sum8 = [i32; PANEL_ROWS];
    #[inline(always)]
    unsafe fn line8(from: *const u8) -> Self::Line8 {
        // SAFETY: see above the impls.
        unsafe { read(from) }
    }
    #[inline(always)]
    unsafe fn open8(start: i32) -> Self::Sum8 {
        [start; PANEL_ROWS]
    }
    #[inline(always)]
    unsafe fn add8(sums: Self::Sum8, line: Self::Line8, x: u32) -> Self::Sum8 {
        add_products(sums, &line, x)
    }
    #[inline(always)]
    unsafe fn close8(sums: Self::Sum8, _start: i32) -> Self {
        Portable(sums.map(|sum| sum as f32))
    }

    type Line4 = [[[u8; 4]; PANEL_ROWS]; 2];
    type Sum4 = [i32; PANEL_ROWS];
    #[inline(always)]
    unsafe fn line4(from: *const u8) -> Self::Line4 {
        // SAFETY: see above the impls.
        let line: [[u8; 4]; PANEL_ROWS] = unsafe { read(from) };
        [line.map(|bytes| bytes.map(|byte| byte & 0x0f)), line.map(|bytes| bytes.map(|byte| byte >> 4))]
    }
    #[inline(always)]
    unsafe fn open4(start: i32) -> Self::Sum4 {
        [start; PANEL_ROWS]
    }
    #[inline(always)]
    unsafe fn add4(sums: Self::Sum4, line: Self::Line4, x: [u32; 2]) -> Self::Sum4 {
        add_products(add_products(sums, &line[0], x[0]), &line[1], x[1])
    }
    #[inline(always)]
    unsafe fn close4(sums: Self::Sum4, _start: i32) -> Self {
        Portable(sums.map(|sum| sum as f32))
    }
}
