use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CrlDistributionPoint,
    CrlIssuingDistributionPoint, CrlScope, DnType, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SerialNumber,
};

use super::*;
use crate::authority::tests::{enrol, pki, plain_request};
use crate::certificate::{Certificate, to_pem};
use crate::clock::from_ms;
use crate::config;
use crate::credential;
use crate::device;
use crate::id::DeviceId;
use crate::issuing::{self, Issued};
use crate::testing::TestDb;

const NOON: i64 = 1_763_722_800_000;

fn day(n: i64) -> DateTime<Utc> {
    from_ms(NOON) + TimeDelta::days(n)
}

struct Plant {
    db: TestDb,
    pki: Pki,
    authority: Authority,
    _dir: tempfile::TempDir,
}

impl Plant {
    async fn new(change: impl FnOnce(&mut config::Certificates)) -> Self {
        let (db, (pki, dir)) = (TestDb::new().await, pki(change));
        let mut conn = db.pool().acquire().await.unwrap();
        let authority = authority::create(&mut conn, &pki, db.tenant(), "Oslo", None, day(0)).await.unwrap();
        drop(conn);
        Self { db, pki, authority, _dir: dir }
    }

    async fn issue(&self, id: &str) -> (DeviceId, Issued) {
        let id = enrol(&self.db, self.db.tenant(), id).await;
        let csr = plain_request();
        let mut conn = self.db.pool().acquire().await.unwrap();
        let issued = issuing::issue(&mut conn, &self.pki, self.db.tenant(), &id, None, (&csr, None), day(0)).await;
        (id, issued.unwrap())
    }

    async fn revoke(&self, (id, issued): &(DeviceId, Issued), reason: Reason, at: DateTime<Utc>) {
        let mut conn = self.db.pool().acquire().await.unwrap();
        credential::revoke(&mut conn, self.db.tenant(), id, issued.credential.id, reason, at).await.unwrap();
    }

    async fn list(&self, at: DateTime<Utc>) -> List {
        let mut tx = self.db.pool().begin().await.unwrap();
        let list = list(&mut tx, &self.pki, self.authority.id, at).await.unwrap();
        tx.commit().await.unwrap();
        list
    }

    /// What a list says: number, and what is on it with its reason code.
    fn read(&self, list: &List) -> (u64, Vec<(Serial, u8)>) {
        let (_, read) = CertificateRevocationList::from_der(&list.der).unwrap();
        let authority = X509Certificate::from_der(&self.authority.certificate.der).unwrap().1;
        read.verify_signature(authority.public_key()).unwrap();
        assert_eq!(read.issuer().as_raw(), authority.subject().as_raw());
        assert_eq!(instant(read.next_update().unwrap()).unwrap(), list.next_update);
        let entry = |one: &RevokedCertificate<'_>| {
            (Serial::read(one.raw_serial()).unwrap(), one.reason_code().map_or(0, |(_, code)| code.0))
        };
        let number = read.crl_number().unwrap().iter_u64_digits().next().unwrap_or(0);
        (number, read.iter_revoked_certificates().map(entry).collect())
    }
}

fn serial((_, issued): &(DeviceId, Issued)) -> Serial {
    issued.registered.serial.unwrap()
}

#[tokio::test]
async fn a_list_has_what_was_taken_back_and_is_made_anew_only_when_that_changes() {
    let plant = Plant::new(|settings| settings.crl_lifetime_s = 7 * 86_400).await;
    let (boiler, pump) = (plant.issue("boiler-1").await, plant.issue("pump-1").await);
    let first = plant.list(day(0)).await;
    assert_eq!(plant.read(&first), (1, vec![]));
    assert_eq!(plant.list(day(3)).await, first, "cached");
    plant.revoke(&boiler, Reason::KeyCompromise, day(3)).await;
    let second = plant.list(day(3)).await;
    assert_eq!(plant.read(&second), (2, vec![(serial(&boiler), 1)]));
    assert_eq!(second.next_update, day(10));
    plant.revoke(&boiler, Reason::Superseded, day(4)).await;
    assert_eq!(plant.read(&plant.list(day(4)).await).1, [(serial(&boiler), 1)], "the first reason stays");
    plant.revoke(&pump, Reason::default(), day(4)).await;
    let mut both = vec![(serial(&boiler), 1), (serial(&pump), 0)];
    both.sort();
    assert_eq!(plant.read(&plant.list(day(4)).await).1, both);
    let number = plant.read(&plant.list(day(4)).await).0;
    assert_eq!(plant.read(&plant.list(day(8)).await).0, number + 1, "half of its life is over");
}

