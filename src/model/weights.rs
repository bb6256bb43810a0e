//! The weights of a model: matrices in the layout of `quant/panels.rs`, norms in f32, in host memory or wherever a
//! [`Destination`] puts them.

use safetensors::Dtype;

use super::checkpoint::{Checkpoint, Tensor};
use super::config::{self, Config};
use super::formats::Formats;
use super::loader::Loader;
use super::names::{self, Layout, Part, Role};
use super::progress::Progress;
use super::quantization;
use crate::error::{Error, Result, Status};
use crate::memory::{Buffer, Bytes, as_bytes, try_with_capacity};
use crate::quant::{Format, Groups, LINE_BYTES, NotFinite, PANEL_ROWS, Shape, Source, pack, unpack_row};

/// A weight matrix `[rows, columns]` = `[out, in]`.
pub struct Matrix {
    shape: Shape,
    lines: Bytes,
    scales: Bytes,
}

impl Matrix {
    /// Of lines and scales that are laid out; panics where they are not as long as the shape has them.
    pub fn new(shape: Shape, lines: Bytes, scales: Bytes) -> Matrix {
        assert_eq!((lines.len(), scales.len()), (shape.line_bytes(), shape.scale_bytes()));
        Matrix { shape, lines, scales }
    }

    /// Rounds or lays out rows that are in memory, as a file would have them.
    pub fn from_rows(what: &str, shape: Shape, source: &Source) -> Result<Matrix> {
        let mut lines = Buffer::zeroed(what, shape.line_bytes())?;
        let mut scales = Buffer::zeroed(what, shape.scale_bytes())?;
        pack(source, &shape, &mut lines, &mut scales).map_err(|at| not_finite(what, at))?;
        Ok(Matrix::new(shape, Bytes::Owned(lines), Bytes::Owned(scales)))
    }

    /// Its size and format.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.shape.rows
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        self.shape.columns
    }

    /// All its lines, panel after panel.
    pub fn lines(&self) -> &[u8] {
        &self.lines
    }

    /// All its scales, panel after panel; empty in formats without.
    pub fn scales(&self) -> &[u8] {
        &self.scales
    }

    /// Size in bytes, mapped or not.
    pub fn bytes(&self) -> usize {
        self.lines.len() + self.scales.len()
    }

    /// Row `row`, widened to f32 into `out: [columns]`.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        unpack_row(&self.shape, &self.lines, &self.scales, row, out);
    }
}

/// One expert: `down( gelu(gate x) * (up x) )`. `gate` and `up` have one format: they are computed in one kernel.
#[derive(Clone, Copy, Debug)]
pub struct ExpertWeights<M = Matrix> {
    /// [intermediate_size, hidden_size]
    pub gate: M,
    /// [intermediate_size, hidden_size]
    pub up: M,
    /// [hidden_size, intermediate_size]
    pub down: M,
}

/// Which of an expert's matrices one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertPart {
    /// The first.
    Gate,
    /// Beside it.
    Up,
    /// The last.
    Down,
}

/// Whose matrix one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertPlace {
    /// Its layer.
    pub layer: usize,
    /// Its expert in the layer.
    pub expert: usize,
    /// Which of the expert's.
    pub part: ExpertPart,
}

/// One layer.
pub struct LayerWeights<M = Matrix, V = Buffer<f32>, E = M> {
    /// [hidden_size], without the 1 that Gemma's norm adds.
    pub input_norm: V,
    /// [query_size, hidden_size]
    pub query: M,
    /// [key_value_size, hidden_size]
    pub key: M,
    /// [key_value_size, hidden_size]
    pub value: M,
    /// [hidden_size, query_size]
    pub output: M,
    /// [hidden_size], without the 1 that Gemma's norm adds.
    pub post_attention_norm: V,
    /// [num_local_experts, hidden_size], in f32; none in a dense model.
    pub router: Option<M>,
    /// num_local_experts of them.
    pub experts: Vec<ExpertWeights<E>>,
}

impl LayerWeights {
    /// Its matrices, the router among them.
    fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let experts = self.experts.iter().flat_map(|expert| [&expert.gate, &expert.up, &expert.down]);
        [&self.query, &self.key, &self.value, &self.output].into_iter().chain(&self.router).chain(experts)
    }
}

