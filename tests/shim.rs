//! The SIMT shim itself, through the driver API: right kernels give the right numbers in every order, and each kind of mistake
//! is shown. The kernels are in `kernels/shim/samples.cu`.

#[path = "shim/driver.rs"]
mod driver;
#[path = "shim/images.rs"]
mod images;
#[path = "common/shim.rs"]
mod shim;

use half::{bf16, f16};

use driver::{Gpu, Sample};
use shim::{Check, ORDERS, Order, Shim, fails_checked, passes_checked};

const INVALID_VALUE: i32 = 1;
const OUT_OF_MEMORY: i32 = 2;
const NOT_READY: i32 = 600;
const LAUNCH_FAILED: i32 = 719;

/// Numbers that differ from run to run, in -1..1.
fn random(count: usize) -> Vec<f32> {
    use std::hash::{BuildHasher, Hasher};
    let state = std::hash::RandomState::new();
    (0..count as u64)
        .map(|index| {
            let mut hasher = state.build_hasher();
            hasher.write_u64(index);
            (hasher.finish() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

#[test]
fn whoever_looks_for_the_driver_finds_the_shim() {
    let Some(shim) = Shim::take() else { return };
    // SAFETY: the library is loaded already, under this name.
    let found = unsafe { libc::dlopen(c"libcuda.so".as_ptr(), libc::RTLD_NOW) };
    assert!(!found.is_null());
    // SAFETY: the library is open.
    let init = unsafe { libc::dlsym(found, c"cuInit".as_ptr()) };
    assert_eq!(init, shim.symbol("cuInit"));
}

#[test]
fn a_norm_is_right_in_every_order() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    #[repr(C)]
    struct Norm(u64, u64, u64, f32, u32);
    let (rows, columns) = (5, 640);
    let (x, weight) = (random(rows * columns), random(columns));
    let (x_there, weight_there, out) = (gpu.upload(&x), gpu.upload(&weight), gpu.alloc(rows * columns * 4));
    let mut results: Vec<Vec<f32>> = Vec::new();
    for order in ORDERS {
        shim.order(order);
        let arguments = Norm(x_there, weight_there, out, 1e-6, columns as u32);
        gpu.launch("sample_norm", rows as u32, 256, &arguments).unwrap();
        results.push(gpu.download(out, rows * columns));
        for (row, out) in x.chunks(columns).zip(results[0].chunks(columns)) {
            let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / columns as f64;
            for ((x, weight), out) in row.iter().zip(&weight).zip(out) {
                let expected = f64::from(*x) / (mean + 1e-6).sqrt() * f64::from(*weight);
                assert!((f64::from(*out) - expected).abs() < 1e-5, "{out} {expected}");
            }
        }
    }
    assert!(results.iter().all(|result| *result == results[0]), "the order changes results");
}

#[test]
fn lanes_hand_values_to_each_other_and_vote() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let out = gpu.alloc(64 * 3 * 4);
    for order in ORDERS {
        shim.order(order);
        gpu.launch("sample_lanes", 1, 64, &Sample { input: 0, out, mode: 5 }).unwrap();
        let values: Vec<f32> = gpu.download(out, 64 * 3);
        for (thread, values) in values.chunks(3).enumerate() {
            let lane = thread % 32;
            assert_eq!(values[0], (thread - lane + (lane + 5) % 32) as f32);
            assert_eq!(values[1], (0xaaaa_aaaau32 >> lane & 3) as f32);
            assert_eq!(values[2], (thread ^ 1) as f32 + 0.5);
        }
    }
}

#[test]
fn a_missing_barrier_shows_in_some_order() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let input = random(128);
    let (there, out) = (gpu.upload(&input), gpu.alloc(128 * 4));
    let expected: Vec<f32> = (0..128).map(|thread| input[(thread + 1) % 128] + 1.0).collect();
    let right_with = |mode: u32| {
        let run = |order| {
            shim.order(order);
            gpu.launch("sample_neighbour", 1, 128, &Sample { input: there, out, mode }).unwrap();
            gpu.download::<f32>(out, 128) == expected
        };
        ORDERS.map(run)
    };
    assert_eq!(right_with(3), [true; 4]);
    assert_eq!(right_with(0), [false; 4]);
    // This one does no harm in any order; that it is wrong is seen by a check of races only.
    assert_eq!(right_with(1), [true; 4]);
}

#[test]
fn blocks_that_wait_for_each_other_show_in_another_order() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let counts = ORDERS.map(|order| {
        shim.order(order);
        let out = gpu.upload(&[0f32; 9]);
        gpu.launch("sample_chain", 8, 32, &Sample { input: 0, out, mode: 0 }).unwrap();
        gpu.download::<f32>(out, 9)[8]
    });
    assert_eq!(counts[0], 8.0);
    assert!(counts[1..].iter().all(|count| *count != 8.0), "{counts:?}");
}

