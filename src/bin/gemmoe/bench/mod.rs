//! `gemmoe bench`

mod figure;
mod print;
mod roof;
mod rounds;
mod runs;
mod work;

use clap::builder::RangedU64ValueParser;
use gemmoe::Result;
use gemmoe::backend::KvDtype;

use crate::ModelArgs;
use crate::load::{load, options};
use crate::session::kv_dtypes;
use roof::PROBE_BYTES;
use rounds::Rounds;
use runs::{RunOptions, Runs};
use work::Work;

#[derive(clap::Args)]
pub struct Bench {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of the prompt.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = at_least_one())]
    prompt: usize,
    /// Tokens each session decodes in a round.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least_one())]
    decode: usize,
    /// Numbers of sessions that decode together, such as 1,8; up to 256.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,8", value_parser = sessions())]
    batch: Vec<usize>,
    /// Rounds that are measured, of everything in turn; one more goes before, to warm up.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one())]
    rounds: usize,
    /// Most tokens of one forward pass of the prompt; by default 256.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    chunk: usize,
    /// How keys and values are stored; by default like the weights.
    #[arg(long, value_name = "DTYPE", value_parser = kv_dtypes())]
    kv: Option<KvDtype>,
    /// Memory that the bandwidth is measured on, in MiB; should be many times the caches.
    #[arg(long, value_name = "MIB", default_value_t = PROBE_BYTES >> 20, value_parser = at_least_one())]
    probe: usize,
    /// Print one JSON object. Figures have median, lowest, highest, unit, and "share": how much of "roof" they are.
    #[arg(long)]
    json: bool,
}

fn at_least_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=1 << 30)
}

fn sessions() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=256)
}

impl Bench {
    pub fn run(&self) -> Result<()> {
        let model = load(&self.model)?;
        let run_options = RunOptions {
            prompt: self.prompt,
            steps: self.decode,
            sessions: self.batch.iter().copied().max().unwrap_or(1),
            chunk: self.chunk,
            kv_dtype: self.kv,
        };
        let mut runs = Runs::new(&model, &run_options)?;
        let work = Work::new(&model, &self.model.model, &options(&self.model.load), runs.kv_dtype())?;
        let rounds = Rounds::measure(self, &mut runs, &work)?;
        if self.json {
            println!("{}", print::json(self, &model, &work, &rounds));
        } else {
            print::table(self, &model, &work, &rounds);
        }
        Ok(())
    }

    /// The threads that the model runs on.
    fn threads(&self) -> usize {
        match self.model.load.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        }
    }
}