/// All weights of a model.
pub struct Weights<M = Matrix, V = Buffer<f32>, E = M> {
    /// [vocab_size, hidden_size]
    pub embedding: M,
    /// num_hidden_layers of them.
    pub layers: Vec<LayerWeights<M, V, E>>,
    /// [hidden_size], without the 1 that Gemma's norm adds.
    pub final_norm: V,
    /// [vocab_size, hidden_size]; none where the embedding is the head.
    pub head: Option<M>,
    /// As [`Description::embedding_dtype`].
    pub embedding_dtype: Dtype,
}

/// Takes each part of a model as soon as it is read, so that no more than one is held twice.
pub trait Destination {
    /// What becomes of a matrix.
    type Matrix;
    /// What becomes of a norm's weights.
    type Vector;
    /// What becomes of an expert's matrix.
    type Expert;

    /// Takes a matrix that is no expert's; `name` is its tensor's.
    fn matrix(&mut self, name: &str, matrix: Matrix) -> Result<Self::Matrix>;

    /// Takes an expert's matrix; those of an expert come after each other, gate, up, down.
    fn expert(&mut self, place: ExpertPlace, matrix: Matrix) -> Result<Self::Expert>;

    /// Takes a norm's weights.
    fn vector(&mut self, name: &str, vector: Buffer<f32>) -> Result<Self::Vector>;

    /// A matrix that need not be read; none where it has to be, as it is unless a destination says otherwise.
    fn unread_matrix(&mut self, _name: &str, _shape: &Shape) -> Option<Result<Self::Matrix>> {
        None
    }

    /// The same of an expert's matrix.
    fn unread_expert(&mut self, _place: ExpertPlace, _name: &str, _shape: &Shape) -> Option<Result<Self::Expert>> {
        None
    }

    /// The same of a norm's weights.
    fn unread_vector(&mut self, _name: &str, _columns: usize) -> Option<Result<Self::Vector>> {
        None
    }
}

/// Where everything stays as it was read.
pub struct HostMemory;

impl Destination for HostMemory {
    type Matrix = Matrix;
    type Vector = Buffer<f32>;
    type Expert = Matrix;

    fn matrix(&mut self, _name: &str, matrix: Matrix) -> Result<Matrix> {
        Ok(matrix)
    }

    fn expert(&mut self, _place: ExpertPlace, matrix: Matrix) -> Result<Matrix> {
        Ok(matrix)
    }

    fn vector(&mut self, _name: &str, vector: Buffer<f32>) -> Result<Buffer<f32>> {
        Ok(vector)
    }
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
    /// The dtype of the embedding before anything was rounded: keys and values and the embedding's scale follow it.
    pub embedding_dtype: Dtype,
    /// Bytes of everything once it is loaded, and of the experts among it: what [`Weights::bytes`] will say.
    pub loaded_bytes: (u64, u64),
    /// `[layers, experts]`: what each expert's matrices will be.
    pub expert_shapes: Vec<Vec<ExpertWeights<Shape>>>,
    /// Bytes among them of an embedding that is not the head as well: a pass reads only its tokens' rows of it.
    pub lookup_bytes: u64,
    /// What each part is held in once it is loaded; none where its matrices have several formats.
    pub formats: Formats,
    plan: Plan,
}

impl Description {
    /// Checks every tensor the configuration asks for, as loading in these formats does, without reading any.
    pub fn new(config: &Config, checkpoint: &Checkpoint, formats: Formats) -> Result<Description> {
        let layout = Layout::detect(checkpoint)?;
        let config = if layout == Layout::Dense { config.as_dense() } else { config.clone() };
        let plan = Plan::new(&config, layout, checkpoint, formats)?;
        let elements = |part: &Part| (part.rows * part.columns) as u64;
        let mut dtypes: Vec<String> = Vec::new();
        for part in plan.all() {
            let dtype = match plan.stored_format(part) {
                Some(format) => format.name().to_owned(),
                None => dtype_of(part, checkpoint)?.to_string(),
            };
            if !dtypes.contains(&dtype) {
                dtypes.push(dtype);
            }
        }
        Ok(Description {
            // One tensor held in two formats counts once.
            parameters: plan.all().filter(|part| !plan.is_copy(part)).map(elements).sum(),
            expert_parameters: plan.layers.iter().flat_map(|layer| layer.expert_parts()).map(elements).sum(),
            bytes: plan.bytes,
            dtypes,
            embedding_dtype: match (plan.stored_format(&plan.embedding), &config.quantization) {
                (Some(_), Some(quantization)) => quantization.source_dtype,
                _ => dtype_of(&plan.embedding, checkpoint)?,
            },
            loaded_bytes: plan.loaded_bytes(checkpoint)?,
            expert_shapes: plan.expert_shapes(checkpoint)?,
            lookup_bytes: match plan.head {
                Some(_) => plan.shape(&plan.embedding, checkpoint)?.bytes() as u64,
                None => 0,
            },
            formats: plan.held_formats(checkpoint)?,
            layout,
            config,
            plan,
        })
    }

