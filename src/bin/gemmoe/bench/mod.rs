//! `gemmoe bench`

mod figure;
mod measure;
mod roof;
mod work;

use clap::builder::RangedU64ValueParser;
use gemmoe::backend::KvDtype;
use gemmoe::{Model, Result};
use serde_json::{Map, Value, json};

use crate::ModelArgs;
use crate::load::{bar, load};
use crate::session::kv_dtypes;
use crate::units::size;
use figure::Figure;
use measure::{RunOptions, Runs};
use roof::{PROBE_BYTES, Roof};
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
    /// Print one JSON object. Each figure has median, lowest, highest and unit, and "share", how much of "roof" it is.
    #[arg(long)]
    json: bool,
}

fn at_least_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=1 << 30)
}

fn sessions() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=256)
}

/// What was measured of one thing, round by round.
struct Measured {
    values: Vec<f64>,
    /// Of the time that the roof allows, by the time taken.
    shares: Vec<f64>,
    roof: Roof,
}

/// Decoding of one number of sessions.
struct Decoded {
    sessions: usize,
    rate: Measured,
    touched: Vec<f64>,
}

struct Results {
    roofs: Vec<(Roof, Vec<f64>)>,
    prefill: Measured,
    first_token: Measured,
    decode: Vec<Decoded>,
}

impl Bench {
    pub fn run(&self) -> Result<()> {
        let model = load(&self.model)?;
        let options = RunOptions {
            prompt: self.prompt,
            steps: self.decode,
            sessions: self.batch.iter().copied().max().unwrap_or(1),
            chunk: self.chunk,
            kv_dtype: self.kv,
        };
        let mut runs = Runs::new(&model, &options)?;
        let work = Work::new(&model, &self.model.model, self.model.follow_links, &runs.session)?;
        let results = self.measure(&mut runs, &work)?;
        if self.json {
            self.print_json(&model, &runs, &results)
        } else {
            self.print_table(&model, &runs, &work, &results)
        }
        Ok(())
    }

