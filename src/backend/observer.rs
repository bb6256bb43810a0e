//! What the matrices of a model are multiplied with: the mean square of each of their columns, collected over the passes of
//! a calibration text; and, where somebody wants them, the inputs of routers themselves. A backend that is asked to shows an
//! `Observer` the inputs of every product.

use std::fmt;

use parking_lot::Mutex;

use crate::error::{Error, Result, Status};
use crate::memory::{try_vec, try_with_capacity};
use crate::model::Config;

/// An input that one or several matrices of a layer, or the head, are multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Of queries, keys and values in a layer: `[hidden_size]`.
    Attention(usize),
    /// Of the output projection in a layer: `[query_size]`.
    Output(usize),
    /// Of gate and up in a layer, of an expert: `[hidden_size]`, of the tokens sent to it.
    Expert(usize, usize),
    /// Of down in a layer, of an expert: `[intermediate_size]`.
    Down(usize, usize),
    /// Of the head: `[hidden_size]`.
    Head,
}

/// Sums over the rows it was shown. Usable from any thread.
pub struct Observer {
    sizes: Sizes,
    layers: Vec<Layer>,
    head: Mutex<Sums>,
    /// For each layer the inputs of its router, where they are kept: `[tokens, hidden_size]`.
    router_inputs: Vec<Mutex<Vec<f32>>>,
}

/// What a model's inputs are as many as, and as wide as.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Sizes {
    layers: usize,
    experts: usize,
    hidden: usize,
    query: usize,
    inner: usize,
}

impl Sizes {
    fn of(config: &Config) -> Sizes {
        Sizes {
            layers: config.num_hidden_layers,
            experts: config.num_local_experts,
            hidden: config.hidden_size,
            query: config.query_size(),
            inner: config.intermediate_size,
        }
    }
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Sizes { layers, experts, hidden, query, inner } = self;
        write!(f, "{layers} layers of {experts} experts, inputs of {hidden}, {query} and {inner} columns")
    }
}

struct Layer {
    attention: Mutex<Sums>,
    output: Mutex<Sums>,
    experts: Vec<Mutex<Sums>>,
    downs: Vec<Mutex<Sums>>,
}

struct Sums {
    rows: u64,
    /// `[columns]`
    squares: Vec<f64>,
}

impl Sums {
    fn new(columns: usize) -> Result<Mutex<Sums>> {
        Ok(Mutex::new(Sums { rows: 0, squares: try_vec("mean squares of activations", columns, 0.0)? }))
    }
}

impl Observer {
    /// One for a model.
    pub fn new(config: &Config) -> Result<Observer> {
        let sizes = Sizes::of(config);
        let Sizes { layers, experts, hidden, query, inner } = sizes;
        let of_experts = |columns: usize| (0..experts).map(|_| Sums::new(columns)).collect::<Result<_>>();
        let layer = |_| {
            Ok(Layer {
                attention: Sums::new(hidden)?,
                output: Sums::new(query)?,
                experts: of_experts(hidden)?,
                downs: of_experts(inner)?,
            })
        };
        let layers = (0..layers).map(layer).collect::<Result<_>>()?;
        let router_inputs = (0..sizes.layers).map(|_| Mutex::default()).collect();
        Ok(Observer { sizes, layers, head: Sums::new(hidden)?, router_inputs })
    }

    /// From now on keeps what routers are multiplied with, of as many as `tokens` tokens until they are taken.
    pub fn keep_router_inputs(&self, tokens: usize) -> Result<()> {
        let elements = tokens.saturating_mul(self.sizes.hidden);
        for inputs in &self.router_inputs {
            *inputs.lock() = try_with_capacity("the inputs of routers", elements)?;
        }
        Ok(())
    }

