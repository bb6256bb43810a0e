//! The order in which an epoch goes through data.

use crate::error::{Error, Result, Status};
use crate::memory::try_with_capacity;
use crate::random::{mixed, uniform};

/// The order of an epoch: a permutation of `0..len` that depends on seed and epoch alone, all permutations being as likely.
///
/// Fisher and Yates' shuffle (Durstenfeld 1964). Fails with `InvalidArgument` where there are more than 2^32 - 1, and `OutOfMemory`.
pub fn shuffled(len: usize, seed: u64, epoch: u64) -> Result<Vec<u32>> {
    let Ok(count) = u32::try_from(len) else {
        let text = format!("{len} documents, at most {} can be shuffled", u32::MAX);
        return Err(Error::new(Status::InvalidArgument, text));
    };
    let mut order = try_with_capacity("the order of an epoch", len)?;
    order.extend(0..count);
    let seed = mixed(seed).wrapping_add(epoch);
    for last in (1..len).rev() {
        // Below last + 1: the product of it and a number below 1 rounds to less, for it has at most 32 bits.
        let other = (uniform(seed, last as u64) * (last + 1) as f64) as usize;
        order.swap(last, other);
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_a_permutation_of_seed_and_epoch_alone() {
        for len in [0, 1, 2, 3, 100, 1023] {
            let mut order = shuffled(len, 7, 3).unwrap();
            assert_eq!(order, shuffled(len, 7, 3).unwrap());
            order.sort_unstable();
            assert!(order.iter().copied().eq(0..len as u32), "{order:?}");
        }
        let orders = [(7, 0), (7, 1), (8, 0), (8, 1), (0, 0)].map(|(seed, epoch)| shuffled(100, seed, epoch).unwrap());
        for (index, order) in orders.iter().enumerate() {
            assert!(!orders[..index].contains(order), "{index}");
        }
    }

    #[test]
    fn every_permutation_of_four_is_as_likely() {
        let mut counts = std::collections::BTreeMap::new();
        let (draws, permutations) = (24_000u64, 24);
        for epoch in 0..draws {
            *counts.entry(shuffled(4, 1, epoch).unwrap()).or_insert(0u64) += 1;
        }
        assert_eq!(counts.len(), permutations);
        let expected = (draws / permutations as u64) as f64;
        let chi: f64 = counts.values().map(|count| (*count as f64 - expected).powi(2) / expected).sum();
        // 23 degrees of freedom: beyond 49.7 once in a thousand.
        assert!(chi < 49.7, "chi-squared is {chi}: {counts:?}");
    }
}