#[test]
fn shared_and_device_memory_is_not_a_number_until_written() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let out = gpu.alloc(32 * 4);
    assert!(gpu.download::<f32>(out, 32).iter().all(|value| value.is_nan()));
    gpu.launch("sample_step", 1, 32, &Sample { input: out, out, mode: 0 }).unwrap();
    assert!(gpu.download::<f32>(out, 32).iter().all(|value| value.is_nan()));
    gpu.upload_to(out, &[1f32; 32]);
    // The second block finds nothing of the first.
    gpu.launch("sample_unwritten", 2, 32, &Sample { input: 0, out, mode: 0 }).unwrap();
    assert!(gpu.download::<f32>(out, 32).iter().all(|value| value.is_nan()));
}

#[test]
fn lanes_that_do_not_come_to_a_shuffle_fail_the_launch() {
    let Some(shim) = Shim::take() else { return };
    for (mode, other) in [(0, "at its end"), (1, "at a barrier"), (2, "in a ballot")] {
        for order in ORDERS {
            let gpu = Gpu::new(&shim);
            let out = gpu.alloc(64 * 4);
            shim.order(order);
            gpu.launch("sample_divergent", 3, 64, &Sample { input: 0, out, mode }).unwrap();
            assert_eq!(gpu.synchronize(), Err(LAUNCH_FAILED));
            let text = shim.last_error_text();
            assert!(text.contains("kernel sample_divergent, block (") && text.contains("thread "), "{text}");
            assert!(text.contains("waits in a shuffle while thread") && text.contains(other), "{text}");
            // The context is lost; the next one is not.
            assert_eq!(gpu.try_alloc(4), Err(LAUNCH_FAILED));
            gpu.free(out).unwrap_err();
            drop(gpu);
            assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
            let gpu = Gpu::new(&shim);
            let out = gpu.alloc(64 * 4);
            gpu.launch("sample_divergent", 3, 64, &Sample { input: 0, out, mode: 3 }).unwrap();
            assert_eq!(gpu.download::<f32>(out, 64)[33], 32.0);
        }
    }
}

#[test]
fn a_barrier_does_not_wait_for_threads_that_ended() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let out = gpu.alloc(64 * 4);
    for order in ORDERS {
        shim.order(order);
        gpu.launch("sample_early_end", 1, 64, &Sample { input: 0, out, mode: 0 }).unwrap();
        let values: Vec<f32> = gpu.download(out, 64);
        assert!((0..64).step_by(2).all(|thread| values[thread] == 62.0 - thread as f32), "{values:?}");
    }
}

#[test]
fn numbers_are_narrowed_and_widened_as_on_the_cpu() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    // Every f16, every bf16, what is around halves between them, and any bits.
    let near = |value: f32| [-1i32, 0, 1].map(|step| f32::from_bits(value.to_bits().wrapping_add_signed(step)));
    let halves =
        |value: f32| [value, f32::from_bits(value.to_bits() | 0x1000), f32::from_bits(value.to_bits() | 0x8000)];
    let all = (0..=u16::MAX).flat_map(|bits| [f16::from_bits(bits).to_f32(), bf16::from_bits(bits).to_f32()]);
    let mut values: Vec<f32> = all.flat_map(halves).flat_map(near).collect();
    values.extend([65504.0, 65519.9, 65520.0, 1e30, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 2f32.powi(-25)]);
    values.resize(values.len().next_multiple_of(256), 1.0);
    let (there, out) = (gpu.upload(&values), gpu.alloc(values.len() * 4));
    gpu.launch("sample_narrow", (values.len() / 256) as u32, 256, &Sample { input: there, out, mode: 0 }).unwrap();
    for (value, bits) in values.iter().zip(gpu.download::<u32>(out, values.len())) {
        let (half, brain) = (f16::from_bits(bits as u16), bf16::from_bits((bits >> 16) as u16));
        let expected =
            if value.is_finite() { f16::from_f32(value.clamp(-65504.0, 65504.0)) } else { f16::from_f32(*value) };
        assert!(half.to_bits() == expected.to_bits() || value.is_nan() && half.is_nan(), "{value:e}: {half:e}");
        assert_eq!(brain.to_bits(), bf16::from_f32(*value).to_bits(), "{value:e}");
    }
    let out = gpu.alloc(65536 * 4);
    for mode in 0..2 {
        gpu.launch("sample_widen", 256, 256, &Sample { input: 0, out, mode }).unwrap();
        for (bits, value) in (0..=u16::MAX).zip(gpu.download::<u32>(out, 65536)) {
            let expected = if mode == 0 { f16::from_bits(bits).to_f32() } else { bf16::from_bits(bits).to_f32() };
            assert!(value == expected.to_bits() || expected.is_nan() && f32::from_bits(value).is_nan(), "{bits:04x}");
        }
    }
}

