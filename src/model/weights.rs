//! The weights of a model in host memory, in the dtype they were stored in.

use half::{bf16, f16};
use safetensors::Dtype;

use super::checkpoint::Checkpoint;
use super::config::Config;
use super::names::{self, Layout, Part};
use super::progress::Progress;
use crate::error::{Error, Result, Status};
use crate::memory::{Buffer, as_bytes, as_bytes_mut, try_with_capacity};

/// Elements of a matrix, row-major.
pub enum Elements {
    /// bfloat16, as published.
    Bf16(Buffer<bf16>),
    /// IEEE half precision.
    F16(Buffer<f16>),
    /// IEEE single precision.
    F32(Buffer<f32>),
}

impl Elements {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Elements::Bf16(buffer) => buffer.bytes(),
            Elements::F16(buffer) => buffer.bytes(),
            Elements::F32(buffer) => buffer.bytes(),
        }
    }

    /// The elements as they lie in memory.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Elements::Bf16(buffer) => as_bytes(buffer),
            Elements::F16(buffer) => as_bytes(buffer),
            Elements::F32(buffer) => as_bytes(buffer),
        }
    }

    /// Their dtype.
    pub fn dtype(&self) -> Dtype {
        match self {
            Elements::Bf16(_) => Dtype::BF16,
            Elements::F16(_) => Dtype::F16,
            Elements::F32(_) => Dtype::F32,
        }
    }

    /// `value` rounded to this dtype.
    pub fn round(&self, value: f64) -> f32 {
        match self {
            Elements::Bf16(_) => bf16::from_f64(value).to_f32(),
            Elements::F16(_) => f16::from_f64(value).to_f32(),
            Elements::F32(_) => value as f32,
        }
    }
}

/// A weight matrix `[rows, columns]` = `[out, in]`.
pub struct Matrix {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// rows * columns of them.
    pub elements: Elements,
}

impl Matrix {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.elements.bytes()
    }

    /// Row `row`, widened to f32 into `out: [columns]`.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let range = row * self.columns..(row + 1) * self.columns;
        match &self.elements {
            Elements::Bf16(buffer) => out.iter_mut().zip(&buffer[range]).for_each(|(o, e)| *o = e.to_f32()),
            Elements::F16(buffer) => out.iter_mut().zip(&buffer[range]).for_each(|(o, e)| *o = e.to_f32()),
            Elements::F32(buffer) => out.copy_from_slice(&buffer[range]),
        }
    }

    /// All elements, widened to f32.
    fn to_f32(&self, what: &str) -> Result<Buffer<f32>> {
        let mut wide = Buffer::zeroed(what, self.rows * self.columns)?;
        for (row, out) in wide.chunks_exact_mut(self.columns).enumerate() {
            self.read_row(row, out);
        }
        Ok(wide)
    }
}

/// One expert: `down( gelu(gate x) * (up x) )`. `gate` and `up` have one dtype: they are computed in one kernel.
pub struct ExpertWeights {
    /// [intermediate_size, hidden_size]
    pub gate: Matrix,
    /// [intermediate_size, hidden_size]
    pub up: Matrix,
    /// [hidden_size, intermediate_size]
    pub down: Matrix,
}

/// One layer.
pub struct LayerWeights {
    /// [hidden_size], without the 1 that Gemma's norm adds.
    pub input_norm: Buffer<f32>,
    /// [query_size, hidden_size]
    pub query: Matrix,
    /// [key_value_size, hidden_size]
    pub key: Matrix,
    /// [key_value_size, hidden_size]
    pub value: Matrix,
    /// [hidden_size, query_size]
    pub output: Matrix,
    /// [hidden_size], without the 1 that Gemma's norm adds.
    pub post_attention_norm: Buffer<f32>,
    /// [num_local_experts, hidden_size]; none in a dense model.
    pub router: Option<Buffer<f32>>,
    /// num_local_experts of them.
    pub experts: Vec<ExpertWeights>,
}

/// All weights of a model.
pub struct Weights {
    /// [vocab_size, hidden_size]
    pub embedding: Matrix,
    /// num_hidden_layers of them.
    pub layers: Vec<LayerWeights>,
    /// [hidden_size], without the 1 that Gemma's norm adds.
    pub final_norm: Buffer<f32>,
    /// [vocab_size, hidden_size]; none where the embedding is the head.
    pub head: Option<Matrix>,
}

