//! The CPU's inner loops, and the one place that chooses an instruction set for them.

pub(super) mod attention;
pub(crate) mod math;
pub(super) mod matmul;
mod store;
mod vector;

#[cfg(test)]
mod tests;

use std::ops::Range;

use attention::HeadView;
use matmul::{Output, TokenRows};
use vector::Portable;

use crate::backend::kv::{KvBlock, KvPage};
use crate::error::{Error, Result, Status};
use crate::model::weights::{ExpertWeights, Matrix};

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
}

/// One instruction set's kernels. The functions are safe to call: a table is only handed out where it can run.
#[derive(Clone, Copy)]
pub struct Kernels {
    /// The instruction set, for people.
    pub name: &'static str,
    matmul: unsafe fn(&Matrix, Range<usize>, &TokenRows, &Output),
    geglu: unsafe fn(&ExpertWeights, Range<usize>, &TokenRows, bool, &Output),
    attend: unsafe fn(&HeadView, &mut [f32], &mut [f32]),
    store: unsafe fn(&[f32], &mut KvPage, KvBlock, usize),
}

impl Kernels {
    /// The kernels for an instruction set, or an error if this processor does not have it.
    pub fn get(instructions: Instructions) -> Result<Kernels> {
        let portable = Kernels {
            name: "portable",
            matmul: matmul_with,
            geglu: geglu_with,
            attend: attention::attend::<Portable>,
            store: store::store,
        };
        match (instructions, avx2()) {
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

    /// `out[token][row] = gelu(gate[row] . x[token]) * (up[row] . x[token])` for the given rows of an expert.
    ///
    /// # Safety
    /// As for `matmul`.
    pub unsafe fn geglu(&self, expert: &ExpertWeights, rows: Range<usize>, x: &TokenRows, exact: bool, out: &Output) {
        // SAFETY: as in `matmul`.
        unsafe { (self.geglu)(expert, rows, x, exact, out) }
    }

    /// One head's attention for one token into `out: [head_dim]`; `scores` is scratch for all its positions.
    pub fn attend(&self, view: &HeadView, scores: &mut [f32], out: &mut [f32]) {
        // SAFETY: `get` hands the table out only where its instruction set is present.
        unsafe { (self.attend)(view, scores, out) }
    }

    /// Stores one head's key or value `row: [head_dim]` at position `slot` of its block of a page.
    pub fn store(&self, row: &[f32], page: &mut KvPage, block: KvBlock, slot: usize) {
        // SAFETY: as in `attend`.
        unsafe { (self.store)(row, page, block, slot) }
    }
}

fn naive(weights: &Matrix, rows: Range<usize>, x: &TokenRows, mut see: impl FnMut(usize, usize, f32)) {
    let mut row_numbers = vec![0.0; weights.columns()];
    for row in rows {
        weights.read_row(row, &mut row_numbers);
        for token in 0..x.count {
            see(token, row, row_numbers.iter().zip(x.row(token)).map(|(w, x)| w * x).sum());
        }
    }
}

unsafe fn matmul_with(weights: &Matrix, rows: Range<usize>, x: &TokenRows, out: &Output) {
    naive(weights, rows, x, |token, row, sum| unsafe { out.write(token, row, sum) });
}

unsafe fn geglu_with(expert: &ExpertWeights, rows: Range<usize>, x: &TokenRows, exact: bool, out: &Output) {
    use math::{gelu_erf, gelu_tanh};
    let mut gates = Vec::new();
    naive(&expert.gate, rows.clone(), x, |_, _, gate| gates.push(if exact { gelu_erf(gate) } else { gelu_tanh(gate) }));
    let mut gates = gates.into_iter();
    naive(&expert.up, rows, x, |token, row, up| unsafe { out.write(token, row, gates.next().unwrap_or(0.0) * up) });
}

#[cfg(not(target_arch = "x86_64"))]
fn avx2() -> Option<Kernels> {
    None
}

#[cfg(target_arch = "x86_64")]
fn avx2() -> Option<Kernels> {
    use vector::Avx2;

    // SAFETY of the four: called through a table that `avx2` hands out only after detection.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn matmul(weights: &Matrix, rows: Range<usize>, x: &TokenRows, out: &Output) {
        // SAFETY: the instruction set is enabled on this function; the rest is the caller's promise.
        unsafe { matmul_with(weights, rows, x, out) }
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn geglu(expert: &ExpertWeights, rows: Range<usize>, x: &TokenRows, exact: bool, out: &Output) {
        // SAFETY: as above.
        unsafe { geglu_with(expert, rows, x, exact, out) }
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn attend(view: &HeadView, scores: &mut [f32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { attention::attend::<Avx2>(view, scores, out) }
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store(row: &[f32], page: &mut KvPage, block: KvBlock, slot: usize) {
        store::store(row, page, block, slot)
    }

    let present =
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    present.then_some(Kernels { name: "avx2", matmul, geglu, attend, store })
}
