//! Losses of the router itself: that experts share the load, and that logits stay small.
//!
//! **Balancing** (Switch Transformers, arXiv 2101.03961, equations 4 to 6; for k choices as in the published Mixtral class):
//! `E * sum over choices k and experts e of f[k, e] p[e]`, f the share of tokens whose k-th choice is e, which has no gradient,
//! and p the mean probability. Even routing gives k. *Global*: f and p over the tokens of all layers together; *per layer*: the
//! mean over layers of each one's loss.
//!
//! **z-loss** (ST-MoE, arXiv 2202.08906, equation 5): the mean of the squared logarithm of the sum of all e^logit, over tokens and
//! layers.

use super::routing::{Choice, Routes};

/// Over what the balancing loss takes its shares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BalanceForm {
    /// All layers together, as the published Mixtral class.
    #[default]
    Global,
    /// Each layer alone, as Switch Transformers.
    PerLayer,
}

impl BalanceForm {
    /// All of them, the default first.
    pub const ALL: [BalanceForm; 2] = [BalanceForm::Global, BalanceForm::PerLayer];

    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            BalanceForm::Global => "global",
            BalanceForm::PerLayer => "layer",
        }
    }
}

/// Coefficients of the router's own losses; 0 leaves one out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterLosses {
    /// Of the balancing loss (router_aux_loss_coef).
    pub balance: f64,
    /// Its form.
    pub form: BalanceForm,
    /// Of the z-loss.
    pub z: f64,
}

/// What the router's own losses are over one batch, and what their gradients need.
#[derive(Clone, Debug, Default)]
pub struct RouterLoad {
    /// The balancing loss, without its coefficient.
    pub balance: f64,
    /// The z-loss, without its coefficient.
    pub z: f64,
    /// `[layers, experts]`: the share of choices each expert has; the sum of a layer is 1.
    pub shares: Vec<f64>,
    /// `[layers, experts]`: the gradient of the balancing loss with respect to each token's probability.
    gradients: Vec<f64>,
    tokens: usize,
    layers: usize,
}

impl RouterLoad {
    /// Of the routes of all layers.
    pub fn new(choice: &Choice, layers: &[Routes], form: BalanceForm) -> RouterLoad {
        let (experts, count) = (choice.experts, layers.len());
        let tokens = layers.first().map_or(0, |routes| routes.log_sums.len());
        let per_token = 1.0 / tokens.max(1) as f64;
        let mut load = RouterLoad { tokens, layers: count, ..RouterLoad::default() };
        // Summed over k: p does not depend on it.
        let mut shares = vec![0f64; count * experts];
        let mut means = vec![0f64; count * experts];
        for (layer, routes) in layers.iter().enumerate() {
            let at = layer * experts..(layer + 1) * experts;
            routes.chosen.iter().for_each(|expert| shares[at.start + *expert as usize] += per_token);
            for probabilities in routes.probabilities.chunks_exact(experts) {
                means[at.clone()].iter_mut().zip(probabilities).for_each(|(mean, p)| *mean += p * per_token);
            }
            load.z += routes.log_sums.iter().map(|log_sum| log_sum * log_sum).sum::<f64>() * per_token / count as f64;
        }
        load.shares = shares.iter().map(|share| share / choice.top_k as f64).collect();
        if form == BalanceForm::Global {
            let mean_of = |numbers: &[f64], expert: usize| {
                numbers.iter().skip(expert).step_by(experts).sum::<f64>() / count.max(1) as f64
            };
            let global: Vec<f64> = (0..experts).map(|expert| mean_of(&shares, expert)).collect();
            shares.iter_mut().enumerate().for_each(|(at, share)| *share = global[at % experts]);
        }
        let scale = experts as f64 / count.max(1) as f64;
        load.balance = shares.iter().zip(&means).map(|(share, mean)| scale * share * mean).sum();
        load.gradients = shares.iter().map(|share| scale * share * per_token).collect();
        load
    }

    /// Adds the gradients of one layer's logits to `out: [tokens, experts]`, the losses times their coefficients and `scale`.
    pub fn add_logit_gradient(
        &self,
        layer: usize,
        routes: &Routes,
        losses: &RouterLosses,
        scale: f64,
        out: &mut [f32],
    ) {
        let experts = self.gradients.len() / self.layers.max(1);
        let of_layer = &self.gradients[layer * experts..(layer + 1) * experts];
        let z = losses.z * scale * 2.0 / (self.tokens * self.layers).max(1) as f64;
        let rows = routes.probabilities.chunks_exact(experts).zip(&routes.log_sums).zip(out.chunks_exact_mut(experts));
        for ((probabilities, log_sum), out) in rows {
            let mean: f64 = probabilities.iter().zip(of_layer).map(|(p, gradient)| p * gradient).sum();
            for ((out, p), gradient) in out.iter_mut().zip(probabilities).zip(of_layer) {
                *out += (losses.balance * scale * p * (gradient - mean) + z * log_sum * p) as f32;
            }
        }
    }
}