/// Bits that differ from run to run.
fn random_bits(count: usize) -> Vec<u32> {
    random(count).into_iter().map(|number| number.to_bits().wrapping_mul(0x9e37_79b9) >> 3).collect()
}

/// `c + a . b` by `sample_mma`: a `[16, 8 words]`, b `[8 columns, 8 words]`, c `[16, 8]`.
fn mma(shim: &Shim, mode: u32, a: &[u32], b: &[u32], c: &[u32]) -> Vec<u32> {
    let gpu = Gpu::new(shim);
    let (input, out) = (gpu.upload_words(&[a, b, c].concat()), gpu.alloc(16 * 8 * 4));
    let results = ORDERS.map(|order| {
        shim.order(order);
        gpu.launch("sample_mma", 1, 32, &Sample { input, out, mode }).unwrap();
        gpu.download::<u32>(out, 16 * 8)
    });
    assert!(results.iter().all(|result| *result == results[0]), "the order changes results");
    results[0].clone()
}

#[test]
fn products_of_bytes_by_a_warp_are_exact() {
    let Some(shim) = Shim::take() else { return };
    let (mut a, mut b, c) = (random_bits(16 * 8), random_bits(8 * 8), random_bits(16 * 8));
    // The largest sum there is.
    a[..8].fill(0x8080_8080);
    b[..8].fill(0x8080_8080);
    let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes().map(|byte| byte as i8)).collect();
    let (a_bytes, b_bytes): (Vec<i8>, Vec<i8>) = (bytes(&a), bytes(&b));
    let results = mma(&shim, 2, &a, &b, &c);
    for row in 0..16 {
        for column in 0..8 {
            let products = (0..32).map(|k| i32::from(a_bytes[row * 32 + k]) * i32::from(b_bytes[column * 32 + k]));
            let expected = (c[row * 8 + column] as i32).wrapping_add(products.sum());
            assert_eq!(results[row * 8 + column] as i32, expected, "row {row}, column {column}");
        }
    }
}

#[test]
fn products_of_halves_by_a_warp_are_summed_in_f32() {
    let Some(shim) = Shim::take() else { return };
    type Half = (u32, fn(f32) -> u16, fn(u16) -> f32);
    let halves: [Half; 2] = [
        (0, |number| bf16::from_f32(number).to_bits(), |bits| bf16::from_bits(bits).to_f32()),
        (1, |number| f16::from_f32(number).to_bits(), |bits| f16::from_bits(bits).to_f32()),
    ];
    for (mode, narrow, wide) in halves {
        let numbers = |count: usize| random(count).into_iter().map(narrow).collect::<Vec<u16>>();
        let (a, b, c) = (numbers(16 * 16), numbers(8 * 16), random(16 * 8));
        let words = |halves: &[u16]| -> Vec<u32> {
            halves.chunks(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16).collect()
        };
        let c_bits: Vec<u32> = c.iter().map(|number| number.to_bits()).collect();
        let results = mma(&shim, mode, &words(&a), &words(&b), &c_bits);
        for row in 0..16 {
            for column in 0..8 {
                let product = |k: usize| f64::from(wide(a[row * 16 + k])) * f64::from(wide(b[column * 16 + k]));
                let start = f64::from(c[row * 8 + column]);
                let expected = (0..16).map(product).sum::<f64>() + start;
                let magnitude = (0..16).map(|k| product(k).abs()).sum::<f64>() + start.abs();
                let off = (f64::from(f32::from_bits(results[row * 8 + column])) - expected).abs();
                // Sixteen roundings; a GPU may cut off where it should round, which is twice as much.
                assert!(off <= 32.0 * magnitude / f64::from(1u32 << 24), "row {row}, column {column}: off {off:e}");
            }
        }
    }
}

