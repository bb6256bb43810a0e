//! A safetensors file in the making, free to say what no writer would.

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::common::Directory;

/// A tensor as its header describes it, and its bytes.
pub struct Stored {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<u64>,
    pub data: Vec<u8>,
}

/// Tensors in file order.
pub struct WeightFile {
    pub tensors: Vec<Stored>,
}

impl WeightFile {
    /// The tensors of a directory, all BF16.
    pub fn of(directory: &Directory) -> WeightFile {
        assert_eq!(directory.dtype, Dtype::BF16);
        let stored = directory.tensors.iter().map(|(name, (shape, values))| Stored {
            name: name.clone(),
            dtype: "BF16".to_owned(),
            shape: shape.iter().map(|size| *size as u64).collect(),
            data: directory.tensor_bytes(values),
        });
        WeightFile { tensors: stored.collect() }
    }

    /// The tensors of a file that is in order.
    pub fn from_bytes(bytes: &[u8]) -> WeightFile {
        let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
        let stored = |(name, tensor): (String, safetensors::tensor::TensorView)| Stored {
            name,
            dtype: tensor.dtype().to_string(),
            shape: tensor.shape().iter().map(|size| *size as u64).collect(),
            data: tensor.data().to_vec(),
        };
        WeightFile { tensors: file.tensors().into_iter().map(stored).collect() }
    }

    pub fn get(&mut self, name: &str) -> &mut Stored {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    pub fn remove(&mut self, name: &str) -> Stored {
        let at = self.tensors.iter().position(|tensor| tensor.name == name).unwrap();
        self.tensors.remove(at)
    }

    /// Adds a BF16 tensor of zeros.
    pub fn add(&mut self, name: &str, shape: &[u64]) {
        let data = vec![0; 2 * shape.iter().product::<u64>() as usize];
        self.tensors.push(Stored { name: name.to_owned(), dtype: "BF16".to_owned(), shape: shape.to_vec(), data });
    }

    /// Puts one fused tensor of this shape in the place of the per-expert ones of every layer.
    pub fn fuse(&mut self, gate_up: &[u64], down: &[u64]) {
        self.tensors.retain(|tensor| !tensor.name.contains(".experts."));
        for tensor in &mut self.tensors {
            tensor.name = tensor.name.replace("block_sparse_moe.gate", "mlp.gate");
        }
        for layer in 0..2 {
            self.add(&format!("model.layers.{layer}.mlp.experts.gate_up_proj"), gate_up);
            self.add(&format!("model.layers.{layer}.mlp.experts.down_proj"), down);
        }
    }

    /// Keeps expert 0 of every layer under the names a dense model has.
    pub fn make_dense(&mut self) {
        self.tensors.retain(|tensor| !tensor.name.contains("block_sparse_moe") || tensor.name.contains(".experts.0."));
        for tensor in &mut self.tensors {
            for (moe, dense) in [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")] {
                let (from, to) = (format!("block_sparse_moe.experts.0.{moe}"), format!("mlp.{dense}"));
                tensor.name = tensor.name.replace(&from, &to);
            }
        }
    }

    /// The header and the data it describes.
    pub fn to_parts(&self) -> (Value, Vec<u8>) {
        let (mut header, mut data) = (Map::new(), Vec::new());
        for tensor in &self.tensors {
            let first = data.len();
            data.extend_from_slice(&tensor.data);
            let offsets = [first, data.len()];
            let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets});
            header.insert(tensor.name.clone(), entry);
        }
        (Value::Object(header), data)
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let (header, data) = self.to_parts();
        let header = header.to_string().into_bytes();
        [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
    }
}
