//! The command line: parses and prints, nothing else.

mod bench;
mod chat;
mod devices;
mod domains;
mod embed;
mod eval;
mod files;
mod formats;
mod generate;
mod grammar;
mod heat_map;
mod inspect;
mod interrupt;
mod load;
mod logits;
mod mix;
mod plan;
mod plot;
mod quantize;
mod routes;
mod sampling;
mod score;
mod session;
mod train_router;
mod units;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use gemmoe::Formats;
use gemmoe::backend::Device;
use gemmoe::backend::cpu::kernels::Instructions;

/// Run GemMoE, the mixture of experts made from Gemma.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List the devices that models can run on.
    Devices(devices::Devices),
    /// Check a model directory and say what is in it, without reading the weights.
    Inspect(inspect::Inspect),
    /// Say how much memory a model and its sessions will take, without reading the weights.
    Plan(plan::Plan),
    /// Round a model's weights to 8 or 4 bits and write it to another directory, with a report of the errors.
    Quantize(quantize::Quantize),
    /// Mix fine-tuned Gemmas of one geometry into a GemMoE whose experts they are, as a recipe says.
    ///
    /// A recipe is a TOML file:
    ///
    ///     base = "mean"               # or a directory: where all but experts is from
    ///     [[experts]]                 # 2 to 64 of them
    ///     model = "gemma-math"        # expert = 3 takes one expert of a GemMoE
    ///     [[experts]]
    ///     model = "gemma-code"
    ///     [router]
    ///     method = "uniform"          # normal, hidden, embedding or ridge
    #[command(verbatim_doc_comment)]
    Mix(mix::Mix),
    /// Train a model's routers, everything else frozen, as a recipe says.
    ///
    /// A recipe is a TOML file:
    ///
    ///     model = "gemmoe"            # a directory
    ///     objective = "sft"           # or dpo
    ///     [data]
    ///     files = "train.jsonl"       # rows of {"text"}, {"prompt", "response"}, {"messages"}, ...
    ///     held_out = "held-out.jsonl"
    ///     [train]
    ///     epochs = 1
    ///     learning_rate = 0.001
    ///     [output]
    ///     path = "router.safetensors" # a router patch; kind = "model" for a model directory
    #[command(verbatim_doc_comment)]
    TrainRouter(train_router::TrainRouter),
    /// Continue a prompt.
    Generate(generate::Generate),
    /// Talk with the model, turn by turn, through its chat template.
    ///
    /// One message a line; an empty line or the end of input ends the conversation. When the context is full, what was
    /// said first is left out.
    Chat(chat::Chat),
    /// Print the logits and router choices after the last of some tokens.
    Logits(logits::Logits),
    /// Measure how well the model predicts a text: perplexity and bits per byte.
    Score(score::Score),
    /// Turn a text into one vector, printed as {"embedding": [...], "tokens": tokens pooled over}.
    Embed(embed::Embed),
    /// Compare models and routers: perplexity by domain, pairs of answers, where tokens are sent; as a table, JSON or a picture.
    ///
    /// Domains are texts, which are scored in windows as `score` does, or JSON Lines (.jsonl) in the shapes that training takes, of
    /// which the tokens that would be learned count. Routers are those of the first model, its patches, and those of the other models.
    Eval(eval::Eval),
    /// Show which experts different kinds of text are sent to, as a heat map.
    Routes(routes::Routes),
    /// Measure how fast the model runs here, beside what the machine can do at best.
    ///
    /// Each round measures the machine first, then a prompt, then decoding. A share is the time that the roof allows, for
    /// the bytes that a step reads or the multiply-adds it does, by the time taken. Weights that fit the processor's
    /// caches can have shares above one of the read bandwidth.
    Bench(bench::Bench),
}

/// What every command that loads a model takes.
#[derive(Args)]
struct ModelArgs {
    /// Model directory: config.json, model.safetensors or shards with their index, and tokenizer.json for text.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    load: LoadArgs,
}

