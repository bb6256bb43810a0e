//! The CPU's inner loops, and the one place that chooses an instruction set for them.

pub(super) mod activations;
pub(super) mod attention;
mod dots;
mod lanes;
pub(crate) mod math;
pub(super) mod matmul;
pub(super) mod rows;
mod store;
pub(super) mod strips;
mod tile;
mod vector;

#[cfg(test)]
mod tests;

use std::ops::Range;

pub use activations::Precision;
use activations::{Packed, Packing, Place};
use attention::QueryBlock;
use dots::{Bf16, F16, F32, Int4, Int8, Widened};
use matmul::{Output, Panels, Sums, TileKernel, TokenRows};
use rows::RowWork;
use strips::{AddStrips, Strips};
use tile::{Dot, Span, TokenPart};

use crate::backend::kv::{KvBlock, KvPage};
use crate::error::{Error, Result, Status};
use crate::model::weights::{ExpertWeights, Matrix};
use crate::quant::{Format, Groups, ScaleDtype};

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
    tiles: TileKernels,
    pack: unsafe fn(&Packing, &Place, usize, &TokenRows),
    matmul: unsafe fn(TileKernel, &Matrix, Range<usize>, &Packed, &Output),
    geglu: unsafe fn(TileKernel, &ExpertWeights, Range<usize>, &Packed, bool, &Output),
    attend: unsafe fn(&QueryBlock, Range<usize>, &Output, &Output),
    store: unsafe fn(&[f32], &mut KvPage, KvBlock, usize),
    add_strips: AddStrips,
    run_row: unsafe fn(RowWork),
}

/// The tiles of each format.
#[derive(Clone, Copy)]
struct TileKernels {
    f32: TileKernel,
    f16: TileKernel,
    bf16: TileKernel,
    integers: IntegerTiles,
}

/// The tiles of int8 and int4, by whether scales are bf16 or f16.
#[derive(Clone, Copy)]
struct IntegerTiles {
    int8: [TileKernel; 2],
    int4: [TileKernel; 2],
}

impl TileKernels {
    fn of(&self, format: Format) -> TileKernel {
        let with_scales = |kernels: [TileKernel; 2], groups: Groups| match groups.scales {
            ScaleDtype::Bf16 => kernels[0],
            ScaleDtype::F16 => kernels[1],
        };
        match format {
            Format::F32 => self.f32,
            Format::F16 => self.f16,
            Format::Bf16 => self.bf16,
            Format::Int8(groups) => with_scales(self.integers.int8, groups),
            Format::Int4(groups) => with_scales(self.integers.int4, groups),
        }
    }
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
        self.tiles.of(format).precision
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
        unsafe { (self.matmul)(self.tiles.of(weights.shape().format), weights, panels, x, out) }
    }

    /// `out[token][row] = gelu(gate[row] . x[token]) * (up[row] . x[token])` for the rows of some panels of an expert.
    ///
    /// # Safety
    /// As for `matmul`.
    pub unsafe fn geglu(&self, expert: &ExpertWeights, panels: Range<usize>, x: &Packed, exact: bool, out: &Output) {
        let tiles = self.tiles.of(expert.gate.shape().format);
        // SAFETY: as in `pack`.
        unsafe { (self.geglu)(tiles, expert, panels, x, exact, out) }
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

    /// `out[token][columns] += x[token][depth] . strips`; see [`strips::add_strips`].
    ///
    /// # Safety
    /// Nobody else touches these columns of `out` during the call, and its buffer is alive.
    pub unsafe fn add_strips(
        &self,
        x: &TokenRows,
        depth: Range<usize>,
        strips: Strips,
        out: &Output,
        columns: Range<usize>,
    ) {
        // SAFETY: as in `pack`.
        unsafe { (self.add_strips)(x, depth, strips, out, columns) }
    }

    /// Does a row's work.
    pub fn run_row(&self, work: RowWork) {
        // SAFETY: `get` hands the table out only where its instruction set is present.
        unsafe { (self.run_row)(work) }
    }
}