    /// The embedding's part.
    pub fn embedding_part(&self) -> &Part {
        &self.plan.embedding
    }

    /// The final norm's part.
    pub fn final_norm_part(&self) -> &Part {
        &self.plan.final_norm
    }

    /// The parts of one layer.
    pub fn layer_parts(&self, layer: usize) -> &names::LayerParts {
        &self.plan.layers[layer]
    }

    /// The head's part where it is not the embedding's.
    pub fn head_part(&self) -> Option<&Part> {
        self.plan.head.as_ref()
    }

    /// The format that was asked for where a part is not held as it is stored; none for norms and routers.
    pub fn asked_format(&self, part: &Part) -> Option<Format> {
        self.plan.formats.of_matrix(part.role)
    }

    /// Parameters one token meets: everything but the experts, and its share of those.
    pub fn active_parameters(&self) -> u64 {
        let per_choice = self.expert_parameters / self.config.num_local_experts as u64;
        self.parameters - self.expert_parameters + per_choice * self.config.num_experts_per_tok as u64
    }
}

impl<M, V, E> Weights<M, V, E> {
    /// Reads every weight of a checkpoint, all of which its description has checked, in the formats it was made for, lays
    /// them out on `threads` threads and hands them over one by one. With `map`, matrices that are stored as they are held are
    /// mapped, not read.
    pub fn load_to(
        destination: &mut dyn Destination<Matrix = M, Vector = V, Expert = E>,
        description: &Description,
        checkpoint: &Checkpoint,
        threads: usize,
        map: bool,
        progress: &Progress,
    ) -> Result<Self> {
        let plan = &description.plan;
        progress.begin(plan.bytes);
        let mut loader = Loader { destination, plan, checkpoint, threads, map, progress };
        let mut layers = try_with_capacity("layers", plan.layers.len())?;
        for (layer, parts) in plan.layers.iter().enumerate() {
            layers.push(loader.layer(layer, parts)?);
        }
        Ok(Weights {
            embedding: loader.matrix(&plan.embedding)?,
            layers,
            final_norm: loader.vector(&plan.final_norm)?,
            head: plan.head.as_ref().map(|head| loader.matrix(head)).transpose()?,
            embedding_dtype: description.embedding_dtype,
        })
    }
}

impl Weights {
    /// As [`Weights::load_to`], into host memory.
    pub fn load(
        description: &Description,
        checkpoint: &Checkpoint,
        threads: usize,
        map: bool,
        progress: &Progress,
    ) -> Result<Weights> {
        Weights::load_to(&mut HostMemory, description, checkpoint, threads, map, progress)
    }

    /// Size in bytes of everything, and of the experts among it.
    pub fn bytes(&self) -> (usize, usize) {
        let norms = |layer: &LayerWeights| layer.input_norm.bytes() + layer.post_attention_norm.bytes();
        let of_layer = |layer: &LayerWeights| norms(layer) + layer.matrices().map(Matrix::bytes).sum::<usize>();
        let head = self.head.as_ref().map_or(0, Matrix::bytes);
        let all = self.embedding.bytes() + self.final_norm.bytes() + head;
        let experts = self.layers.iter().flat_map(|layer| &layer.experts);
        let experts = experts.map(|expert| expert.gate.bytes() + expert.up.bytes() + expert.down.bytes()).sum();
        (all + self.layers.iter().map(of_layer).sum::<usize>(), experts)
    }

    /// Every matrix, the embedding first.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        std::iter::once(&self.embedding).chain(&self.head).chain(self.layers.iter().flat_map(LayerWeights::matrices))
    }
}

/// Bytes of each matrix that a fingerprint is made of: blocks spread over it.
const SAMPLE_BLOCKS: usize = 16;
const SAMPLE_BLOCK_BYTES: usize = 4096;

/// Shows `see` bytes of a part, enough to tell models apart: of a small one all, of a large one blocks.
pub fn sample(bytes: &[u8], see: &mut dyn FnMut(&[u8])) {
    if bytes.len() <= SAMPLE_BLOCKS * SAMPLE_BLOCK_BYTES {
        return see(bytes);
    }
    for block in 0..SAMPLE_BLOCKS {
        let start = (bytes.len() - SAMPLE_BLOCK_BYTES) / (SAMPLE_BLOCKS - 1) * block;
        see(&bytes[start..start + SAMPLE_BLOCK_BYTES]);
    }
}

