//! Where the cluster lives, below the data directory:
//!
//! | | |
//! |---|---|
//! | `postgres/lock` | held by the one server that uses the cluster |
//! | `postgres/*.conf` | written at every start |
//! | `postgres/postgres.log`, `.1` | what PostgreSQL says, bounded |
//! | `postgres/data/` | the cluster; `postgres/data.new/` while it is being made |
//! | `postgres/socket/` | the socket; elsewhere when the path would be too long |
//!
//! As root only `data` and `socket` belong to the cluster's user, so that nothing we write as root is in its hands.

use std::fs::{self, DirBuilder, File, Permissions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use sha2::{Digest, Sha256};
use tracing::info;

use super::account::Account;
use super::programs::Programs;
use super::{Tuning, leftovers, refuse};
use crate::error::{Error, Result};

/// Longest path of a Unix socket on Linux, in bytes.
const MAX_SOCKET_PATH: usize = 107;

/// The socket's name in its directory.
const SOCKET: &str = ".s.PGSQL.5432";

/// The administrator and owner of everything.
pub(super) const ROLE: &str = "muster";

/// How long the remains of an interrupted `initdb` may resist being removed.
const REMOVE_WITHIN: Duration = Duration::from_secs(5);

/// The directories of one cluster. While it lives, no other server can use them.
#[derive(Debug)]
pub(super) struct Home {
    dir: PathBuf,
    pub(super) socket_dir: PathBuf,
    pub(super) account: Account,
    _lock: File,
}

impl Home {
    /// Makes the directories and takes the lock.
    pub(super) fn open(data_dir: &Path) -> Result<Self> {
        let unusable = |e: io::Error| {
            let shown = data_dir.display();
            refuse(format!("the data directory {shown} cannot be used ({e}): choose another with MUSTER__DATA_DIR"))
        };
        let dir = data_dir.join("postgres");
        fs::create_dir_all(&dir).map_err(unusable)?;
        // /proc tells where processes are without symbolic links.
        let dir = dir.canonicalize().map_err(unusable)?;
        let lock = take_lock(&dir.join("lock")).map_err(unusable)?.ok_or_else(|| in_use(&dir, data_dir))?;
        let account = Account::choose(&dir.join("data"))?;
        if account.other.is_some() {
            let_through(dir.parent().unwrap_or(&dir)).and_then(|()| let_through(&dir)).map_err(unusable)?;
        }
        account.check_reach(&dir)?;
        let socket_dir = socket_dir(&dir, &account)?;
        Ok(Self { dir, socket_dir, account, _lock: lock })
    }

    /// PGDATA.
    pub(super) fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The file of settings that `postgres` is started with.
    pub(super) fn settings(&self) -> PathBuf {
        self.dir.join("postgresql.conf")
    }

    /// Where PostgreSQL's own words go.
    pub(super) fn log(&self) -> PathBuf {
        self.dir.join("postgres.log")
    }

    /// Written by the postmaster while it runs.
    pub(super) fn pid_file(&self) -> PathBuf {
        self.data().join("postmaster.pid")
    }

    /// Files by which PostgreSQL knows that a socket is in use.
    pub(super) fn socket_files(&self) -> [PathBuf; 2] {
        [self.socket_dir.join(SOCKET), self.socket_dir.join(format!("{SOCKET}.lock"))]
    }

    /// The major version that made the data; `None` before the first start.
    pub(super) fn data_major(&self) -> Result<Option<u32>> {
        let data = self.data();
        let odd = || {
            let shown = data.display();
            refuse(format!(
                "{shown} is not a PostgreSQL data directory: move it away or choose another MUSTER__DATA_DIR"
            ))
        };
        match fs::read_to_string(data.join("PG_VERSION")) {
            Ok(text) => text.trim().parse().map(Some).map_err(|_| odd()),
            Err(e) if e.kind() == io::ErrorKind::NotFound && !data.exists() => Ok(None),
            Err(_) => Err(odd()),
        }
    }

    /// Makes the cluster at the first start. It gets its name when it is whole, so that an interrupted start is
    /// simply begun again.
    pub(super) fn make_cluster(&self, programs: &Programs, tuning: Tuning) -> Result<()> {
        let making = self.dir.join("data.new");
        let failed = |e: io::Error| refuse(format!("cannot make {}: {e}", making.display()));
        remove_remains(&making).map_err(failed)?;
        DirBuilder::new().mode(0o700).create(&making).map_err(failed)?;
        self.account.give(&making)?;
        let mut initdb = self.account.command("KILL", &programs.initdb());
        initdb.arg("-D").arg(&making).args(["--username", ROLE, "--encoding=UTF8", "--locale=C"]);
        // The order of bytes is fast and never changes with the C library; upper and lower case know all letters.
        initdb.args(["--lc-ctype=C.UTF-8", "--data-checksums", "--auth=peer", "--no-instructions"]);
        if !tuning.durable {
            initdb.arg("--no-sync");
        }
        let done = initdb.stdin(Stdio::null()).output().map_err(|e| no_setpriv(&e))?;
        if !done.status.success() {
            let said = String::from_utf8_lossy(&done.stderr);
            let why = said.lines().find(|line| line.contains("error:")).or(said.lines().last()).unwrap_or("killed");
            return Err(refuse(format!("PostgreSQL could not make its cluster: {}", why.trim())));
        }
        fs::rename(&making, self.data()).and_then(|()| File::open(&self.dir)?.sync_all()).map_err(failed)
    }

    /// Writes the settings and who may connect: the machine's users of [`Account::names`], through the socket alone.
    pub(super) fn write_settings(&self, tuning: Tuning) -> Result<()> {
        let (hba, ident) = (self.dir.join("pg_hba.conf"), self.dir.join("pg_ident.conf"));
        let users: String =
            self.account.names().map(|name| format!("muster \"{name}\" {ROLE}\n")).collect::<Vec<_>>().concat();
        let head = "# Written at every start of muster.\n";
        let files = [
            (self.settings(), tuning.settings(&hba, &ident, &self.socket_dir)),
            (hba, format!("{head}local all all peer map=muster\n")),
            (ident, format!("{head}{users}")),
        ];
        for (path, text) in files {
            fs::write(&path, text)
                .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o644)))
                .map_err(|e| refuse(format!("cannot write {}: {e}", path.display())))?;
        }
        Ok(())
    }
}