/// The tiles of one kind of dot product, compiled with the features that their instruction set needs.
macro_rules! tiles {
    ($dot:ty $(, $features:literal)?) => {{
        $(#[target_feature(enable = $features)])?
        unsafe fn add(panels: &Panels, x: (TokenPart, usize), span: Span, sums: &mut Sums) {
            // SAFETY: called through a table that is handed out only where the features are present; the rest is its callers'
            // promise.
            unsafe { matmul::add_tile::<$dot>(panels, x, span, sums) }
        }
        TileKernel { precision: <$dot as Dot>::PRECISION, add }
    }};
}

/// The tiles of all formats of whole numbers.
macro_rules! integers {
    ($products:ty $(, $features:literal)?) => {
        IntegerTiles {
            int8: [tiles!(Int8<$products, false> $(, $features)?), tiles!(Int8<$products, true> $(, $features)?)],
            int4: [tiles!(Int4<$products, false> $(, $features)?), tiles!(Int4<$products, true> $(, $features)?)],
        }
    };
}

/// The table of one instruction set: its name, its lanes of f32, what attention is done in, and the features that its functions
/// are compiled with, which are to be present where the table is handed out.
macro_rules! kernels {
    ($name:literal, $lanes:ty, $vector:ty $(, $features:literal)?) => {{
        // SAFETY of the seven: called through a table that is handed out only where the features are present; what else they
        // need is their callers' promise.
        $(#[target_feature(enable = $features)])?
        unsafe fn pack(packing: &Packing, place: &Place, tile: usize, x: &TokenRows) {
            // SAFETY: see above.
            unsafe { packing.pack(place, tile, x) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn matmul(tiles: TileKernel, weights: &Matrix, panels: Range<usize>, x: &Packed, out: &Output) {
            // SAFETY: see above.
            unsafe { matmul::matmul(tiles, weights, panels, x, out) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn geglu(
            tiles: TileKernel,
            expert: &ExpertWeights,
            panels: Range<usize>,
            x: &Packed,
            exact: bool,
            out: &Output,
        ) {
            // SAFETY: see above.
            unsafe { matmul::geglu(tiles, expert, panels, x, exact, out) }
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
        $(#[target_feature(enable = $features)])?
        unsafe fn add_strips(
            x: &TokenRows,
            depth: Range<usize>,
            strips: Strips,
            out: &Output,
            columns: Range<usize>,
        ) {
            // SAFETY: see above.
            unsafe { strips::add_strips::<$vector>(x, depth, strips, out, columns) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn run_row(work: RowWork) {
            work.run();
        }
        let tiles = TileKernels {
            f32: tiles!(Widened<F32<$lanes>, 1> $(, $features)?),
            f16: tiles!(Widened<F16<$lanes>, 2> $(, $features)?),
            bf16: tiles!(Widened<Bf16<$lanes>, 2> $(, $features)?),
            integers: integers!($lanes $(, $features)?),
        };
        Kernels { name: $name, tiles, pack, matmul, geglu, attend, store, add_strips, run_row }
    }};
}

fn portable() -> Kernels {
    kernels!("portable", lanes::portable::Portable, vector::Portable)
}

#[cfg(not(target_arch = "x86_64"))]
fn present(instructions: Instructions) -> Option<Kernels> {
    (instructions == Instructions::Portable).then(portable)
}

/// The kernels of an instruction set, where the processor has it.
#[cfg(target_arch = "x86_64")]
fn present(instructions: Instructions) -> Option<Kernels> {
    match instructions {
        Instructions::Detect => None,
        Instructions::Portable => Some(portable()),
        Instructions::Avx2 => x86::avx2(),
        Instructions::AvxVnni => x86::avx_vnni(),
        Instructions::Avx512 => x86::avx512_bf16().or_else(x86::avx512),
    }
}

/// The tables of x86, where the processor has what they need. AVX-VNNI is AVX2 with other tiles for whole numbers, and AVX-512
/// with BF16 is AVX-512 with other ones for bf16, so that nothing is compiled twice.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::lanes::{avx_vnni::AvxVnni, avx2::Avx2, avx512::Avx512};
    use super::*;

    pub fn avx2() -> Option<Kernels> {
        let has =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        has.then(|| kernels!("avx2", Avx2, vector::Avx2, "avx2,fma,f16c"))
    }

    pub fn avx_vnni() -> Option<Kernels> {
        let avx2 = avx2().filter(|_| is_x86_feature_detected!("avxvnni"))?;
        let integers = integers!(AvxVnni<false>, "avx2,fma,f16c,avxvnni");
        Some(Kernels { name: "avx-vnni", tiles: TileKernels { integers, ..avx2.tiles }, ..avx2 })
    }

    pub fn avx512() -> Option<Kernels> {
        let has = avx2().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        has.then(|| {
            kernels!("avx512", Avx512, vector::Avx512, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
        })
    }

    pub fn avx512_bf16() -> Option<Kernels> {
        let avx512 = avx512().filter(|_| is_x86_feature_detected!("avx512bf16"))?;
        let bf16 = tiles!(dots::Bf16Pairs, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16");
        Some(Kernels { name: "avx512 with bf16", tiles: TileKernels { bf16, ..avx512.tiles }, ..avx512 })
    }

    /// For tests: the twin of AVX-VNNI on processors with AVX-512, which hand it out to nobody.
    #[cfg(test)]
    pub fn avx_vnni_by_avx512() -> Option<Kernels> {
        let avx2 = avx2().filter(|_| avx512().is_some())?;
        let integers = integers!(AvxVnni<true>, "avx2,fma,f16c,avx512f,avx512vl,avx512vnni");
        Some(Kernels { name: "avx-vnni by avx512", tiles: TileKernels { integers, ..avx2.tiles }, ..avx2 })
    }
}