#[test]
fn matrices_are_turned_over_by_a_warp() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    // Four matrices, eight rows each, four words a row.
    let words = random_bits(4 * 8 * 4);
    let number = |matrix: usize, row: usize, column: usize| {
        words[(matrix * 8 + row) * 4 + column / 2] >> (16 * (column % 2)) & 0xffff
    };
    let (input, out) = (gpu.upload_words(&words), gpu.alloc(32 * 4 * 4));
    for order in ORDERS {
        shim.order(order);
        gpu.launch("sample_matrices", 1, 32, &Sample { input, out, mode: 0 }).unwrap();
        for (at, word) in gpu.download::<u32>(out, 32 * 4).into_iter().enumerate() {
            let (lane, matrix) = (at / 4, at % 4);
            let (column, row) = (lane / 4, 2 * (lane % 4));
            assert_eq!(word, number(matrix, row, column) | number(matrix, row + 1, column) << 16, "lane {lane}");
        }
    }
    gpu.launch("sample_matrices", 1, 32, &Sample { input, out, mode: 1 }).unwrap();
    assert_eq!(gpu.synchronize(), Err(716));
    assert!(shim.last_error_text().contains("load_matrices_transposed"), "{}", shim.last_error_text());
}

/// What each of 64 threads reads of its neighbour's copies: 24 bytes, and four that are not wanted.
fn run_copies(mode: u32) -> Option<([Vec<f32>; 4], Vec<f32>)> {
    let shim = Shim::take()?;
    let gpu = Gpu::new(&shim);
    let values = random(64 * 8);
    let (input, out) = (gpu.upload(&values), gpu.alloc(64 * 7 * 4));
    let results = ORDERS.map(|order| {
        shim.order(order);
        gpu.launch("sample_copies", 1, 64, &Sample { input, out, mode }).unwrap();
        gpu.download::<f32>(out, 64 * 7)
    });
    let of = |thread: usize| values[8 * thread..8 * thread + 6].iter().copied().chain([0.0]);
    Some((results, (0..64).flat_map(|thread| of((thread + 1) % 64)).collect()))
}

#[test]
fn copies_are_there_after_a_wait_and_a_barrier() {
    let Some((results, expected)) = run_copies(3) else { return };
    assert!(results.iter().all(|result| *result == expected));
}

#[test]
fn without_a_wait_or_a_barrier_copies_are_not_there() {
    // A wait that comes too late, and a barrier that is missing.
    for mode in [6, 1] {
        let Some((results, expected)) = run_copies(mode) else { return };
        assert!(results.iter().all(|result| *result != expected), "mode {mode}");
    }
}

#[test]
fn copies_have_their_boundaries_and_a_wait() {
    let Some(shim) = Shim::take() else { return };
    for (kernel, threads, mode, status, text) in [
        ("sample_copy_at", 32, 8, 716, "copy_async"),
        ("sample_copies", 64, 2, LAUNCH_FAILED, "ends before its copies"),
        // What that one left behind is not another's.
        ("sample_copies", 64, 7, 0, ""),
    ] {
        let gpu = Gpu::new(&shim);
        let (input, out) = (gpu.upload(&random(64 * 8)), gpu.alloc(64 * 7 * 4));
        gpu.launch(kernel, 1, threads, &Sample { input, out, mode }).unwrap();
        assert_eq!(gpu.synchronize().err().unwrap_or(0), status, "{kernel}, mode {mode}");
        assert!(status == 0 || shim.last_error_text().contains(text), "{}", shim.last_error_text());
    }
}

#[test]
#[ignore = "a barrier is missing after the wait for copies: for a check of races"]
fn a_kernel_reads_copies_without_a_barrier() {
    run_copies(1);
}

#[test]
#[ignore = "a copy from past the end: for a check of memory"]
fn a_kernel_copies_from_past_the_end() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let (input, out) = (gpu.upload(&[1f32; 7]), gpu.alloc(4));
    gpu.launch("sample_copy_at", 1, 32, &Sample { input, out, mode: 0 }).unwrap();
    gpu.synchronize().unwrap();
    println!("so far all was well");
    gpu.launch("sample_copy_at", 1, 32, &Sample { input, out, mode: 16 }).unwrap();
    gpu.synchronize().unwrap();
}

#[test]
fn copies_are_watched_like_other_reads_and_writes() {
    passes_checked(Check::Races, "copies_are_there_after_a_wait_and_a_barrier");
    fails_checked(Check::Races, "a_kernel_reads_copies_without_a_barrier", "data race");
    passes_checked(Check::Memory, "copies_are_there_after_a_wait_and_a_barrier");
    fails_checked(Check::Memory, "a_kernel_copies_from_past_the_end", "heap-buffer-overflow");
    fails_checked(Check::Memory, "a_kernel_copies_from_past_the_end", "so far all was well");
}