#[tokio::test]
async fn what_would_not_be_valid_any_more_leaves_the_list_after_one_more() {
    let plant = Plant::new(|settings| settings.crl_lifetime_s = 86_400).await;
    let boiler = plant.issue("boiler-1").await;
    plant.revoke(&boiler, Reason::default(), day(1)).await;
    assert_eq!(plant.read(&plant.list(day(89)).await).1.len(), 1);
    assert_eq!(plant.read(&plant.list(day(90)).await).1.len(), 1, "expired since the list before");
    assert_eq!(plant.read(&plant.list(day(92)).await).1.len(), 0);
}

#[tokio::test]
async fn a_renewed_certificate_is_on_the_list_when_its_overlap_is_over() {
    let plant = Plant::new(|settings| settings.crl_lifetime_s = 30 * 86_400).await;
    let (id, first) = plant.issue("boiler-1").await;
    let proof = crate::policy::Proof { credential: Some(first.credential.id), ..crate::policy::Proof::default() };
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::new(Vec::new()).unwrap().serialize_request(&key).unwrap().pem().unwrap();
    let request = issuing::Request::decode(serde_json::json!({ "csr": csr }).to_string().as_bytes(), 16_384).unwrap();
    let mut conn = plant.db.pool().acquire().await.unwrap();
    plant.list(day(60)).await;
    let at = (plant.db.tenant(), &id);
    issuing::renew(&mut conn, &plant.pki, at, &proof, &request, day(60)).await.unwrap();
    assert_eq!(plant.read(&plant.list(day(60)).await).1, []);
    // Not the list that is due in fifteen days.
    assert_eq!(plant.read(&plant.list(day(61)).await).1, [(first.registered.serial.unwrap(), 4)]);
    // The others, that end at their time, are on none.
    assert_eq!(plant.read(&plant.list(day(130)).await).1, []);
}

#[tokio::test]
async fn a_device_that_is_gone_stays_on_the_list() {
    let plant = Plant::new(|_| {}).await;
    let (boiler, pump) = (plant.issue("boiler-1").await, plant.issue("pump-1").await);
    plant.revoke(&pump, Reason::KeyCompromise, day(0)).await;
    plant.list(day(1)).await;
    let mut conn = plant.db.pool().acquire().await.unwrap();
    for (id, _) in [&boiler, &pump] {
        device::delete(&mut conn, plant.db.tenant(), id, &[], day(1)).await.unwrap();
    }
    let mut expected = vec![(serial(&boiler), 5), (serial(&pump), 1)];
    expected.sort();
    assert_eq!(plant.read(&plant.list(day(1)).await).1, expected);
    // And stays outside, even when there is a device of its name again.
    enrol(&plant.db, plant.db.tenant(), "boiler-1").await;
    let shown = Certificate::from_pem(&boiler.1.pem).unwrap();
    assert_eq!(credential::registration(&mut conn, &shown, TimeDelta::zero(), day(1)).await.unwrap(), None);
}

#[tokio::test]
async fn of_several_who_find_it_due_one_makes_it() {
    let plant = Plant::new(|_| {}).await;
    let lists = futures::future::join_all((0..4).map(|_| plant.list(day(0)))).await;
    assert!(lists.iter().all(|list| *list == lists[0]));
    assert_eq!(lists[0].number, Serial::read(&[1]).unwrap());
}

