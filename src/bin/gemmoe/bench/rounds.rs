//! Rounds in which roofs and runs are measured in turn.

use gemmoe::Result;

use super::Bench;
use super::roof::Roof;
use super::runs::Runs;
use super::work::{Amount, Work};
use crate::load::bar;

/// What was measured of one thing, round by round.
pub struct Measured {
    pub values: Vec<f64>,
    /// The time that the roof allows, by the time taken.
    pub shares: Vec<f64>,
    /// The latest round's: of two, the one that allows less.
    pub roof: Roof,
}

/// Decoding of a number of sessions together.
pub struct Decoded {
    pub sessions: usize,
    /// Tokens per second.
    pub rate: Measured,
    /// Experts read per layer.
    pub touched: Vec<f64>,
    /// What the latest round's steps had to do, on average.
    pub step: Amount,
}

pub struct Rounds {
    pub roofs: Roofs,
    /// Tokens per second.
    pub prefill: Measured,
    /// Seconds.
    pub first_token: Measured,
    pub decode: Vec<Decoded>,
}

/// Each roof that this machine has, per second.
#[derive(Default)]
pub struct Roofs(pub Vec<(Roof, Vec<f64>)>);

impl Rounds {
    pub fn measure(bench: &Bench, runs: &mut Runs, work: &Work) -> Result<Rounds> {
        let bar = bar(bench.rounds as u64 + 1, "measuring {wide_bar} {pos} of {len} rounds, {eta} left");
        bar.tick();
        // The round that warms up leaves no figures.
        runs.prefill()?;
        for sessions in &bench.batch {
            runs.decode(*sessions)?;
        }
        bar.inc(1);
        let mut rounds = Rounds {
            roofs: Roofs::default(),
            prefill: Measured::of(work.arithmetic()),
            first_token: Measured::of(work.arithmetic()),
            decode: bench.batch.iter().map(|sessions| Decoded::of(*sessions)).collect(),
        };
        for _ in 0..bench.rounds {
            rounds.roofs.measure(bench.threads(), bench.probe << 20)?;
            rounds.run(bench, runs, work)?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(rounds)
    }

    fn run(&mut self, bench: &Bench, runs: &mut Runs, work: &Work) -> Result<()> {
        let (bandwidth, _) = self.roofs.latest(Roof::ReadBandwidth);
        let (multiply_adds, arithmetic) = self.roofs.latest(work.arithmetic());
        let times = runs.prefill()?;
        let least = work.prefill(bench.prompt) / multiply_adds;
        self.prefill.push(bench.prompt as f64 / times.prefill, least / times.prefill, arithmetic);
        self.first_token.push(times.first_token, least / times.first_token, arithmetic);
        for decoded in &mut self.decode {
            let times = runs.decode(decoded.sessions)?;
            let amount = work.step(decoded.sessions, times.held, times.touched);
            let (reading, computing) = (amount.bytes / bandwidth, amount.multiply_adds / multiply_adds);
            let roof = if reading >= computing { Roof::ReadBandwidth } else { arithmetic };
            decoded.rate.push(decoded.sessions as f64 / times.step, reading.max(computing) / times.step, roof);
            decoded.touched.push(times.touched);
            decoded.step = amount;
        }
        Ok(())
    }
}

impl Roofs {
    fn measure(&mut self, threads: usize, bytes: usize) -> Result<()> {
        for roof in Roof::ALL {
            let Some(value) = roof.measure(threads, bytes)? else { continue };
            match self.0.iter_mut().find(|(other, _)| *other == roof) {
                Some((_, values)) => values.push(value),
                None => self.0.push((roof, vec![value])),
            }
        }
        Ok(())
    }

    /// The last round's value of a roof, or of f32 multiply-adds where the processor has no instruction for it.
    fn latest(&self, roof: Roof) -> (f64, Roof) {
        let found = |wanted: Roof| self.0.iter().find(|(roof, _)| *roof == wanted);
        let found = found(roof).or_else(|| found(Roof::MultiplyAdds));
        found.and_then(|(roof, values)| Some((*values.last()?, *roof))).unwrap_or((f64::NAN, roof))
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
}

impl Decoded {
    fn of(sessions: usize) -> Decoded {
        Decoded { sessions, rate: Measured::of(Roof::ReadBandwidth), touched: Vec::new(), step: Amount::default() }
    }
}