impl Matrix {
    /// As [`sample`], of its lines and scales; and what makes weights of the bytes.
    pub fn sample(&self, see: &mut dyn FnMut(&[u8])) {
        let format = self.shape.format;
        see(format.name().as_bytes());
        if let Some(Groups { size, scales }) = format.groups() {
            see(&size.to_le_bytes());
            see(scales.name().as_bytes());
        }
        sample(&self.lines, see);
        sample(&self.scales, see);
    }
}

impl Weights {
    /// As [`sample`], of every part.
    pub fn sample(&self, see: &mut dyn FnMut(&[u8])) {
        sample(as_bytes(&self.final_norm), see);
        for layer in &self.layers {
            [&layer.input_norm, &layer.post_attention_norm].iter().for_each(|norm| sample(as_bytes(norm), see));
        }
        self.matrices().for_each(|matrix| matrix.sample(see));
    }
}

/// Every part of the model, each checked to be in the checkpoint with its shape and a dtype that can be read.
pub(super) struct Plan {
    /// What parts are held in.
    formats: Formats,
    /// What they are stored in, where quantised.
    stored: Formats,
    embedding: Part,
    layers: Vec<names::LayerParts>,
    final_norm: Part,
    head: Option<Part>,
    bytes: u64,
}

impl Plan {
    fn new(config: &Config, layout: Layout, checkpoint: &Checkpoint, asked: Formats) -> Result<Plan> {
        asked.check()?;
        names::check_no_extra(config, layout, checkpoint)?;
        let embedding = names::embedding(config);
        let final_norm = names::final_norm(config);
        let own_head = !config.tie_word_embeddings || checkpoint.tensor(names::HEAD).is_some();
        let stored = stored_formats(config, layout, own_head)?;
        let formats = asked.resolved(!own_head).over(&stored)?;
        let (mut bytes, mut scale_tensors) = (0, Vec::new());
        let mut check = |part: &Part| -> Result<()> {
            bytes += match stored.of_matrix(part.role) {
                Some(format) => {
                    scale_tensors.push(names::scales(&part.tensor));
                    check_quantised(part, format, checkpoint)?
                }
                None => check_plain(part, formats.of_matrix(part.role), checkpoint)?,
            };
            Ok(())
        };
        let head = match own_head {
            true => Some(names::head(config)),
            // One tensor held in two formats.
            false if formats.head != formats.embedding => Some(Part { role: Role::Head, ..names::embedding(config) }),
            false => None,
        };
        check(&embedding)?;
        check(&final_norm)?;
        head.iter().try_for_each(&mut check)?;
        let mut layers = Vec::new();
        for layer in 0..config.num_hidden_layers {
            let parts = names::layer(config, layout, layer);
            parts.all().try_for_each(&mut check)?;
            layers.push(parts);
        }
        names::check_scales(&scale_tensors, checkpoint)?;
        Ok(Plan { formats, stored, embedding, layers, final_norm, head, bytes })
    }

    fn all(&self) -> impl Iterator<Item = &Part> {
        let layers = self.layers.iter().flat_map(|layer| layer.all());
        [&self.embedding, &self.final_norm].into_iter().chain(&self.head).chain(layers)
    }

    /// The format a part is stored in, where it is a quantised one.
    pub(super) fn stored_format(&self, part: &Part) -> Option<Format> {
        self.stored.of_matrix(part.role)
    }

    /// As [`Description::formats`].
    fn held_formats(&self, checkpoint: &Checkpoint) -> Result<Formats> {
        let common = |shapes: &mut dyn Iterator<Item = Result<Shape>>| -> Result<Option<Format>> {
            let mut formats = shapes.map(|shape| Ok::<Format, Error>(shape?.format));
            let Some(first) = formats.next().transpose()? else { return Ok(None) };
            let mut alike = true;
            for format in formats {
                alike &= format? == first;
            }
            Ok(alike.then_some(first))
        };
        let shape = |part: &Part| self.shape(part, checkpoint);
        let attention = |layer: &names::LayerParts| [&layer.query, &layer.key, &layer.value, &layer.output].map(shape);
        let expert = |expert: &names::ExpertParts| match self.gate_up_shapes(expert, checkpoint) {
            Ok([gate, up]) => [Ok(gate), Ok(up), shape(&expert.down)],
            Err(error) => [Err(error.clone()), Err(error.clone()), Err(error)],
        };
        let experts = || self.layers.iter().flat_map(|layer| &layer.experts);
        Ok(Formats {
            experts: common(&mut experts().flat_map(expert))?,
            attention: common(&mut self.layers.iter().flat_map(attention))?,
            head: Some(shape(self.head.as_ref().unwrap_or(&self.embedding))?.format),
            embedding: Some(shape(&self.embedding)?.format),
        })
    }

