use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SerialNumber,
};
use x509_parser::extensions::ParsedExtension;

use super::*;
use crate::clock::from_ms;
use crate::config::{Config, Environment};
use crate::credential;
use crate::device::{self, NewDevice};
use crate::issuing;
use crate::testing::TestDb;

const NOON: i64 = 1_763_722_800_000;

fn now() -> DateTime<Utc> {
    from_ms(NOON)
}

/// Settings as shipped, with a key file of its own.
pub(crate) fn pki(change: impl FnOnce(&mut config::Certificates)) -> (Pki, tempfile::TempDir) {
    let config = Config::from_sources(&Environment::default(), Some(std::collections::HashMap::new())).unwrap();
    let mut settings = config.certificates;
    change(&mut settings);
    let dir = tempfile::tempdir().unwrap();
    (Pki::new(settings, dir.path()), dir)
}

/// A signing request of a new key, that asks for whatever the test likes.
pub(crate) fn request(params: &CertificateParams, key: &KeyPair) -> Csr {
    Csr::from_pem(&params.serialize_request(key).unwrap().pem().unwrap(), 16_384).unwrap()
}

pub(crate) fn plain_request() -> Csr {
    request(&CertificateParams::new(Vec::new()).unwrap(), &KeyPair::generate().unwrap())
}

pub(crate) async fn enrol(db: &TestDb, tenant: TenantKey, id: &str) -> DeviceId {
    let new = NewDevice::named(id.parse().unwrap());
    device::enrol(&mut db.pool().acquire().await.unwrap(), tenant, &new, now()).await.unwrap();
    new.id
}

async fn tenant(db: &TestDb, id: &str) -> TenantKey {
    let made = sqlx::query_scalar!(
        r#"insert into tenant (id, created_at) values ($1, now()) returning key as "key: TenantKey""#,
        id
    );
    made.fetch_one(db.pool()).await.unwrap()
}

/// Somebody's authority, and what it signs.
struct Foreign {
    params: CertificateParams,
    key: KeyPair,
}

