//! Where a run's files may be: not over what it reads, nor among the files of its model.

use std::path::{Path, PathBuf};

use super::recipe::{Output, OutputKind, Reference, TrainRecipe};
use super::records::Begin;
use crate::error::{Error, Result, Status};
use crate::platform;

fn fail<T>(status: Status, path: &Path, text: &str) -> Result<T> {
    Err(Error::new(status, text).in_file(path.display().to_string()))
}

impl TrainRecipe {
    /// Fails where a checkpoint is there or is missing, as the run is to begin, where no file can be written, and where one would take
    /// the place of a file that the run reads, or be in the model's directory: to be asked before a model is loaded.
    pub fn check_output(&self, begin: Begin) -> Result<()> {
        let output = &self.output;
        output.check_places()?;
        let reference = match &self.reference {
            Reference::Patch(path) => Some(path),
            _ => None,
        };
        // The text of a host's recipe is no file, and what errors call it names none.
        let recipe = PathBuf::from(&self.name);
        let data = self.data.files.iter().chain(&self.data.held_out);
        let read = data.chain(&self.router).chain(reference).chain([&recipe]);
        let mut taken: Vec<PathBuf> = read.filter_map(|path| path.canonicalize().ok()).collect();
        let model = self.model.canonicalize().ok();
        for path in output.paths() {
            let Some(place) = resolved(path) else { continue };
            if place.parent() == model.as_deref() {
                let text = "is in the model's directory, which stays as it is: give another place";
                return fail(Status::FileNotAllowed, path, text);
            }
            if taken.contains(&place) {
                let text = "is a file that the run reads, or writes something else to: give another one";
                return fail(Status::FileNotAllowed, path, text);
            }
            taken.push(place);
        }
        output.check_checkpoint(begin)
    }
}

/// The path without links, of a file that may not be there yet.
fn resolved(path: &Path) -> Option<PathBuf> {
    path.canonicalize()
        .ok()
        .or_else(|| Some(platform::parent_directory(path).canonicalize().ok()?.join(path.file_name()?)))
}

impl Output {
    fn paths(&self) -> [&Path; 3] {
        [&self.path, &self.checkpoint, &self.metrics]
    }

    fn check_places(&self) -> Result<()> {
        for path in self.paths() {
            if !platform::parent_directory(path).is_dir() {
                let text = "cannot be written: the directory it is to be in is not there";
                return fail(Status::WriteFailed, path, text);
            }
            if path == self.path && self.kind == OutputKind::Model {
                continue;
            }
            // A name with a separator behind it is none of a file, whatever is there.
            if path.is_dir() || path.to_string_lossy().ends_with(std::path::is_separator) {
                return fail(Status::AlreadyExists, path, "is a directory, and a file is to be written");
            }
            if path.exists() && !path.is_file() {
                return fail(Status::FileNotAllowed, path, "is a device or a pipe, and a file is to be written");
            }
        }
        Ok(())
    }

    fn check_checkpoint(&self, begin: Begin) -> Result<()> {
        match (begin, self.checkpoint.symlink_metadata().is_ok()) {
            (Begin::New, true) => {
                let text = "is the checkpoint of a run that was begun: go on from it (--resume), or begin anew and lose it \
                            (--restart)";
                fail(Status::AlreadyExists, &self.checkpoint, text)
            }
            (Begin::Resume, false) => {
                let text = "is not there: no run has left a checkpoint to go on from";
                fail(Status::FileNotFound, &self.checkpoint, text)
            }
            _ => Ok(()),
        }
    }
}
