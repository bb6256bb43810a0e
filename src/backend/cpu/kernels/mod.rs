//! The CPU's inner loops, and the one place that chooses an instruction set for them.

pub(super) mod activations;
pub(super) mod attention;
mod dots;
mod lanes;
pub(crate) mod math;
pub(super) mod matmul;
mod store;
mod tile;
mod vector;

#[cfg(test)]
mod tests;

use std::ops::Range;

pub use activations::Precision;
use activations::{Packed, Packing, Place};
use attention::QueryBlock;
use dots::{Bf16, F16, F32, Int4, Int8, Widened};
use lanes::Products;
use matmul::{Output, TokenRows};
use tile::Dot;

use crate::backend::kv::{KvBlock, KvPage};
use crate::error::{Error, Result, Status};
use crate::model::weights::{ExpertWeights, Matrix};
use crate::quant::{Format, ScaleDtype};

/// Which instruction set to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Instructions {
    /// The best the processor has.
    #[default]
    Detect,
    /// Plain Rust.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX2 and AVX-VNNI.
    AvxVnni,
    /// AVX-512 with BW, DQ, VL and VNNI. Where the processor has BF16 too, bf16 weights meet activations rounded to bf16.
    Avx512,
}

impl Instructions {
    /// Those that can be asked for, the best last.
    pub const ALL: [Instructions; 4] =
        [Instructions::Portable, Instructions::Avx2, Instructions::AvxVnni, Instructions::Avx512];

    /// Its name, for people.
    pub fn name(self) -> &'static str {
        match self {
            Instructions::Detect => "detect",
            Instructions::Portable => "portable",
            Instructions::Avx2 => "avx2",
            Instructions::AvxVnni => "avx-vnni",
            Instructions::Avx512 => "avx512",
        }
    }

    /// What it needs, for messages.
    fn needs(self) -> &'static str {
        match self {
            Instructions::Detect | Instructions::Portable => "nothing",
            Instructions::Avx2 => "AVX2, FMA and F16C",
            Instructions::AvxVnni => "AVX2, FMA, F16C and AVX-VNNI",
            Instructions::Avx512 => "AVX-512 F, BW, DQ, VL and VNNI",
        }
    }
}

/// One instruction set's kernels. The functions are safe to call: a table is only handed out where it can run.
#[derive(Clone, Copy)]
pub struct Kernels {
    /// The instruction set, for people.
    pub name: &'static str,
    /// What bf16 weights are multiplied with.
    bf16_precision: Precision,
    pack: unsafe fn(&Packing, &Place, usize, &TokenRows),
    matmul: unsafe fn(&Matrix, Range<usize>, &Packed, &Output),
    geglu: unsafe fn(&ExpertWeights, Range<usize>, &Packed, bool, &Output),
    attend: unsafe fn(&QueryBlock, Range<usize>, &Output, &Output),
    store: unsafe fn(&[f32], &mut KvPage, KvBlock, usize),
}

impl Kernels {
    /// The kernels for an instruction set, or an error if this processor does not have it.
    pub fn get(instructions: Instructions) -> Result<Kernels> {
        let found = match instructions {
            Instructions::Detect => Instructions::ALL.iter().rev().find_map(|instructions| present(*instructions)),
            wanted => present(wanted),
        };
        found.ok_or_else(|| {
            let (name, needs) = (instructions.name(), instructions.needs());
            let text = format!("the {name} kernels were asked for, but this processor lacks some of {needs}");
            Error::new(Status::InvalidArgument, text).at_key("instructions")
        })
    }

    /// What activations have to be packed as for weights of a format.
    pub fn precision(&self, format: Format) -> Precision {
        match format {
            Format::F32 | Format::F16 => Precision::F32,
            Format::Bf16 => self.bf16_precision,
            Format::Int8(_) | Format::Int4(_) => Precision::Int8,
        }
    }

    /// Packs the tokens `x` of one tile of a place; see [`Packing::pack`].
    ///
    /// # Safety
    /// The buffers of `packing` are alive, and nobody else reads or writes this tile during the call.
    pub unsafe fn pack(&self, packing: &Packing, place: &Place, tile: usize, x: &TokenRows) {
        // SAFETY: `get` hands the table out only where its instruction set is present; the rest is the caller's promise.
        unsafe { (self.pack)(packing, place, tile, x) }
    }