/// The directory of the socket of a postmaster that runs, by its own word.
pub(super) fn socket_dir_in_use(dir: &Path) -> Option<PathBuf> {
    let said = fs::read_to_string(dir.join("data/postmaster.pid")).ok()?;
    said.lines().nth(4).filter(|line| !line.is_empty()).map(PathBuf::from)
}

/// Why `setpriv`, through which all of PostgreSQL is started, did not start.
pub(super) fn no_setpriv(e: &io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::NotFound => refuse("setpriv is not installed: install it (Debian: util-linux)".to_owned()),
        _ => refuse(format!("setpriv cannot be run: {e}")),
    }
}

fn in_use(dir: &Path, data_dir: &Path) -> Error {
    let holder = fs::read_to_string(dir.join("lock")).unwrap_or_default();
    refuse(format!(
        "another muster (process {}) uses the data directory {}: stop it, or choose another with MUSTER__DATA_DIR",
        holder.trim(),
        data_dir.display()
    ))
}

/// `None` when another process holds the lock. It is held as long as the file is open, so a killed server leaves none.
fn take_lock(path: &Path) -> io::Result<Option<File>> {
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(e)) => return Err(e),
    }
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())?;
    Ok(Some(file))
}

/// Lets everyone walk through `dir`, when it is ours: the cluster's user has to reach what is below.
fn let_through(dir: &Path) -> io::Result<()> {
    let found = fs::metadata(dir)?;
    if found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o011 == 0o011 {
        return Ok(());
    }
    fs::set_permissions(dir, Permissions::from_mode(found.mode() & 0o7777 | 0o011))
}

