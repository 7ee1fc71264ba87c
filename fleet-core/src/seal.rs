//! Secrets at rest: what must come back as it was, such as a private key, is in a row only encrypted with a key that is in
//! no row.
//!
//! [`Seal::seal`] and [`Seal::open`] by AES-256-GCM; [`Seal::stamp`] is a keyed hash, for what we give out and want to know
//! again. Holds: the key is in one file that is made at its first use, whole or not at all, readable by its owner alone; one
//! that anybody may read is refused. A sealed secret opens only in the context it was sealed in. Processes that share a
//! database must share the file. Ignorant of: what is sealed.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use aws_lc_rs::{hmac, rand};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use parking_lot::Mutex;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::error::{Error, Result};

/// Bytes of the key.
const KEY_BYTES: usize = 32;
/// Bytes of a [`Seal::stamp`].
pub const STAMP_BYTES: usize = 32;
/// The first byte of what was sealed: how that was done.
const VERSION: u8 = 1;
/// Whoever is neither the file's owner nor of its group may not read it.
const OTHERS: u32 = 0o007;

type Key = Zeroizing<[u8; KEY_BYTES]>;

/// The key by which secrets are sealed; cloning shares it. The file is looked at when it is first needed.
#[derive(Clone)]
pub struct Seal(Arc<Inner>);

struct Inner {
    file: PathBuf,
    key: Mutex<Option<Key>>,
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Seal").field(&self.0.file).finish()
    }
}

impl Seal {
    /// By the key in this file.
    pub fn new(file: PathBuf) -> Self {
        Self(Arc::new(Inner { file, key: Mutex::new(None) }))
    }

    /// Encrypts a secret for a row; `context` says which, such as the row's id.
    ///
    /// # Errors
    /// [`Error::Seal`] when the file can neither be read nor made.
    pub fn seal(&self, context: &[u8], secret: &[u8]) -> Result<Vec<u8>> {
        let cipher = self.cipher()?;
        let mut text = Zeroizing::new(secret.to_vec());
        let nonce = cipher.seal_in_place_append_tag(Aad::from(context), &mut *text);
        let nonce = nonce.map_err(|_| Error::Internal("a secret could not be sealed".into()))?;
        Ok([&[VERSION][..], nonce.as_ref(), &text].concat())
    }

    /// What was sealed in the same context.
    ///
    /// # Errors
    /// [`Error::Seal`] when this is another key, or somebody has changed the row.
    pub fn open(&self, context: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
        let cipher = self.cipher()?;
        let opened = sealed.strip_prefix(&[VERSION]).and_then(|rest| rest.split_first_chunk::<NONCE_LEN>());
        let opened = opened.and_then(|(nonce, text)| {
            let mut text = Zeroizing::new(text.to_vec());
            let nonce = Nonce::assume_unique_for_key(*nonce);
            let length = cipher.open_in_place(nonce, Aad::from(context), &mut text).ok()?.len();
            text.truncate(length);
            Some(text)
        });
        opened.ok_or_else(|| {
            self.wrong("does not open what is in the database: expected the file it was sealed with, on every machine")
        })
    }

    /// A keyed hash of `data`, which nobody else can make.
    ///
    /// # Errors
    /// [`Error::Seal`] when the file can neither be read nor made.
    pub fn stamp(&self, context: &[u8], data: &[u8]) -> Result<[u8; STAMP_BYTES]> {
        let key = self.derived(b"stamp")?;
        let mut hash = hmac::Context::with_key(&key);
        let length = u64::try_from(context.len()).unwrap_or(u64::MAX);
        for part in [&length.to_be_bytes()[..], context, data] {
            hash.update(part);
        }
        hash.sign().as_ref().try_into().map_err(|_| Error::Internal("SHA-256 has 32 bytes".into()))
    }

    fn cipher(&self) -> Result<RandomizedNonceKey> {
        let key = hmac::sign(&self.derived(b"seal")?, b"AES-256-GCM");
        RandomizedNonceKey::new(&AES_256_GCM, key.as_ref()).map_err(|_| Error::Internal("no cipher".into()))
    }