    /// Takes in the rows of a layer's router input, `[hidden_size]` each; where none are kept, or enough, it passes them over.
    pub fn see_router<'a>(&self, layer: usize, rows: impl Iterator<Item = &'a [f32]>) {
        let mut inputs = self.router_inputs[layer].lock();
        for row in rows {
            if inputs.capacity() - inputs.len() >= row.len() {
                inputs.extend_from_slice(row);
            }
        }
    }

    /// Shows the inputs of a layer's router, `[tokens, hidden_size]` in the order of the tokens, and forgets them.
    pub fn take_router_inputs<T>(&self, layer: usize, see: impl FnOnce(&[f32]) -> T) -> T {
        let mut inputs = self.router_inputs[layer].lock();
        let result = see(&inputs);
        inputs.clear();
        result
    }

    /// Fails with `InvalidArgument` unless a model of `config` has the inputs of the one this was made for.
    pub fn check(&self, config: &Config) -> Result<()> {
        let (own, its) = (self.sizes, Sizes::of(config));
        if own == its {
            return Ok(());
        }
        let text = format!("the importance is of another model: that has {own}, this one {its}");
        Err(Error::new(Status::InvalidArgument, text).at_key("importance"))
    }

    fn sums(&self, input: Input) -> &Mutex<Sums> {
        match input {
            Input::Attention(layer) => &self.layers[layer].attention,
            Input::Output(layer) => &self.layers[layer].output,
            Input::Expert(layer, expert) => &self.layers[layer].experts[expert],
            Input::Down(layer, expert) => &self.layers[layer].downs[expert],
            Input::Head => &self.head,
        }
    }

    /// What was seen up to now.
    pub fn copied(&self) -> Result<Observer> {
        let copy = |sums: &Mutex<Sums>| {
            let sums = sums.lock();
            let copy = Sums::new(sums.squares.len())?;
            copy.lock().rows = sums.rows;
            copy.lock().squares.copy_from_slice(&sums.squares);
            Ok(copy)
        };
        let layer = |layer: &Layer| {
            Ok(Layer {
                attention: copy(&layer.attention)?,
                output: copy(&layer.output)?,
                experts: layer.experts.iter().map(copy).collect::<Result<_>>()?,
                downs: layer.downs.iter().map(copy).collect::<Result<_>>()?,
            })
        };
        let layers = self.layers.iter().map(layer).collect::<Result<_>>()?;
        let router_inputs = (0..self.sizes.layers).map(|_| Mutex::default()).collect();
        Ok(Observer { sizes: self.sizes, layers, head: copy(&self.head)?, router_inputs })
    }

    /// Takes in the rows of a product, `[columns]` each.
    pub fn see<'a>(&self, input: Input, rows: impl Iterator<Item = &'a [f32]>) {
        let mut sums = self.sums(input).lock();
        for row in rows {
            sums.rows += 1;
            for (sum, value) in sums.squares.iter_mut().zip(row) {
                *sum += *value as f64 * *value as f64;
            }
        }
    }

    /// The rows that were seen, and the mean square of each of their columns, `[columns]`, as a share of the mean of all;
    /// none where no row, or only zeros, were seen.
    pub fn mean_squares(&self, input: Input) -> Option<(u64, Vec<f32>)> {
        let sums = self.sums(input).lock();
        let mean = sums.squares.iter().sum::<f64>() / sums.squares.len() as f64;
        let seen = sums.rows > 0 && mean > 0.0 && mean.is_finite();
        seen.then(|| (sums.rows, sums.squares.iter().map(|square| (square / mean) as f32).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_squares_are_shares_of_their_mean_and_absent_where_nothing_was_seen() {
        let config = Config::from_json(br#"{"model_type":"gemmoe","hidden_size":4,"num_hidden_layers":2}"#).unwrap();
        let observer = Observer::new(&config).unwrap();
        let rows = [[1.0, 0.0, 2.0, 3.0], [-1.0, 0.0, 0.0, 1.0]];
        observer.see(Input::Expert(1, 3), rows.iter().map(|row| &row[..]));
        observer.see(Input::Head, [&[0.0; 4][..]].into_iter());
        assert_eq!(observer.mean_squares(Input::Expert(1, 3)), Some((2, vec![0.5, 0.0, 1.0, 2.5])));
        assert_eq!(observer.mean_squares(Input::Expert(0, 3)), None);
        assert_eq!(observer.mean_squares(Input::Head), None);
        let copied = observer.copied().unwrap();
        observer.see(Input::Expert(1, 3), [&[1.0; 4][..]].into_iter());
        assert_eq!(copied.mean_squares(Input::Expert(1, 3)), Some((2, vec![0.5, 0.0, 1.0, 2.5])));
        assert_eq!(observer.mean_squares(Input::Expert(1, 3)).map(|(rows, _)| rows), Some(3));
    }
}
