//! Keys and values: what is stored in every dtype.

use super::super::store::{to_bf16, to_f16, to_int8};
use super::*;
use crate::backend::kv::{KvDtype, KvGeometry, KvHalf, PAGE_TOKENS, copy_positions_in, copy_positions_out};

const LAYERS: usize = 2;
const HEADS: usize = 3;
const HEAD_DIMS: [usize; 5] = [2, 8, 30, 64, 256];
/// The block the tests look at: every coordinate differs from zero and from the others' count.
pub const LAYER: usize = 1;
pub const HEAD: usize = 2;

pub fn geometry(head_dim: usize, dtype: KvDtype) -> KvGeometry {
    KvGeometry { layers: LAYERS, heads: HEADS, head_dim, dtype }
}

pub fn block(half: KvHalf) -> KvBlock {
    KvBlock { layer: LAYER, half, head: HEAD }
}

/// A page of bytes that no kernel may read as they are: what is not a number in three dtypes, and a scale in the fourth.
pub fn page(geometry: &KvGeometry) -> KvPage {
    let mut page = KvPage::host(geometry).unwrap();
    page.bytes_mut().fill(0xff);
    page
}

/// One row as the documented layout has it, read from the page's bytes without the library's views.
pub fn stored(page: &KvPage, half: KvHalf, slot: usize) -> Vec<f64> {
    let KvGeometry { head_dim, dtype, .. } = *page.geometry();
    let index = (LAYER * 2 + half as usize) * HEADS + HEAD;
    let first = (index * PAGE_TOKENS + slot) * head_dim;
    let scales = LAYERS * 2 * HEADS * PAGE_TOKENS * head_dim;
    let bytes = page.bytes();
    let at = |position: usize, size: usize| &bytes[position * size..(position + 1) * size];
    let f32_at = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap()) as f64;
    (first..first + head_dim)
        .map(|element| match dtype {
            KvDtype::F32 => f32_at(at(element, 4)),
            KvDtype::Bf16 => bf16::from_le_bytes(at(element, 2).try_into().unwrap()).to_f64(),
            KvDtype::F16 => f16::from_le_bytes(at(element, 2).try_into().unwrap()).to_f64(),
            KvDtype::Int8 => {
                let scale = scales + (index * PAGE_TOKENS + slot) * 4;
                f32_at(&bytes[scale..scale + 4]) * bytes[element] as i8 as f64
            }
        })
        .collect()
}

/// The largest error a dtype may make in an element of a row.
pub fn bound(dtype: KvDtype, value: f32, row: &[f32]) -> f64 {
    let absmax = row.iter().fold(0f64, |max, value| max.max(value.abs() as f64));
    match dtype {
        KvDtype::F32 => 0.0,
        KvDtype::Bf16 => value.abs() as f64 / 256.0,
        // The steps of subnormals are all 2^-24.
        KvDtype::F16 => (value.abs() as f64 / 2048.0).max(2f64.powi(-25)),
        // Half a step of 127, and the roundings of the scale, its inverse and their product: three of 2^-24 of the absmax.
        KvDtype::Int8 => absmax * (1.0 / 254.0 + 3.0 / 16_777_216.0),
    }
}

#[test]
fn what_is_stored_is_within_the_dtypes_bound() {
    let mut random = Random::fresh();
    for (head_dim, dtype) in HEAD_DIMS.into_iter().flat_map(|head_dim| KvDtype::ALL.map(|dtype| (head_dim, dtype))) {
        for kernels in all_kernels() {
            let mut page = page(&geometry(head_dim, dtype));
            for slot in 0..PAGE_TOKENS {
                let row: Vec<f32> = random.vector(head_dim).into_iter().map(|x| x * (0.1 + slot as f32)).collect();
                kernels.store(&row, &mut page, block(KvHalf::Key), slot);
                for (value, found) in row.iter().zip(stored(&page, KvHalf::Key, slot)) {
                    let error = (found - *value as f64).abs();
                    assert!(error <= bound(dtype, *value, &row), "{} {}: {value}", kernels.name, dtype.name());
                }
            }
        }
    }
}