/// What a checkpoint's weights are, told from its headers alone.
pub struct Description {
    /// The configuration the weights have: dense checkpoints have one expert.
    pub config: Config,
    /// How the experts are stored.
    pub layout: Layout,
    /// Parameters of the model.
    pub parameters: u64,
    /// Parameters of the experts among them.
    pub expert_parameters: u64,
    /// Bytes of the model's tensors in the files.
    pub bytes: u64,
    /// The dtypes its tensors are stored in, each once.
    pub dtypes: Vec<String>,
    /// The dtype of the embedding.
    pub embedding_dtype: Dtype,
    /// Bytes of everything once it is loaded, and of the experts among it: what [`Weights::bytes`] will say.
    pub loaded_bytes: (u64, u64),
    plan: Plan,
}

impl Description {
    /// Checks every tensor the configuration asks for, as loading does, without reading any.
    pub fn new(config: &Config, checkpoint: &Checkpoint) -> Result<Description> {
        let layout = Layout::detect(checkpoint)?;
        let config = if layout == Layout::Dense { config.as_dense() } else { config.clone() };
        let plan = Plan::new(&config, layout, checkpoint)?;
        let elements = |part: &Part| (part.rows * part.columns) as u64;
        let mut dtypes: Vec<String> = Vec::new();
        for part in plan.all() {
            let dtype = checkpoint.tensor(&part.tensor).map(|tensor| tensor.info.dtype.to_string()).unwrap_or_default();
            if !dtypes.contains(&dtype) {
                dtypes.push(dtype);
            }
        }
        Ok(Description {
            parameters: plan.all().map(elements).sum(),
            expert_parameters: plan.layers.iter().flat_map(|layer| layer.expert_parts()).map(elements).sum(),
            bytes: plan.bytes,
            dtypes,
            embedding_dtype: dtype_of(&plan.embedding, checkpoint)?,
            loaded_bytes: plan.loaded_bytes(checkpoint)?,
            layout,
            config,
            plan,
        })
    }

    /// Parameters one token meets: everything but the experts, and its share of those.
    pub fn active_parameters(&self) -> u64 {
        let per_choice = self.expert_parameters / self.config.num_local_experts as u64;
        self.parameters - self.expert_parameters + per_choice * self.config.num_experts_per_tok as u64
    }
}

impl Weights {
    /// Reads every weight of a checkpoint, all of which its description has checked.
    pub fn load(description: &Description, checkpoint: &Checkpoint, progress: &Progress) -> Result<Weights> {
        let plan = &description.plan;
        progress.begin(plan.bytes);
        let reader = Reader { checkpoint, progress };
        let mut layers = try_with_capacity("layers", plan.layers.len())?;
        for parts in &plan.layers {
            layers.push(reader.layer(parts)?);
        }
        Ok(Weights {
            embedding: reader.matrix(&plan.embedding)?,
            layers,
            final_norm: reader.vector(&plan.final_norm)?,
            head: plan.head.as_ref().map(|head| reader.matrix(head)).transpose()?,
        })
    }

    /// Size in bytes of everything, and of the experts among it.
    pub fn bytes(&self) -> (usize, usize) {
        let mut experts = 0;
        let mut others = self.embedding.bytes() + self.final_norm.bytes() + self.head.as_ref().map_or(0, Matrix::bytes);
        for layer in &self.layers {
            others += layer.input_norm.bytes() + layer.post_attention_norm.bytes();
            others += layer.query.bytes() + layer.key.bytes() + layer.value.bytes() + layer.output.bytes();
            others += layer.router.as_ref().map_or(0, Buffer::bytes);
            experts += layer.experts.iter().map(|e| e.gate.bytes() + e.up.bytes() + e.down.bytes()).sum::<usize>();
        }
        (others + experts, experts)
    }
}

/// Bytes of each matrix that a fingerprint is made of: blocks spread over it.
const SAMPLE_BLOCKS: usize = 16;
const SAMPLE_BLOCK_BYTES: usize = 4096;