impl Foreign {
    fn new(name: &str) -> Self {
        let mut params = named(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self { params, key: KeyPair::generate().unwrap() }
    }

    fn pem(&self) -> String {
        self.params.self_signed(&self.key).unwrap().pem()
    }

    fn sign(&self, params: &CertificateParams) -> rcgen::Certificate {
        params.signed_by(&KeyPair::generate().unwrap(), &Issuer::from_params(&self.params, &self.key)).unwrap()
    }
}

fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

async fn registered(db: &TestDb, pki: &Pki, tenant: TenantKey, foreign: &Foreign) -> Result<Authority> {
    let nonce = pki.nonce(tenant, now()).unwrap().text;
    let proof = foreign.sign(&named(&nonce)).pem();
    let mut conn = db.pool().acquire().await.unwrap();
    register(&mut conn, pki, tenant, "theirs", (&foreign.pem(), &proof), now()).await
}

#[tokio::test]
async fn a_built_in_authority_is_one_and_its_key_is_readable_nowhere() {
    let db = TestDb::new().await;
    let (pki, _dir) = pki(|_| {});
    let mut conn = db.pool().acquire().await.unwrap();
    let made = create(&mut conn, &pki, db.tenant(), " Oslo ", Some(86_400), now()).await.unwrap();
    assert_eq!((made.kind, made.disabled, made.version), (Kind::BuiltIn, false, 1));
    assert_eq!(made.certificate.subject, "O=main, CN=Oslo");
    assert_eq!(made.certificate.not_after, now() + TimeDelta::days(1));
    let read = parsed(&made.certificate.der).unwrap();
    check_authority(&read).unwrap();
    assert_eq!(read.basic_constraints().unwrap().unwrap().value.path_len_constraint, Some(0));
    read.verify_signature(None).unwrap();
    let sealed: Vec<u8> = sqlx::query_scalar("select sealed_key from authority").fetch_one(db.pool()).await.unwrap();
    let key = pki.seal.open(made.id.uuid().as_bytes(), &sealed).unwrap();
    assert!(KeyPair::try_from(&key[..]).is_ok() && !sealed.windows(32).any(|part| key.windows(32).any(|k| k == part)));
    assert_eq!(list(&mut conn, db.tenant()).await.unwrap(), [made]);
}

#[tokio::test]
async fn names_lifetimes_and_numbers_are_bounded() {
    let db = TestDb::new().await;
    let (pki, _dir) = pki(|settings| settings.max_authorities = 2);
    let mut conn = db.pool().acquire().await.unwrap();
    for bad in ["", "  ", "a\nb", &"x".repeat(65)] {
        assert!(
            matches!(create(&mut conn, &pki, db.tenant(), bad, None, now()).await, Err(Error::Invalid(_))),
            "{bad:?}"
        );
    }
    for bad in [0, 315_360_001, u64::MAX] {
        assert!(create(&mut conn, &pki, db.tenant(), "a", Some(bad), now()).await.is_err(), "{bad}");
    }
    create(&mut conn, &pki, db.tenant(), "a", None, now()).await.unwrap();
    let twice = create(&mut conn, &pki, db.tenant(), "a", None, now()).await;
    assert!(matches!(twice, Err(Error::AuthorityExists("name"))), "{twice:?}");
    create(&mut conn, &pki, db.tenant(), "b", None, now()).await.unwrap();
    let many = create(&mut conn, &pki, db.tenant(), "c", None, now()).await;
    assert!(matches!(many, Err(Error::TooMany { most: 2, .. })), "{many:?}");
    let elsewhere = tenant(&db, "acme").await;
    create(&mut conn, &pki, elsewhere, "a", None, now()).await.expect("another tenant has its own");
}

#[tokio::test]
async fn a_certificate_says_what_we_say_whatever_was_asked_for() {
    let db = TestDb::new().await;
    let (pki, _dir) = pki(|settings| settings.crl_base_url = "https://fleet.example.com/".into());
    let boiler = enrol(&db, db.tenant(), "boiler-1").await;
    let mut conn = db.pool().acquire().await.unwrap();
    let authority = create(&mut conn, &pki, db.tenant(), "Oslo", Some(86_400), now()).await.unwrap();
    let mut greedy = CertificateParams::new(["evil.example.com".to_owned()]).unwrap();
    greedy.distinguished_name.push(DnType::CommonName, "other/pump-1");
    greedy.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    greedy.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    greedy.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::CodeSigning];
    let (csr, key) = {
        let key = KeyPair::generate().unwrap();
        (request(&greedy, &key), key)
    };
    // Longer than its authority: it is cut.
    let asked = (&csr, Some(864_000));
    let issued = issuing::issue(&mut conn, &pki, db.tenant(), &boiler, None, asked, now()).await.unwrap();
    let certificate = Certificate::from_pem(&issued.pem).unwrap();
    assert_eq!(certificate.subject, "CN=main/boiler-1");
    assert_eq!(certificate.not_after, authority.certificate.not_after);
    assert_eq!(issued.registered.renew_after, Some(now() + TimeDelta::hours(16)), "two thirds of a day");
    assert_eq!(Certificate::from_pem(&issued.chain).unwrap(), authority.certificate);
    let read = parsed(&certificate.der).unwrap();
    read.verify_signature(Some(parsed(&authority.certificate.der).unwrap().public_key())).unwrap();
    assert_eq!(read.public_key().raw, csr.public_key);
    assert_eq!(read.public_key().subject_public_key.data, key.public_key_raw());
    assert!(!read.basic_constraints().unwrap().unwrap().value.ca);
    assert_eq!(read.key_usage().unwrap().unwrap().value.flags, 1, "digitalSignature");
    let usage = read.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && !usage.server_auth && !usage.code_signing && !usage.any && usage.other.is_empty());
    assert!(read.subject_alternative_name().unwrap().is_none());
    let points = read.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::CRLDistributionPoints(points) => Some(format!("{points:?}")),
        _ => None,
    });
    assert!(points.unwrap().contains(&format!("https://fleet.example.com/api/v1/authorities/{}/crl", authority.id)));
    assert!(certificate.serial.unwrap().significant().len() >= 12, "128 random bits");
}

