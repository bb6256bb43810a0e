//! The texts whose routes are compared: each a domain with a name.

use std::path::{Path, PathBuf};

use clap::Args;
use gemmoe::{Error, Result, Status};

use crate::files;

#[derive(Args)]
pub struct DomainArgs {
    /// A file of one domain as NAME=FILE, or FILE for its own name; or a directory, of which each file is a domain. May be
    /// given several times.
    #[arg(long, value_name = "NAME=FILE")]
    text: Vec<String>,
    /// A domain's text itself. May be given several times.
    #[arg(long, value_name = "NAME=TEXT", value_parser = parse_prompt)]
    prompt: Vec<(String, String)>,
}

/// A domain.
pub struct Domain {
    pub name: String,
    pub text: String,
}

/// Where a domain's text is.
pub enum Source {
    File(PathBuf),
    Given(String),
}

impl DomainArgs {
    /// All domains by their names, in the order given; a directory's by name. No file is read.
    pub fn sources(&self) -> Result<Vec<(String, Source)>> {
        let mut sources = Vec::new();
        for argument in &self.text {
            let (name, path) = named(argument);
            if name.is_none() && path.is_dir() {
                sources.extend(files_of(path)?.into_iter().map(|file| (name_of(&file), Source::File(file))));
                continue;
            }
            sources.push((name.map_or_else(|| name_of(path), str::to_owned), Source::File(path.to_owned())));
        }
        sources.extend(self.prompt.iter().map(|(name, text)| (name.clone(), Source::Given(text.clone()))));
        Ok(sources)
    }

    /// Reads all texts.
    pub fn read(&self) -> Result<Vec<Domain>> {
        self.sources()?.into_iter().map(|(name, source)| source.read(name)).collect()
    }
}

impl Source {
    /// The whole text, which must not be empty.
    pub fn read(self, name: String) -> Result<Domain> {
        let text = match self {
            Source::File(path) => files::read(&path)?,
            Source::Given(text) => text,
        };
        match text.is_empty() {
            false => Ok(Domain { name, text }),
            true => {
                let text = format!("the text of domain {name:?} is empty");
                Err(Error::new(Status::InvalidArgument, text).at_key("text"))
            }
        }
    }
}

/// `NAME=PATH`, or `PATH` alone; a path may have a `=` in it where there is such a file.
pub fn named(argument: &str) -> (Option<&str>, &Path) {
    match argument.split_once('=') {
        Some((name, path)) if !Path::new(argument).exists() => (Some(name), Path::new(path)),
        _ => (None, Path::new(argument)),
    }
}

/// The texts of files, and of directories by the names of their files, each with its name.
pub fn texts_of(paths: &[PathBuf]) -> Result<Vec<(String, String)>> {
    let mut texts = Vec::new();
    for path in paths {
        let files = if path.is_dir() { files_of(path)? } else { vec![path.clone()] };
        for file in files {
            texts.push((name_of(&file), files::read(&file)?));
        }
    }
    Ok(texts)
}

/// The files of a directory that are not hidden, by name.
fn files_of(directory: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |error| files::unreadable(directory, &error);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
        if path.is_file() && !hidden {
            files.push(path);
        }
    }
    if files.is_empty() {
        let text = format!("{}: no files in it, expected one for each domain", directory.display());
        return Err(Error::new(Status::FileNotFound, text));
    }
    files.sort();
    Ok(files)
}

/// A file's name without its extension.
pub fn name_of(path: &Path) -> String {
    path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn parse_prompt(argument: &str) -> std::result::Result<(String, String), String> {
    let (name, text) = argument.split_once('=').ok_or("expected a name, = and a text")?;
    Ok((name.to_owned(), text.to_owned()))
}
