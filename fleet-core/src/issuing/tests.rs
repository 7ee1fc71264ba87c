use rcgen::{CertificateParams, KeyPair};

use super::*;
use crate::authority::tests::{enrol, pki, plain_request};
use crate::authority::{self as authorities};
use crate::clock::from_ms;
use crate::testing::TestDb;

const NOON: i64 = 1_763_722_800_000;
const LIFE: TimeDelta = TimeDelta::days(90);

fn day(n: i64) -> DateTime<Utc> {
    from_ms(NOON) + TimeDelta::days(n)
}

fn by(credential: Option<CredentialId>) -> Proof {
    Proof { credential, ..Proof::default() }
}

/// A tenant with an authority and the device `boiler-1`.
struct Plant {
    db: TestDb,
    pki: Pki,
    boiler: DeviceId,
    _dir: tempfile::TempDir,
}

impl Plant {
    async fn new(change: impl FnOnce(&mut config::Certificates)) -> Self {
        let (db, (pki, dir)) = (TestDb::new().await, pki(change));
        let boiler = enrol(&db, db.tenant(), "boiler-1").await;
        let mut conn = db.pool().acquire().await.unwrap();
        authorities::create(&mut conn, &pki, db.tenant(), "Oslo", None, day(0)).await.unwrap();
        drop(conn);
        Self { db, pki, boiler, _dir: dir }
    }

    async fn issue(&self, csr: &Csr, at: DateTime<Utc>) -> Issued {
        let mut conn = self.db.pool().acquire().await.unwrap();
        issue(&mut conn, &self.pki, self.db.tenant(), &self.boiler, None, (csr, None), at).await.unwrap()
    }

    async fn renew(&self, proof: &Proof, csr: &Csr, at: DateTime<Utc>) -> Renewal {
        let mut conn = self.db.pool().acquire().await.unwrap();
        let request = Request(csr.clone());
        renew(&mut conn, &self.pki, (self.db.tenant(), &self.boiler), proof, &request, at).await.unwrap()
    }

    /// What it gets by this certificate.
    async fn renewed(&self, by_certificate: &Issued, csr: &Csr, at: DateTime<Utc>) -> Issued {
        match self.renew(&by(Some(by_certificate.credential.id)), csr, at).await {
            Renewal::Issued(issued) => *issued,
            other => panic!("{other:?}"),
        }
    }

    async fn rejected(&self, proof: &Proof, csr: &Csr, at: DateTime<Utc>) -> Rejection {
        match self.renew(proof, csr, at).await {
            Renewal::Rejected(rejection) => rejection,
            other => panic!("{other:?}"),
        }
    }

    /// Whether a certificate lets the device in, and whether to be renewed only.
    async fn opens(&self, issued: &Issued, at: DateTime<Utc>) -> Option<bool> {
        let shown = Certificate::from_pem(&issued.pem).unwrap();
        let grace = TimeDelta::seconds(self.pki.settings.renewal_grace_s.cast_signed());
        let mut conn = self.db.pool().acquire().await.unwrap();
        let found = credential::registration(&mut conn, &shown, grace, at).await.unwrap().unwrap();
        found.holder.map(|holder| holder.proof.renew_only)
    }
}

#[tokio::test]
async fn a_certificate_is_renewed_from_two_thirds_of_its_life_on() {
    let plant = Plant::new(|_| {}).await;
    let first = plant.issue(&plain_request(), day(0)).await;
    let proof = by(Some(first.credential.id));
    let csr = plain_request();
    let early = plant.rejected(&proof, &csr, day(60) - TimeDelta::milliseconds(1)).await;
    assert_eq!((early.code, early.renew_after), (Code::TooEarly, Some(day(60))));
    let second = plant.renewed(&first, &csr, day(60)).await;
    assert_eq!(second.registered.not_after, day(60) + LIFE);
    assert_eq!(second.registered.renew_after, Some(day(120)));
    assert_eq!(plant.opens(&second, day(60)).await, Some(false));
    // The overlap is a day.
    assert_eq!(plant.opens(&first, day(61) - TimeDelta::seconds(1)).await, Some(false));
    assert_eq!(plant.opens(&first, day(61)).await, None, "and no grace: there is a newer one");
    let third = plant.renewed(&second, &plain_request(), day(130)).await;
    assert_eq!(plant.opens(&third, day(130)).await, Some(false));
}