#[tokio::test]
async fn every_kind_of_key_is_signed() {
    let db = TestDb::new().await;
    let (pki, _dir) = pki(|_| {});
    let mut conn = db.pool().acquire().await.unwrap();
    let authority = create(&mut conn, &pki, db.tenant(), "Oslo", None, now()).await.unwrap();
    let authority = parsed(&authority.certificate.der).unwrap();
    let kinds =
        [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519, &rcgen::PKCS_RSA_SHA256];
    for (n, kind) in kinds.into_iter().enumerate() {
        let id = enrol(&db, db.tenant(), &format!("device-{n}")).await;
        let csr = request(&named("x"), &KeyPair::generate_for(kind).unwrap());
        let issued = issuing::issue(&mut conn, &pki, db.tenant(), &id, None, (&csr, None), now()).await.unwrap();
        let der = Certificate::from_pem(&issued.pem).unwrap().der;
        parsed(&der).unwrap().verify_signature(Some(authority.public_key())).unwrap();
    }
}

#[tokio::test]
async fn the_newest_enabled_authority_signs_unless_another_is_named() {
    let db = TestDb::new().await;
    let (pki, _dir) = pki(|_| {});
    let boiler = enrol(&db, db.tenant(), "boiler-1").await;
    let elsewhere = tenant(&db, "acme").await;
    let mut conn = db.pool().acquire().await.unwrap();
    let csr = plain_request();
    let signer = async |conn: &mut PgConnection, named| {
        let device = (&"main".parse().unwrap(), &boiler);
        sign(conn, &pki, db.tenant(), named, device, (&csr, None), now()).await.map(|signed| signed.authority)
    };
    assert!(matches!(signer(&mut conn, None).await, Err(Error::CannotSign(_))), "there is none");
    let foreign = create(&mut conn, &pki, elsewhere, "a", None, now()).await.unwrap();
    let theirs = registered(&db, &pki, db.tenant(), &Foreign::new("ca")).await.unwrap();
    let old = create(&mut conn, &pki, db.tenant(), "old", None, now()).await.unwrap();
    let new = create(&mut conn, &pki, db.tenant(), "new", None, now()).await.unwrap();
    assert_eq!(signer(&mut conn, None).await.unwrap(), new.id);
    assert_eq!(signer(&mut conn, Some(old.id)).await.unwrap(), old.id);
    assert!(matches!(signer(&mut conn, Some(theirs.id)).await, Err(Error::CannotSign(_))), "its key is elsewhere");
    assert!(matches!(signer(&mut conn, Some(foreign.id)).await, Err(Error::NoSuchAuthority(_))), "another tenant's");
    let off = Patch { disabled: Some(true), ..Patch::default() };
    update(&mut conn, db.tenant(), new.id, &off, &[], now()).await.unwrap();
    assert_eq!(signer(&mut conn, None).await.unwrap(), old.id);
    assert!(matches!(signer(&mut conn, Some(new.id)).await, Err(Error::CannotSign(_))), "disabled");
}

#[tokio::test]
async fn without_the_key_file_nothing_is_signed_and_the_reason_is_told() {
    let db = TestDb::new().await;
    let (first, dir) = pki(|_| {});
    let boiler = enrol(&db, db.tenant(), "boiler-1").await;
    let mut conn = db.pool().acquire().await.unwrap();
    create(&mut conn, &first, db.tenant(), "Oslo", None, now()).await.unwrap();
    let shared = Pki::new((*first.settings).clone(), dir.path());
    let (other, _other_dir) = pki(|_| {});
    let csr = plain_request();
    let refused = issuing::issue(&mut conn, &other, db.tenant(), &boiler, None, (&csr, None), now()).await;
    assert!(matches!(&refused, Err(Error::Seal(why)) if why.contains("does not open")), "{refused:?}");
    issuing::issue(&mut conn, &shared, db.tenant(), &boiler, None, (&csr, None), now()).await.expect("the same file");
}

