//! The router, and the experts it chooses.

use std::sync::Arc;

use super::CudaPass;
use super::products::Wanted;
use crate::backend::cuda::arguments::*;
use crate::backend::cuda::context::Current;
use crate::backend::cuda::driver::Address;
use crate::backend::cuda::experts::{ExpertGroup, ExpertTables};
use crate::backend::cuda::gates;
use crate::backend::cuda::workspace::at;
use crate::backend::gates::AppliedGates;
use crate::backend::ops::Limit;
use crate::error::Result;
use crate::quant::PANEL_ROWS;

impl CudaPass {
    /// Addresses of a layer's choices, and of their weights.
    pub(super) fn routes_of(&self, layer: usize) -> (Address, Address) {
        let of_layer = self.shape.tokens * self.shared.config.num_experts_per_tok * size_of::<u32>();
        let all = of_layer * self.shared.config.num_hidden_layers;
        let routes = self.workspace.parts.routes + (layer * of_layer) as Address;
        (routes, routes + all as Address)
    }

    /// Choices of all layers in this batch.
    pub(super) fn choices(&self) -> usize {
        let config = &self.shared.config;
        self.shape.tokens * config.num_experts_per_tok * config.num_hidden_layers
    }

    pub(super) fn choose_experts(&self, current: &Current, layer: usize, gates: Option<&AppliedGates>) -> Result<()> {
        let (parts, layout, shared) = (&self.workspace.parts, &self.workspace.layout, &self.shared);
        let (config, weights, tokens) = (&shared.config, &shared.weights.layers[layer], self.shape.tokens);
        let wanted = self.wanted_for(weights.experts.iter().map(|expert| &expert.gate), tokens);
        self.norm(current, &weights.post_attention_norm, 0, tokens, wanted)?;
        let (chosen, chosen_weights) = self.routes_of(layer);
        let top_k = config.num_experts_per_tok as u32;
        let arguments = RouteArguments {
            router: gates::arguments(shared, gates, layer),
            normed: at(parts.normed.numbers),
            places: at(self.batch_part(&layout.places)),
            allowed: at(self.batch_part(&layout.allowed)),
            bias: at(self.batch_part(&layout.bias)),
            chosen: at(chosen),
            weights: at(chosen_weights),
            exact_weights: at(parts.exact_weights),
            stride: parts.normed.stride as u32,
            layer: layer as u32,
            layers: config.num_hidden_layers as u32,
            experts: config.num_local_experts as u32,
            top_k,
        };
        // SAFETY: as in `norm`.
        unsafe { shared.kernels.route.launch(current, [tokens, 1, 1], &arguments) }?;
        let arguments = GroupArguments {
            chosen: at(chosen),
            slots: at(parts.slots),
            slot_tokens: at(parts.slot_tokens),
            starts: at(parts.starts),
            tokens: tokens as u32,
            top_k,
            experts: config.num_local_experts as u32,
        };
        // SAFETY: as in `norm`.
        unsafe { shared.kernels.group.launch(current, [1, 1, 1], &arguments) }
    }

    /// All of a layer's experts; whether some are left to `compute_on_host`, which then ends the layer.
    pub(super) fn run_experts(&mut self, current: &Current, layer: usize, limit: &Limit) -> Result<bool> {
        let shared = Arc::clone(&self.shared);
        let mut experts = shared.experts.lock();
        self.check_generation(experts.generation())?;
        if !experts.has_host(layer) {
            self.run_resident_experts(current, layer, experts.tables(current, layer)?)?;
        } else if self.run_split_experts(current, layer, limit, experts)? {
            return Ok(true);
        }
        self.combine(current, layer)?;
        self.pace(current, limit)?;
        Ok(false)
    }

