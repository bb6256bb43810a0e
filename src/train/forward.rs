//! The forward pass of training, over the operations of a backend, in the order of `engine/forward.rs`.

use super::document::Packed;
use super::pass::{Parts, RouterPass, host_numbers};
use super::routing::{Noise, Routes};
use crate::backend::training::{ExpertProjection, Norm, Projection, Slots};
use crate::error::Result;

impl RouterPass {
    /// Runs a batch, and keeps what its backward pass needs: the input and the routes of each layer, and where it is to learn the
    /// gradients of the targets' log-probabilities.
    pub fn forward(&mut self, batch: &Packed, noise: Option<&Noise>, learn: bool) -> Result<()> {
        self.check(batch)?;
        let tokens = batch.tokens.len();
        self.routes.clear();
        self.device.embed(&batch.tokens, self.parts.inputs[0].first(tokens))?;
        for layer in 0..self.layers {
            self.attend(layer, batch)?;
            let routes = self.route(layer, batch, noise)?;
            self.run_experts(layer, tokens, &routes.slots)?;
            let (kept, out) = (self.parts.of_layers[layer], self.parts.inputs[layer + 1].first(tokens));
            self.device.copy(kept.middle.first(tokens), out)?;
            self.device.add_combined(&routes.slots, true, kept.slot_outputs.first(routes.slots.count()), out)?;
            self.routes.push(routes);
        }
        self.run_head(batch, learn)
    }

    /// `middle = x + attention(norm(x))`; queries and keys stay rotated.
    pub(super) fn attend(&mut self, layer: usize, batch: &Packed) -> Result<()> {
        let (parts, device, tokens) = (&self.parts, &mut self.device, batch.tokens.len());
        let kept = &parts.of_layers[layer];
        let (x, normed, middle) =
            (parts.inputs[layer].first(tokens), parts.normed.first(tokens), kept.middle.first(tokens));
        let qkv = kept.qkv.map(|rows| rows.first(tokens));
        let attended = kept.attended.first(tokens);
        device.norm(Norm::Input(layer), x, normed)?;
        for (projection, out) in [Projection::Query, Projection::Key, Projection::Value].into_iter().zip(qkv) {
            device.clear(out)?;
            device.add_product(layer, projection, normed, out)?;
        }
        device.rotate(&batch.positions, false, qkv[0])?;
        device.rotate(&batch.positions, false, qkv[1])?;
        device.attention(&batch.documents, qkv, attended, kept.log_sums.first(tokens))?;
        device.copy(x, middle)?;
        device.add_product(layer, Projection::Output, attended, middle)
    }

    /// `normed = norm(middle)`, and where the router sends it.
    fn route(&mut self, layer: usize, batch: &Packed, noise: Option<&Noise>) -> Result<Routes> {
        let (parts, device, tokens) = (&self.parts, &mut self.device, batch.tokens.len());
        let (normed, logits) = (parts.normed.first(tokens), parts.logits.first(tokens));
        device.norm(Norm::PostAttention(layer), parts.of_layers[layer].middle.first(tokens), normed)?;
        device.clear(logits)?;
        device.add_gate_product(normed, Parts::of_layer(parts.gates, layer, self.choice.experts), logits)?;
        host_numbers(&mut self.logits, logits.count())?;
        device.read(logits, &mut self.logits)?;
        Routes::new(&self.choice, layer, (tokens, batch.counted), &self.logits, noise)
    }

    /// The outputs of all slots' experts, from `normed`; what is inside the experts stays for the gradient.
    pub(super) fn run_experts(&mut self, layer: usize, tokens: usize, slots: &Slots) -> Result<()> {
        let (parts, device, count) = (&self.parts, &mut self.device, slots.count());
        let kept = &parts.of_layers[layer];
        let (inputs, outputs) = (parts.slot_inputs.first(count), kept.slot_outputs.first(count));
        let (gates, ups, hidden) =
            (kept.slot_gates.first(count), kept.slot_ups.first(count), parts.slot_hidden.first(count));
        device.gather(slots, false, parts.normed.first(tokens), inputs)?;
        for (projection, x, out) in [(ExpertProjection::Gate, inputs, gates), (ExpertProjection::Up, inputs, ups)] {
            device.clear(out)?;
            device.add_expert_product(layer, projection, slots, x, out)?;
        }
        device.geglu(gates, ups, hidden)?;
        device.clear(outputs)?;
        device.add_expert_product(layer, ExpertProjection::Down, slots, hidden, outputs)
    }

    /// Final norm and head, of the tokens that have a target.
    fn run_head(&mut self, batch: &Packed, learn: bool) -> Result<()> {
        let (parts, device, tokens) = (&self.parts, &mut self.device, batch.tokens.len());
        let targets = batch.targets.len();
        let (normed, inputs, sums) =
            (parts.normed.first(tokens), parts.head_inputs.first(targets), parts.head_sums.first(targets));
        device.norm(Norm::Final, parts.inputs[self.layers].first(tokens), normed)?;
        device.gather(&batch.head_slots()?, false, normed, inputs)?;
        if learn {
            let gradient = parts.head_gradient.first(targets);
            device.log_probabilities_and_gradients(&batch.targets, inputs, sums, gradient)?;
        } else {
            device.log_probabilities(&batch.targets, inputs, sums)?;
        }
        host_numbers(&mut self.log_sums, sums.count())?;
        device.read(sums, &mut self.log_sums)
    }
}