/// How models are loaded.
#[derive(Args, Default)]
struct LoadArgs {
    /// Where the model runs: cpu, cuda, cuda:N, or auto for a GPU where the model fits one.
    #[arg(long, value_name = "NAME", default_value = "cpu", value_parser = devices::parse_device)]
    device: Device,
    /// On a GPU, most memory that weights take there, as in 24GB; experts that do not fit stay in host memory. 0 is no limit.
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size, default_value = "0", hide_default_value = true)]
    device_memory_limit: u64,
    /// Threads; by default one per core.
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Instruction set; by default the best there is.
    #[arg(long, value_name = "NAME", value_parser = load::instruction_sets())]
    instructions: Option<Instructions>,
    /// Keep each thread on a processor of its own (Linux).
    #[arg(long)]
    pin: bool,
    /// Priority of the threads beside other programs (Linux). The thread that waits for them keeps its own.
    #[arg(long, value_enum, default_value_t = Priority::Normal, hide_default_value = true)]
    priority: Priority,
    /// Round weights while loading: experts, attention, head or embedding to int8 or int4, as in
    /// experts=int4,attention=int8,head=int8; group-size=64 or 128 and scales=f16 can be added.
    #[arg(long, value_name = "PART=FORMAT,...", value_parser = formats::parse_formats)]
    quantize: Option<Formats>,
    /// Follow symbolic links inside the directory, as in a download cache.
    #[arg(long)]
    follow_links: bool,
    /// Map quantised matrices instead of reading them: less to do before the first token, more for it, and the files must not
    /// change meanwhile.
    #[arg(long)]
    map: bool,
    /// On a GPU, the same bits whatever else is in a batch and however a prompt is cut, without tensor cores.
    #[arg(long)]
    exact: bool,
    /// Multiply the embedding by the unrounded square root of hidden_size.
    #[arg(long)]
    unrounded_embedding_scale: bool,
    /// Use GeLU by its definition instead of the tanh approximation.
    #[arg(long)]
    exact_gelu: bool,
}

/// Priority of threads.
#[derive(Clone, Copy, Default, ValueEnum)]
enum Priority {
    /// As the program has it
    #[default]
    Normal,
    /// A quarter of the time where others compete
    Low,
    /// What others leave
    Lowest,
}

fn main() -> ExitCode {
    end_quietly_with_the_pipe();
    go_on_at_the_file_size_limit();
    end_where_output_cannot_be_written();
    let result = match Cli::parse().command {
        Command::Devices(command) => command.run(),
        Command::Inspect(command) => command.run(),
        Command::Plan(command) => command.run(),
        Command::Quantize(command) => command.run(),
        Command::Mix(command) => command.run(),
        Command::TrainRouter(command) => command.run(),
        Command::Generate(command) => command.run(),
        Command::Chat(command) => command.run(),
        Command::Logits(command) => command.run(),
        Command::Score(command) => command.run(),
        Command::Embed(command) => command.run(),
        Command::Eval(command) => command.run(),
        Command::Routes(command) => command.run(),
        Command::Bench(command) => command.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gemmoe: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A reader that has seen enough, such as `head`, ends this program as it does others.
#[cfg(unix)]
fn end_quietly_with_the_pipe() {
    // SAFETY: no other thread runs yet, and the default action needs no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

#[cfg(not(unix))]
fn end_quietly_with_the_pipe() {}

/// A file that may not grow is an error like others, with its name in it.
#[cfg(unix)]
fn go_on_at_the_file_size_limit() {
    // SAFETY: no other thread runs yet, and ignoring needs no handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

#[cfg(not(unix))]
fn go_on_at_the_file_size_limit() {}

/// Standard output that cannot be written, on a full disk, is an error like others. The macros that print can only panic.
fn end_where_output_cannot_be_written() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let text = info.payload().downcast_ref::<String>().map_or("", String::as_str);
        let Some(reason) = text.strip_prefix("failed printing to stdout: ") else { return previous(info) };
        eprintln!("gemmoe: standard output cannot be written: {reason}");
        std::process::exit(1);
    }));
}

/// Token ids as `2,17,5`.
fn parse_tokens(text: &str) -> Result<Vec<u32>, String> {
    let ids = text.split(',').map(|id| id.trim().parse::<u32>().map_err(|_| format!("{id:?} is not a token id")));
    ids.collect()
}