    /// Whether a part is the embedding's tensor again, held in the head's format.
    fn is_copy(&self, part: &Part) -> bool {
        part.role == Role::Head && part.tensor == self.embedding.tensor
    }

    /// The shape a part is held in.
    pub(super) fn shape(&self, part: &Part, checkpoint: &Checkpoint) -> Result<Shape> {
        let format = match self.formats.of(part.role) {
            Some(format) => format,
            None => plain_format(dtype_of(part, checkpoint)?, part)?,
        };
        Ok(Shape { rows: part.rows, columns: part.columns, format })
    }

    /// The shapes of an expert's gate and up, which have one format: where the checkpoint has two, f32.
    pub(super) fn gate_up_shapes(&self, expert: &names::ExpertParts, checkpoint: &Checkpoint) -> Result<[Shape; 2]> {
        let shapes = [self.shape(&expert.gate, checkpoint)?, self.shape(&expert.up, checkpoint)?];
        let format = if shapes[0].format == shapes[1].format { shapes[0].format } else { Format::F32 };
        Ok(shapes.map(|shape| Shape { format, ..shape }))
    }

    /// As [`Description::expert_shapes`].
    fn expert_shapes(&self, checkpoint: &Checkpoint) -> Result<Vec<Vec<ExpertWeights<Shape>>>> {
        let of_expert = |expert: &names::ExpertParts| {
            let [gate, up] = self.gate_up_shapes(expert, checkpoint)?;
            Ok(ExpertWeights { gate, up, down: self.shape(&expert.down, checkpoint)? })
        };
        self.layers.iter().map(|layer| layer.experts.iter().map(of_expert).collect()).collect()
    }

    /// As [`Weights::bytes`] of what a `Loader` makes of these parts.
    fn loaded_bytes(&self, checkpoint: &Checkpoint) -> Result<(u64, u64)> {
        let vector = |part: &Part| part.columns * size_of::<f32>();
        let matrix = |part: &Part| Ok::<usize, Error>(self.shape(part, checkpoint)?.bytes());
        let mut experts = 0;
        let mut others = matrix(&self.embedding)? + vector(&self.final_norm);
        others += self.head.as_ref().map_or(Ok(0), matrix)?;
        for layer in &self.layers {
            others += vector(&layer.input_norm) + vector(&layer.post_attention_norm);
            for part in [&layer.query, &layer.key, &layer.value, &layer.output].into_iter().chain(&layer.router) {
                others += matrix(part)?;
            }
            for expert in &layer.experts {
                experts += self.gate_up_shapes(expert, checkpoint)?.iter().map(Shape::bytes).sum::<usize>();
                experts += matrix(&expert.down)?;
            }
        }
        Ok(((others + experts) as u64, experts as u64))
    }
}

/// The error of a number that is infinite or NaN and cannot be rounded.
fn not_finite(tensor: &str, at: NotFinite) -> Error {
    let (row, column) = (at.row, at.column);
    let text = format!("tensor \"{tensor}\" has in row {row}, column {column} a number that is not finite");
    Error::new(Status::TensorValue, text).at_key(tensor)
}

/// The same of a part's matrix, as the error for its tensor, which may have rows before it, and its file.
pub fn not_finite_in(part: &Part, at: NotFinite, checkpoint: &Checkpoint) -> Error {
    let file = checkpoint.tensor(&part.tensor).map(|tensor| checkpoint.file_of(tensor)).unwrap_or_default();
    not_finite(&part.tensor, NotFinite { row: part.first_row + at.row, ..at }).in_file(file)
}

/// The dtype a part is stored in.
pub fn dtype_of(part: &Part, checkpoint: &Checkpoint) -> Result<Dtype> {
    let dtype = checkpoint.tensor(&part.tensor).map(|tensor| tensor.info.dtype);
    dtype.ok_or_else(|| Error::new(Status::Internal, format!("tensor \"{}\" was not checked", part.tensor)))
}