impl Weights {
    /// Shows `see` bytes of every part, enough to tell models apart: small parts whole, large ones in blocks.
    pub fn sample(&self, see: &mut dyn FnMut(&[u8])) {
        let mut see = |bytes: &[u8]| match bytes.len() <= SAMPLE_BLOCKS * SAMPLE_BLOCK_BYTES {
            true => see(bytes),
            false => (0..SAMPLE_BLOCKS).for_each(|block| {
                let start = (bytes.len() - SAMPLE_BLOCK_BYTES) / (SAMPLE_BLOCKS - 1) * block;
                see(&bytes[start..start + SAMPLE_BLOCK_BYTES]);
            }),
        };
        see(self.embedding.elements.as_bytes());
        see(as_bytes(&self.final_norm));
        self.head.iter().for_each(|head| see(head.elements.as_bytes()));
        for layer in &self.layers {
            [&layer.input_norm, &layer.post_attention_norm]
                .into_iter()
                .chain(&layer.router)
                .for_each(|v| see(as_bytes(v)));
            [&layer.query, &layer.key, &layer.value, &layer.output].iter().for_each(|m| see(m.elements.as_bytes()));
            for expert in &layer.experts {
                [&expert.gate, &expert.up, &expert.down].iter().for_each(|matrix| see(matrix.elements.as_bytes()));
            }
        }
    }
}

/// Every part of the model, each checked to be in the checkpoint with its shape and a dtype that can be read.
struct Plan {
    embedding: Part,
    layers: Vec<names::LayerParts>,
    final_norm: Part,
    head: Option<Part>,
    bytes: u64,
}

impl Plan {
    fn new(config: &Config, layout: Layout, checkpoint: &Checkpoint) -> Result<Plan> {
        names::check_no_extra(config, layout, checkpoint)?;
        let mut bytes = 0;
        let mut check = |part: &Part| -> Result<()> {
            bytes += check_part(part, checkpoint)?;
            Ok(())
        };
        let embedding = names::embedding(config);
        let final_norm = names::final_norm(config);
        let own_head = !config.tie_word_embeddings || checkpoint.tensor(names::HEAD).is_some();
        let head = own_head.then(|| names::head(config));
        check(&embedding)?;
        check(&final_norm)?;
        head.iter().try_for_each(&mut check)?;
        let mut layers = Vec::new();
        for layer in 0..config.num_hidden_layers {
            let parts = names::layer(config, layout, layer);
            parts.all().try_for_each(&mut check)?;
            layers.push(parts);
        }
        Ok(Plan { embedding, layers, final_norm, head, bytes })
    }

    fn all(&self) -> impl Iterator<Item = &Part> {
        let layers = self.layers.iter().flat_map(|layer| layer.all());
        [&self.embedding, &self.final_norm].into_iter().chain(&self.head).chain(layers)
    }

    /// As [`Weights::bytes`] of what a `Reader` makes of these parts.
    fn loaded_bytes(&self, checkpoint: &Checkpoint) -> Result<(u64, u64)> {
        let bytes = |part: &Part, dtype: Dtype| (part.rows * part.columns * dtype.bitsize() / 8) as u64;
        let vector = |part: &Part| bytes(part, Dtype::F32);
        let matrix = |part: &Part| Ok(bytes(part, dtype_of(part, checkpoint)?));
        let sum = |parts: &[&Part]| parts.iter().map(|part| matrix(part)).sum::<Result<u64>>();
        let mut experts = 0;
        let mut others = matrix(&self.embedding)? + vector(&self.final_norm);
        others += self.head.as_ref().map_or(Ok(0), matrix)?;
        for layer in &self.layers {
            others += vector(&layer.input_norm) + vector(&layer.post_attention_norm);
            others += sum(&[&layer.query, &layer.key, &layer.value, &layer.output])?;
            others += layer.router.as_ref().map_or(0, vector);
            for expert in &layer.experts {
                let dtype = common_dtype(dtype_of(&expert.gate, checkpoint)?, dtype_of(&expert.up, checkpoint)?);
                experts += bytes(&expert.gate, dtype) + bytes(&expert.up, dtype) + matrix(&expert.down)?;
            }
        }
        Ok((others + experts, experts))
    }
}

/// The dtype a part is stored in.
fn dtype_of(part: &Part, checkpoint: &Checkpoint) -> Result<Dtype> {
    let dtype = checkpoint.tensor(&part.tensor).map(|tensor| tensor.info.dtype);
    dtype.ok_or_else(|| Error::new(Status::Internal, format!("tensor \"{}\" was not checked", part.tensor)))
}

