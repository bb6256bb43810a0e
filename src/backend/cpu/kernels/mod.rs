//! The CPU's inner loops, and the one place that chooses an instruction set for them.

pub(super) mod attention;
pub(crate) mod math;
pub(super) mod matmul;
mod store;
mod vector;

#[cfg(test)]
mod tests;

use std::ops::Range;

use attention::QueryBlock;
use matmul::{Output, TokenRows};
use vector::{Portable, Vector};

use crate::backend::kv::{KvBlock, KvPage};
use crate::error::{Error, Result, Status};
use crate::model::weights::{Elements, ExpertWeights, Matrix};

/// Which instruction set to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Instructions {
    /// The best the processor has.
    #[default]
    Detect,
    /// Plain Rust.
    Portable,
    /// AVX2 with FMA and F16C; an error where the processor lacks one of them.
    Avx2,
    /// AVX-512 F, BW, VL and DQ with what AVX2 has; an error where the processor lacks one of them.
    Avx512,
}

/// One instruction set's kernels. The functions are safe to call: a table is only handed out where it can run.
#[derive(Clone, Copy)]
pub struct Kernels {
    /// The instruction set, for people.
    pub name: &'static str,
    matmul: unsafe fn(&Matrix, Range<usize>, &TokenRows, &Output),
    matmul_f32: unsafe fn(&[f32], Range<usize>, &TokenRows, &Output),
    geglu: unsafe fn(&ExpertWeights, Range<usize>, &TokenRows, bool, &Output),
    attend: unsafe fn(&QueryBlock, Range<usize>, &Output, &Output),
    store: unsafe fn(&[f32], &mut KvPage, KvBlock, usize),
}

impl Kernels {
    /// The kernels for an instruction set, or an error if this processor does not have it.
    pub fn get(instructions: Instructions) -> Result<Kernels> {
        let portable = Kernels {
            name: "portable",
            matmul: matmul_with::<Portable>,
            matmul_f32: matmul::matmul::<Portable, f32>,
            geglu: geglu_with::<Portable>,
            attend: attention::attend::<Portable>,
            store: store::store,
        };
        match (instructions, avx2()) {
            (Instructions::Avx512, _) => avx512().ok_or_else(|| {
                Error::new(
                    Status::InvalidArgument,
                    "the AVX-512 kernels were asked for, but this processor lacks AVX-512 F, BW, VL or DQ",
                )
                .at_key("instructions")
            }),
            (Instructions::Detect, _) if avx512().is_some() => Ok(avx512().unwrap_or(portable)),
            (Instructions::Portable, _) | (Instructions::Detect, None) => Ok(portable),
            (Instructions::Avx2 | Instructions::Detect, Some(avx2)) => Ok(avx2),
            (Instructions::Avx2, None) => Err(Error::new(
                Status::InvalidArgument,
                "the AVX2 kernels were asked for, but this processor lacks AVX2, FMA or F16C",
            )
            .at_key("instructions")),
        }
    }

    /// `out[token][row] = weights[row] . x[token]` for the given rows.
    ///
    /// # Safety
    /// Nobody else touches these rows of `out` during the call, and its buffer is alive.
    pub unsafe fn matmul(&self, weights: &Matrix, rows: Range<usize>, x: &TokenRows, out: &Output) {
        // SAFETY: `get` hands the table out only where its instruction set is present; the rest is the caller's promise.
        unsafe { (self.matmul)(weights, rows, x, out) }
    }

    /// As `matmul`, for weights `[rows, x.columns]` that are f32 whatever the checkpoint's dtype: the router.
    ///
    /// # Safety
    /// As for `matmul`.
    pub unsafe fn matmul_f32(&self, weights: &[f32], rows: Range<usize>, x: &TokenRows, out: &Output) {
        // SAFETY: as in `matmul`.
        unsafe { (self.matmul_f32)(weights, rows, x, out) }
    }

