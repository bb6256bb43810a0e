//! What rounding weights costs on a device: as little as is promised, and as little as on the processor.

use gemmoe::LoadOptions;

use crate::common::held_out::{check_rise, demo_model, perplexities, promises};
use crate::common::load_options;
use crate::driver::Driver;
use crate::{on_processor, on_tensor_cores};

/// By how much more perplexity may rise than on the processor, in percent: int8 and int4 are the same numbers on both, what they
/// meet is rounded in the same way, and only sums have other orders.
const MOST_MORE_PERCENT: f64 = 0.1;

#[test]
fn rounding_raises_perplexity_by_no_more_than_on_the_processor() {
    let Some(_driver) = Driver::take() else { return };
    let of = |options: LoadOptions| perplexities(&load_options(&demo_model(), &options));
    let (device, processor) = (of(on_tensor_cores()), of(on_processor()));
    for (name, formats, most) in promises() {
        let rise = |name: &str, options: LoadOptions, before| {
            check_rise(name, before, &of(LoadOptions { formats, ..options }), most)
        };
        let on_device = rise(&format!("{name}, CUDA"), on_tensor_cores(), &device);
        let on_processor = rise(&format!("{name}, CPU"), on_processor(), &processor);
        let mean = |changes: &[f64]| changes.iter().sum::<f64>() / changes.len() as f64;
        assert!(mean(&on_device) < mean(&on_processor) + MOST_MORE_PERCENT, "{name}: more than on the processor");
    }
}