/// The format that holds a part as it is stored.
fn plain_format(dtype: Dtype, part: &Part) -> Result<Format> {
    Format::of_dtype(dtype).ok_or_else(|| {
        Error::new(Status::Internal, format!("tensor \"{}\" is {dtype}, which was to be refused before", part.tensor))
    })
}

/// What the matrices of a directory are stored in, where quantised.
fn stored_formats(config: &Config, layout: Layout, own_head: bool) -> Result<Formats> {
    let Some(quantization) = &config.quantization else { return Ok(Formats::default()) };
    let formats = quantization.formats;
    let fail = |part: &str, text: &str| {
        let key = format!("{}.{part}", quantization::KEY);
        let error = Error::new(Status::ConfigValue, format!("\"{key}\": {text}"));
        Err(error.in_file(config::FILE).at_key(key))
    };
    if layout == Layout::Fused && formats.experts.is_some() {
        return fail(
            "experts",
            "quantised experts are stored one by one, as \"block_sparse_moe\", and these are fused",
        );
    }
    if !own_head && formats.head != formats.embedding {
        return fail("head", "the head is the embedding here, and must have its format");
    }
    Ok(formats)
}

/// Bytes of a part in its file, once its tensor is there with the right shape and a dtype that can be read, and held in
/// `format`, if one was asked for.
fn check_plain(part: &Part, format: Option<Format>, checkpoint: &Checkpoint) -> Result<u64> {
    let name = &part.tensor;
    let tensor = find(name, &part.shape, part.meaning, checkpoint)?;
    let fail = |status, text| Err(Error::new(status, text).in_file(checkpoint.file_of(tensor)).at_key(name));
    check_shape(name, tensor, &part.shape, part.meaning, checkpoint)?;
    let dtype = tensor.info.dtype;
    let Some(plain) = Format::of_dtype(dtype) else {
        return fail(Status::TensorDtype, format!("tensor \"{name}\" is {dtype}, expected BF16, F16 or F32"));
    };
    if let Some(format @ (Format::Bf16 | Format::F16)) = format
        && format != plain
    {
        let text = format!("tensor \"{name}\" is {dtype} and was asked for in {format}: only quantised formats round");
        return fail(Status::InvalidArgument, text);
    }
    Ok((part.rows * part.columns * dtype.bitsize() / 8) as u64)
}

/// The same of a part that is stored in a quantised format, of both its tensors.
fn check_quantised(part: &Part, format: Format, checkpoint: &Checkpoint) -> Result<u64> {
    let shape = Shape { rows: part.rows, columns: part.columns, format };
    let groups = format.groups().map_or(0, |groups| shape.padded_columns() / groups.size);
    let scales = format.groups().map_or(Dtype::BF16, |groups| groups.scales.dtype());
    let tensors = [
        (part.tensor.clone(), Dtype::U8, [shape.panels(), shape.lines_per_panel(), LINE_BYTES], "panels x lines x 64"),
        (names::scales(&part.tensor), scales, [shape.panels(), groups, PANEL_ROWS], "panels x groups x 16"),
    ];
    for (name, dtype, shape, meaning) in tensors {
        let tensor = find(&name, &shape, meaning, checkpoint)?;
        if tensor.info.dtype != dtype {
            let text = format!(
                "tensor \"{name}\" is {}, expected {dtype}: {} says that \"{}\" is {format}",
                tensor.info.dtype,
                config::FILE,
                part.tensor
            );
            return Err(Error::new(Status::TensorDtype, text).in_file(checkpoint.file_of(tensor)).at_key(name));
        }
        check_shape(&name, tensor, &shape, meaning, checkpoint)?;
    }
    Ok(shape.bytes() as u64)
}

/// The tensor of this name, or an error that says what it should be.
pub(super) fn find<'a>(name: &str, shape: &[usize], meaning: &str, checkpoint: &'a Checkpoint) -> Result<&'a Tensor> {
    checkpoint.tensor(name).ok_or_else(|| {
        let text = format!("tensor \"{name}\" is missing, expected {shape:?} ({meaning})");
        Error::new(Status::TensorMissing, text).in_file(checkpoint.table_of_contents()).at_key(name)
    })
}

fn check_shape(name: &str, tensor: &Tensor, shape: &[usize], meaning: &str, checkpoint: &Checkpoint) -> Result<()> {
    if tensor.info.shape == shape {
        return Ok(());
    }
    let text = format!("tensor \"{name}\" is {:?}, expected {shape:?} ({meaning})", tensor.info.shape);
    Err(Error::new(Status::TensorShape, text).in_file(checkpoint.file_of(tensor)).at_key(name))
}