    fn measure(&self, runs: &mut Runs, work: &Work) -> Result<Results> {
        let bar = bar(self.rounds as u64 + 1, "measuring {wide_bar} round {pos} of {len}, {eta} left");
        bar.tick();
        let mut results = Results {
            roofs: Vec::new(),
            prefill: Measured::of(Roof::MultiplyAdds),
            first_token: Measured::of(Roof::MultiplyAdds),
            decode: self.batch.iter().map(|sessions| Decoded::of(*sessions)).collect(),
        };
        // The round that warms up leaves no figures.
        runs.prefill()?;
        for sessions in &self.batch {
            runs.decode(*sessions)?;
        }
        bar.inc(1);
        for _ in 0..self.rounds {
            self.measure_roofs(&mut results.roofs)?;
            let (arithmetic, multiply_adds) = arithmetic_roof(&results.roofs, &work.dtypes);
            let bandwidth = latest(&results.roofs, Roof::ReadBandwidth);
            let times = runs.prefill()?;
            let least = work.prefill(self.prompt) / multiply_adds;
            results.prefill.push(self.prompt as f64 / times.prefill, least / times.prefill, arithmetic);
            results.first_token.push(times.first_token, least / times.first_token, arithmetic);
            for decoded in &mut results.decode {
                let times = runs.decode(decoded.sessions)?;
                let amount = work.step(decoded.sessions, times.held, times.touched);
                let (reading, computing) = (amount.bytes / bandwidth, amount.multiply_adds / multiply_adds);
                let roof = if reading >= computing { Roof::ReadBandwidth } else { arithmetic };
                decoded.rate.push(decoded.sessions as f64 / times.step, reading.max(computing) / times.step, roof);
                decoded.touched.push(times.touched);
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(results)
    }

    fn measure_roofs(&self, roofs: &mut Vec<(Roof, Vec<f64>)>) -> Result<()> {
        let threads = match self.model.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        for roof in Roof::ALL {
            let Some(value) = roof.measure(threads, self.probe << 20)? else { continue };
            match roofs.iter_mut().find(|(other, _)| *other == roof) {
                Some((_, values)) => values.push(value),
                None => roofs.push((roof, vec![value])),
            }
        }
        Ok(())
    }

    fn print_table(&self, model: &Model, runs: &Runs, work: &Work, results: &Results) {
        let backend = model.backend();
        println!("{}", backend.device_name());
        println!(
            "{} of weights, {}; keys and values in {}",
            size(backend.weight_bytes().0 as u64),
            work.dtypes.join(" and "),
            runs.session.kv_dtype().name()
        );
        let token = work.step(1, 0.0, model.config().num_experts_per_tok as f64);
        println!(
            "a decoded token reads {} and does {:.3} G multiply-adds\n",
            size(token.bytes as u64),
            token.multiply_adds / 1e9
        );
        Figure::print_heading();
        for (roof, values) in &results.roofs {
            Figure::of(values, 1e-9).print_row(&format!("{}, {}", roof.name(), roof.unit()), "");
        }
        let print = |name: String, measured: &Measured, scale: f64| {
            let share = Figure::of(&measured.shares, 100.0).median;
            measured.figure(scale).print_row(&name, &format!("{share:.0} % of the {}", measured.roof.name()));
        };
        print(format!("prefill of {}, tokens/s", self.prompt), &results.prefill, 1.0);
        print("first token, ms".to_owned(), &results.first_token, 1e3);
        for Decoded { sessions, rate, .. } in &results.decode {
            let name = if *sessions == 1 { "1 session".to_owned() } else { format!("{sessions} sessions together") };
            print(format!("decode of {name}, tokens/s"), rate, 1.0);
        }
    }

    fn print_json(&self, model: &Model, runs: &Runs, results: &Results) {
        let figure_of = |roof: Roof| {
            let found = results.roofs.iter().find(|(other, _)| *other == roof);
            found.map(|(_, values)| Figure::of(values, 1e-9).json(roof.unit()))
        };
        let roofs: Map<String, Value> =
            Roof::ALL.into_iter().map(|roof| (roof.key().to_owned(), json!(figure_of(roof)))).collect();
        let decode: Vec<Value> = results.decode.iter().map(Decoded::json).collect();
        let object = json!({
            "device": model.backend().device_name(),
            "weight_bytes": model.backend().weight_bytes().0,
            "kv_dtype": runs.session.kv_dtype().name(),
            "prompt_tokens": self.prompt,
            "decode_tokens": self.decode,
            "rounds": self.rounds,
            "roofs": roofs,
            "prefill": results.prefill.json("tokens/s", 1.0),
            "first_token": results.first_token.json("ms", 1e3),
            "decode": decode,
        });
        println!("{object}");
    }
}

impl Measured {
    fn of(roof: Roof) -> Measured {
        Measured { values: Vec::new(), shares: Vec::new(), roof }
    }

    fn push(&mut self, value: f64, share: f64, roof: Roof) {
        self.values.push(value);
        self.shares.push(share);
        self.roof = roof;
    }

    fn figure(&self, scale: f64) -> Figure {
        Figure::of(&self.values, scale)
    }

    fn json(&self, unit: &str, scale: f64) -> Value {
        let mut object = self.figure(scale).json(unit);
        let share = Figure::of(&self.shares, 1.0);
        object["share"] = json!({ "median": share.median, "lowest": share.lowest, "highest": share.highest });
        object["roof"] = json!(self.roof.key());
        object
    }
}

impl Decoded {
    fn of(sessions: usize) -> Decoded {
        Decoded { sessions, rate: Measured::of(Roof::ReadBandwidth), touched: Vec::new() }
    }

    fn json(&self) -> Value {
        let mut object = self.rate.json("tokens/s", 1.0);
        object["sessions"] = json!(self.sessions);
        object["experts_per_layer"] = json!(Figure::of(&self.touched, 1.0).median);
        object
    }
}

/// The roof of arithmetic on weights of these dtypes, and its latest value: the fastest instructions that could multiply
/// them, whether or not the library uses those.
fn arithmetic_roof(roofs: &[(Roof, Vec<f64>)], dtypes: &[String]) -> (Roof, f64) {
    let is_float = |dtype: &String| matches!(dtype.as_str(), "F32" | "F16" | "BF16");
    let wanted = if dtypes.iter().any(|dtype| !is_float(dtype)) {
        Roof::Int8DotProducts
    } else if dtypes.iter().any(|dtype| dtype == "BF16") {
        Roof::Bf16DotProducts
    } else {
        Roof::MultiplyAdds
    };
    let found = roofs.iter().any(|(roof, _)| *roof == wanted);
    let roof = if found { wanted } else { Roof::MultiplyAdds };
    (roof, latest(roofs, roof))
}

fn latest(roofs: &[(Roof, Vec<f64>)], roof: Roof) -> f64 {
    let found = roofs.iter().find(|(other, _)| *other == roof);
    found.and_then(|(_, values)| values.last().copied()).unwrap_or(f64::NAN)
}