/// The directory of the socket: in `dir`, or a short path when its name would be longer than a socket's may be.
fn socket_dir(dir: &Path, account: &Account) -> Result<PathBuf> {
    let mut chosen = dir.join("socket");
    if chosen.join(SOCKET).as_os_str().len() > MAX_SOCKET_PATH {
        let digest = Sha256::digest(dir.as_os_str().as_encoded_bytes());
        let name =
            format!("muster-{}-{:02x}{:02x}{:02x}{:02x}", account.own.uid, digest[0], digest[1], digest[2], digest[3]);
        let place = if account.other.is_some() { "/run" } else { "/tmp" };
        chosen = Path::new(place).join(name);
        info!(socket_dir = %chosen.display(), "the data directory's path is too long for a Unix socket, which goes elsewhere");
    }
    let failed = |e: io::Error| refuse(format!("cannot make the socket directory {}: {e}", chosen.display()));
    match DirBuilder::new().mode(0o700).create(&chosen) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed(e)),
        _ => {}
    }
    // Somebody else may have been first in /tmp.
    let found = fs::symlink_metadata(&chosen).map_err(failed)?;
    let owners = [Some(&account.own), account.other.as_ref()];
    if !found.is_dir() || owners.into_iter().flatten().all(|user| user.uid != found.uid()) {
        return Err(refuse(format!("{} is not a directory of ours: remove it", chosen.display())));
    }
    fs::set_permissions(&chosen, Permissions::from_mode(0o700)).map_err(failed)?;
    account.give(&chosen)?;
    Ok(chosen)
}

/// Removes what an interrupted `initdb` has left, whose last process may still be writing.
fn remove_remains(making: &Path) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        for pid in leftovers::postgres_in(making) {
            leftovers::send(pid, Signal::KILL);
        }
        match fs::remove_dir_all(making) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if begun.elapsed() > REMOVE_WITHIN => return Err(e),
            _ => thread::sleep(Duration::from_millis(10)),
        }
    }
}

impl Drop for Home {
    /// A socket directory elsewhere is not left lying about.
    fn drop(&mut self) {
        if !self.socket_dir.starts_with(&self.dir) {
            let _in_use_or_gone = fs::remove_dir(&self.socket_dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_has_one_user_at_a_time() {
        let data_dir = tempfile::tempdir().unwrap();
        let home = Home::open(data_dir.path()).unwrap();
        let refused = Home::open(data_dir.path()).unwrap_err().to_string();
        assert!(refused.contains("another muster") && refused.contains(&std::process::id().to_string()), "{refused}");
        drop(home);
        Home::open(data_dir.path()).unwrap();
    }

    #[test]
    fn a_long_path_gets_its_socket_elsewhere_and_a_short_one_keeps_it() {
        let data_dir = tempfile::tempdir().unwrap();
        let home = Home::open(data_dir.path()).unwrap();
        assert!(home.socket_dir.starts_with(data_dir.path().canonicalize().unwrap()));
        let deep = data_dir.path().join("d".repeat(100));
        let home = Home::open(&deep).unwrap();
        assert!(home.socket_files()[0].as_os_str().len() <= MAX_SOCKET_PATH);
        let elsewhere = home.socket_dir.clone();
        assert!(elsewhere.is_dir());
        drop(home);
        assert!(!elsewhere.exists());
    }

    #[test]
    fn a_data_directory_that_is_none_is_said_in_one_line() {
        let data_dir = tempfile::tempdir().unwrap();
        let file = data_dir.path().join("file");
        fs::write(&file, "").unwrap();
        let refused = Home::open(&file).unwrap_err().to_string();
        assert!(refused.contains("MUSTER__DATA_DIR") && !refused.contains('\n'), "{refused}");

        let home = Home::open(data_dir.path()).unwrap();
        fs::create_dir(home.data()).unwrap();
        assert!(home.data_major().unwrap_err().to_string().contains("not a PostgreSQL data directory"));
    }
}
