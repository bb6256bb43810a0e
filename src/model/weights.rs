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

    /// The dtype's name as safetensors writes it.
    pub fn dtype_name(&self) -> &'static str {
        match self {
            Elements::Bf16(_) => "BF16",
            Elements::F16(_) => "F16",
            Elements::F32(_) => "F32",
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

/// Two matrices as they are if their dtypes agree, else both as f32.
fn one_dtype(a: Matrix, b: Matrix) -> Result<[Matrix; 2]> {
    if a.elements.dtype_name() == b.elements.dtype_name() {
        return Ok([a, b]);
    }
    let wide = |matrix: Matrix| -> Result<Matrix> {
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
        let name = &part.tensor;
        let dtype = self.checkpoint.tensor(name).map(|tensor| tensor.info.dtype);
        let elements = match dtype {
            Some(Dtype::BF16) => Elements::Bf16(self.elements(part)?),
            Some(Dtype::F16) => Elements::F16(self.elements(part)?),
            Some(Dtype::F32) => Elements::F32(self.elements(part)?),
            _ => return Err(Error::new(Status::Internal, format!("tensor \"{name}\" was not checked"))),
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