#[tokio::test]
async fn an_authority_is_registered_by_whoever_holds_its_key() {
    let db = TestDb::new().await;
    let (pki, _dir) = pki(|_| {});
    let foreign = Foreign::new("their authority");
    let made = registered(&db, &pki, db.tenant(), &foreign).await.unwrap();
    assert_eq!((made.kind, made.certificate.subject.as_str()), (Kind::Registered, "CN=their authority"));
    let twice = registered(&db, &pki, db.tenant(), &foreign).await;
    assert!(matches!(twice, Err(Error::AuthorityExists(_))), "{twice:?}");
    let elsewhere = tenant(&db, "acme").await;
    registered(&db, &pki, elsewhere, &foreign).await.expect("whoever holds its key may do so in two tenants");
}

#[tokio::test]
async fn what_proves_nothing_registers_nothing() {
    let db = TestDb::new().await;
    let (pki, _dir) = pki(|_| {});
    let (other_pki, _other_dir) = super::tests::pki(|_| {});
    let elsewhere = tenant(&db, "acme").await;
    let (mine, stranger) = (Foreign::new("ca"), Foreign::new("ca"));
    let nonce = |at| pki.nonce(db.tenant(), at).unwrap().text;
    let good = nonce(now());
    let mut changed = good.clone().into_bytes();
    changed[3] = if changed[3] == b'A' { b'B' } else { b'A' };
    let changed = String::from_utf8(changed).unwrap();
    let leaf = mine.sign(&named("no authority")).pem();
    let mut no_signer = Foreign::new("ca");
    no_signer.params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let mut old = Foreign::new("ca");
    old.params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    for (certificate, proof, why) in [
        (mine.pem(), stranger.sign(&named(&good)).pem(), "not signed by"),
        (mine.pem(), mine.pem(), "no nonce"),
        (mine.pem(), mine.sign(&named("hello")).pem(), "no nonce"),
        (mine.pem(), mine.sign(&named(&changed)).pem(), "no nonce"),
        (mine.pem(), mine.sign(&named(&good[..good.len() - 2])).pem(), "no nonce"),
        (mine.pem(), mine.sign(&named(&nonce(now() - NONCE_LIFETIME))).pem(), "no nonce"),
        (mine.pem(), mine.sign(&named(&pki.nonce(elsewhere, now()).unwrap().text)).pem(), "no nonce"),
        (mine.pem(), mine.sign(&named(&other_pki.nonce(db.tenant(), now()).unwrap().text)).pem(), "no nonce"),
        (leaf.clone(), mine.sign(&named(&good)).pem(), "CA:TRUE"),
        (no_signer.pem(), no_signer.sign(&named(&good)).pem(), "keyCertSign"),
        (old.pem(), old.sign(&named(&good)).pem(), "expired"),
        (mine.key.serialize_pem(), mine.sign(&named(&good)).pem(), "certificate"),
        (mine.pem(), String::new(), "certificate"),
    ] {
        let mut conn = db.pool().acquire().await.unwrap();
        let refused = register(&mut conn, &pki, db.tenant(), "x", (&certificate, &proof), now()).await;
        assert!(matches!(&refused, Err(Error::Invalid(said)) if said.contains(why)), "{why}: {refused:?}");
    }
}

