//! `muster tls`: a development authority, the server certificate it signs, and certificates for devices.
//!
//! Holds: keys are readable by their owner alone; nothing is overwritten unasked; a file is there whole or not at all, since
//! a running server takes up what changes.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::{Context, bail};
use broker::TlsFiles;
use chrono::TimeDelta;
use fleet_core::clock::Clock;
use fleet_core::id::{DeviceId, TenantId};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::ServerName;

use crate::settings;

/// Names under which the server can be reached from the machine it runs on.
const LOCAL_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];
/// How long the authority is valid.
const AUTHORITY_DAYS: i64 = 3650;
/// How long what it signs is valid.
const CERTIFICATE_DAYS: i64 = 825;
/// Certificates are valid from a little earlier, for clocks that are behind.
const BACKDATED: TimeDelta = TimeDelta::hours(1);

/// What `muster tls` takes.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Make a certificate authority and a server certificate for development.
    Init(Init),
    /// Make a certificate for a device, signed by that authority.
    Device(Device),
}

#[derive(clap::Args)]
pub(crate) struct Init {
    /// A name or address under which clients reach the server, besides localhost; may be repeated.
    #[arg(long)]
    host: Vec<String>,
    /// Overwrite what is there; certificates of the old authority are worthless then.
    #[arg(long)]
    force: bool,
}

#[derive(clap::Args)]
pub(crate) struct Device {
    /// The device's id.
    name: String,
    /// Its tenant.
    #[arg(long, default_value = "main")]
    tenant: String,
    /// Overwrite what is there.
    #[arg(long)]
    force: bool,
}

/// Runs `muster tls`.
pub(crate) fn run(command: &Command) -> anyhow::Result<ExitCode> {
    let data_dir = settings::load()?.data_dir;
    match command {
        Command::Init(args) => init(&data_dir, args)?,
        Command::Device(args) => device(&data_dir, args)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The files of the development authority.
struct Authority {
    certificate: PathBuf,
    key: PathBuf,
}

impl Authority {
    fn of(files: &TlsFiles) -> anyhow::Result<Self> {
        let certificate = files.client_ca.clone().context("the authority has a file")?;
        Ok(Self { key: certificate.with_file_name("ca-key.pem"), certificate })
    }
}

fn init(data_dir: &Path, args: &Init) -> anyhow::Result<()> {
    if let Some(host) = args.host.iter().find(|host| !is_host(host)) {
        return Err(fleet_core::Error::Invalid(format!("--host {host:?}: expected a DNS name or an address")).into());
    }
    let files = TlsFiles::of_init(data_dir);
    let authority = Authority::of(&files)?;
    refuse_to_overwrite(&[&authority.certificate, &authority.key, &files.certificate, &files.key], args.force)?;

    let authority_key = KeyPair::generate()?;
    let authority_params = authority_params()?;
    let authority_certificate = authority_params.self_signed(&authority_key)?;
    let names: Vec<String> = LOCAL_NAMES.into_iter().map(str::to_owned).chain(args.host.iter().cloned()).collect();
    let key = KeyPair::generate()?;
    let params = server_params(names.clone())?;
    let certificate = params.signed_by(&key, &Issuer::from_params(&authority_params, &authority_key))?;

    // The server takes up its certificate last, when what vouches for it is there.
    write(&authority.key, &authority_key.serialize_pem(), Secrecy::Secret)?;
    write(&authority.certificate, &authority_certificate.pem(), Secrecy::Public)?;
    write(&files.key, &key.serialize_pem(), Secrecy::Secret)?;
    write(&files.certificate, &certificate.pem(), Secrecy::Public)?;
    println!("authority: {}", authority.certificate.display());
    println!("server certificate: {} for {}", files.certificate.display(), names.join(", "));
    println!("TLS is spoken with mqtt.tls_listen, e.g. MUSTER__MQTT__TLS_LISTEN=127.0.0.1:8883");
    Ok(())
}

/// Whether a client could ask for this: a name, all names below one, or an address.
fn is_host(host: &str) -> bool {
    ServerName::try_from(host.strip_prefix("*.").unwrap_or(host)).is_ok()
}

fn device(data_dir: &Path, args: &Device) -> anyhow::Result<()> {
    let id: DeviceId = args.name.parse().map_err(fleet_core::Error::from)?;
    let tenant: TenantId = args.tenant.parse().map_err(fleet_core::Error::from)?;
    let authority = Authority::of(&TlsFiles::of_init(data_dir))?;
    let read = |path: &Path| {
        fs::read_to_string(path).with_context(|| format!("{}: run `muster tls init` first", path.display()))
    };
    let issuer = Issuer::from_ca_cert_pem(&read(&authority.certificate)?, KeyPair::from_pem(&read(&authority.key)?)?)
        .with_context(|| authority.certificate.display().to_string())?;
    let dir = authority.certificate.with_file_name("devices").join(tenant.as_str());
    let (certificate_file, key_file) = (dir.join(format!("{id}.pem")), dir.join(format!("{id}-key.pem")));
    refuse_to_overwrite(&[&certificate_file, &key_file], args.force)?;

    let key = KeyPair::generate()?;
    let certificate = device_params(&tenant, &id)?.signed_by(&key, &issuer)?;
    write(&key_file, &key.serialize_pem(), Secrecy::Secret)?;
    write(&certificate_file, &certificate.pem(), Secrecy::Public)?;
    println!("certificate: {}", certificate_file.display());
    println!("key: {}", key_file.display());
    println!("authority: {}", authority.certificate.display());
    Ok(())
}

fn authority_params() -> anyhow::Result<CertificateParams> {
    let mut params = valid_for(AUTHORITY_DAYS, CertificateParams::new(Vec::new())?);
    params.distinguished_name.push(DnType::CommonName, "Muster development authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn server_params(names: Vec<String>) -> anyhow::Result<CertificateParams> {
    let mut params = valid_for(CERTIFICATE_DAYS, CertificateParams::new(names)?);
    params.distinguished_name.push(DnType::CommonName, "Muster");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn device_params(tenant: &TenantId, id: &DeviceId) -> anyhow::Result<CertificateParams> {
    let mut params = valid_for(CERTIFICATE_DAYS, CertificateParams::new(Vec::new())?);
    params.distinguished_name.push(DnType::CommonName, format!("{tenant}/{id}"));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn valid_for(days: i64, mut params: CertificateParams) -> CertificateParams {
    let now = Clock::system().now();
    params.not_before = SystemTime::from(now - BACKDATED).into();
    params.not_after = SystemTime::from(now + TimeDelta::days(days)).into();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
}

fn refuse_to_overwrite(files: &[&Path], force: bool) -> anyhow::Result<()> {
    match files.iter().find(|file| file.exists()) {
        Some(file) if !force => bail!("{} exists already: --force overwrites it", file.display()),
        _ => Ok(()),
    }
}

/// Who may read a file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Secrecy {
    Secret,
    Public,
}

fn write(path: &Path, text: &str, secrecy: Secrecy) -> anyhow::Result<()> {
    write_whole(path, text, secrecy).with_context(|| path.display().to_string())
}

fn write_whole(path: &Path, text: &str, secrecy: Secrecy) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
    }
    let new = path.with_extension("pem.new");
    // One that was left behind may be readable by others.
    if let Err(error) = fs::remove_file(&new)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let mode = if secrecy == Secrecy::Secret { 0o600 } else { 0o644 };
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(new, path)
}
