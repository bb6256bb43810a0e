//! The texts whose routes are compared: each a domain with a name.

use std::path::{Path, PathBuf};

use clap::Args;
use gemmoe::{Error, Result, Status};

use crate::files;

#[derive(Args)]
#[group(required = true, multiple = true)]
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

impl DomainArgs {
    /// Reads all texts, in the order given; a directory's by name.
    pub fn read(&self) -> Result<Vec<Domain>> {
        let mut domains = Vec::new();
        for argument in &self.text {
            let path = Path::new(argument);
            match argument.split_once('=') {
                Some((name, file)) if !path.exists() => {
                    domains.push(Domain { name: name.to_owned(), text: files::read(Path::new(file))? });
                }
                _ if path.is_dir() => {
                    for file in files_of(path)? {
                        domains.push(Domain { name: name_of(&file), text: files::read(&file)? });
                    }
                }
                _ => domains.push(Domain { name: name_of(path), text: files::read(path)? }),
            }
        }
        let prompts = self.prompt.iter().map(|(name, text)| Domain { name: name.clone(), text: text.clone() });
        domains.extend(prompts);
        match domains.iter().find(|domain| domain.text.is_empty()) {
            None => Ok(domains),
            Some(empty) => {
                let text = format!("the text of domain {:?} is empty", empty.name);
                Err(Error::new(Status::InvalidArgument, text).at_key("text"))
            }
        }
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
fn name_of(path: &Path) -> String {
    path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn parse_prompt(argument: &str) -> std::result::Result<(String, String), String> {
    let (name, text) = argument.split_once('=').ok_or("expected a name, = and a text")?;
    Ok((name.to_owned(), text.to_owned()))
}