#[tokio::test]
async fn a_disabled_authority_counts_for_nothing_and_a_deleted_one_never_again() {
    let db = TestDb::new().await;
    let (pki, _dir) = pki(|_| {});
    let boiler = enrol(&db, db.tenant(), "boiler-1").await;
    let mut conn = db.pool().acquire().await.unwrap();
    let authority = create(&mut conn, &pki, db.tenant(), "Oslo", None, now()).await.unwrap();
    let csr = plain_request();
    let issued = issuing::issue(&mut conn, &pki, db.tenant(), &boiler, None, (&csr, None), now()).await.unwrap();
    let shown = Certificate::from_pem(&issued.pem).unwrap();
    let opens = async |conn: &mut PgConnection| {
        let found = credential::registration(conn, &shown, TimeDelta::zero(), now()).await.unwrap();
        found.is_some_and(|found| found.holder.is_some())
    };
    assert!(opens(&mut conn).await);
    let enabled = delete(&mut conn, db.tenant(), authority.id, &[], now()).await;
    assert!(matches!(enabled, Err(Error::AuthorityEnabled(_))), "{enabled:?}");
    let change = |disabled| Patch { disabled: Some(disabled), ..Patch::default() };
    let stale = update(&mut conn, db.tenant(), authority.id, &change(true), &[7], now()).await;
    assert!(matches!(stale, Err(Error::VersionMismatch { .. })), "{stale:?}");
    let (old, new) = update(&mut conn, db.tenant(), authority.id, &change(true), &[1], now()).await.unwrap();
    assert_eq!((old.disabled, new.disabled, new.version), (false, true, 2));
    assert!(!opens(&mut conn).await);
    update(&mut conn, db.tenant(), authority.id, &change(false), &[], now()).await.unwrap();
    assert!(opens(&mut conn).await);
    update(&mut conn, db.tenant(), authority.id, &change(true), &[], now()).await.unwrap();
    delete(&mut conn, db.tenant(), authority.id, &[], now()).await.unwrap();
    assert!(!opens(&mut conn).await);
    assert!(credential::list(&mut conn, db.tenant(), &boiler).await.unwrap()[0].revoked_at.is_some());
    let elsewhere = tenant(&db, "acme").await;
    for (tenant, id) in [(db.tenant(), authority.id), (elsewhere, authority.id)] {
        assert!(matches!(find(&mut conn, tenant, id).await, Err(Error::NoSuchAuthority(_))));
    }
}

async fn vouched(db: &TestDb, shown: &rcgen::Certificate, issuer: &Foreign) -> Vec<String> {
    let shown = Certificate::from_der(shown.der()).unwrap();
    let issuer = Certificate::from_pem(&issuer.pem()).unwrap();
    let candidates = vouching(&mut db.pool().acquire().await.unwrap(), &shown, &[issuer.name], now()).await.unwrap();
    let name = |Candidate { principal, .. }: Candidate| match principal.who {
        Who::Device { id, .. } => format!("{}/{id}", principal.tenant_id),
        Who::User { .. } | Who::Claim { .. } => panic!("a user"),
    };
    candidates.into_iter().map(name).collect()
}

#[tokio::test]
async fn an_authority_vouches_within_its_tenant_only() {
    let db = TestDb::new().await;
    let (pki, _dir) = pki(|_| {});
    let acme = tenant(&db, "acme").await;
    for (tenant, device) in [(db.tenant(), "boiler-1"), (acme, "boiler-1"), (acme, "pump-1")] {
        enrol(&db, tenant, device).await;
    }
    let foreign = Foreign::new("ca of acme");
    let authority = registered(&db, &pki, acme, &foreign).await.unwrap();
    let named_by = async |name: &str| vouched(&db, &foreign.sign(&named(name)), &foreign).await;
    assert_eq!(named_by("acme/boiler-1").await, ["acme/boiler-1"]);
    assert_eq!(named_by("boiler-1").await, ["acme/boiler-1"], "not that of main");
    assert_eq!(named_by("pump-1").await, ["acme/pump-1"]);
    for nobody in ["main/boiler-1", "other/boiler-1", "acme/nobody", "", "acme/boiler-1/x"] {
        assert_eq!(named_by(nobody).await, [""; 0], "{nobody}");
    }
    assert_eq!(vouched(&db, &foreign.sign(&named("pump-1")), &Foreign::new("another name")).await, [""; 0]);
    let mut conn = db.pool().acquire().await.unwrap();
    let taken_back = foreign.sign(&{
        let mut params = named("pump-1");
        params.serial_number = Some(SerialNumber::from(77));
        params
    });
    assert_eq!(vouched(&db, &taken_back, &foreign).await, ["acme/pump-1"]);
    sqlx::query("insert into revoked_certificate values ($1, $2, now(), 'unspecified')")
        .bind(authority.id.uuid())
        .bind(Serial::read(&[77]).unwrap().as_bytes())
        .execute(&mut *conn)
        .await
        .unwrap();
    assert_eq!(vouched(&db, &taken_back, &foreign).await, [""; 0]);
    registered(&db, &pki, db.tenant(), &foreign).await.unwrap();
    assert_eq!(named_by("boiler-1").await, ["acme/boiler-1", "main/boiler-1"], "the broker takes neither");
    assert_eq!(named_by("main/boiler-1").await, ["main/boiler-1"]);
    let off = Patch { disabled: Some(true), ..Patch::default() };
    update(&mut conn, acme, authority.id, &off, &[], now()).await.unwrap();
    assert_eq!(named_by("acme/boiler-1").await, [""; 0], "disabled");
}