#[tokio::test]
async fn whoever_asks_again_with_the_same_key_gets_the_same_certificate() {
    let plant = Plant::new(|_| {}).await;
    let first = plant.issue(&plain_request(), day(0)).await;
    let proof = by(Some(first.credential.id));
    let csr = plain_request();
    let second = plant.renewed(&first, &csr, day(70)).await;
    for proof in [proof, by(Some(second.credential.id))] {
        let Renewal::Repeated(again) = plant.renew(&proof, &csr, day(70)).await else { panic!("a new one") };
        assert_eq!((again.pem, again.chain), (second.pem.clone(), second.chain.clone()));
    }
    let mut conn = plant.db.pool().acquire().await.unwrap();
    let listed = credential::list(&mut conn, plant.db.tenant(), &plant.boiler).await.unwrap();
    assert_eq!(listed.iter().filter(|one| one.certificate.is_some()).count(), 2);
    // When that one is due in turn, the same key gets a new certificate.
    let third = plant.renewed(&second, &csr, day(131)).await;
    assert_ne!(third.pem, second.pem);
}

#[tokio::test]
async fn never_more_than_two_are_valid_and_the_one_in_use_stays() {
    let plant = Plant::new(|_| {}).await;
    let first = plant.issue(&plain_request(), day(0)).await;
    let second = plant.renewed(&first, &plain_request(), day(70)).await;
    let third = plant.renewed(&first, &plain_request(), day(70)).await;
    assert_eq!(plant.opens(&first, day(70)).await, Some(false));
    assert_eq!(plant.opens(&third, day(70)).await, Some(false));
    assert_eq!(plant.opens(&second, day(70)).await, None, "it was never used, and there is a newer one");
}

#[tokio::test]
async fn an_old_certificate_renews_nothing_once_a_newer_one_is_in_use() {
    let plant = Plant::new(|_| {}).await;
    let first = plant.issue(&plain_request(), day(0)).await;
    let second = plant.renewed(&first, &plain_request(), day(70)).await;
    assert_eq!(plant.opens(&second, day(70)).await, Some(false), "the device has come in by it");
    let rejection = plant.rejected(&by(Some(first.credential.id)), &plain_request(), day(70)).await;
    assert_eq!(rejection.code, Code::Superseded);
    assert_eq!(plant.opens(&second, day(70)).await, Some(false));
}

#[tokio::test]
async fn one_certificate_brings_a_bounded_number_until_an_operator_allows_more() {
    let plant = Plant::new(|settings| settings.max_renewals = 3).await;
    let first = plant.issue(&plain_request(), day(0)).await;
    let proof = by(Some(first.credential.id));
    for _ in 0..3 {
        plant.renewed(&first, &plain_request(), day(70)).await;
    }
    assert_eq!(plant.rejected(&proof, &plain_request(), day(70)).await.code, Code::TooMany);
    let mut conn = plant.db.pool().acquire().await.unwrap();
    allow(&mut conn, plant.db.tenant(), &plant.boiler, first.credential.id, day(70)).await.unwrap();
    plant.renewed(&first, &plain_request(), day(70)).await;
}

#[tokio::test]
async fn an_operator_may_allow_it_early() {
    let plant = Plant::new(|_| {}).await;
    let first = plant.issue(&plain_request(), day(0)).await;
    let proof = by(Some(first.credential.id));
    assert_eq!(plant.rejected(&proof, &plain_request(), day(1)).await.code, Code::TooEarly);
    let mut conn = plant.db.pool().acquire().await.unwrap();
    allow(&mut conn, plant.db.tenant(), &plant.boiler, first.credential.id, day(1)).await.unwrap();
    plant.renewed(&first, &plain_request(), day(1)).await;
    let token = credential::issue(&mut conn, plant.db.tenant(), &plant.boiler, day(1)).await.unwrap();
    let other = enrol(&plant.db, plant.db.tenant(), "pump-1").await;
    for (device, id) in [(&plant.boiler, token.id), (&other, first.credential.id), (&plant.boiler, CredentialId::new())]
    {
        let refused = allow(&mut conn, plant.db.tenant(), device, id, day(1)).await;
        assert!(matches!(refused, Err(Error::NoSuchCredential(_))), "{refused:?}");
    }
}

#[tokio::test]
async fn within_its_grace_a_certificate_is_good_for_its_renewal_only() {
    let plant = Plant::new(|settings| settings.renewal_grace_s = 7 * 86_400).await;
    let first = plant.issue(&plain_request(), day(0)).await;
    assert_eq!(plant.opens(&first, day(90) - TimeDelta::seconds(1)).await, Some(false));
    assert_eq!(plant.opens(&first, day(90)).await, Some(true));
    assert_eq!(plant.opens(&first, day(97) - TimeDelta::seconds(1)).await, Some(true));
    assert_eq!(plant.opens(&first, day(97)).await, None);
    let late = Proof { renew_only: true, ..by(Some(first.credential.id)) };
    let Renewal::Issued(second) = plant.renew(&late, &plain_request(), day(91)).await else { panic!("none") };
    assert_eq!(plant.opens(&second, day(91)).await, Some(false));
    assert_eq!(plant.rejected(&late, &plain_request(), day(91)).await.code, Code::Superseded);
    let mut conn = plant.db.pool().acquire().await.unwrap();
    let revoked = first.credential.id;
    credential::revoke(&mut conn, plant.db.tenant(), &plant.boiler, revoked, Reason::default(), day(91)).await.unwrap();
    assert_eq!(plant.opens(&first, day(91)).await, None, "revoked is revoked");
    assert_eq!(plant.rejected(&late, &plain_request(), day(91)).await.code, Code::NotAllowed);
}

