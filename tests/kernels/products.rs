//! Products with dense weights.

use crate::Effort;
use crate::arguments::{MatmulArguments, MatrixArguments};
use crate::device::Device;
use crate::random::Random;
use crate::tensors::{Activations, Format, Kind, Matrix, PRODUCT_ERROR, kinds, product};

pub const TILES: [usize; 4] = [1, 2, 4, 8];

/// Which kernel of a family multiplies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Variant {
    /// A tile of so many tokens.
    Tile(usize),
    /// On tensor cores, up to 16 tokens.
    Narrow,
    /// On tensor cores.
    Tensor,
}

impl Variant {
    pub fn kernel(self, family: &str, format: Format) -> String {
        match self {
            Variant::Tile(tokens) => format!("{family}_{}_{tokens}", format.name()),
            Variant::Narrow => format!("{family}_narrow_{}", format.name()),
            Variant::Tensor => format!("{family}_tensor_{}", format.name()),
        }
    }
}

/// Panels of a block on tensor cores with up to 16 tokens.
pub const NARROW_PANELS: usize = 2;

/// Tokens and panels of a block on tensor cores with more.
pub const TENSOR_TOKENS: usize = 64;
pub const TENSOR_PANELS: usize = 8;

/// In `out` where a kernel has nothing to write.
pub const UNTOUCHED: f32 = 12345.0;

pub struct Launch<'a> {
    pub weights: &'a [Matrix],
    pub x: &'a Activations<'a>,
    /// Rows of x, token by token.
    pub tokens: &'a [usize],
    pub variant: Variant,
    /// What is in `out` before, where products are added to it.
    pub added_to: Option<f32>,
}

/// `[matrices][tokens][rows]`
pub fn matmul(device: &Device, launch: &Launch) -> Vec<Vec<Vec<f32>>> {
    let Launch { weights, x, tokens, variant, added_to } = *launch;
    let on_device: Vec<_> = weights.iter().map(|matrix| matrix.upload(device)).collect();
    // Rows of results with something after them, and a row more.
    let stride = |matrix: &Matrix| matrix.rows + 3;
    let before = added_to.unwrap_or(UNTOUCHED);
    let fill = |matrix: &Matrix| device.array(&vec![before; (tokens.len() + 1) * stride(matrix)]);
    let outs: Vec<_> = weights.iter().map(fill).collect();
    let index: Vec<u32> = tokens.iter().map(|token| *token as u32).collect();
    let is_plain = tokens.iter().enumerate().all(|(at, token)| at == *token);
    let index = device.array(&index);
    let nothing = MatrixArguments {
        lines: std::ptr::null(),
        scales: std::ptr::null(),
        rows: 0,
        columns: 0,
        group_shift: 0,
        half_scales: 0,
    };
    let mut arguments = MatmulArguments {
        weights: [nothing; 3],
        out: [std::ptr::null_mut(); 3],
        out_stride: [0; 3],
        count: weights.len() as u32,
        x: x.arguments(if is_plain { None } else { Some(&index) }, weights[0].kind.format),
        tokens: tokens.len() as u32,
        accumulate: added_to.is_some().into(),
    };
    for (at, matrix) in weights.iter().enumerate() {
        arguments.weights[at] = on_device[at].arguments();
        arguments.out[at] = outs[at].pointer_mut();
        arguments.out_stride[at] = stride(matrix) as u32;
    }
    let panels = on_device.iter().map(|matrix| matrix.panels());
    let grid = match variant {
        Variant::Tile(tile) => [panels.sum(), tokens.len().div_ceil(tile), 1],
        Variant::Narrow => [panels.map(|panels| panels.div_ceil(NARROW_PANELS)).sum(), 1, 1],
        // One tile too many leaves at once.
        Variant::Tensor => {
            let groups = panels.map(|panels| panels.div_ceil(TENSOR_PANELS)).sum();
            [tokens.len().div_ceil(TENSOR_TOKENS) + 1, groups, 1]
        }
    };
    device.launch(&variant.kernel("matmul", weights[0].kind.format), grid, &arguments);
    let mut results = Vec::new();
    for (matrix, out) in weights.iter().zip(&outs) {
        let out = out.read();
        let (written, rest) = out.split_at(tokens.len() * stride(matrix));
        assert!(rest.iter().all(|number| *number == before), "a token too many");
        let rows = written.chunks(stride(matrix)).map(|row| {
            assert!(row[matrix.rows..].iter().all(|number| *number == before), "a row too many");
            row[..matrix.rows].to_vec()
        });
        results.push(rows.collect());
    }
    results
}

