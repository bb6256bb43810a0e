//! Logits, their candidates and log-probabilities, and what of a batch comes back to the host.

use super::CudaPass;
use super::products::Wanted;
use crate::backend::cuda::arguments::{CandidateArguments, LogSoftmaxArguments};
use crate::backend::cuda::context::Current;
use crate::backend::cuda::driver::Address;
use crate::backend::cuda::logits::{parts_of, result_bytes};
use crate::backend::cuda::workspace::at;
use crate::error::Result;
use crate::memory::{Buffer, as_bytes_mut};

impl CudaPass {
    /// `logits[row]` of the tokens in the batch's rows from `first` on.
    pub(super) fn project_head(&self, current: &Current, first: usize, rows: usize) -> Result<()> {
        let (parts, shared) = (&self.workspace.parts, &self.shared);
        let index = self.batch_part(&self.workspace.layout.rows) + (first * size_of::<u32>()) as Address;
        let head = shared.weights.head();
        let wanted = self.wanted(std::iter::once(head), rows);
        self.norm(current, &shared.weights.final_norm, index, rows, wanted)?;
        let product = [(head, parts.logits, shared.config.vocab_size)];
        self.multiply(current, &product, parts.normed.arguments(0), (rows, wanted), false)
    }

    /// Log-probabilities of the targets of the next scored tokens, as many as there are rows of logits.
    pub(super) fn score(&mut self, current: &Current) -> Result<()> {
        let (first, rows) = (self.scored, self.limits.logit_rows.min(self.shape.scored.len() - self.scored));
        self.project_head(current, first, rows)?;
        let parts = &self.workspace.parts;
        let skipped = (first * size_of::<u32>()) as Address;
        let arguments = LogSoftmaxArguments {
            logits: at(parts.logits),
            targets: at(self.batch_part(&self.workspace.layout.targets) + skipped),
            out: at(parts.log_probabilities + skipped),
            vocab_size: self.shared.config.vocab_size as u32,
        };
        // SAFETY: as in `norm`.
        unsafe { self.shared.kernels.log_softmax_at.launch(current, [rows, 1, 1], &arguments) }?;
        self.scored += rows;
        Ok(())
    }

    /// Of the first `rows` rows of logits: copies to where they are wanted, and candidates.
    fn select_candidates(&self, current: &Current, rows: usize) -> Result<()> {
        let (parts, shared) = (&self.workspace.parts, &self.shared);
        let vocab_size = shared.config.vocab_size;
        let arguments = CandidateArguments {
            logits: at(parts.logits),
            copies: at(self.batch_part(&self.workspace.layout.logits)),
            of_parts: at(parts.candidates_of_parts),
            results: at(parts.candidates),
            vocab_size: vocab_size as u32,
        };
        let of_vocabulary = parts_of(vocab_size);
        // SAFETY: as in `norm`; the copies go to rows that sequences of the batch have for this pass.
        unsafe { shared.kernels.select_candidates.launch(current, [of_vocabulary, rows, 1], &arguments) }?;
        // SAFETY: as in `norm`.
        unsafe { shared.kernels.merge_candidates.launch(current, [1 + of_vocabulary, rows, 1], &arguments) }
    }

    /// Logits where they are wanted, and copies of everything that the host reads.
    pub(super) fn fetch_results(&mut self, current: &Current) -> Result<()> {
        let (scored, wanted, choices) = (self.shape.scored.len(), self.shape.wanted, self.choices());
        if wanted > 0 {
            self.project_head(current, scored, wanted)?;
            self.select_candidates(current, wanted)?;
        }
        let (candidates, log_probabilities) = (self.workspace.parts.candidates, self.workspace.parts.log_probabilities);
        let routes = self.workspace.parts.routes;
        let candidate_bytes = wanted * result_bytes(self.shared.config.vocab_size);
        let (results, [candidates_at, log_probabilities_at, routes_at]) = self.workspace.results_mut();
        let copies = [
            (candidates_at, candidates, candidate_bytes),
            (log_probabilities_at, log_probabilities, scored * size_of::<f32>()),
            (routes_at, routes, choices * (size_of::<u32>() + size_of::<f32>())),
        ];
        for (offset, from, bytes) in copies.into_iter().filter(|(.., bytes)| *bytes > 0) {
            // SAFETY: results are read after `wait_for_results`; the buffers are this pass's.
            unsafe { results.fetch(current, offset, from, bytes) }?;
        }
        Ok(())
    }

    /// Waits for everything, results above all.
    pub(super) fn wait_for_results(&mut self, current: &Current) -> Result<()> {
        current.wait()?;
        self.in_progress = false;
        Ok(())
    }

    /// Hidden states of all tokens of the last batch, rows of the stride of `normed`.
    pub(super) fn fetch_hidden(&self) -> Result<Buffer<f32>> {
        let (tokens, normed) = (self.shape.tokens, &self.workspace.parts.normed);
        let mut hidden = Buffer::zeroed("hidden states", tokens * normed.stride)?;
        let current = self.shared.device.enter_on(&self.stream)?;
        let bytes = as_bytes_mut(&mut hidden);
        let enqueued =
            self.norm(&current, &self.shared.weights.final_norm, 0, tokens, Wanted::default()).and_then(|()| {
                // SAFETY: both are as long; `hidden` is kept until the wait below is over.
                unsafe { current.copy_to_host(bytes.as_mut_ptr(), normed.numbers, bytes.len()) }
            });
        // Also for what was enqueued before something failed.
        let waited = current.wait();
        enqueued.and(waited)?;
        Ok(hidden)
    }
}
