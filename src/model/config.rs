//! config.json: the numbers that give every tensor its shape, checked before anything is sized by them.

use serde_json::Value;

use super::json::{Bounded, UniqueMembers};
use super::quantization::{self, Fault, Quantization};
use crate::error::{Error, Result, Status};

/// The file's name in a model directory.
pub const FILE: &str = "config.json";
/// The largest config.json the library parses, in bytes.
pub const MAX_BYTES: u64 = 1 << 20;

/// The geometry and constants of a model, all within the ranges `Config::from_json` checks.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Rows of the embedding, and logits per position.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside one expert.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head; independent of hidden_size and even.
    pub head_dim: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Longest context the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Experts per layer; 1 for a dense model.
    pub num_local_experts: usize,
    /// Experts each token is sent to.
    pub num_experts_per_tok: usize,
    /// Whether the head is the embedding (an lm_head tensor that is present wins all the same).
    pub tie_word_embeddings: bool,
    /// Token put before every text.
    pub bos_token_id: u32,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// What matrices are stored in, where they were quantised.
    pub quantization: Option<Quantization>,
}

/// Number of experts `Config` accepts at most.
pub const MAX_EXPERTS: usize = 64;

impl Config {
    /// Parses and checks the contents of a config.json. Errors name the key, the value and what was expected.
    pub fn from_json(bytes: &[u8]) -> Result<Config> {
        let keys = Keys(parse(bytes)?);
        keys.check_family()?;
        let hidden_size = keys.count("hidden_size", 3072, 1, 1 << 16)?;
        let num_attention_heads = keys.count("num_attention_heads", 16, 1, 1024)?;
        let num_local_experts = keys.count("num_local_experts", 8, 1, MAX_EXPERTS)?;
        let config = Config {
            vocab_size: keys.count("vocab_size", 256_000, 1, 1 << 24)?,
            hidden_size,
            intermediate_size: keys.count("intermediate_size", 24_576, 1, 1 << 20)?,
            num_hidden_layers: keys.count("num_hidden_layers", 28, 1, 1024)?,
            num_attention_heads,
            num_key_value_heads: keys.count("num_key_value_heads", 16, 1, 1024)?,
            head_dim: keys.count("head_dim", 256, 2, 4096)?,
            rope_theta: keys.positive("rope_theta", 10_000.0)?,
            rms_norm_eps: keys.positive("rms_norm_eps", 1e-6)?,
            max_position_embeddings: keys.count("max_position_embeddings", 8192, 1, 1 << 24)?,
            num_local_experts,
            num_experts_per_tok: keys.count("num_experts_per_tok", 2.min(num_local_experts), 1, MAX_EXPERTS)?,
            tie_word_embeddings: keys.flag("tie_word_embeddings", true)?,
            bos_token_id: keys.token("bos_token_id", 2)?,
            eos_token_ids: keys.tokens("eos_token_id", 1)?,
            quantization: keys.quantization()?,
        };
        config.check_relations()?;
        Ok(config)
    }

    fn check_relations(&self) -> Result<()> {
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(value_error(
                "num_key_value_heads",
                &self.num_key_value_heads.to_string(),
                &format!("a divisor of num_attention_heads ({})", self.num_attention_heads),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(value_error("head_dim", &self.head_dim.to_string(), "an even number (rotary pairs)"));
        }
        if self.bos_token_id as usize >= self.vocab_size {
            return Err(value_error(
                "bos_token_id",
                &self.bos_token_id.to_string(),
                &format!("a token below vocab_size ({})", self.vocab_size),
            ));
        }
        if self.num_experts_per_tok > self.num_local_experts {
            return Err(value_error(
                "num_experts_per_tok",
                &self.num_experts_per_tok.to_string(),
                &format!("1 to num_local_experts ({})", self.num_local_experts),
            ));
        }
        Ok(())
    }

    /// The same model with one expert and no router, which is what a dense checkpoint holds.
    pub fn as_dense(&self) -> Config {
        Config { num_local_experts: 1, num_experts_per_tok: 1, ..self.clone() }
    }

    /// Width of all query heads together.
    pub fn query_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn key_value_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }
}

