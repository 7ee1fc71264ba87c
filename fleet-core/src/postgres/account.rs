//! Whose processes these are: as root the cluster runs as `postgres` (else `nobody`), otherwise as we do.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use super::refuse;
use crate::error::Result;

/// A user of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl User {
    /// By name or number; `None` when the machine does not know it.
    fn find(key: &str) -> Option<Self> {
        let found = Command::new("getent").args(["passwd", key]).output().ok()?;
        Self::parse(std::str::from_utf8(&found.stdout).ok()?)
    }

    /// A line of passwd(5).
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.lines().next()?.split(':');
        let (name, _, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        Some(Self { name: name.to_owned(), uid: uid.parse().ok()?, gid: gid.parse().ok()? })
    }
}

/// Who we are and who the cluster is run by.
#[derive(Debug, Clone)]
pub(super) struct Account {
    /// The user of this process.
    pub(super) own: User,
    /// The user of the cluster's processes, when it is another.
    pub(super) other: Option<User>,
}

impl Account {
    /// Chooses the user for the cluster in `data`, which need not exist yet.
    pub(super) fn choose(data: &Path) -> Result<Self> {
        let uid = rustix::process::geteuid().as_raw();
        let own = User::find(&uid.to_string()).ok_or_else(|| {
            refuse(format!("PostgreSQL needs a user with a name, and user {uid} has none: add it to /etc/passwd"))
        })?;
        if uid != 0 {
            return Ok(Self { own, other: None });
        }
        // A cluster that exists stays with its owner: PostgreSQL refuses anyone else.
        let owner = std::fs::metadata(data).ok().and_then(|found| User::find(&found.uid().to_string()));
        let other = owner.or_else(|| User::find("postgres")).or_else(|| User::find("nobody"));
        let other = other.ok_or_else(|| {
            refuse("PostgreSQL does not run as root, and there is no user postgres or nobody to run it as".to_owned())
        })?;
        Ok(Self { own, other: Some(other) })
    }

    /// Runs `program` as the cluster's user. It gets `on_death` (a signal's name) when the *thread* that starts it ends.
    pub(super) fn command(&self, on_death: &str, program: &Path) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", on_death]);
        if let Some(user) = &self.other {
            command.args([format!("--reuid={}", user.uid), format!("--regid={}", user.gid)]).arg("--clear-groups");
        }
        command.arg("--").arg(program);
        // PG* variables would change what the programs do, and messages are read by this module.
        command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("LC_ALL", "C").current_dir("/");
        command
    }

    /// Hands `path` to the cluster's user.
    pub(super) fn give(&self, path: &Path) -> Result<()> {
        match &self.other {
            Some(user) => std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid))
                .map_err(|e| refuse(format!("cannot give {} to user {}: {e}", path.display(), user.name))),
            None => Ok(()),
        }
    }

    /// Names of the users that may connect as the administrator.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        [Some(&self.own), self.other.as_ref()].into_iter().flatten().map(|user| user.name.as_str())
    }

    /// Refuses a directory that the cluster's user cannot reach, and names the one in the way.
    pub(super) fn check_reach(&self, dir: &Path) -> Result<()> {
        let Some(user) = &self.other else { return Ok(()) };
        let reaches = |path: &Path| {
            let tried = self.command("KILL", Path::new("test")).arg("-x").arg(path).status();
            tried.is_ok_and(|status| status.success())
        };
        if reaches(dir) {
            return Ok(());
        }
        let mut way: Vec<&Path> = dir.ancestors().collect();
        way.reverse();
        let wall = way.into_iter().find(|path| !reaches(path)).unwrap_or(dir);
        Err(refuse(format!(
            "PostgreSQL runs as user {}, who may not enter {}: choose another data directory (MUSTER__DATA_DIR), such as /var/lib/muster",
            user.name,
            wall.display()
        )))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_line_of_passwd_is_read() {
        let postgres = User { name: "postgres".into(), uid: 109, gid: 117 };
        assert_eq!(User::parse("postgres:x:109:117:PostgreSQL:/var/lib/postgresql:/bin/bash\n"), Some(postgres));
        for bad in ["", "postgres", "postgres:x:many:117::"] {
            assert_eq!(User::parse(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_user_is_read_and_nothing_panics(name in "[^:\n\r]+", uid: u32, gid: u32, noise: String) {
            let line = format!("{name}:x:{uid}:{gid}:a: b:/home:/bin/sh\n");
            prop_assert_eq!(User::parse(&line), Some(User { name, uid, gid }));
            let _whatever_it_is = User::parse(&noise);
        }
    }
}