#[test]
fn powers_of_two_and_pairs_of_halves_are_what_they_say() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let mut values: Vec<f32> = random(252).iter().map(|number| number * 150.0).collect();
    values.extend([f32::NEG_INFINITY, f32::NAN, 0.0, f32::INFINITY]);
    let (input, out) = (gpu.upload(&values), gpu.alloc(values.len() * 3 * 4));
    gpu.launch("sample_powers", 1, 256, &Sample { input, out, mode: 0 }).unwrap();
    for (at, found) in gpu.download::<u32>(out, values.len() * 3).chunks(3).enumerate() {
        let (value, power) = (values[at], f32::from_bits(found[0]));
        let expected = f64::from(value).exp2();
        let is_right = match expected {
            _ if value.is_nan() => power.is_nan(),
            _ if expected < f64::from(f32::MIN_POSITIVE) => power <= f32::MIN_POSITIVE,
            _ if expected > f64::from(f32::MAX) => power == f32::INFINITY,
            _ => (f64::from(power) - expected).abs() <= 3e-7 * expected,
        };
        assert!(is_right, "2^{value}: {power}");
        for (word, wide) in [
            (found[1], (|bits| bf16::from_bits(bits).to_f32()) as fn(u16) -> f32),
            (found[2], |bits| f16::from_bits(bits).to_f32()),
        ] {
            for (bits, value) in [(word as u16, value), ((word >> 16) as u16, values[at ^ 1])] {
                let off = (wide(bits) - value).abs();
                assert!(off <= value.abs() / 256.0 || wide(bits) == value || value.is_nan(), "{value}");
            }
        }
    }
}

#[test]
fn sixteen_bytes_are_loaded_from_their_boundary_only() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let (input, out) = (gpu.upload(&[0f32, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]), gpu.alloc(4));
    gpu.launch("sample_words", 1, 32, &Sample { input, out, mode: 16 }).unwrap();
    assert_eq!(gpu.download::<f32>(out, 1), [7.0]);
    gpu.launch("sample_words", 1, 32, &Sample { input, out, mode: 4 }).unwrap();
    assert_eq!(gpu.synchronize(), Err(716));
    assert!(shim.last_error_text().contains("load_words"), "{}", shim.last_error_text());
}

#[test]
fn right_kernels_pass_every_check() {
    for check in [Check::Memory, Check::Races] {
        passes_checked(check, "a_norm_is_right_in_every_order");
        passes_checked(check, "lanes_hand_values_to_each_other_and_vote");
        passes_checked(check, "products_of_bytes_by_a_warp_are_exact");
    }
    passes_checked(Check::Memory, "lanes_that_do_not_come_to_a_shuffle_fail_the_launch");
}

#[test]
#[ignore = "a write past the end: for a check of memory"]
fn a_kernel_writes_past_the_end() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let (input, out) = (gpu.upload(&[1f32; 8]), gpu.alloc(7 * 4));
    gpu.launch("sample_at", 1, 32, &Sample { input, out, mode: 6 }).unwrap();
    gpu.synchronize().unwrap();
    println!("so far all was well");
    gpu.launch("sample_at", 1, 32, &Sample { input, out, mode: 7 }).unwrap();
    gpu.synchronize().unwrap();
}

#[test]
#[ignore = "a read of memory that was freed: for a check of memory"]
fn a_kernel_reads_what_was_freed() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let (input, out) = (gpu.upload(&[1f32; 8]), gpu.alloc(8 * 4));
    gpu.free(input).unwrap();
    gpu.launch("sample_at", 1, 32, &Sample { input, out, mode: 1 }).unwrap();
    gpu.synchronize().unwrap();
}

#[test]
#[ignore = "a write past a shared array: for a check of memory"]
fn a_kernel_writes_past_a_shared_array() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let out = gpu.alloc(4);
    gpu.launch("sample_shared_at", 1, 32, &Sample { input: 0, out, mode: 0 }).unwrap();
    gpu.synchronize().unwrap();
    println!("so far all was well");
    gpu.launch("sample_shared_at", 1, 32, &Sample { input: 0, out, mode: 1 }).unwrap();
    gpu.synchronize().unwrap();
}

#[test]
fn kernels_are_stopped_at_the_first_wrong_byte() {
    let all_was_well = "so far all was well";
    fails_checked(Check::Memory, "a_kernel_writes_past_the_end", "heap-buffer-overflow");
    fails_checked(Check::Memory, "a_kernel_writes_past_the_end", all_was_well);
    fails_checked(Check::Memory, "a_kernel_reads_what_was_freed", "heap-use-after-free");
    fails_checked(Check::Memory, "a_kernel_writes_past_a_shared_array", "use-after-poison");
    fails_checked(Check::Memory, "a_kernel_writes_past_a_shared_array", all_was_well);
}