    /// `out[token][row] = weights[row] . x[token]` for the rows of some panels; `x` is packed as `precision` says.
    ///
    /// # Safety
    /// Nobody else touches these rows of `out` during the call, and its buffer is alive.
    pub unsafe fn matmul(&self, weights: &Matrix, panels: Range<usize>, x: &Packed, out: &Output) {
        // SAFETY: as in `pack`.
        unsafe { (self.matmul)(weights, panels, x, out) }
    }

    /// `out[token][row] = gelu(gate[row] . x[token]) * (up[row] . x[token])` for the rows of some panels of an expert.
    ///
    /// # Safety
    /// As for `matmul`.
    pub unsafe fn geglu(&self, expert: &ExpertWeights, panels: Range<usize>, x: &Packed, exact: bool, out: &Output) {
        // SAFETY: as in `pack`.
        unsafe { (self.geglu)(expert, panels, x, exact, out) }
    }

    /// Takes a range of positions into the attention of a block of query rows; see [`attention::attend`].
    ///
    /// # Safety
    /// Nobody else touches the block's rows of `state` and `out` during the call, and their buffers are alive.
    pub unsafe fn attend(&self, block: &QueryBlock, positions: Range<usize>, state: &Output, out: &Output) {
        // SAFETY: as in `matmul`.
        unsafe { (self.attend)(block, positions, state, out) }
    }

    /// Stores one head's key or value `row: [head_dim]` at position `slot` of its block of a page.
    pub fn store(&self, row: &[f32], page: &mut KvPage, block: KvBlock, slot: usize) {
        // SAFETY: `get` hands the table out only where its instruction set is present.
        unsafe { (self.store)(row, page, block, slot) }
    }
}

/// The product in the weights' format; `B` is how bf16 is multiplied.
///
/// # Safety
/// As for [`matmul::matmul`].
#[inline(always)]
unsafe fn matmul_with<P: Products, B: Dot>(weights: &Matrix, panels: Range<usize>, x: &Packed, out: &Output) {
    use matmul::matmul;
    // SAFETY: the caller's promise.
    unsafe {
        match weights.shape().format {
            Format::F32 => matmul::<Widened<F32<P::Lanes>, 1>>(weights, panels, x, out),
            Format::F16 => matmul::<Widened<F16<P::Lanes>, 2>>(weights, panels, x, out),
            Format::Bf16 => matmul::<B>(weights, panels, x, out),
            Format::Int8(groups) => match groups.scales {
                ScaleDtype::Bf16 => matmul::<Int8<P, false>>(weights, panels, x, out),
                ScaleDtype::F16 => matmul::<Int8<P, true>>(weights, panels, x, out),
            },
            Format::Int4(groups) => match groups.scales {
                ScaleDtype::Bf16 => matmul::<Int4<P, false>>(weights, panels, x, out),
                ScaleDtype::F16 => matmul::<Int4<P, true>>(weights, panels, x, out),
            },
        }
    }
}

/// As `matmul_with`, of an expert's first half.
///
/// # Safety
/// As for [`matmul::geglu`].
#[inline(always)]
unsafe fn geglu_with<P: Products, B: Dot>(
    expert: &ExpertWeights,
    panels: Range<usize>,
    x: &Packed,
    exact: bool,
    out: &Output,
) {
    use matmul::geglu;
    // SAFETY: the caller's promise.
    unsafe {
        match expert.gate.shape().format {
            Format::F32 => geglu::<Widened<F32<P::Lanes>, 1>>(expert, panels, x, exact, out),
            Format::F16 => geglu::<Widened<F16<P::Lanes>, 2>>(expert, panels, x, exact, out),
            Format::Bf16 => geglu::<B>(expert, panels, x, exact, out),
            Format::Int8(groups) => match groups.scales {
                ScaleDtype::Bf16 => geglu::<Int8<P, false>>(expert, panels, x, exact, out),
                ScaleDtype::F16 => geglu::<Int8<P, true>>(expert, panels, x, exact, out),
            },
            Format::Int4(groups) => match groups.scales {
                ScaleDtype::Bf16 => geglu::<Int4<P, false>>(expert, panels, x, exact, out),
                ScaleDtype::F16 => geglu::<Int4<P, true>>(expert, panels, x, exact, out),
            },
        }
    }
}