#[test]
fn numbers_count_up_over_every_byte() {
    let number = |bytes: &[u8]| Serial::read(bytes).unwrap();
    assert_eq!(Serial::default().next(), Some(number(&[1])));
    assert_eq!(number(&[0xff]).next(), Some(number(&[1, 0])));
    assert_eq!(number(&[0xff; 20]).next(), None);
    assert!(number(&[1, 0]) > number(&[0xff]));
    assert_eq!((number(&[0, 0, 7]).to_string(), number(&[]).to_string()), ("07".into(), "00".into()));
    assert_eq!(Serial::read(&[1; 21]), None);
}

#[test]
fn reasons_are_named_once() {
    for reason in Reason::ALL {
        assert_eq!(Reason::named(reason.name()), Some(reason));
    }
    assert_eq!(Reason::named("because"), None);
}

// Lists of others

struct Foreign {
    params: CertificateParams,
    key: KeyPair,
}

impl Foreign {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, "theirs");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self { params, key: KeyPair::generate().unwrap() }
    }

    fn list(&self, number: u64, serials: &[u64], change: impl FnOnce(&mut CertificateRevocationListParams)) -> String {
        let moment = |at: DateTime<Utc>| std::time::SystemTime::from(at).into();
        let entry = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: moment(day(-1)),
            reason_code: Some(rcgen::RevocationReason::CertificateHold),
            invalidity_date: None,
        };
        let mut params = CertificateRevocationListParams {
            this_update: moment(day(-1)),
            next_update: moment(day(7)),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        change(&mut params);
        params.signed_by(&Issuer::from_params(&self.params, &self.key)).unwrap().pem().unwrap()
    }

    async fn register(&self, plant: &Plant) -> AuthorityId {
        let nonce = plant.pki.nonce(plant.db.tenant(), day(0)).unwrap().text;
        let mut proof = CertificateParams::new(Vec::new()).unwrap();
        proof.distinguished_name = rcgen::DistinguishedName::new();
        proof.distinguished_name.push(DnType::CommonName, nonce);
        let issuer = Issuer::from_params(&self.params, &self.key);
        let proof = proof.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap().pem();
        let own = self.params.self_signed(&self.key).unwrap().pem();
        let mut conn = plant.db.pool().acquire().await.unwrap();
        let (tenant, pems) = (plant.db.tenant(), (own.as_str(), proof.as_str()));
        authority::register(&mut conn, &plant.pki, tenant, "theirs", pems, day(0)).await.unwrap().id
    }
}

async fn on_list(plant: &Plant) -> Vec<Serial> {
    let serials: Vec<Vec<u8>> = sqlx::query_scalar("select serial from revoked_certificate order by serial")
        .fetch_all(plant.db.pool())
        .await
        .unwrap();
    serials.iter().map(|serial| Serial::read(serial).unwrap()).collect()
}

fn numbers(of: &[u8]) -> Vec<Serial> {
    of.iter().map(|n| Serial::read(&[*n]).unwrap()).collect()
}

#[tokio::test]
async fn a_list_of_a_registered_authority_replaces_the_one_before() {
    let plant = Plant::new(|settings| settings.max_crl_entries = 3).await;
    let foreign = Foreign::new();
    let id = foreign.register(&plant).await;
    let mut conn = plant.db.pool().acquire().await.unwrap();
    let none = list(&mut conn, &plant.pki, id, day(0)).await;
    assert!(matches!(none, Err(Error::NoRevocationList(_))), "{none:?}");
    let mut take = async |pem: String| upload(&mut conn, &plant.pki, plant.db.tenant(), id, &pem, day(0)).await;
    let (old, new) = take(foreign.list(5, &[1, 2], |_| {})).await.unwrap();
    assert_eq!((old.crl_number, new.crl_number, new.version), (None, Serial::read(&[5]), 2));
    assert_eq!(on_list(&plant).await, numbers(&[1, 2]));
    take(foreign.list(6, &[2, 3, 4], |_| {})).await.unwrap();
    assert_eq!(on_list(&plant).await, numbers(&[2, 3, 4]), "one that was on hold is back");
    let older = take(foreign.list(5, &[], |_| {})).await;
    assert!(matches!(older, Err(Error::OldRevocationList { .. })), "{older:?}");
    let long = take(foreign.list(7, &[1, 2, 3, 4], |_| {})).await;
    assert!(matches!(long, Err(Error::TooMany { most: 3, .. })), "{long:?}");
    assert_eq!(on_list(&plant).await, numbers(&[2, 3, 4]));
    let newest = foreign.list(6, &[], |_| {});
    take(newest.clone()).await.expect("the same number again");
    assert_eq!(on_list(&plant).await, []);
    let given = list(&mut plant.db.pool().acquire().await.unwrap(), &plant.pki, id, day(300)).await.unwrap();
    assert_eq!(to_pem("X509 CRL", &given.der), newest, "as it was uploaded");
}

