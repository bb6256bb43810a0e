//! Lanes of f32: eight in plain Rust and in AVX2, sixteen in AVX-512. Attention is written over this trait, and compiled for
//! each instruction set in `mod.rs`.

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
mod avx512;

/// A few f32 lanes.
///
/// # Safety
/// Every method needs the instruction set of the implementing type to be present, and pointers to be readable
/// (writable for `store`) for LANES elements; no alignment is needed.
pub trait Vector: Copy {
    /// How many; also the number of partial sums of every dot product.
    const LANES: usize;
    /// How many of them the processor keeps at hand.
    const REGISTERS: usize;

    /// All lanes 0.
    unsafe fn zero() -> Self;
    /// All lanes `value`.
    unsafe fn splat(value: f32) -> Self;
    /// Loads f32.
    unsafe fn load_f32(from: *const f32) -> Self;
    /// Loads bfloat16, widened exactly.
    unsafe fn load_bf16(from: *const bf16) -> Self;
    /// Loads half precision, widened exactly.
    unsafe fn load_f16(from: *const f16) -> Self;
    /// Loads signed bytes, widened exactly.
    unsafe fn load_i8(from: *const i8) -> Self;
    /// Asks for the cache line at an address, which need not be readable, to be brought into the second cache.
    unsafe fn prefetch_far(from: *const u8);
    /// Stores f32.
    unsafe fn store(self, to: *mut f32);
    /// `self * factor + addend`, lane by lane.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The sum of all lanes: `((0+4)+(2+6)) + ((1+5)+(3+7))`, where there are sixteen of `0+8`, `1+9` and so on.
    unsafe fn sum(self) -> f32;
    /// The sums of four, each the bits of `sum`, stored side by side.
    unsafe fn store_sums(four: [Self; 4], to: *mut f32);
}

/// An element type of weights, keys and values.
pub trait Element: Copy {
    /// Loads LANES of them.
    ///
    /// # Safety
    /// As for [`Vector`].
    unsafe fn load<V: Vector>(from: *const Self) -> V;
    /// Widens one.
    fn widen(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_f32(from) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_bf16(from) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_f16(from) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Element for i8 {
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_i8(from) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self as f32
    }
}

/// Lanes of Portable and of Avx2.
const EIGHT: usize = 8;

/// Lanes in an array, for processors without a path of their own; the compiler vectorises what it can.
#[derive(Clone, Copy)]
pub struct Portable([f32; EIGHT]);

// In all methods: SAFETY is the caller's promise that the pointers are good for LANES elements.
impl Vector for Portable {
    const LANES: usize = EIGHT;
    // Sixteen of half the size, as in SSE2.
    const REGISTERS: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Portable([0.0; EIGHT])
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Portable([value; EIGHT])
    }
    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> Self {
        // SAFETY: see above the impl.
        Portable(unsafe { from.cast::<[f32; EIGHT]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: see above the impl.
        Portable(unsafe { from.cast::<[bf16; EIGHT]>().read_unaligned() }.map(Element::widen))
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: see above the impl.
        Portable(unsafe { from.cast::<[f16; EIGHT]>().read_unaligned() }.map(Element::widen))
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: see above the impl.
        Portable(unsafe { from.cast::<[i8; EIGHT]>().read_unaligned() }.map(Element::widen))
    }
    #[inline(always)]
    unsafe fn prefetch_far(_from: *const u8) {}
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see above the impl.
        unsafe { to.cast::<[f32; EIGHT]>().write_unaligned(self.0) };
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        // Not f32::mul_add, which is a slow library call where the processor has no such instruction.
        let mut lanes = addend.0;
        for (lane, (a, b)) in lanes.iter_mut().zip(self.0.iter().zip(&factor.0)) {
            *lane += a * b;
        }
        Portable(lanes)
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let v = self.0;
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }
    #[inline(always)]
    unsafe fn store_sums(four: [Self; 4], to: *mut f32) {
        // SAFETY: see above the impl; four are written.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(four.map(|vector| vector.sum())) };
    }
}

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{EIGHT, Vector, bf16, f16};

    /// One 256-bit register; needs AVX2, FMA and F16C.
    #[derive(Clone, Copy)]
    pub struct Avx2(__m256);

    impl Avx2 {
        /// `i + (i+4)`.
        ///
        /// # Safety
        /// As for [`Vector`].
        #[inline(always)]
        unsafe fn half(self) -> __m128 {
            // SAFETY: the caller's promise.
            unsafe { _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0)) }
        }
    }

    /// The sums of four, `(0+2) + (1+3)` of each.
    ///
    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    pub unsafe fn sums_of_four([a, b, c, d]: [__m128; 4]) -> __m128 {
        // SAFETY: the caller's promise.
        unsafe {
            let ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
            let cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
            _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab))
        }
    }

    // In all methods: SAFETY is the caller's promise that the processor has AVX2, FMA and F16C, and that the
    // pointers are good for LANES elements; every load and store used is the unaligned one.
    impl Vector for Avx2 {
        const LANES: usize = EIGHT;
        const REGISTERS: usize = 16;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: see above the impl.
            Avx2(unsafe { _mm256_setzero_ps() })
        }
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: see above the impl.
            Avx2(unsafe { _mm256_set1_ps(value) })
        }
        #[inline(always)]
        unsafe fn load_f32(from: *const f32) -> Self {
            // SAFETY: see above the impl.
            Avx2(unsafe { _mm256_loadu_ps(from) })
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            // SAFETY: see above the impl. A bf16 is the upper half of an f32.
            Avx2(unsafe {
                let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves))
            })
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            // SAFETY: see above the impl.
            Avx2(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) })
        }
        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> Self {
            // SAFETY: see above the impl. The load is of eight bytes.
            Avx2(unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) })
        }
        #[inline(always)]
        unsafe fn prefetch_far(from: *const u8) {
            // SAFETY: see above the impl; a prefetch reads nothing. Into the second cache: in the first, it would push
            // out what the tile at hand is still being computed from.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) };
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: see above the impl.
            unsafe { _mm256_storeu_ps(to, self.0) };
        }
        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
            // SAFETY: see above the impl.
            Avx2(unsafe { _mm256_fmadd_ps(self.0, factor.0, addend.0) })
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            // SAFETY: see above the impl.
            unsafe {
                let four = self.half();
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
            }
        }
        #[inline(always)]
        unsafe fn store_sums(four: [Self; 4], to: *mut f32) {
            // SAFETY: see above the impl; four are written.
            unsafe {
                let [a, b, c, d] = four;
                _mm_storeu_ps(to, sums_of_four([a.half(), b.half(), c.half(), d.half()]));
            }
        }
    }
}