fn parse(bytes: &[u8]) -> Result<Vec<(String, Value)>> {
    match serde_json::from_slice::<UniqueMembers<Bounded>>(bytes) {
        Ok(members) => Ok(members.0.into_iter().map(|(key, Bounded(value))| (key, value)).collect()),
        Err(error) => Err(Error::new(Status::ConfigSyntax, format!("not a valid JSON object: {error}")).in_file(FILE)),
    }
}

fn value_error(key: &str, found: &str, expected: &str) -> Error {
    Error::new(Status::ConfigValue, format!("\"{key}\" is {found}, expected {expected}")).in_file(FILE).at_key(key)
}

fn unsupported(key: &str, found: &Value, supported: &str) -> Error {
    let text = format!("\"{key}\" is {}, this library runs {supported}", shorten(found));
    Error::new(Status::UnsupportedModel, text).in_file(FILE).at_key(key)
}

/// A value as JSON, cut so that a hostile file cannot make an error message large.
fn shorten(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

struct Keys(Vec<(String, Value)>);

impl Keys {
    /// The value of a key; null counts as absent, as in the published files.
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value).filter(|value| !value.is_null())
    }

    fn check_family(&self) -> Result<()> {
        match self.get("model_type") {
            Some(Value::String(name)) if name == "gemmoe" || name == "gemma" => {}
            Some(other) => return Err(unsupported("model_type", other, "\"gemmoe\" and \"gemma\"")),
            None => return Err(value_error("model_type", "absent", "\"gemmoe\" or \"gemma\"")),
        }
        for key in ["hidden_act", "hidden_activation"] {
            const GELU: [&str; 4] = ["gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"];
            if let Some(value) = self.get(key)
                && !value.as_str().is_some_and(|name| GELU.contains(&name))
            {
                return Err(unsupported(key, value, "GeLU (\"gelu\" or \"gelu_pytorch_tanh\")"));
            }
        }
        if self.flag("attention_bias", false)? {
            return Err(unsupported("attention_bias", &Value::Bool(true), "attention without biases (false)"));
        }
        for key in ["rope_scaling", "sliding_window"] {
            if let Some(value) = self.get(key) {
                return Err(unsupported(key, value, "models without it (null)"));
            }
        }
        Ok(())
    }

    fn quantization(&self) -> Result<Option<Quantization>> {
        let Some(value) = self.get(quantization::KEY) else { return Ok(None) };
        // What is found at `quantization_config` or at one key inside it.
        let found = |key: &str| {
            let inside = key.strip_prefix(quantization::KEY).and_then(|rest| rest.strip_prefix('.'));
            inside.map_or(Some(value), |key| value.get(key)).unwrap_or(&Value::Null).clone()
        };
        Quantization::from_json(value).map(Some).map_err(|fault| match fault {
            Fault::Unsupported(key, runs) => unsupported(&key, &found(&key), &runs),
            Fault::Value(key, expected) => value_error(&key, &shorten(&found(&key)), &expected),
        })
    }

    /// A whole number in `lowest..=highest`; `4.0` counts as 4.
    fn count(&self, key: &str, default: usize, lowest: usize, highest: usize) -> Result<usize> {
        let Some(value) = self.get(key) else { return Ok(default) };
        match value.as_f64() {
            Some(number) if number.fract() == 0.0 && number >= lowest as f64 && number <= highest as f64 => {
                Ok(number as usize)
            }
            _ => Err(value_error(key, &shorten(value), &format!("a whole number from {lowest} to {highest}"))),
        }
    }

    /// A finite number above zero that f32 can hold.
    fn positive(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else { return Ok(default) };
        match value.as_f64() {
            Some(number) if number as f32 > 0.0 && (number as f32).is_finite() => Ok(number),
            _ => Err(value_error(key, &shorten(value), "a finite number above 0")),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(value_error(key, &shorten(other), "true or false")),
        }
    }

    fn token(&self, key: &str, default: u32) -> Result<u32> {
        Ok(self.count(key, default as usize, 0, u32::MAX as usize)? as u32)
    }

    /// One token id or a list of them.
    fn tokens(&self, key: &str, default: u32) -> Result<Vec<u32>> {
        let Some(Value::Array(items)) = self.get(key) else { return Ok(vec![self.token(key, default)?]) };
        let id = |item: &Value| item.as_u64().and_then(|id| u32::try_from(id).ok());
        match items.iter().map(id).collect::<Option<Vec<u32>>>() {
            Some(ids) if ids.len() <= 256 => Ok(ids),
            _ => Err(value_error(key, &shorten(&Value::Array(items.clone())), "a token id or at most 256 of them")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(json: &str) -> Status {
        Config::from_json(json.as_bytes()).unwrap_err().status()
    }

    #[test]
    fn absent_keys_take_the_published_defaults() {
        let config = Config::from_json(br#"{"model_type":"gemmoe"}"#).unwrap();
        assert_eq!((config.vocab_size, config.hidden_size, config.intermediate_size), (256_000, 3072, 24_576));
        assert_eq!((config.num_hidden_layers, config.num_attention_heads, config.head_dim), (28, 16, 256));
        assert_eq!((config.num_local_experts, config.num_experts_per_tok), (8, 2));
        assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (2, [1].as_slice()));
        assert!(config.tie_word_embeddings);
        assert_eq!((config.query_size(), config.key_value_size()), (4096, 4096));
    }

    #[test]
    fn whole_floats_count_as_integers_and_null_as_absent() {
        let json = br#"{"model_type":"gemmoe","hidden_size":72.0,"rope_scaling":null,"rope_theta":10000}"#;
        let config = Config::from_json(json).unwrap();
        assert_eq!((config.hidden_size, config.rope_theta), (72, 10_000.0));
    }

    #[test]
    fn every_way_of_being_wrong_has_its_status() {
        let cases = [
            ("{", Status::ConfigSyntax),
            ("[]", Status::ConfigSyntax),
            (r#"{"model_type":"gemmoe","head_dim":8,"head_dim":8}"#, Status::ConfigSyntax),
            ("{}", Status::ConfigValue),
            (r#"{"model_type":"llama"}"#, Status::UnsupportedModel),
            (r#"{"model_type":"gemmoe","hidden_act":"silu"}"#, Status::UnsupportedModel),
            (r#"{"model_type":"gemmoe","attention_bias":true}"#, Status::UnsupportedModel),
            (r#"{"model_type":"gemmoe","rope_scaling":{"type":"linear"}}"#, Status::UnsupportedModel),
            (r#"{"model_type":"gemmoe","hidden_size":0}"#, Status::ConfigValue),
            (r#"{"model_type":"gemmoe","hidden_size":-1}"#, Status::ConfigValue),
            (r#"{"model_type":"gemmoe","hidden_size":1.5}"#, Status::ConfigValue),
            (r#"{"model_type":"gemmoe","hidden_size":1e300}"#, Status::ConfigValue),
            (r#"{"model_type":"gemmoe","hidden_size":"72"}"#, Status::ConfigValue),
            (r#"{"model_type":"gemmoe","head_dim":7}"#, Status::ConfigValue),
            (r#"{"model_type":"gemmoe","num_key_value_heads":3}"#, Status::ConfigValue),
            (r#"{"model_type":"gemmoe","num_local_experts":65}"#, Status::ConfigValue),
            (r#"{"model_type":"gemmoe","num_local_experts":4,"num_experts_per_tok":5}"#, Status::ConfigValue),
            (r#"{"model_type":"gemmoe","rope_theta":0}"#, Status::ConfigValue),
            (r#"{"model_type":"gemmoe","rms_norm_eps":1e-60}"#, Status::ConfigValue),
            (r#"{"model_type":"gemmoe","eos_token_id":[1,-2]}"#, Status::ConfigValue),
        ];
        for (json, expected) in cases {
            assert_eq!(status(json), expected, "{json}");
        }
    }
}
