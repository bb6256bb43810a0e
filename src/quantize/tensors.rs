//! Which tensors the new directory has, and what each is made from.

use safetensors::Dtype;

use super::matrix::stored_tensors;
use super::report::Kind;
use crate::backend::observer::Input;
use crate::error::Result;
use crate::model::names::{self, ExpertParts, LayerParts, Layout, Part};
use crate::model::weights::dtype_of;
use crate::model::writer::NewTensor;
use crate::model::{Checkpoint, Description};
use crate::quant::{Format, Shape};

/// A tensor of the new directory, or the two a quantised matrix has.
pub struct Planned {
    /// What it is made from.
    pub source: Part,
    /// Its name.
    pub name: String,
    /// Its shape where it is copied.
    shape: Vec<usize>,
    /// Its dtype in the source.
    dtype: Dtype,
    /// What it is rounded to; without one it is copied.
    pub format: Option<Format>,
    /// Which matrix it is.
    pub kind: Kind,
    /// Its layer.
    pub layer: Option<usize>,
    /// Its expert.
    pub expert: Option<usize>,
    /// What it is multiplied with.
    pub input: Option<Input>,
}

impl Planned {
    /// The tensors it becomes: two for a quantised matrix, its lines and its scales.
    pub fn new_tensors(&self) -> Vec<NewTensor> {
        let matrix = NewTensor { name: self.name.clone(), dtype: self.dtype, shape: self.shape.clone() };
        let Part { rows, columns, .. } = self.source;
        stored_tensors(matrix, self.format.map(|format| Shape { rows, columns, format }).as_ref())
    }
}

/// All tensors, in the order a token meets them.
pub fn plan(description: &Description, checkpoint: &Checkpoint) -> Result<Vec<Planned>> {
    let config = &description.config;
    // Experts are written one by one.
    let layout = if description.layout == Layout::Dense { Layout::Dense } else { Layout::BlockSparseMoe };
    let mut planned = Vec::new();
    let mut add =
        |source: &Part, target: Part, kind: Kind, place: (Option<usize>, Option<usize>), input: Option<Input>| {
            planned.push(Planned {
                dtype: dtype_of(source, checkpoint)?,
                format: description.asked_format(source),
                name: target.tensor,
                shape: target.shape,
                source: source.clone(),
                kind,
                layer: place.0,
                expert: place.1,
                input,
            });
            Ok::<(), crate::error::Error>(())
        };
    // An embedding that is the head is rounded as the head: rows that are looked up have no input.
    let input = description.head_part().is_none().then_some(Input::Head);
    add(description.embedding_part(), names::embedding(config), Kind::Embedding, (None, None), input)?;
    for layer in 0..config.num_hidden_layers {
        let source = description.layer_parts(layer);
        let target = names::layer(config, layout, layer);
        for ((kind, input, source), target) in of_layer(source, layer).into_iter().zip(of_layer(&target, layer)) {
            add(source, target.2.clone(), kind, (Some(layer), None), input)?;
        }
        for (expert, (source, target)) in source.experts.iter().zip(&target.experts).enumerate() {
            let parts = of_expert(source, layer, expert).into_iter().zip(of_expert(target, layer, expert));
            for ((kind, input, source), target) in parts {
                add(source, target.2.clone(), kind, (Some(layer), Some(expert)), Some(input))?;
            }
        }
    }
    add(description.final_norm_part(), names::final_norm(config), Kind::Other, (None, None), None)?;
    if let Some(head) = description.head_part() {
        add(head, names::head(config), Kind::Head, (None, None), Some(Input::Head))?;
    }
    Ok(planned)
}

/// The parts of a layer but its experts'.
fn of_layer(parts: &LayerParts, layer: usize) -> Vec<(Kind, Option<Input>, &Part)> {
    let (attention, output) = (Some(Input::Attention(layer)), Some(Input::Output(layer)));
    let mut all = vec![
        (Kind::Other, None, &parts.input_norm),
        (Kind::Query, attention, &parts.query),
        (Kind::Key, attention, &parts.key),
        (Kind::Value, attention, &parts.value),
        (Kind::Output, output, &parts.output),
        (Kind::Other, None, &parts.post_attention_norm),
    ];
    all.extend(parts.router.iter().map(|router| (Kind::Other, None, router)));
    all
}

fn of_expert(parts: &ExpertParts, layer: usize, expert: usize) -> [(Kind, Input, &Part); 3] {
    let input = Input::Expert(layer, expert);
    [
        (Kind::Gate, input, &parts.gate),
        (Kind::Up, input, &parts.up),
        (Kind::Down, Input::Down(layer, expert), &parts.down),
    ]
}