fn run_neighbours(mode: u32) {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let (input, out) = (gpu.upload(&[1f32; 128]), gpu.alloc(128 * 4));
    gpu.launch("sample_neighbour", 2, 128, &Sample { input, out, mode }).unwrap();
    gpu.synchronize().unwrap();
}

#[test]
fn a_kernel_has_its_barriers() {
    run_neighbours(3);
}

#[test]
#[ignore = "a barrier is missing before reading: for a check of races"]
fn a_kernel_reads_without_a_barrier() {
    run_neighbours(2);
}

#[test]
#[ignore = "a barrier is missing before writing again: for a check of races"]
fn a_kernel_overwrites_without_a_barrier() {
    run_neighbours(1);
}

#[test]
fn a_missing_barrier_is_a_race_even_where_no_order_shows_it() {
    passes_checked(Check::Races, "a_kernel_has_its_barriers");
    for test in ["a_kernel_reads_without_a_barrier", "a_kernel_overwrites_without_a_barrier"] {
        fails_checked(Check::Races, test, "data race");
        fails_checked(Check::Races, test, "in kernel_sample_neighbour");
    }
}

#[test]
fn copies_outside_of_live_memory_are_refused() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let memory = gpu.alloc(100);
    let mut bytes = [0u8; 101];
    assert_eq!(gpu.copy_to(memory, &bytes[..100]), Ok(()));
    assert_eq!(gpu.copy_to(memory, &bytes), Err(INVALID_VALUE));
    assert!(shim.last_error_text().contains("101 bytes where 100 are left"), "{}", shim.last_error_text());
    assert_eq!(gpu.copy_to(memory + 50, &bytes[..51]), Err(INVALID_VALUE));
    assert_eq!(gpu.copy_from(&mut bytes[..1], memory + 100), Err(INVALID_VALUE));
    assert_eq!(gpu.copy_from(&mut bytes[..1], 4096), Err(INVALID_VALUE));
    gpu.free(memory).unwrap();
    assert_eq!(gpu.copy_to(memory, &bytes[..1]), Err(INVALID_VALUE));
    assert_eq!(gpu.free(memory), Err(INVALID_VALUE));
}

#[test]
fn bytes_that_come_back_are_counted_once_they_did() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let (memory, mut bytes) = (gpu.alloc(100), [0u8; 60]);
    gpu.copy_to(memory, &bytes).unwrap();
    gpu.copy_from(&mut bytes, memory).unwrap();
    assert_eq!(shim.bytes_to_host(), 0);
    gpu.synchronize().unwrap();
    assert_eq!(shim.bytes_to_host(), 60);
}

#[test]
fn launches_have_the_size_that_the_kernel_is_written_for() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let sample = Sample { input: 0, out: gpu.alloc(128), mode: 0 };
    for (grid, block, shared) in [(0, 32, 0), (1, 64, 0), (1, 2048, 0), (1, 32, 50000), (1 << 31, 32, 0)] {
        assert_eq!(gpu.launch_with("sample_unwritten", grid, block, shared, &sample), Err(INVALID_VALUE));
        assert!(shim.last_error_text().contains("sample_unwritten"), "{}", shim.last_error_text());
    }
    assert_eq!(shim.launches(), 0);
    assert_eq!(gpu.launch_with("sample_unwritten", 1, 32, 0, &sample), Ok(()));
    assert_eq!(shim.launches(), 1);
}

#[test]
fn a_module_has_the_kernels_that_its_text_names() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let ptx = |version: &str, target: &str| {
        format!(
            ".version {version}\n.target {target}\n.visible .entry sample_at(\n.param .u64 x\n)\n{{ ret; }}\n.entry other()"
        )
    };
    let module = gpu.load_module(&ptx("8.1", "sm_80")).unwrap();
    assert!(gpu.function(module, "sample_at").is_ok());
    assert_eq!(gpu.function(module, "sample_norm"), Err(500));
    assert!(shim.last_error_text().contains("no entry sample_norm"), "{}", shim.last_error_text());
    assert_eq!(gpu.function(module, "other"), Err(500));
    assert!(shim.last_error_text().contains("no kernel other"), "{}", shim.last_error_text());
    gpu.unload_module(module).unwrap();
    assert_eq!(gpu.function(module, "sample_at"), Err(400));
    assert_eq!(gpu.load_module(&ptx("8.2", "sm_80")), Err(222));
    assert_eq!(gpu.load_module(&ptx("8.1", "sm_90a")), Err(209));
    assert_eq!(gpu.load_module("nothing"), Err(200));
    shim.driver_version(11080);
    assert_eq!(gpu.load_module(&ptx("8.1", "sm_80")), Err(222));
    shim.compute_capability(90);
    shim.driver_version(12080);
    let module = gpu.load_module(&ptx("8.2", "sm_90a")).unwrap();
    gpu.unload_module(module).unwrap();
}

