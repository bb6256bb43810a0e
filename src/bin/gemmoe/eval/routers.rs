//! The routers that are compared: those of models as they are stored, and patches.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use gemmoe::evaluate::check_tokenizers;
use gemmoe::{Error, LoadOptions, Model, Result, Status};

use crate::domains::{name_of, named};

/// A router by its name.
pub struct Router {
    pub name: String,
    /// Of its model.
    pub directory: PathBuf,
    /// The patch that is put on it.
    pub patch: Option<PathBuf>,
}

/// All of them: the first model's own, its patches, and the other models' own. Names are given, or those of directories and
/// files; where two are the same, whole paths.
pub fn routers(models: &[String], patches: &[String]) -> Vec<Router> {
    let of_model = |argument: &String| {
        let (name, directory) = named(argument);
        let last = || directory.file_name().map(|name| name.to_string_lossy().into_owned());
        let name = name.map(str::to_owned).or_else(last).unwrap_or_else(|| directory.display().to_string());
        Router { name, directory: directory.to_owned(), patch: None }
    };
    let Some((first, others)) = models.split_first() else { return Vec::new() };
    let mut routers = vec![of_model(first)];
    let directory = routers[0].directory.clone();
    routers.extend(patches.iter().map(|argument| {
        let (name, path) = named(argument);
        let name = name.map_or_else(|| name_of(path), str::to_owned);
        Router { name, directory: directory.clone(), patch: Some(path.to_owned()) }
    }));
    routers.extend(others.iter().map(of_model));
    let mut counts = HashMap::new();
    routers.iter().for_each(|router| *counts.entry(router.name.clone()).or_insert(0) += 1);
    for router in routers.iter_mut().filter(|router| counts[&router.name] > 1) {
        router.name = router.patch.as_ref().unwrap_or(&router.directory).display().to_string();
    }
    routers
}

/// Finds what is wrong with the models before the first is run, which may take hours.
pub fn check(routers: &[Router], options: &LoadOptions) -> Result<()> {
    let mut directories: Vec<&Path> = routers.iter().map(|router| &*router.directory).collect();
    directories.dedup();
    for directory in &directories {
        Model::inspect(directory, options)?;
    }
    for other in directories.iter().skip(1) {
        check_tokenizers(directories[0], other, options.follow_links)?;
    }
    Ok(())
}

/// The index of the router of this name; the first where none is asked for.
pub fn index_of(routers: &[Router], name: Option<&str>) -> Result<usize> {
    let Some(name) = name else { return Ok(0) };
    routers.iter().position(|router| router.name == name).ok_or_else(|| {
        let names: Vec<&str> = routers.iter().map(|router| router.name.as_str()).collect();
        let text = format!("the reference is {name:?}, expected one of {}", names.join(", "));
        Error::new(Status::InvalidArgument, text).at_key("reference")
    })
}