/// Bytes of the part in its file, once its tensor is there with the right shape and dtype.
fn check_part(part: &Part, checkpoint: &Checkpoint) -> Result<u64> {
    let name = &part.tensor;
    let Some(tensor) = checkpoint.tensor(name) else {
        let text = format!("tensor \"{name}\" is missing, expected {:?} ({})", part.shape, part.meaning);
        return Err(Error::new(Status::TensorMissing, text).in_file(checkpoint.table_of_contents()).at_key(name));
    };
    let fail = |status, text| Err(Error::new(status, text).in_file(checkpoint.file_of(tensor)).at_key(name));
    if tensor.info.shape != part.shape {
        let text =
            format!("tensor \"{name}\" is {:?}, expected {:?} ({})", tensor.info.shape, part.shape, part.meaning);
        return fail(Status::TensorShape, text);
    }
    if !matches!(tensor.info.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32) {
        let text = format!("tensor \"{name}\" is {}, expected BF16, F16 or F32", tensor.info.dtype);
        return fail(Status::TensorDtype, text);
    }
    Ok((part.rows * part.columns * tensor.info.dtype.bitsize() / 8) as u64)
}

/// The dtype in which two matrices of one kernel are held.
fn common_dtype(a: Dtype, b: Dtype) -> Dtype {
    if a == b { a } else { Dtype::F32 }
}

/// Two matrices, both in their common dtype.
fn one_dtype(a: Matrix, b: Matrix) -> Result<[Matrix; 2]> {
    let dtype = common_dtype(a.elements.dtype(), b.elements.dtype());
    let wide = |matrix: Matrix| -> Result<Matrix> {
        if matrix.elements.dtype() == dtype {
            return Ok(matrix);
        }
        let elements = Elements::F32(matrix.to_f32("an expert's gate and up")?);
        Ok(Matrix { elements, ..matrix })
    };
    Ok([wide(a)?, wide(b)?])
}

struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    progress: &'a Progress,
}

impl Reader<'_> {
    fn layer(&self, parts: &names::LayerParts) -> Result<LayerWeights> {
        let mut experts = try_with_capacity("experts", parts.experts.len())?;
        for expert in &parts.experts {
            let [gate, up] = one_dtype(self.matrix(&expert.gate)?, self.matrix(&expert.up)?)?;
            experts.push(ExpertWeights { gate, up, down: self.matrix(&expert.down)? });
        }
        Ok(LayerWeights {
            input_norm: self.vector(&parts.input_norm)?,
            query: self.matrix(&parts.query)?,
            key: self.matrix(&parts.key)?,
            value: self.matrix(&parts.value)?,
            output: self.matrix(&parts.output)?,
            post_attention_norm: self.vector(&parts.post_attention_norm)?,
            router: parts.router.as_ref().map(|router| self.vector(router)).transpose()?,
            experts,
        })
    }

    /// A small part, widened to f32.
    fn vector(&self, part: &Part) -> Result<Buffer<f32>> {
        self.matrix(part)?.to_f32(&part.tensor)
    }

    fn matrix(&self, part: &Part) -> Result<Matrix> {
        let elements = match dtype_of(part, self.checkpoint)? {
            Dtype::BF16 => Elements::Bf16(self.elements(part)?),
            Dtype::F16 => Elements::F16(self.elements(part)?),
            Dtype::F32 => Elements::F32(self.elements(part)?),
            dtype => {
                let text = format!("tensor \"{}\" is {dtype}, which was to be refused before", part.tensor);
                return Err(Error::new(Status::Internal, text));
            }
        };
        Ok(Matrix { rows: part.rows, columns: part.columns, elements })
    }

    fn elements<T: crate::memory::Plain>(&self, part: &Part) -> Result<Buffer<T>> {
        let mut buffer = Buffer::<T>::zeroed(&part.tensor, part.rows * part.columns)?;
        if let Some(tensor) = self.checkpoint.tensor(&part.tensor) {
            let skip = (part.first_row * part.columns * size_of::<T>()) as u64;
            self.checkpoint.read_tensor(tensor, skip, as_bytes_mut(&mut buffer), self.progress)?;
        }
        Ok(buffer)
    }
}