#[tokio::test]
async fn a_built_in_authority_vouches_for_nothing_that_has_no_row() {
    let db = TestDb::new().await;
    let (pki, _dir) = pki(|_| {});
    let boiler = enrol(&db, db.tenant(), "boiler-1").await;
    let mut conn = db.pool().acquire().await.unwrap();
    create(&mut conn, &pki, db.tenant(), "Oslo", None, now()).await.unwrap();
    let csr = plain_request();
    let main = "main".parse().unwrap();
    let signed = sign(&mut conn, &pki, db.tenant(), None, (&main, &boiler), (&csr, None), now()).await.unwrap();
    let shown = Certificate::from_der(&signed.der).unwrap();
    assert!(vouching(&mut conn, &shown, &[shown.issuer], now()).await.unwrap().is_empty());
    assert_eq!(credential::registration(&mut conn, &shown, TimeDelta::zero(), now()).await.unwrap(), None);
}

#[tokio::test]
async fn a_certificate_registered_by_itself_is_known_to_its_authority() {
    let db = TestDb::new().await;
    let (pki, _dir) = pki(|_| {});
    let boiler = enrol(&db, db.tenant(), "boiler-1").await;
    let (foreign, namesake) = (Foreign::new("ca"), Foreign::new("ca"));
    let authority = registered(&db, &pki, db.tenant(), &foreign).await.unwrap();
    let mut conn = db.pool().acquire().await.unwrap();
    for (issuer, expected) in [(&foreign, Some(authority.id)), (&namesake, None)] {
        let certificate = Certificate::from_der(issuer.sign(&named("whatever")).der()).unwrap();
        let kept = credential::register(&mut conn, db.tenant(), &boiler, &certificate, now()).await.unwrap();
        assert_eq!(kept.certificate.unwrap().authority, expected);
    }
}

/// What somebody above signs for a request, as an authority or as something else.
fn placed(above: &Foreign, csr: &str, change: impl FnOnce(&mut CertificateParams)) -> String {
    let mut request = rcgen::CertificateSigningRequestParams::from_pem(csr).unwrap();
    change(&mut request.params);
    request.signed_by(&Issuer::from_params(&above.params, &above.key)).unwrap().pem()
}

#[tokio::test]
async fn a_built_in_authority_is_placed_below_another_and_what_it_signs_leads_there() {
    let db = TestDb::new().await;
    let (pki, _dir) = pki(|_| {});
    let boiler = enrol(&db, db.tenant(), "boiler-1").await;
    let mut conn = db.pool().acquire().await.unwrap();
    let made = create(&mut conn, &pki, db.tenant(), "Oslo", None, now()).await.unwrap();
    let csr = plain_request();
    let before = issuing::issue(&mut conn, &pki, db.tenant(), &boiler, None, (&csr, None), now()).await.unwrap();
    let list_before = crate::revocation::list(&mut conn, &pki, made.id, now()).await.unwrap();
    let root = Foreign::new("root");
    let root_pem = root.pem();
    let request = signing_request(&mut conn, &pki, db.tenant(), made.id).await.unwrap();
    let certificate = placed(&root, &request, |_| {});
    let pems = (certificate.as_str(), &*root_pem);
    let (old, new) = place_below(&mut conn, db.tenant(), made.id, pems, &[1], now()).await.unwrap();
    assert_eq!((old.certificate, old.chain, new.version), (made.certificate, vec![], 2));
    assert_eq!(new.certificate, Certificate::from_pem(&certificate).unwrap());
    let csr = plain_request();
    let after = issuing::issue(&mut conn, &pki, db.tenant(), &boiler, None, (&csr, None), now()).await.unwrap();
    assert_eq!(after.chain, format!("{certificate}{root_pem}"));
    let (own, parent) = (parsed(&new.certificate.der).unwrap(), Certificate::from_pem(&root_pem).unwrap());
    own.verify_signature(Some(parsed(&parent.der).unwrap().public_key())).unwrap();
    for issued in [&before, &after] {
        let der = Certificate::from_pem(&issued.pem).unwrap().der;
        let issued = parsed(&der).unwrap();
        assert_eq!(issued.issuer().as_raw(), own.subject().as_raw());
        issued.verify_signature(Some(own.public_key())).unwrap();
    }
    let list = crate::revocation::list(&mut conn, &pki, made.id, now()).await.unwrap();
    assert_ne!(list.number, list_before.number);
    let again = signing_request(&mut conn, &pki, db.tenant(), made.id).await.unwrap();
    let info = |pem: &str| rcgen::CertificateSigningRequestParams::from_pem(pem).unwrap().params.distinguished_name;
    assert_eq!(info(&again), info(&request), "it can be renewed there");
}

