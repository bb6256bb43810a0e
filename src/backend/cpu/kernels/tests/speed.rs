//! How fast products are, by the processor time of one thread: `cargo test --profile bench --lib speed -- --ignored
//! --nocapture`. GEMMOE_SPEED_FORMAT and GEMMOE_SPEED_TOKENS pick cases.

use super::*;

#[test]
#[ignore = "a measurement"]
fn speed_of_products() {
    let (rows, columns) = (24_576, 3072);
    let wanted = |variable: &str, found: &str| std::env::var(variable).map_or(true, |value| value == found);
    let mut random = Random::fresh();
    let data = random.vector(256 * columns);
    let numbers: Vec<u8> =
        random.vector(rows * columns).iter().flat_map(|n| bf16::from_f32(*n).to_le_bytes()).collect();
    println!("{:<18} {:<6} {:>7} {:>8} {:>8}", "kernels", "format", "tokens", "GB/s", "GMAC/s");
    for format in [Format::Bf16, Format::INT8, Format::INT4] {
        if !wanted("GEMMOE_SPEED_FORMAT", format.name()) {
            continue;
        }
        let source = Source { dtype: Dtype::BF16, bytes: &numbers, columns, importance: None };
        let matrix = Matrix::from_rows("a test", Shape { rows, columns, format }, &source).unwrap();
        for kernels in [Instructions::Avx512, Instructions::Avx2].into_iter().filter_map(|set| Kernels::get(set).ok()) {
            for count in [1, 2, 4, 8, 16, 64, 256] {
                if !wanted("GEMMOE_SPEED_TOKENS", &count.to_string()) {
                    continue;
                }
                let x = TokenRows { data: &data, columns, index: None, count };
                let (activations, place) = packed_for(&kernels, format, &x);
                let packed = activations.packed(&place);
                let mut out = vec![0f32; count * rows];
                let mut seconds: Vec<f64> = (0..if count > 16 { 3 } else { 9 })
                    .map(|_| {
                        let out = Output::new(&mut out, rows);
                        let panels = 0..matrix.shape().panels();
                        // SAFETY: this is the only thread, and `out` lives on.
                        processor_seconds(|| unsafe { kernels.matmul(&matrix, panels, &packed, &out) })
                    })
                    .collect();
                seconds.sort_by(f64::total_cmp);
                let median = seconds[seconds.len() / 2];
                let multiply_adds = (rows * columns * count) as f64;
                println!(
                    "{:<18} {:<6} {count:>7} {:>8.1} {:>8.1}",
                    kernels.name,
                    format.name(),
                    matrix.bytes() as f64 / median * 1e-9,
                    multiply_adds / median * 1e-9
                );
            }
        }
    }
}
