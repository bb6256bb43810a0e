//! The backward pass: the steps of `forward.rs` from the last to the first, each with the gradient of its own.

use super::balance::{RouterLoad, RouterLosses};
use super::document::Packed;
use super::pass::{Parts, RouterPass, host_numbers};
use super::routing::Routes;
use crate::backend::training::{ExpertProjection, Norm, Projection};
use crate::error::Result;

/// The router's own losses of a batch, and what they count in the step's.
pub struct Auxiliary<'a> {
    /// Of the batch.
    pub load: &'a RouterLoad,
    /// Coefficients.
    pub losses: &'a RouterLosses,
    /// The batch's share of the step.
    pub share: f64,
}

impl RouterPass {
    /// Adds the gates' gradients for the batch of the last forward pass, where `derivatives: [R]` are those of the loss with
    /// respect to the targets' log-probabilities.
    pub fn backward(&mut self, batch: &Packed, derivatives: &[f32], auxiliary: &Auxiliary) -> Result<()> {
        self.check(batch)?;
        self.head_backward(batch, derivatives)?;
        let routes = std::mem::take(&mut self.routes);
        let result = (0..self.layers).rev().try_for_each(|layer| {
            if !self.has_activations(layer) {
                self.attend(layer, batch)?;
            }
            self.experts_backward(layer, batch, &routes[layer], auxiliary)?;
            if layer > 0 { self.attention_backward(layer, batch) } else { Ok(()) }
        });
        self.routes = routes;
        result
    }

    /// `gradient`, of the residual stream after the last layer.
    fn head_backward(&mut self, batch: &Packed, derivatives: &[f32]) -> Result<()> {
        let (parts, device, tokens) = (&self.parts, &mut self.device, batch.tokens.len());
        let (normed_gradient, gradient) = (parts.normed_gradient.first(tokens), parts.gradient.first(tokens));
        // The forward pass left the gradients of log-probabilities; what the loss makes of each is its weight.
        let mut slots = batch.head_slots()?;
        slots.weights.copy_from_slice(derivatives);
        device.clear(normed_gradient)?;
        device.add_combined(&slots, true, parts.head_gradient.first(batch.targets.len()), normed_gradient)?;
        device.clear(gradient)?;
        let x = parts.inputs[self.layers].first(tokens);
        device.add_norm_gradient(Norm::Final, x, normed_gradient, gradient)
    }

    /// Turns `gradient` from that of the layer's output into that of `middle`, and adds the gate's. Below layer 0's gate
    /// nothing is needed.
    fn experts_backward(&mut self, layer: usize, batch: &Packed, routes: &Routes, auxiliary: &Auxiliary) -> Result<()> {
        let (tokens, slots, count) = (batch.tokens.len(), &routes.slots, routes.slots.count());
        let kept = self.parts.of_layers[layer];
        let (middle, normed) = (kept.middle.first(tokens), self.parts.normed.first(tokens));
        self.device.norm(Norm::PostAttention(layer), middle, normed)?;
        if !self.has_activations(layer) {
            self.run_experts(layer, tokens, slots)?;
        }

        let (parts, device) = (&self.parts, &mut self.device);
        let (inputs, outputs) = (parts.slot_inputs.first(count), kept.slot_outputs.first(count));
        let (gradient, products) = (parts.gradient.first(tokens), parts.products.first(count));
        // g_i: what the loss gains by more of a slot's output.
        device.gather(slots, false, gradient, inputs)?;
        device.row_products(inputs, outputs, products)?;
        host_numbers(&mut self.products, count)?;
        device.read(products, &mut self.products)?;
        host_numbers(&mut self.logits, tokens * self.choice.experts)?;
        routes.add_logit_gradient(&self.products, &mut self.logits)?;
        let Auxiliary { load, losses, share } = auxiliary;
        load.add_logit_gradient(layer, routes, losses, *share, &mut self.logits);
        let logit_gradient = parts.logits.first(tokens);
        device.write(&self.logits, logit_gradient)?;
        let gate_gradient = Parts::of_layer(parts.gate_gradients, layer, self.choice.experts);
        device.add_gate_gradient(logit_gradient, normed, gate_gradient)?;
        if layer == 0 {
            return Ok(());
        }

        let (gates, ups, hidden) =
            (kept.slot_gates.first(count), kept.slot_ups.first(count), parts.slot_hidden.first(count));
        let normed_gradient = parts.normed_gradient.first(tokens);
        // Each output's gradient is the layer's, times its weight.
        device.gather(slots, true, gradient, outputs)?;
        device.clear(hidden)?;
        device.add_expert_product_gradient(layer, ExpertProjection::Down, slots, outputs, hidden)?;
        device.geglu_gradient(hidden, gates, ups)?;
        device.clear(inputs)?;
        device.add_expert_product_gradient(layer, ExpertProjection::Gate, slots, gates, inputs)?;
        device.add_expert_product_gradient(layer, ExpertProjection::Up, slots, ups, inputs)?;
        device.clear(normed_gradient)?;
        device.add_combined(slots, false, inputs, normed_gradient)?;
        let gate = Parts::of_layer(parts.gates, layer, self.choice.experts);
        device.add_gate_input_gradient(logit_gradient, gate, normed_gradient)?;
        // The residual's gradient is `gradient` as it is; the norm's joins it.
        device.add_norm_gradient(Norm::PostAttention(layer), middle, normed_gradient, gradient)
    }

    /// Turns `gradient` from that of `middle` into that of the layer's input.
    fn attention_backward(&mut self, layer: usize, batch: &Packed) -> Result<()> {
        let (parts, device, tokens) = (&self.parts, &mut self.device, batch.tokens.len());
        let (gradient, normed_gradient) = (parts.gradient.first(tokens), parts.normed_gradient.first(tokens));
        let kept = &parts.of_layers[layer];
        let (attended, of_attended) = (kept.attended.first(tokens), parts.attended_gradient.first(tokens));
        let qkv = kept.qkv.map(|rows| rows.first(tokens));
        let of_qkv = parts.qkv_gradients.map(|rows| rows.first(tokens));
        device.clear(of_attended)?;
        device.add_product_gradient(layer, Projection::Output, gradient, of_attended)?;
        of_qkv.iter().try_for_each(|rows| device.clear(*rows))?;
        let log_sums = kept.log_sums.first(tokens);
        device.add_attention_gradient(&batch.documents, qkv, attended, log_sums, of_attended, of_qkv)?;
        device.rotate(&batch.positions, true, of_qkv[0])?;
        device.rotate(&batch.positions, true, of_qkv[1])?;
        device.clear(normed_gradient)?;
        for (projection, rows) in [Projection::Query, Projection::Key, Projection::Value].into_iter().zip(of_qkv) {
            device.add_product_gradient(layer, projection, rows, normed_gradient)?;
        }
        let x = parts.inputs[layer].first(tokens);
        device.add_norm_gradient(Norm::Input(layer), x, normed_gradient, gradient)
    }
}