#[test]
fn devices_have_the_memory_and_are_as_many_as_was_said() {
    let Some(shim) = Shim::take() else { return };
    shim.total_memory(1000);
    let gpu = Gpu::new(&shim);
    let memory = gpu.alloc(600);
    assert_eq!(gpu.try_alloc(401), Err(OUT_OF_MEMORY));
    assert_eq!(gpu.memory(), (400, 1000));
    gpu.free(memory).unwrap();
    gpu.alloc(1000);
    drop(gpu);
    assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0), "a released context takes all with it");
    shim.device_count(0);
    assert_eq!(driver::count_devices(&shim), Err(100));
    shim.device_count(3);
    assert_eq!(driver::count_devices(&shim), Ok(3));
}

#[test]
fn any_call_can_fail_and_frees_still_free() {
    let Some(shim) = Shim::take() else { return };
    let program = || -> Result<f32, i32> {
        let gpu = Gpu::try_new(&shim)?;
        let memory = gpu.try_alloc(32 * 4)?;
        let ones = 1f32.to_ne_bytes().repeat(32);
        let run = || {
            gpu.copy_to(memory, &ones)?;
            gpu.launch("sample_step", 1, 32, &Sample { input: memory, out: memory, mode: 0 })?;
            let mut bytes = [0; 4];
            gpu.copy_from(&mut bytes, memory)?;
            gpu.synchronize()?;
            Ok(f32::from_ne_bytes(bytes))
        };
        let result = run();
        gpu.free(memory).and(result)
    };
    assert_eq!(program(), Ok(3.0));
    let calls = shim.calls();
    assert!(calls > 12, "{calls}");
    for status in [OUT_OF_MEMORY, 700, 719, 999] {
        for nth in 1..=calls {
            shim.fail(nth, status);
            let result = program();
            // The last calls give things back, where nobody asks whether it worked.
            assert!(result == Err(status) || result == Ok(3.0) && nth > calls - 4, "call {nth}: {result:?}");
            assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0), "call {nth}, {status}");
        }
        shim.fail(0, 0);
        assert_eq!(program(), Ok(3.0));
    }
}

#[test]
fn deferred_work_shows_where_nobody_waited() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let memory = gpu.alloc(4);
    let mut source = [1u8; 4];
    let mut read = [0u8; 4];
    // A host buffer that is written to before the copy has read it, and one that is read before it was written.
    gpu.copy_to(memory, &source).unwrap();
    source = [2; 4];
    gpu.copy_from(&mut read, memory).unwrap();
    assert_eq!(read, [0; 4]);
    gpu.synchronize().unwrap();
    assert_eq!((source, read), ([2; 4], [2; 4]));

    // An event is where the stream was when it was recorded.
    let mark = gpu.event();
    gpu.set(memory, 3, 4).unwrap();
    gpu.copy_from(&mut read, memory).unwrap();
    gpu.record(mark).unwrap();
    gpu.set(memory, 4, 4).unwrap();
    assert_eq!(gpu.query(mark), Err(NOT_READY));
    assert_eq!(gpu.query(mark), Ok(()));
    assert_eq!(read, [3; 4]);
    gpu.wait(mark).unwrap();

    shim.deferred(false);
    gpu.copy_from(&mut read, memory).unwrap();
    assert_eq!(read, [4; 4]);
}

#[test]
fn a_stream_waits_for_an_event_of_another() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let second = gpu.another_stream();
    let memory = gpu.upload(&[1f32; 32]);
    let out = gpu.alloc(32 * 4);
    let step = |from, to| gpu.launch("sample_step", 1, 32, &Sample { input: from, out: to, mode: 0 }).unwrap();
    for (waits, expected) in [(false, 1.0), (true, 3.0)] {
        gpu.set(out, 0, 128).unwrap();
        gpu.synchronize().unwrap();
        gpu.use_stream(second, || step(memory, out));
        let mark = gpu.event();
        gpu.use_stream(second, || gpu.record(mark).unwrap());
        if waits {
            gpu.wait_in_stream(mark).unwrap();
        }
        let last = gpu.alloc(32 * 4);
        step(out, last);
        let got: Vec<f32> = gpu.download(last, 1);
        assert_eq!(got[0], if waits { 2.0 * expected + 1.0 } else { expected });
    }
}

