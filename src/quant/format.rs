//! Number formats of weights.

use std::fmt;

use half::{bf16, f16};
use safetensors::Dtype;

/// Columns that share a scale of activations, and the smallest group of weights that share one.
pub const BLOCK: usize = 32;

/// How the numbers of a matrix are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// bfloat16, as published.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// A weight is its group's scale times a whole number from -128 to 127.
    Int8(Groups),
    /// A weight is its group's scale times a whole number from -8 to 7.
    Int4(Groups),
}

/// The sizes a group can have.
pub const GROUP_SIZES: [usize; 3] = [32, 64, 128];

/// The largest of them.
pub(super) const MAX_GROUP: usize = 128;

/// Groups of a row's columns that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Columns in one: one of GROUP_SIZES.
    pub size: usize,
    /// What scales are stored as.
    pub scales: ScaleDtype,
}

/// What scales are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleDtype {
    /// bfloat16: any size, a relative error up to 2^-8.
    Bf16,
    /// Half precision: a relative error up to 2^-11, scales from 6e-8 to 65504.
    F16,
}

impl ScaleDtype {
    /// All of them.
    pub const ALL: [ScaleDtype; 2] = [ScaleDtype::Bf16, ScaleDtype::F16];

    /// Its name in files and for people.
    pub fn name(self) -> &'static str {
        match self {
            ScaleDtype::Bf16 => "bf16",
            ScaleDtype::F16 => "f16",
        }
    }

    /// The dtype of a file's tensor of scales.
    pub fn dtype(self) -> Dtype {
        match self {
            ScaleDtype::Bf16 => Dtype::BF16,
            ScaleDtype::F16 => Dtype::F16,
        }
    }

    /// A scale as it is stored: the nearest there is.
    pub fn encode(self, scale: f32) -> [u8; 2] {
        match self {
            ScaleDtype::Bf16 => bf16::from_f32(scale).to_le_bytes(),
            ScaleDtype::F16 => f16::from_f32(scale).to_le_bytes(),
        }
    }

    /// The least and the largest scale rounding uses: those whose inverse is finite, of half precision the subnormal ones
    /// too, which every processor converts exactly.
    pub(super) fn range(self) -> (f32, f32) {
        match self {
            ScaleDtype::Bf16 => (f32::MIN_POSITIVE, bf16::MAX.to_f32_const()),
            ScaleDtype::F16 => (f16::MIN_POSITIVE_SUBNORMAL.to_f32_const(), f16::MAX.to_f32_const()),
        }
    }

    /// A stored scale.
    pub fn decode(self, bytes: [u8; 2]) -> f32 {
        match self {
            ScaleDtype::Bf16 => bf16::from_le_bytes(bytes).to_f32(),
            ScaleDtype::F16 => f16::from_le_bytes(bytes).to_f32(),
        }
    }
}

impl fmt::Display for Format {
    /// `bf16`; `int4 (groups of 32, bf16 scales)`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.groups() {
            None => f.write_str(self.name()),
            Some(Groups { size, scales }) => write!(f, "{} (groups of {size}, {} scales)", self.name(), scales.name()),
        }
    }
}

impl Format {
    /// int8 as it is used where nobody says more.
    pub const INT8: Format = Format::Int8(Groups { size: BLOCK, scales: ScaleDtype::Bf16 });
    /// int4 as it is used where nobody says more.
    pub const INT4: Format = Format::Int4(Groups { size: BLOCK, scales: ScaleDtype::Bf16 });

    /// The format that holds a file's dtype as it is; none for dtypes that no weights are published in.
    pub fn of_dtype(dtype: Dtype) -> Option<Format> {
        match dtype {
            Dtype::BF16 => Some(Format::Bf16),
            Dtype::F16 => Some(Format::F16),
            Dtype::F32 => Some(Format::F32),
            _ => None,
        }
    }

    /// The groups of a quantised format.
    pub fn groups(self) -> Option<Groups> {
        match self {
            Format::Bf16 | Format::F16 | Format::F32 => None,
            Format::Int8(groups) | Format::Int4(groups) => Some(groups),
        }
    }

    /// The smallest and the largest whole number of a quantised format.
    pub fn integers(self) -> Option<(i32, i32)> {
        match self {
            Format::Bf16 | Format::F16 | Format::F32 => None,
            Format::Int8(_) => Some((-128, 127)),
            Format::Int4(_) => Some((-8, 7)),
        }
    }

    /// Its name in files and for people, groups and scales apart.
    pub fn name(self) -> &'static str {
        match self {
            Format::Bf16 => "bf16",
            Format::F16 => "f16",
            Format::F32 => "f32",
            Format::Int8(_) => "int8",
            Format::Int4(_) => "int4",
        }
    }

    /// Bits a weight takes, its share of a scale included.
    pub fn bits_per_weight(self) -> f64 {
        match self {
            Format::Bf16 | Format::F16 => 16.0,
            Format::F32 => 32.0,
            Format::Int8(groups) => 8.0 + 16.0 / groups.size as f64,
            Format::Int4(groups) => 4.0 + 16.0 / groups.size as f64,
        }
    }
}