pub fn check_matmul(device: &Device, random: &mut Random, effort: Effort) {
    const ROWS: [usize; 4] = [1, 15, 17, 40];
    const COLUMNS: [usize; 7] = [1, 31, 33, 129, 260, 517, 1060];
    for (at, kind) in kinds().into_iter().enumerate() {
        for (step, columns) in COLUMNS.into_iter().enumerate() {
            if effort == Effort::Sample && step != at % COLUMNS.len() {
                continue;
            }
            for (turn, tile) in TILES.into_iter().enumerate() {
                if effort == Effort::Sample && turn != at % TILES.len() {
                    continue;
                }
                // One to three matrices; two tiles, the second with a token or more.
                let count = 1 + (at + step + turn) % 3;
                let tokens = tile + 1 + random.below(tile);
                let rows: Vec<usize> = (0..count).map(|_| ROWS[random.below(4)]).collect();
                let weights: Vec<_> = rows.iter().map(|rows| Matrix::random(random, *rows, columns, kind)).collect();
                let x = Activations::random(device, random, tokens + 2, columns);
                let picked: Vec<usize> = match random.below(2) {
                    0 => (0..tokens).collect(),
                    _ => (0..tokens).map(|_| random.below(x.rows)).collect(),
                };
                let added_to = (random.below(2) == 0).then_some(0.25f32);
                let variant = Variant::Tile(tile);
                let launch = Launch { weights: &weights, x: &x, tokens: &picked, variant, added_to };
                compare(&launch, &matmul(device, &launch));
            }
        }
    }
}

fn compare(launch: &Launch, results: &[Vec<Vec<f32>>]) {
    for (weights, results) in launch.weights.iter().zip(results) {
        for (token, row) in launch.tokens.iter().zip(results) {
            for (index, result) in row.iter().enumerate() {
                let (expected, magnitude) = product(weights, index, launch.x, *token);
                let expected = expected + f64::from(launch.added_to.unwrap_or(0.0));
                let error = (f64::from(*result) - expected).abs();
                assert!(
                    error <= PRODUCT_ERROR * (magnitude + expected.abs()),
                    "{:?}, {} columns, {:?}, row {index}: {result} for {expected}, off {error:e} of {magnitude}",
                    weights.kind,
                    weights.columns,
                    launch.variant
                );
            }
        }
    }
}

pub fn check_bits(device: &Device, random: &mut Random, effort: Effort) {
    let formats = Format::ALL.map(|format| Kind { format, group: 32, half_scales: false });
    for kind in formats {
        let columns = if effort == Effort::Sample { 70 } else { 1100 };
        let weights = [Matrix::random(random, 21, columns, kind)];
        let x = Activations::random(device, random, 11, columns);
        let run = |tokens: &[usize], tile: usize| {
            let variant = Variant::Tile(tile);
            matmul(device, &Launch { weights: &weights, x: &x, tokens, variant, added_to: None }).remove(0)
        };
        let all: Vec<usize> = (0..11).collect();
        let together = run(&all, 1);
        for tile in TILES {
            let order: Vec<usize> = (0..9).map(|_| random.below(11)).collect();
            for tokens in [&all, &order, &vec![7]] {
                for (token, row) in tokens.iter().zip(run(tokens, tile)) {
                    let bits = |row: &[f32]| row.iter().map(|number| number.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&row), bits(&together[*token]), "{kind:?}, tile of {tile}, token {token}");
                }
            }
        }
    }
}
