//! The kernels of training, loaded with the first workspace of a trainer: whoever does not train does without them.

use std::sync::Arc;

use crate::backend::cuda::arguments::*;
use crate::backend::cuda::device::Device;
use crate::backend::cuda::images::{Code, generated};
use crate::backend::cuda::kernels::{Finder, KINDS, Kernel, Modules};
use crate::error::Result;

/// Their code.
static FILES: [Code; 4] = [
    generated!("training_multiply"),
    generated!("training_products"),
    generated!("training_rows"),
    generated!("training_softmax"),
];

/// Threads of a block of any of them.
const THREADS: u32 = 256;

/// Rows and columns of a block's tile of a product.
pub const TILE: usize = 64;

/// All of them, loaded onto one device.
pub struct TrainingKernels {
    /// For each kind of format.
    pub product: [Kernel<TrainingProductArguments>; KINDS.len()],
    pub product_gradient: [Kernel<TrainingProductArguments>; KINDS.len()],
    pub multiply: Kernel<TrainingMultiplyArguments>,
    pub softmax: Kernel<TrainingSoftmaxArguments>,
    pub softmax_gradient: Kernel<TrainingSoftmaxArguments>,
    pub log_sum: Kernel<TrainingLogitArguments>,
    pub logit_gradient: Kernel<TrainingLogitArguments>,
    pub norm_gradient: Kernel<TrainingNormArguments>,
    pub rotate: Kernel<TrainingRotateArguments>,
    pub gather: Kernel<TrainingSlotArguments>,
    pub combine: Kernel<TrainingSlotArguments>,
    pub row_products: Kernel<TrainingRowProductArguments>,
    pub geglu: Kernel<TrainingGegluArguments>,
    pub geglu_gradient: Kernel<TrainingGegluArguments>,
    /// Last, so that it is there as long as what was found in it.
    _modules: Modules,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for TrainingKernels {}

impl TrainingKernels {
    /// Loads them, as `Kernels::load` does.
    pub fn load(device: &Arc<Device>, dependent_launch: bool) -> Result<TrainingKernels> {
        let modules = Modules::load(device, &FILES)?;
        let finder = Finder::new(device, &modules, dependent_launch)?;
        let products = "training_products";
        let (softmax, rows) = ("training_softmax", "training_rows");
        Ok(TrainingKernels {
            product: finder.find_kinds(products, "training_product", THREADS)?,
            product_gradient: finder.find_kinds(products, "training_product_gradient", THREADS)?,
            multiply: finder.find("training_multiply", "training_multiply", THREADS)?,
            softmax: finder.find(softmax, "training_softmax", THREADS)?,
            softmax_gradient: finder.find(softmax, "training_softmax_gradient", THREADS)?,
            log_sum: finder.find(softmax, "training_log_sum", THREADS)?,
            logit_gradient: finder.find(softmax, "training_logit_gradient", THREADS)?,
            norm_gradient: finder.find(rows, "training_norm_gradient", THREADS)?,
            rotate: finder.find(rows, "training_rotate", THREADS)?,
            gather: finder.find(rows, "training_gather", THREADS)?,
            combine: finder.find(rows, "training_combine", THREADS)?,
            row_products: finder.find(rows, "training_row_products", THREADS)?,
            geglu: finder.find(rows, "training_geglu", THREADS)?,
            geglu_gradient: finder.find(rows, "training_geglu_gradient", THREADS)?,
            _modules: modules,
        })
    }
}