#[test]
fn a_row_goes_to_its_slot_and_no_other_byte_and_alike_on_every_instruction_set() {
    let mut random = Random::fresh();
    for (head_dim, dtype) in HEAD_DIMS.into_iter().flat_map(|head_dim| KvDtype::ALL.map(|dtype| (head_dim, dtype))) {
        let geometry = geometry(head_dim, dtype);
        let row = random.vector(head_dim);
        for slot in 0..PAGE_TOKENS {
            let pages: Vec<KvPage> = all_kernels()
                .into_iter()
                .map(|kernels| {
                    let mut page = page(&geometry);
                    kernels.store(&row, &mut page, block(KvHalf::Value), slot);
                    page
                })
                .collect();
            assert!(pages.iter().all(|page| page.bytes() == pages[0].bytes()), "{} {head_dim}", dtype.name());
            // Stored over other bytes, so that one that happens to be 0xff shows.
            let mut zeros = KvPage::host(&geometry).unwrap();
            all_kernels()[0].store(&row, &mut zeros, block(KvHalf::Value), slot);
            let written = zeros.bytes().iter().zip(pages[0].bytes()).filter(|(a, b)| a == b).count();
            assert_eq!(written * 2 * LAYERS * HEADS, geometry.bytes_per_token(), "{} {head_dim}", dtype.name());
        }
    }
}

#[test]
fn every_f32_is_rounded_to_bf16_and_f16_as_ieee_says_but_for_what_would_overflow_f16() {
    let check = |value: f32| {
        let (narrow, expected) = (to_bf16(value), bf16::from_f32(value));
        assert!(narrow.to_bits() == expected.to_bits(), "{value:e} {narrow:e}");
        let (narrow, expected) = (to_f16(value), f16::from_f32(value));
        if value.is_nan() {
            assert!(narrow.is_nan());
        } else if value.is_finite() && expected.is_infinite() {
            assert_eq!(narrow.to_f32(), 65504f32.copysign(value));
        } else {
            assert!(narrow.to_bits() == expected.to_bits(), "{value:e} {narrow:e} {expected:e}");
        }
    };
    // Around every f16 and the middles between them, where ties are; around the upper halves of all numbers; and some.
    for bits in 0..=u16::MAX {
        let exact = f16::from_bits(bits).to_f32();
        for offset in [0, 1, 0xfff, 0x1000, 0x1001] {
            check(f32::from_bits(exact.to_bits().wrapping_add(offset)));
        }
        for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            check(f32::from_bits((bits as u32) << 16 | low));
        }
    }
    let mut random = Random::fresh();
    for _ in 0..2_000_000 {
        random.unit();
        check(f32::from_bits(random.0 as u32));
    }
}

#[test]
fn int8_keeps_its_bound_for_rows_of_any_size_and_says_what_is_not_a_number() {
    let mut random = Random::fresh();
    let mut out = [0i8; 30];
    for exponent in -115..=127 {
        let row: Vec<f32> = random.vector(30).into_iter().map(|x| x * 2f32.powi(exponent)).collect();
        let scale = to_int8(&row, &mut out);
        for (value, element) in row.iter().zip(&out) {
            let error = (scale as f64 * *element as f64 - *value as f64).abs();
            assert!(error <= bound(KvDtype::Int8, *value, &row), "2^{exponent}");
        }
    }
    let mut row = vec![0.0; 30];
    assert_eq!((to_int8(&row, &mut out), out), (0.0, [0; 30]));
    for tiny in [1e-45, 1e-38, -1e-36] {
        row[7] = tiny;
        assert_eq!((to_int8(&row, &mut out), out), (0.0, [0; 30]), "{tiny:e}");
    }
    for largest in [f32::MAX, f32::MIN, 1e-35, -65504.0] {
        row[7] = largest;
        let scale = to_int8(&row, &mut out);
        assert_eq!(out[7] as f32, 127f32.copysign(largest));
        assert!((scale as f64 * 127.0 / largest.abs() as f64 - 1.0).abs() < 1e-6, "{largest:e}");
    }
    for odd in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        row[7] = odd;
        assert!(to_int8(&row, &mut out).is_nan());
        assert_eq!(out, [0; 30]);
    }
}