#[tokio::test]
async fn a_first_certificate_by_token_where_the_settings_allow_it() {
    let closed = Plant::new(|_| {}).await;
    assert_eq!(closed.rejected(&by(None), &plain_request(), day(0)).await.code, Code::NotAllowed);
    let open = Plant::new(|settings| settings.first_by_token = true).await;
    let mut conn = open.db.pool().acquire().await.unwrap();
    let token = credential::issue(&mut conn, open.db.tenant(), &open.boiler, day(0)).await.unwrap();
    let csr = plain_request();
    for proof in [by(Some(token.id)), by(None)] {
        let given = open.renew(&proof, &csr, day(0)).await;
        assert!(matches!(given, Renewal::Issued(_) | Renewal::Repeated(_)), "{given:?}");
        let second = open.rejected(&proof, &plain_request(), day(1)).await;
        assert_eq!((second.code, second.renew_after), (Code::TooEarly, Some(day(60))));
    }
    let Renewal::Issued(second) = open.renew(&by(Some(token.id)), &plain_request(), day(60)).await else { panic!() };
    assert_eq!(open.opens(&second, day(60)).await, Some(false));
    credential::revoke(&mut conn, open.db.tenant(), &open.boiler, token.id, Reason::default(), day(61)).await.unwrap();
    assert_eq!(open.rejected(&by(Some(token.id)), &plain_request(), day(130)).await.code, Code::NotAllowed);
}

#[tokio::test]
async fn a_certificate_made_elsewhere_is_renewed_here() {
    let plant = Plant::new(|_| {}).await;
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.not_before = std::time::SystemTime::from(day(0)).into();
    params.not_after = std::time::SystemTime::from(day(90)).into();
    let own = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
    let own = Certificate::from_der(own.der()).unwrap();
    let mut conn = plant.db.pool().acquire().await.unwrap();
    let pinned = credential::register(&mut conn, plant.db.tenant(), &plant.boiler, &own, day(0)).await.unwrap();
    let proof = by(Some(pinned.id));
    assert_eq!(plant.rejected(&proof, &plain_request(), day(59)).await.code, Code::TooEarly);
    let renewed = plant.renew(&proof, &plain_request(), day(60)).await;
    assert!(matches!(renewed, Renewal::Issued(_)), "{renewed:?}");
}

#[tokio::test]
async fn nobody_signs_without_an_authority_or_for_a_device_that_is_gone() {
    let plant = Plant::new(|settings| settings.first_by_token = true).await;
    let mut conn = plant.db.pool().acquire().await.unwrap();
    let id = authorities::list(&mut conn, plant.db.tenant()).await.unwrap()[0].id;
    let off = authorities::Patch { disabled: Some(true), ..authorities::Patch::default() };
    authorities::update(&mut conn, plant.db.tenant(), id, &off, &[], day(0)).await.unwrap();
    assert_eq!(plant.rejected(&by(None), &plain_request(), day(0)).await.code, Code::NoAuthority);
    crate::device::delete(&mut conn, plant.db.tenant(), &plant.boiler, &[], day(0)).await.unwrap();
    assert_eq!(plant.rejected(&by(None), &plain_request(), day(0)).await.code, Code::NotAllowed);
}

#[test]
fn a_payload_is_read_or_its_device_told_why_not() {
    let key = KeyPair::generate().unwrap();
    let pem = CertificateParams::new(Vec::new()).unwrap().serialize_request(&key).unwrap().pem().unwrap();
    let payload = serde_json::json!({ "csr": pem, "later": [1] }).to_string();
    Request::decode(payload.as_bytes(), 16_384).unwrap();
    for bad in ["", "[]", "{}", "{\"csr\":1}", "{\"csr\":\"x\"}", &pem, &payload[..payload.len() - 3]] {
        assert_eq!(Request::decode(bad.as_bytes(), 16_384).unwrap_err().code, Code::BadRequest, "{bad}");
    }
    let small = Request::decode(payload.as_bytes(), 100).unwrap_err();
    assert!(small.message.contains("at most 100 bytes"), "{small:?}");
}

proptest::proptest! {
    #[test]
    fn no_payload_panics(bytes: Vec<u8>, text: String) {
        let _ = Request::decode(&bytes, 1000);
        let _ = Request::decode(serde_json::json!({ "csr": text }).to_string().as_bytes(), 1000);
    }
}