#[tokio::test]
async fn what_is_not_a_whole_list_of_the_authority_is_refused() {
    let plant = Plant::new(|_| {}).await;
    let (foreign, stranger) = (Foreign::new(), Foreign::new());
    let id = foreign.register(&plant).await;
    let moment = |at: DateTime<Utc>| std::time::SystemTime::from(at).into();
    let point = |scope| {
        let distribution_point = CrlDistributionPoint { uris: vec!["http://example.com/".to_owned()] };
        Some(CrlIssuingDistributionPoint { distribution_point, scope })
    };
    let good = foreign.list(1, &[1], |_| {});
    let mut der = only_block(&good, &["X509 CRL"], "list").unwrap();
    der.push(0);
    for (why, pem) in [
        ("signed by", stranger.list(1, &[1], |_| {})),
        ("expired", foreign.list(1, &[1], |list| list.next_update = moment(day(0)))),
        ("not valid yet", foreign.list(1, &[1], |list| list.this_update = moment(day(1)))),
        (
            "a part of",
            foreign.list(1, &[1], |list| list.issuing_distribution_point = point(Some(CrlScope::CaCertsOnly))),
        ),
        ("revocation list", String::new()),
        ("revocation list", foreign.params.self_signed(&foreign.key).unwrap().pem()),
        ("more than that", format!("{good}{good}")),
        ("not a revocation list", to_pem("X509 CRL", &der)),
        ("not a revocation list", to_pem("X509 CRL", b"")),
    ] {
        let mut conn = plant.db.pool().acquire().await.unwrap();
        let refused = upload(&mut conn, &plant.pki, plant.db.tenant(), id, &pem, day(0)).await;
        assert!(matches!(&refused, Err(Error::Invalid(said)) if said.contains(why)), "{why}: {refused:?}");
    }
    let mut conn = plant.db.pool().acquire().await.unwrap();
    let users = foreign.list(1, &[1], |list| list.issuing_distribution_point = point(Some(CrlScope::UserCertsOnly)));
    upload(&mut conn, &plant.pki, plant.db.tenant(), id, &users, day(0)).await.expect("those are devices");
    let ours = upload(&mut conn, &plant.pki, plant.db.tenant(), plant.authority.id, &good, day(0)).await;
    assert!(matches!(ours, Err(Error::CannotSign(_))), "{ours:?}");
}

proptest::proptest! {
    #[test]
    fn nothing_panics_and_no_change_brings_another_list(bytes: Vec<u8>, at: usize, with: u8) {
        let foreign = Foreign::new();
        let own = foreign.params.self_signed(&foreign.key).unwrap();
        let _ = Given::read(&bytes, own.der(), 10, day(0));
        let mut der = only_block(&foreign.list(1, &[1, 2, 3], |_| {}), &["X509 CRL"], "list").unwrap();
        let at = at % der.len();
        let good = Given::read(&der, own.der(), 10, day(0)).unwrap();
        der[at] = with;
        // Some of what is around the signed part may be otherwise.
        if let Ok(read) = Given::read(&der, own.der(), 10, day(0)) {
            proptest::prop_assert_eq!((read.number, read.revoked), (good.number, good.revoked));
        }
    }
}