#[test]
fn packed_positions_come_back_and_the_others_stay() {
    let mut random = Random::fresh();
    for (dtype, head_dim) in KvDtype::ALL.into_iter().flat_map(|dtype| [2, 30].map(|head_dim| (dtype, head_dim))) {
        let geometry = geometry(head_dim, dtype);
        let blocks: Vec<KvBlock> = (0..LAYERS * 2 * HEADS)
            .map(|index| KvBlock {
                layer: index / (2 * HEADS),
                half: [KvHalf::Key, KvHalf::Value][index / HEADS % 2],
                head: index % HEADS,
            })
            .collect();
        let kernels = all_kernels()[0];
        let mut full = page(&geometry);
        for (block, slot) in blocks.iter().flat_map(|block| (0..PAGE_TOKENS).map(move |slot| (*block, slot))) {
            kernels.store(&random.vector(head_dim), &mut full, block, slot);
        }
        for slots in 0..=PAGE_TOKENS {
            let mut packed = vec![0; geometry.packed_bytes(slots)];
            assert_eq!(packed.len(), slots * geometry.bytes_per_token());
            copy_positions_out(&geometry, &full, slots, &mut packed).unwrap();
            let mut copy = page(&geometry);
            copy_positions_in(&geometry, &mut copy, slots, &packed).unwrap();
            let untouched = page(&geometry);
            for (block, slot) in blocks.iter().flat_map(|block| (0..PAGE_TOKENS).map(move |slot| (*block, slot))) {
                let expected = if slot < slots { &full } else { &untouched };
                assert_eq!(row_bytes(&copy, block, slot), row_bytes(expected, block, slot), "{} {slots}", dtype.name());
            }
            if slots == PAGE_TOKENS {
                assert_eq!(packed, full.bytes());
            }
            copy.copy_from(&full).unwrap();
            assert_eq!(copy.bytes(), full.bytes());
        }
        // The first block's row comes first, the second block's right behind the first one's `slots` rows.
        let mut packed = vec![0; geometry.packed_bytes(3)];
        copy_positions_out(&geometry, &full, 3, &mut packed).unwrap();
        let row = head_dim * dtype.bytes_per_element();
        assert_eq!(packed[3 * row..4 * row], row_bytes(&full, blocks[1], 0)[..row]);
    }
}

/// The bytes of one row, its scale included.
fn row_bytes(page: &KvPage, block: KvBlock, slot: usize) -> Vec<u8> {
    let KvGeometry { head_dim, dtype, .. } = *page.geometry();
    let index = (block.layer * 2 + block.half as usize) * HEADS + block.head;
    let row = head_dim * dtype.bytes_per_element();
    let at = (index * PAGE_TOKENS + slot) * row;
    let mut bytes = page.bytes()[at..at + row].to_vec();
    if dtype == KvDtype::Int8 {
        let at = LAYERS * 2 * HEADS * PAGE_TOKENS * head_dim + (index * PAGE_TOKENS + slot) * 4;
        bytes.extend_from_slice(&page.bytes()[at..at + 4]);
    }
    bytes
}

#[test]
fn views_of_another_type_or_place_are_refused() {
    let refused = |look: &dyn Fn(&KvPage) -> usize| {
        let page = KvPage::host(&geometry(8, KvDtype::Bf16)).unwrap();
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| look(&page))).is_err()
    };
    assert!(!refused(&|page| page.elements::<bf16>(block(KvHalf::Key)).len()));
    assert!(refused(&|page| page.elements::<f16>(block(KvHalf::Key)).len()));
    assert!(refused(&|page| page.elements::<f32>(block(KvHalf::Key)).len()));
    assert!(refused(&|page| page.elements::<bf16>(KvBlock { layer: LAYERS, ..block(KvHalf::Key) }).len()));
    assert!(refused(&|page| page.elements::<bf16>(KvBlock { head: HEADS, ..block(KvHalf::Key) }).len()));
    let other = KvPage::host(&geometry(8, KvDtype::F16)).unwrap();
    let copy = |mut page: KvPage| std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| page.copy_from(&other)));
    assert!(copy(KvPage::host(&geometry(8, KvDtype::Bf16)).unwrap()).is_err());
}
