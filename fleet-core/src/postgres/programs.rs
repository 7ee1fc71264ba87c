//! The PostgreSQL programs of the machine: where they are and which version.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::refuse;
use crate::error::{Error, Result};

/// Oldest major version that is used.
pub(crate) const OLDEST: u32 = 14;

/// Where packages put each major version.
const PACKAGED: &str = "/usr/lib/postgresql";

/// One installation of `postgres` and `initdb`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Programs {
    dir: PathBuf,
    pub(super) major: u32,
}

impl Programs {
    /// What `database.binaries` names; for "auto" the version that made the data when it is here, else the newest.
    pub(super) fn find(binaries: &str, data_major: Option<u32>) -> Result<Self> {
        let found = match binaries {
            "auto" => Self::choose(packaged(Path::new(PACKAGED)).chain(on_path()), data_major).ok_or_else(missing),
            dir => Self::at(Path::new(dir)).ok_or_else(|| {
                refuse(format!(
                    "database.binaries = {dir:?} does not hold the programs postgres and initdb: expected a directory such as {PACKAGED}/15/bin"
                ))
            }),
        }?;
        match data_major {
            Some(made_by) if made_by != found.major => Err(refuse(format!(
                "the data directory was made by PostgreSQL {made_by}, and {} holds version {}: install postgresql-{made_by}, or migrate the data with pg_upgrade",
                found.dir.display(),
                found.major
            ))),
            _ if found.major < OLDEST => {
                Err(refuse(format!("PostgreSQL {} is too old: expected {OLDEST} or newer", found.major)))
            }
            _ => Ok(found),
        }
    }

    fn choose(candidates: impl Iterator<Item = Self>, data_major: Option<u32>) -> Option<Self> {
        candidates.max_by_key(|found| (Some(found.major) == data_major, found.major))
    }

    fn at(dir: &Path) -> Option<Self> {
        let said = Command::new(dir.join("postgres")).arg("--version").output().ok()?;
        let major = major(std::str::from_utf8(&said.stdout).ok()?)?;
        dir.join("initdb").is_file().then(|| Self { dir: dir.to_owned(), major })
    }

    pub(super) fn postgres(&self) -> PathBuf {
        self.dir.join("postgres")
    }

    pub(super) fn initdb(&self) -> PathBuf {
        self.dir.join("initdb")
    }
}

fn packaged(root: &Path) -> impl Iterator<Item = Programs> {
    let versions = std::fs::read_dir(root).into_iter().flatten().flatten();
    versions.filter_map(|version| Programs::at(&version.path().join("bin")))
}

fn on_path() -> Option<Programs> {
    let found = Command::new("sh").args(["-c", "command -v postgres"]).output().ok()?;
    // The link in a directory of links is followed to where initdb is, too.
    let program = Path::new(std::str::from_utf8(&found.stdout).ok()?.trim()).canonicalize().ok()?;
    Programs::at(program.parent()?)
}

/// `15` of "postgres (PostgreSQL) 15.18 (Debian …)", "postgres (PostgreSQL) 19beta1".
fn major(version: &str) -> Option<u32> {
    let number = version.split(") ").nth(1)?;
    number.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn missing() -> Error {
    refuse(
        "PostgreSQL is not installed: install it (Debian: apt-get install postgresql), name its programs in database.binaries, or give a running one in MUSTER__DATABASE__URL"
            .to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read() {
        assert_eq!(major("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"), Some(15));
        assert_eq!(major("postgres (PostgreSQL) 19beta1\n"), Some(19));
        assert_eq!(major("not it"), None);
    }

    #[test]
    fn the_version_that_made_the_data_is_preferred_and_else_the_newest() {
        let of = |major| Programs { dir: PathBuf::from("/"), major };
        let installed = || [of(15), of(17), of(16)].into_iter();
        assert_eq!(Programs::choose(installed(), None), Some(of(17)));
        assert_eq!(Programs::choose(installed(), Some(16)), Some(of(16)));
        assert_eq!(Programs::choose(installed(), Some(14)), Some(of(17)));
        assert_eq!(Programs::choose(std::iter::empty(), None), None);
    }

    #[test]
    fn missing_programs_are_said_in_one_sentence_that_helps() {
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(packaged(empty.path()).count(), 0);
        assert!(missing().to_string().contains("apt-get install postgresql"));
        let named = Programs::find(empty.path().to_str().unwrap(), None).unwrap_err().to_string();
        assert!(named.contains("database.binaries") && !named.contains('\n'), "{named}");
    }

    #[test]
    fn data_of_another_version_is_refused() {
        let refused = Programs::find("auto", Some(9)).unwrap_err().to_string();
        assert!(refused.contains("made by PostgreSQL 9") && !refused.contains('\n'), "{refused}");
    }
}