#[tokio::test]
async fn what_places_an_authority_nowhere_is_refused() {
    let db = TestDb::new().await;
    let (pki, _dir) = pki(|_| {});
    let mut conn = db.pool().acquire().await.unwrap();
    let made = create(&mut conn, &pki, db.tenant(), "Oslo", None, now()).await.unwrap();
    let other = create(&mut conn, &pki, db.tenant(), "Bergen", None, now()).await.unwrap();
    let (root, stranger) = (Foreign::new("root"), Foreign::new("root"));
    let request = signing_request(&mut conn, &pki, db.tenant(), made.id).await.unwrap();
    let of_other = signing_request(&mut conn, &pki, db.tenant(), other.id).await.unwrap();
    let good = placed(&root, &request, |_| {});
    let mut old_root = Foreign::new("root");
    old_root.params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    let by_old = placed(&old_root, &request, |_| {});
    let usages = |usage| move |params: &mut CertificateParams| params.key_usages = vec![usage];
    for (why, certificate, chain) in [
        ("its name and its key", placed(&root, &of_other, |_| {}), root.pem()),
        ("its name and its key", root.pem(), root.pem()),
        ("did not sign", good.clone(), stranger.pem()),
        ("did not sign", good.clone(), format!("{}{}", root.pem(), stranger.pem())),
        ("chain: expected", good.clone(), String::new()),
        ("chain: expected", good.clone(), root.pem().repeat(5)),
        ("chain: expected", good.clone(), root.key.serialize_pem()),
        ("CA:TRUE", placed(&root, &request, |params| params.is_ca = IsCa::ExplicitNoCa), root.pem()),
        ("cRLSign", placed(&root, &request, usages(KeyUsagePurpose::KeyCertSign)), root.pem()),
        ("keyCertSign", placed(&root, &request, usages(KeyUsagePurpose::CrlSign)), root.pem()),
        ("not in force", by_old, old_root.pem()),
        ("certificate in PEM", "hello".into(), root.pem()),
    ] {
        let refused = place_below(&mut conn, db.tenant(), made.id, (&certificate, &chain), &[], now()).await;
        assert!(matches!(&refused, Err(Error::Invalid(said)) if said.contains(why)), "{why}: {refused:?}");
    }
    let theirs = registered(&db, &pki, db.tenant(), &Foreign::new("theirs")).await.unwrap();
    let elsewhere = tenant(&db, "acme").await;
    let pems = (good.as_str(), &*root.pem());
    let refused = place_below(&mut conn, db.tenant(), theirs.id, pems, &[], now()).await;
    assert!(matches!(refused, Err(Error::CannotSign(_))), "{refused:?}");
    assert!(matches!(signing_request(&mut conn, &pki, db.tenant(), theirs.id).await, Err(Error::CannotSign(_))));
    let refused = place_below(&mut conn, elsewhere, made.id, pems, &[], now()).await;
    assert!(matches!(refused, Err(Error::NoSuchAuthority(_))), "{refused:?}");
    let refused = place_below(&mut conn, db.tenant(), made.id, pems, &[7], now()).await;
    assert!(matches!(refused, Err(Error::VersionMismatch { .. })), "{refused:?}");
}
