//! Numbers on their way from f32 into a file's dtype: one rule for each.

use half::{bf16, f16};
use safetensors::Dtype;

use crate::error::{Error, Result, Status};
use crate::memory::try_vec;

/// Rounds numbers to a dtype; fails with `TensorValue` where it cannot hold one. `row` is the first one's, for the message.
pub fn narrow(numbers: &[f32], dtype: Dtype, out: &mut Vec<u8>, name: &str, columns: usize, row: usize) -> Result<()> {
    let size = dtype.bitsize() / 8;
    if out.len() < numbers.len() * size {
        *out = try_vec(name, numbers.len() * size, 0u8)?;
    }
    out.truncate(numbers.len() * size);
    let at = match dtype {
        Dtype::BF16 => narrow_each(numbers, out, |x| {
            let rounded = bf16::from_f32(x);
            (rounded.to_le_bytes(), rounded.is_finite())
        }),
        Dtype::F16 => narrow_each(numbers, out, |x| {
            let rounded = f16::from_f32(x);
            (rounded.to_le_bytes(), rounded.is_finite())
        }),
        _ => narrow_each(numbers, out, |x| (x.to_le_bytes(), x.is_finite())),
    };
    let Some(at) = at else { return Ok(()) };
    let (row, column, x) = (row + at / columns, at % columns, numbers[at]);
    let text = format!("tensor \"{name}\" has in row {row}, column {column} a number that {dtype} cannot hold: {x}");
    Err(Error::new(Status::TensorValue, text).at_key(name))
}

/// Rounds each number by `round`, which also tells whether it fits; answers the place of the first that does not.
fn narrow_each<const N: usize>(
    numbers: &[f32],
    out: &mut [u8],
    round: impl Fn(f32) -> ([u8; N], bool),
) -> Option<usize> {
    // Without a way out of the loop numbers are rounded in vectors.
    let fits = out.as_chunks_mut().0.iter_mut().zip(numbers).fold(true, |fits, (out, x)| {
        let (bytes, is_finite) = round(*x);
        *out = bytes;
        fits & is_finite
    });
    if fits { None } else { numbers.iter().position(|x| !round(*x).1) }
}
