//! Sixteen rows side by side: what formats need of an instruction set, an instruction set a file.

pub mod portable;

#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
#[cfg(target_arch = "x86_64")]
pub mod avx_vnni;

/// Sixteen f32, one for each row of a panel.
///
/// # Safety
/// Every method needs the instruction set of the implementing type to be present, and pointers to be readable (writable
/// for `store`) for what it says; no alignment is needed.
pub trait Lanes: Copy {
    /// Panels of a tile of several tokens, and its tokens at the most: what fills the registers.
    const TILE: (usize, usize);

    /// Loads `[16]` f32.
    unsafe fn load(from: *const f32) -> Self;
    /// Stores `[16]` f32.
    unsafe fn store(self, to: *mut f32);
    /// Loads `[16]` f16, widened.
    unsafe fn load_f16(from: *const u8) -> Self;
    /// Loads `[16]` bf16, widened.
    unsafe fn load_bf16(from: *const u8) -> Self;
    /// Loads `[16 rows][2 columns]` bf16, widened: a column each.
    unsafe fn load_bf16_pairs(from: *const u8) -> [Self; 2];
    /// `self * x`
    unsafe fn scale(self, x: f32) -> Self;
    /// `self * factors + sums`
    unsafe fn mul_add(self, factors: Self, sums: Self) -> Self;
    /// `self * x + sums`
    unsafe fn scale_add(self, x: f32, sums: Self) -> Self;
    /// Asks for the cache line at an address, which need not be readable.
    unsafe fn prefetch(from: *const u8);
}

/// Products of bytes. They are whole numbers and so the same on every instruction set: `sum of (weight + bias) * x`, with
/// unsigned weights and signed x, begun at `-bias * sum of x`.
///
/// # Safety
/// As for [`Lanes`].
pub trait Products {
    /// What the sums become.
    type Lanes: Lanes;

    /// A line of int8 weights, ready to be multiplied.
    type Line8: Copy;
    /// Sums of products of int8 weights over one block.
    type Sum8: Copy;
    /// Loads `[16 rows][4 columns]` u8.
    unsafe fn line8(from: *const u8) -> Self::Line8;
    /// Sums that begin at `start`.
    unsafe fn open8(start: i32) -> Self::Sum8;
    /// Adds the products with four i8.
    unsafe fn add8(sums: Self::Sum8, line: Self::Line8, x: u32) -> Self::Sum8;
    /// The sums as f32; `start` is what they began at.
    unsafe fn close8(sums: Self::Sum8, start: i32) -> Self::Lanes;

    /// A line of int4 weights, ready to be multiplied.
    type Line4: Copy;
    /// Sums of products of int4 weights over one block.
    type Sum4: Copy;
    /// Loads `[16 rows][4]` u8 of two whole numbers each.
    unsafe fn line4(from: *const u8) -> Self::Line4;
    /// Sums that begin at `start`.
    unsafe fn open4(start: i32) -> Self::Sum4;
    /// Adds the products with eight i8: those with the low halves first.
    unsafe fn add4(sums: Self::Sum4, line: Self::Line4, x: [u32; 2]) -> Self::Sum4;
    /// The sums as f32; `start` is what they began at.
    unsafe fn close4(sums: Self::Sum4, start: i32) -> Self::Lanes;
}
