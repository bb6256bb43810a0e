//! How weight matrices are held: number formats, the layout in memory and in files, and rounding to them.

mod format;
mod panels;
mod rounding;

pub use format::{BLOCK, Format, GROUP_SIZES, Groups, ScaleDtype};
pub use panels::{
    INT4_BIAS_BITS, INT8_BIAS_BITS, LINE_BYTES, NotFinite, PANEL_ROWS, Shape, Source, pack, pack_on, pair_halves,
    unpack_columns, unpack_row, unpair_halves,
};
pub use rounding::{Rounded, round_group};