/// The table of one instruction set: its name, how products of bytes, products of bf16 and attention are done in it, and the features
/// its functions are compiled with, which are to be present where the table is handed out.
macro_rules! kernels {
    ($name:literal, $products:ty, $bf16:ty, $vector:ty $(, $features:literal)?) => {{
        // SAFETY of the five: called through a table that is handed out only where the features are present; what else they
        // need is their callers' promise.
        $(#[target_feature(enable = $features)])?
        unsafe fn pack(packing: &Packing, place: &Place, tile: usize, x: &TokenRows) {
            // SAFETY: see above.
            unsafe { packing.pack(place, tile, x) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn matmul(weights: &Matrix, panels: Range<usize>, x: &Packed, out: &Output) {
            // SAFETY: see above.
            unsafe { matmul_with::<$products, $bf16>(weights, panels, x, out) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn geglu(expert: &ExpertWeights, panels: Range<usize>, x: &Packed, exact: bool, out: &Output) {
            // SAFETY: see above.
            unsafe { geglu_with::<$products, $bf16>(expert, panels, x, exact, out) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn attend(block: &QueryBlock, positions: Range<usize>, state: &Output, out: &Output) {
            // SAFETY: see above.
            unsafe { attention::attend::<$vector>(block, positions, state, out) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn store(row: &[f32], page: &mut KvPage, block: KvBlock, slot: usize) {
            store::store(row, page, block, slot)
        }
        Kernels { name: $name, bf16_precision: <$bf16 as Dot>::PRECISION, pack, matmul, geglu, attend, store }
    }};
}

#[cfg(not(target_arch = "x86_64"))]
fn present(instructions: Instructions) -> Option<Kernels> {
    use lanes::portable::Portable;
    (instructions == Instructions::Portable)
        .then(|| kernels!("portable", Portable, Widened<Bf16<Portable>, 2>, vector::Portable))
}

/// The kernels of an instruction set, where the processor has it.
#[cfg(target_arch = "x86_64")]
fn present(instructions: Instructions) -> Option<Kernels> {
    use lanes::{avx_vnni::AvxVnni, avx2::Avx2, avx512::Avx512, portable::Portable};

    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    match instructions {
        Instructions::Detect => None,
        Instructions::Portable => Some(kernels!("portable", Portable, Widened<Bf16<Portable>, 2>, vector::Portable)),
        Instructions::Avx2 => {
            avx2.then(|| kernels!("avx2", Avx2, Widened<Bf16<Avx2>, 2>, vector::Avx2, "avx2,fma,f16c"))
        }
        Instructions::AvxVnni => (avx2 && is_x86_feature_detected!("avxvnni")).then(|| {
            kernels!("avx-vnni", AvxVnni<false>, Widened<Bf16<Avx2>, 2>, vector::Avx2, "avx2,fma,f16c,avxvnni")
        }),
        Instructions::Avx512 if !avx2 || !avx512() => None,
        Instructions::Avx512 if is_x86_feature_detected!("avx512bf16") => Some(kernels!(
            "avx512 with bf16",
            Avx512,
            dots::Bf16Pairs,
            vector::Avx512,
            "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"
        )),
        Instructions::Avx512 => Some(kernels!(
            "avx512",
            Avx512,
            Widened<Bf16<Avx512>, 2>,
            vector::Avx512,
            "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
        )),
    }
}

#[cfg(target_arch = "x86_64")]
fn avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
}

/// Kernels for tests that no processor is given: the twin of AVX-VNNI on processors with AVX-512, and AVX-512 without BF16.
#[cfg(all(test, target_arch = "x86_64"))]
fn variants() -> Vec<Kernels> {
    use lanes::{avx_vnni::AvxVnni, avx2::Avx2, avx512::Avx512};

    if !avx512() {
        return Vec::new();
    }
    vec![
        kernels!(
            "avx-vnni by avx512",
            AvxVnni<true>,
            Widened<Bf16<Avx2>, 2>,
            vector::Avx2,
            "avx2,fma,f16c,avx512f,avx512vl,avx512vnni"
        ),
        kernels!(
            "avx512 without bf16",
            Avx512,
            Widened<Bf16<Avx512>, 2>,
            vector::Avx512,
            "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
        ),
    ]
}