    /// `out[token][row] = gelu(gate[row] . x[token]) * (up[row] . x[token])` for the given rows of an expert.
    ///
    /// # Safety
    /// As for `matmul`.
    pub unsafe fn geglu(&self, expert: &ExpertWeights, rows: Range<usize>, x: &TokenRows, exact: bool, out: &Output) {
        // SAFETY: as in `matmul`.
        unsafe { (self.geglu)(expert, rows, x, exact, out) }
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

/// # Safety
/// As for [`matmul::matmul`].
#[inline(always)]
unsafe fn matmul_with<V: Vector>(weights: &Matrix, rows: Range<usize>, x: &TokenRows, out: &Output) {
    // SAFETY: the caller's promise.
    unsafe {
        match &weights.elements {
            Elements::Bf16(elements) => matmul::matmul::<V, _>(elements, rows, x, out),
            Elements::F16(elements) => matmul::matmul::<V, _>(elements, rows, x, out),
            Elements::F32(elements) => matmul::matmul::<V, _>(elements, rows, x, out),
        }
    }
}

/// # Safety
/// As for [`matmul::geglu`].
#[inline(always)]
unsafe fn geglu_with<V: Vector>(expert: &ExpertWeights, rows: Range<usize>, x: &TokenRows, exact: bool, out: &Output) {
    use Elements::{Bf16, F16, F32};
    // SAFETY: the caller's promise.
    unsafe {
        match (&expert.gate.elements, &expert.up.elements) {
            (Bf16(gate), Bf16(up)) => matmul::geglu::<V, _>(gate, up, rows, x, exact, out),
            (F16(gate), F16(up)) => matmul::geglu::<V, _>(gate, up, rows, x, exact, out),
            (F32(gate), F32(up)) => matmul::geglu::<V, _>(gate, up, rows, x, exact, out),
            _ => unreachable!("weights.rs keeps an expert's gate and up in one dtype"),
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn avx2() -> Option<Kernels> {
    None
}

#[cfg(not(target_arch = "x86_64"))]
fn avx512() -> Option<Kernels> {
    None
}

#[cfg(target_arch = "x86_64")]
fn avx512() -> Option<Kernels> {
    use vector::Avx512;

    // SAFETY: called through a table that `avx512` hands out only after detection.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
    unsafe fn attend(block: &QueryBlock, positions: Range<usize>, state: &Output, out: &Output) {
        // SAFETY: the instruction set is enabled on this function; the rest is the caller's promise.
        unsafe { attention::attend::<Avx512>(block, positions, state, out) }
    }

    let present = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq");
    avx2().filter(|_| present).map(|avx2| Kernels { name: "avx512", attend, ..avx2 })
}

#[cfg(target_arch = "x86_64")]
fn avx2() -> Option<Kernels> {
    use vector::Avx2;

    // SAFETY of the five: called through a table that `avx2` hands out only after detection.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn matmul(weights: &Matrix, rows: Range<usize>, x: &TokenRows, out: &Output) {
        // SAFETY: the instruction set is enabled on this function; the rest is the caller's promise.
        unsafe { matmul_with::<Avx2>(weights, rows, x, out) }
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn matmul_f32(weights: &[f32], rows: Range<usize>, x: &TokenRows, out: &Output) {
        // SAFETY: as above.
        unsafe { matmul::matmul::<Avx2, f32>(weights, rows, x, out) }
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn geglu(expert: &ExpertWeights, rows: Range<usize>, x: &TokenRows, exact: bool, out: &Output) {
        // SAFETY: as above.
        unsafe { geglu_with::<Avx2>(expert, rows, x, exact, out) }
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn attend(block: &QueryBlock, positions: Range<usize>, state: &Output, out: &Output) {
        // SAFETY: as above.
        unsafe { attention::attend::<Avx2>(block, positions, state, out) }
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store(row: &[f32], page: &mut KvPage, block: KvBlock, slot: usize) {
        store::store(row, page, block, slot)
    }

    let present =
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    present.then_some(Kernels { name: "avx2", matmul, matmul_f32, geglu, attend, store })
}