    /// A key for each use, so that one says nothing of another.
    fn derived(&self, purpose: &[u8]) -> Result<hmac::Key> {
        let mut held = self.0.key.lock();
        let key = match &*held {
            Some(key) => key,
            None => held.insert(self.load()?),
        };
        let derived = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key[..]), purpose);
        Ok(hmac::Key::new(hmac::HMAC_SHA256, derived.as_ref()))
    }

    fn load(&self) -> Result<Key> {
        let read = match read(&self.0.file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make(&self.0.file).and_then(|()| read(&self.0.file))
            }
            read => read,
        };
        let (text, mode) = read.map_err(|error| self.wrong(&format!("cannot be used: {error}")))?;
        if mode & OTHERS != 0 {
            return Err(self.wrong("may be read by anybody: expected mode 0600"));
        }
        let mut key = Key::default();
        let length = STANDARD.decode_slice(text.trim(), &mut key[..]);
        match length {
            Ok(KEY_BYTES) => Ok(key),
            _ => Err(self.wrong(&format!("holds no key: expected {KEY_BYTES} bytes in base64"))),
        }
    }

    fn wrong(&self, what: &str) -> Error {
        Error::Seal(format!("{} {what}", self.0.file.display()))
    }
}

fn read(file: &Path) -> io::Result<(Zeroizing<String>, u32)> {
    let mode = fs::metadata(file)?.permissions().mode();
    Ok((Zeroizing::new(fs::read_to_string(file)?), mode))
}

/// Makes the file, unless another process is faster.
fn make(file: &Path) -> io::Result<()> {
    let mut key = Key::default();
    rand::fill(&mut key[..]).map_err(|_| io::Error::other("no random numbers"))?;
    if let Some(dir) = file.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    let new = file.with_extension(format!("{}.new", Uuid::new_v4().simple()));
    let mut written = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    let text = Zeroizing::new(STANDARD.encode(&key[..]));
    let made =
        written.write_all(text.as_bytes()).and_then(|()| written.write_all(b"\n")).and_then(|()| written.sync_all());
    // A link, which replaces nothing: the file is there whole, and only once.
    let made = made.and_then(|()| fs::hard_link(&new, file));
    fs::remove_file(&new)?;
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(dir: &tempfile::TempDir, name: &str) -> Seal {
        Seal::new(dir.path().join("new").join(name))
    }

    #[test]
    fn what_was_sealed_opens_in_its_context_and_with_its_key_alone() {
        let dir = tempfile::tempdir().unwrap();
        let seal = at(&dir, "key");
        let sealed = seal.seal(b"aut_1", b"secret").unwrap();
        assert_ne!(sealed, seal.seal(b"aut_1", b"secret").unwrap(), "nobody sees that two are the same");
        assert!(!sealed.windows(6).any(|part| part == b"secret"));
        assert_eq!(**at(&dir, "key").open(b"aut_1", &sealed).unwrap(), *b"secret", "another process");
        for (seal, context) in [(&seal, &b"aut_2"[..]), (&at(&dir, "other"), b"aut_1")] {
            let refused = seal.open(context, &sealed).unwrap_err();
            assert!(refused.to_string().contains("does not open"), "{refused}");
        }
        for n in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[n] ^= 1;
            assert!(seal.open(b"aut_1", &changed).is_err(), "byte {n}");
            assert!(seal.open(b"aut_1", &sealed[..n]).is_err(), "cut at {n}");
        }
    }

    #[test]
    fn a_stamp_is_of_its_context_data_and_key() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (at(&dir, "key"), at(&dir, "other"));
        let stamp = one.stamp(b"tenant", b"nonce").unwrap();
        assert_eq!(stamp, at(&dir, "key").stamp(b"tenant", b"nonce").unwrap());
        for different in
            [one.stamp(b"tenan", b"tnonce"), one.stamp(b"tenant", b"nonc"), other.stamp(b"tenant", b"nonce")]
        {
            assert_ne!(stamp, different.unwrap());
        }
    }

    #[test]
    fn the_file_is_its_owners_alone_and_those_who_make_it_together_agree() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("new/key");
        let seals: Vec<_> = (0..8).map(|_| Seal::new(file.clone())).collect();
        let stamps: Vec<_> = std::thread::scope(|scope| {
            let running: Vec<_> = seals.iter().map(|seal| scope.spawn(|| seal.stamp(b"", b"").unwrap())).collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(stamps.iter().all(|stamp| *stamp == stamps[0]));
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1, "nothing is left behind");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o604)).unwrap();
        assert!(Seal::new(file.clone()).stamp(b"", b"").unwrap_err().to_string().contains("0600"));
    }

    #[test]
    fn a_file_that_holds_no_key_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "hello", "AAAA", &STANDARD.encode([0; 33])] {
            let file = dir.path().join("key");
            fs::write(&file, text).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
            assert!(Seal::new(file.clone()).seal(b"", b"").is_err(), "{text:?}");
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
        let nowhere = Seal::new(PathBuf::from("/proc/nowhere/key"));
        assert!(nowhere.seal(b"", b"").unwrap_err().to_string().contains("/proc/nowhere/key"));
    }
}
