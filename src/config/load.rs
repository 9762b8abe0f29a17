//! Reading the configuration: the file, over it the environment, then paths made absolute and values checked.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use figment::Figment;
use figment::providers::{Format as _, Toml};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use super::check::check;
use super::environment::Environment;
use super::error::{explain, wrong};
use super::{Config, ConfigError};

impl Config {
    /// Reads the file at `path` and the process's environment.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::load_with(
            path,
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))),
        )
    }

    /// Reads the file at `path` and the variables given.
    pub fn load_with(path: &Path, variables: impl Iterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => ConfigError::Absent { path: path.to_owned() },
            ErrorKind::InvalidData => ConfigError::NoText { path: path.to_owned() },
            _ => ConfigError::Unreadable { path: path.to_owned(), problem: error.to_string() },
        })?;
        Self::from_text(path, &text, variables)
    }

    /// Reads `text`, as if it stood in the file at `path`, and the variables given.
    pub fn from_text(
        path: &Path,
        text: &str,
        variables: impl Iterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let figment = Figment::from(Toml::string(text)).merge(Environment::collect(variables)?);
        let mut config: Self = figment.extract().map_err(|error| explain(error, &figment, path))?;
        let base = std::path::absolute(path).ok().and_then(|path| path.parent().map(Path::to_owned));
        config.resolve_paths(&base.unwrap_or_default());
        check(&config).map_err(|(key, problem)| wrong(&figment, path, key, problem))?;
        Ok(config)
    }

    /// Relative paths, wherever they were given, are relative to the configuration file's folder.
    fn resolve_paths(&mut self, base: &Path) {
        let absolute = |path: &mut PathBuf| *path = base.join(&*path);
        absolute(&mut self.signing_key);
        absolute(&mut self.media.cache_dir);
        self.listen.tls_certificate.iter_mut().for_each(absolute);
        self.listen.tls_private_key.iter_mut().for_each(absolute);
        self.appservice.iter_mut().for_each(|appservice| absolute(&mut appservice.registration));
        self.federation.custom_ca.iter_mut().for_each(absolute);
        if let Some(file) = self.database.url.strip_prefix("sqlite://")
            && !file.starts_with('/')
            && !file.is_empty()
        {
            // The path in the URL is percent-decoded when it is opened.
            let base = base.to_string_lossy();
            self.database.url = format!("sqlite://{}/{file}", utf8_percent_encode(base.trim_end_matches('/'), PATH));
        }
    }
}

const PATH: &AsciiSet = &CONTROLS.add(b' ').add(b'%').add(b'?').add(b'#');