    /// `projected` of the slots of the experts that are on the device.
    pub(super) fn run_resident_experts(&self, current: &Current, layer: usize, tables: &ExpertTables) -> Result<()> {
        self.gate_up(current, layer, tables, &tables.gate_up_groups)?;
        let (parts, config) = (&self.workspace.parts, &self.shared.config);
        let slot_count = parts.starts + (config.num_local_experts * size_of::<u32>()) as Address;
        let slots = self.shape.tokens * config.num_experts_per_tok;
        self.round(current, &parts.activated, slots, slot_count, self.wanted_of_down(layer))?;
        self.down(current, layer, tables, &tables.down_groups)
    }

    /// The same of one that was copied there, whose slots are `count` from `first` on.
    pub(super) fn run_copied_expert(
        &self,
        current: &Current,
        layer: usize,
        tables: &ExpertTables,
        [gate_up, down]: [ExpertGroup; 2],
        (first, count): (usize, usize),
    ) -> Result<()> {
        self.gate_up(current, layer, tables, &[gate_up])?;
        let activated = self.workspace.parts.activated.skip_rows(first);
        self.round(current, &activated, count, 0, self.wanted_of_down(layer))?;
        self.down(current, layer, tables, &[down])
    }

    fn wanted_of_down(&self, layer: usize) -> Wanted {
        let experts = &self.shared.weights.layers[layer].experts;
        self.wanted_for(experts.iter().map(|expert| &expert.down), self.shape.tokens)
    }

    /// activated[slot] = gelu(gate x) * (up x), x being the normed input of the slot's token.
    fn gate_up(&self, current: &Current, layer: usize, tables: &ExpertTables, groups: &[ExpertGroup]) -> Result<()> {
        let (parts, shared) = (&self.workspace.parts, &self.shared);
        let arguments = ExpertArguments {
            weights: at(tables.gate),
            up: at(tables.up),
            selected: std::ptr::null(),
            x: parts.normed.arguments(parts.slot_tokens),
            starts: at(parts.starts),
            out: at(parts.activated.numbers),
            out_stride: parts.activated.stride as u32,
            exact_gelu: shared.numerics.exact_gelu as u32,
        };
        let panels = shared.config.intermediate_size.div_ceil(PANEL_ROWS);
        let experts = &shared.weights.layers[layer].experts;
        let wanted = self.wanted_for(experts.iter().map(|expert| &expert.gate), self.shape.tokens);
        self.multiply_slots(current, &shared.kernels.gate_up, groups, (panels, wanted), arguments)
    }

    /// projected[slot] = down activated[slot]
    fn down(&self, current: &Current, layer: usize, tables: &ExpertTables, groups: &[ExpertGroup]) -> Result<()> {
        let (parts, shared) = (&self.workspace.parts, &self.shared);
        let arguments = ExpertArguments {
            weights: at(tables.down),
            up: std::ptr::null(),
            selected: std::ptr::null(),
            x: parts.activated.arguments(0),
            starts: at(parts.starts),
            out: at(parts.projected),
            out_stride: shared.config.hidden_size as u32,
            exact_gelu: shared.numerics.exact_gelu as u32,
        };
        let panels = shared.config.hidden_size.div_ceil(PANEL_ROWS);
        let wanted = self.wanted_of_down(layer);
        self.multiply_slots(current, &shared.kernels.down, groups, (panels, wanted), arguments)
    }

    /// x += sum of weight * projected over the token's slots, in the order of the weights, rounded once.
    pub(super) fn combine(&self, current: &Current, layer: usize) -> Result<()> {
        let (parts, config) = (&self.workspace.parts, &self.shared.config);
        let arguments = CombineArguments {
            projected: at(parts.projected),
            slots: at(parts.slots),
            chosen: at(self.routes_of(layer).0),
            exact_weights: at(parts.exact_weights),
            x: at(parts.x),
            hidden_size: config.hidden_size as u32,
            top_k: config.num_experts_per_tok as u32,
        };
        // SAFETY: as in `norm`.
        unsafe { self.shared.kernels.combine.launch(current, [self.shape.tokens, 1, 1], &arguments) }
    }
}
