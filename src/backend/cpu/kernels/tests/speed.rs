//! How fast products are, by the processor time of one thread: `cargo test --profile bench --lib speed -- --ignored
//! --nocapture`. GEMMOE_SPEED_FORMAT and GEMMOE_SPEED_TOKENS pick cases.

use super::*;

/// Processor time of this thread.
fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable; the call changes nothing else.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

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
                        let started = processor_seconds();
                        // SAFETY: this is the only thread, and `out` lives on.
                        unsafe { kernels.matmul(&matrix, 0..matrix.shape().panels(), &packed, &out) };
                        processor_seconds() - started
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