#[test]
fn events_tell_the_time_between_them_once_both_have_happened() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let memory = gpu.upload(&[1f32; 64]);
    let sample = Sample { input: memory, out: memory, mode: 0 };
    let [from, to] = [0, 0].map(|flags| gpu.event_with(flags));
    assert_eq!(gpu.elapsed(from, to), Err(400), "never recorded");
    gpu.record(from).unwrap();
    gpu.launch("sample_step", 2, 32, &sample).unwrap();
    gpu.record(to).unwrap();
    assert_eq!(gpu.elapsed(from, to), Err(600), "not there yet");
    gpu.synchronize().unwrap();
    assert!(gpu.elapsed(from, to).unwrap() > 0.0);
    assert!(gpu.elapsed(to, from).unwrap() < 0.0);
    let without_time = gpu.event();
    gpu.record(without_time).unwrap();
    gpu.synchronize().unwrap();
    assert_eq!(gpu.elapsed(from, without_time), Err(400));
}

#[test]
fn a_graph_does_its_work_each_time_it_is_launched() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let memory = gpu.upload(&[1f32; 64]);
    let sample = Sample { input: memory, out: memory, mode: 0 };
    gpu.begin_capture().unwrap();
    gpu.launch("sample_step", 2, 32, &sample).unwrap();
    gpu.launch("sample_step", 2, 32, &sample).unwrap();
    let graph = gpu.end_capture().unwrap();
    assert_eq!(gpu.download::<f32>(memory, 64), [1.0; 64], "capturing does nothing");
    for expected in [7.0, 31.0, 127.0] {
        gpu.launch_graph(graph).unwrap();
        assert_eq!(gpu.download::<f32>(memory, 64), [expected; 64]);
    }
    gpu.destroy_graph(graph).unwrap();
    assert_eq!(gpu.launch_graph(graph), Err(INVALID_VALUE));

    // Who waits in the middle of a capture breaks it.
    gpu.begin_capture().unwrap();
    assert_eq!(gpu.synchronize(), Err(900));
    assert_eq!(gpu.launch("sample_step", 2, 32, &sample), Err(901));
    assert_eq!(gpu.end_capture(), Err(901));
    assert_eq!(gpu.download::<f32>(memory, 64), [127.0; 64]);
    // So does memory that the same thread asks for; what other threads do is their own matter.
    gpu.begin_capture().unwrap();
    std::thread::scope(|scope| scope.spawn(|| Gpu::new(&shim).upload(&[1f32; 64])).join().unwrap());
    assert_eq!(gpu.try_alloc(1), Err(900));
    assert_eq!(gpu.end_capture(), Err(901));
    gpu.begin_capture().unwrap();
    std::thread::scope(|scope| scope.spawn(|| Gpu::new(&shim).upload(&[1f32; 64])).join().unwrap());
    gpu.end_capture().unwrap();
}

#[test]
fn a_context_that_is_not_current_or_not_alive_is_refused() {
    let Some(shim) = Shim::take() else { return };
    shim.device_count(2);
    let first = Gpu::new(&shim);
    let memory = first.alloc(4);
    let second = Gpu::on_device(&shim, 1).unwrap();
    // The second one's is current now.
    assert_eq!(first.copy_to(memory, &[0; 4]), Err(INVALID_VALUE));
    assert_eq!(first.synchronize(), Err(400));
    assert_eq!(second.free(memory), Err(INVALID_VALUE));
    drop(second);
    first.free(memory).unwrap();
    std::thread::scope(|scope| {
        // A thread begins without one.
        scope.spawn(|| assert_eq!(first.try_alloc(4), Err(201)));
    });
}

/// `cargo test --release --test shim speed -- --ignored --nocapture`
#[test]
#[ignore = "prints how fast the shim is"]
fn speed() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    let out = gpu.alloc(64 * 1024 * 4);
    let input = gpu.upload(&vec![1f32; 64 * 1024]);
    let seconds = |name: &str, grid: u32, block: u32, mode: u32| {
        let begin = std::time::Instant::now();
        gpu.launch(name, grid, block, &Sample { input, out, mode }).unwrap();
        gpu.synchronize().unwrap();
        begin.elapsed().as_secs_f64()
    };
    for order in [Order::Forward, Order::Random(1)] {
        shim.order(order);
        seconds("sample_step", 2048, 32, 0);
        let fibers = 65536.0 / seconds("sample_step", 2048, 32, 0);
        let shuffles = 128.0 * 10000.0 / seconds("sample_shuffles", 1, 128, 10000);
        let barriers = 128.0 * 10000.0 / seconds("sample_barriers", 1, 128, 10000);
        println!("{order:?}: {fibers:.3e} threads/s, {shuffles:.3e} shuffles/s, {barriers:.3e} waits at barriers/s");
    }
}
