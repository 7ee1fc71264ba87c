use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use proptest::prelude::*;
use rustls::crypto::aws_lc_rs::hpke::DH_KEM_X25519_HKDF_SHA256_AES_128 as SUITE;
use rustls::crypto::hpke::{EncapsulatedSecret, Hpke, HpkePrivateKey};
use serde_json::json;

use super::request::{self, Answer, Approve, Code, Filter, Origin, Rejection, Request, SEALED_FOR, State};
use super::*;
use crate::clock::from_ms;
use crate::config::{Config, Environment};
use crate::credential;
use crate::device::{self, NewDevice};
use crate::id::ClaimRequestId;
use crate::testing::TestDb;

const NOON: i64 = 1_763_722_800_000;
const NONCE: &str = "0123456789abcdef";
const TOKEN: &str = "a token that the device has made itself";

fn settings() -> Provisioning {
    Config::from_sources(&Environment::default(), Some(std::collections::HashMap::new())).unwrap().provisioning
}

fn new_claim() -> NewClaim {
    let labels = Labels::try_from(std::collections::BTreeMap::from([("batch".to_owned(), "7".to_owned())])).unwrap();
    NewClaim {
        name: "freezers of May".into(),
        approval: Approval::Auto,
        template: Template { kind: Some("freezer".parse().unwrap()), group: Some("oslo".parse().unwrap()), labels },
        id_pattern: Some("freezer-*".parse().unwrap()),
        max_devices: 3,
        expires_in_s: 3600,
    }
}

/// A claim and who asks by it.
async fn made(db: &TestDb, new: &NewClaim) -> (Claim, Secret, Claimant) {
    let mut tx = db.pool().begin().await.unwrap();
    let (claim, secret) = create(&mut tx, db.tenant(), UserId::new(), new, &settings(), from_ms(NOON)).await.unwrap();
    let claimant = of_secret(&mut tx, secret.expose(), from_ms(NOON)).await.unwrap().expect("the right secret");
    tx.commit().await.unwrap();
    (claim, secret, claimant)
}

fn asked(id: &str, more: impl Into<serde_json::Value>) -> Request {
    let mut body = json!({ "id": id, "nonce": NONCE });
    let fields = body.as_object_mut().unwrap();
    fields.extend(more.into().as_object().unwrap().clone());
    if !fields.contains_key("public_key") {
        fields.entry("token_sha256").or_insert_with(|| json!(hex::encode(Sha256::digest(TOKEN))));
    }
    Request::decode(body.to_string().as_bytes()).unwrap()
}

async fn ask_at(db: &TestDb, by: &Claimant, request: &Request, at_ms: i64) -> Answer {
    let from = Origin { asker: "client-1".into(), address: "192.0.2.7".into() };
    request::answer(db.pool(), by, request, &from, &settings(), from_ms(at_ms)).await.unwrap()
}

async fn ask(db: &TestDb, by: &Claimant, request: &Request) -> Answer {
    ask_at(db, by, request, NOON).await
}

fn accepted(id: &str, is_new: bool) -> Answer {
    Answer::Accepted { username: format!("main/{id}"), sealed: None, is_new }
}

#[track_caller]
fn rejected(answer: Answer, code: Code) -> String {
    let Answer::Rejected(Rejection { code: found, message }) = answer else { panic!("{answer:?} instead of {code:?}") };
    assert_eq!(found, code, "{message}");
    message
}

async fn opens(db: &TestDb, id: &str, token: &str) -> bool {
    let mut conn = db.pool().acquire().await.unwrap();
    let username = format!("main/{id}");
    credential::verify(&mut conn, &username, token.as_bytes(), from_ms(NOON)).await.unwrap().is_some()
}

async fn devices(db: &TestDb) -> i64 {
    sqlx::query_scalar("select count(*) from device").fetch_one(db.pool()).await.unwrap()
}

async fn state(db: &TestDb, id: ClaimId) -> Claim {
    find(&mut db.pool().acquire().await.unwrap(), db.tenant(), id).await.unwrap()
}

#[tokio::test]
async fn a_secret_opens_its_claim_until_that_ends() {
    let db = TestDb::new().await;
    let (claim, secret, claimant) = made(&db, &new_claim()).await;
    assert_eq!((claimant.claim, claimant.tenant_id.as_str()), (claim.id, "main"));
    let mut conn = db.pool().acquire().await.unwrap();
    let name = username(&claimant.tenant_id, claim.id);
    assert_eq!(name, format!("main/_claim/{}", claim.id));
    let now = from_ms(NOON);
    let bytes = secret.expose().as_bytes();
    assert_eq!(verify(&mut conn, &name, bytes, now).await.unwrap(), Some(claimant));
    let other = username(&"main".parse().unwrap(), ClaimId::new());
    for wrong in ["main/_claim", "main/freezer-1", "other/_claim/x", &name.replace("main", "other"), &other, "_claim"] {
        assert_eq!(verify(&mut conn, wrong, bytes, now).await.unwrap(), None, "{wrong}");
    }
    for wrong in [&b"mc_x"[..], b"", b"\xff", &bytes[1..]] {
        assert_eq!(verify(&mut conn, &name, wrong, now).await.unwrap(), None);
    }
    // It is no device's credential, and a device's is no claim's.
    assert_eq!(credential::verify(&mut conn, &name, bytes, now).await.unwrap(), None);
    assert!(name.parse::<crate::id::DeviceId>().is_err());
    assert_eq!(verify(&mut conn, &name, bytes, claim.expires_at).await.unwrap(), None, "expired");
    let (before, after) = revoke(&mut conn, db.tenant(), claim.id, now).await.unwrap();
    assert_eq!((before.state(now), after.state(now)), ("open", "revoked"));
    assert_eq!(verify(&mut conn, &name, bytes, now).await.unwrap(), None, "revoked");
    let again = revoke(&mut conn, db.tenant(), claim.id, from_ms(NOON + 1)).await.unwrap();
    assert_eq!(again, (after.clone(), after));
}

#[tokio::test]
async fn a_device_with_a_token_of_its_own_comes_in() {
    let db = TestDb::new().await;
    let (claim, _, by) = made(&db, &new_claim()).await;
    let says = json!({ "type": "toaster", "labels": { "batch": "mine", "colour": "red" }, "serial": "SN 1" });
    let request = asked("freezer-1", says);
    assert_eq!(ask(&db, &by, &request).await, accepted("freezer-1", true));
    assert!(opens(&db, "freezer-1", TOKEN).await);
    let mut conn = db.pool().acquire().await.unwrap();
    let device = device::find(&mut conn, db.tenant(), &"freezer-1".parse().unwrap()).await.unwrap();
    assert_eq!((device.kind.unwrap().as_str(), device.group.unwrap().as_str()), ("freezer", "oslo"));
    let labels = device.labels.as_map().iter().map(|(key, value)| (key.as_str(), value.as_str()));
    assert_eq!(labels.collect::<Vec<_>>(), [("batch", "7"), ("colour", "red"), ("serial", "SN 1")], "the claim wins");

    // Asked twice: one device, one answer.
    assert_eq!(ask(&db, &by, &request).await, accepted("freezer-1", false));
    assert_eq!((devices(&db).await, state(&db, claim.id).await.enrolled), (1, 1));
    let (kept, _) = request::page(&mut conn, db.tenant(), &Filter::default(), None, 10).await.unwrap();
    assert_eq!((kept.len(), kept[0].asked, kept[0].state, kept[0].decided_by), (1, 2, State::Approved, None));
    assert_eq!((kept[0].asker.as_str(), kept[0].address.as_str()), ("client-1", "192.0.2.7"));
    let audited: Vec<(String, String, String, String)> =
        sqlx::query_as("select action, actor_kind, actor_id, device from audit").fetch_all(db.pool()).await.unwrap();
    let by = claim.id.to_string();
    assert_eq!(audited, [("device.provision".into(), "claim".into(), by, "freezer-1".into())]);
}

#[tokio::test]
async fn a_sealed_token_opens_for_the_asker_alone() {
    let db = TestDb::new().await;
    let (_, _, by) = made(&db, &new_claim()).await;
    let (public, private) = SUITE.generate_key_pair().unwrap();
    let request = asked("freezer-1", json!({ "public_key": URL_SAFE_NO_PAD.encode(&public.0) }));
    let Answer::Accepted { username, sealed: Some(sealed), is_new: true } = ask(&db, &by, &request).await else {
        panic!("it is let in")
    };
    let decoded = |text: &str| URL_SAFE_NO_PAD.decode(text).unwrap();
    let open = |key: &HpkePrivateKey, data: &str| {
        let enc = EncapsulatedSecret(decoded(&sealed.enc));
        SUITE.open(&enc, SEALED_FOR.as_bytes(), data.as_bytes(), &decoded(&sealed.ciphertext), key)
    };
    let data = format!("{username} {NONCE}");
    let token = String::from_utf8(open(&private, &data).unwrap()).unwrap();
    assert!(opens(&db, "freezer-1", &token).await);
    assert!(open(&private, "main/freezer-2 x").is_err(), "it is for this device and nonce");
    assert!(open(&SUITE.generate_key_pair().unwrap().1, &data).is_err());
    // The same answer again, not another token.
    let again = ask(&db, &by, &request).await;
    assert_eq!(again, Answer::Accepted { username, sealed: Some(sealed), is_new: false });
}

#[tokio::test]
async fn what_cannot_be_granted_is_told() {
    let db = TestDb::new().await;
    let (claim, _, by) = made(&db, &new_claim()).await;
    assert!(rejected(ask(&db, &by, &asked("pump-1", json!({}))).await, Code::WrongId).contains("freezer-*"));
    let mut conn = db.pool().acquire().await.unwrap();
    let taken = NewDevice::named("freezer-0".parse().unwrap());
    device::enrol(&mut conn, db.tenant(), &taken, from_ms(NOON)).await.unwrap();
    rejected(ask(&db, &by, &asked("freezer-0", json!({}))).await, Code::Exists);

    assert_eq!(ask(&db, &by, &asked("freezer-1", json!({}))).await, accepted("freezer-1", true));
    let other_token = hex::encode(Sha256::digest("another"));
    rejected(ask(&db, &by, &asked("freezer-1", json!({ "token_sha256": other_token }))).await, Code::NonceTaken);
    let other_nonce = asked("freezer-1", json!({ "nonce": "another-nonce-00" }));
    rejected(ask(&db, &by, &other_nonce).await, Code::Exists);
    for id in ["freezer-2", "freezer-3"] {
        assert_eq!(ask(&db, &by, &asked(id, json!({}))).await, accepted(id, true));
    }
    rejected(ask(&db, &by, &asked("freezer-4", json!({}))).await, Code::UsedUp);
    assert_eq!(ask(&db, &by, &asked("freezer-3", json!({}))).await, accepted("freezer-3", false), "used up or not");
    device::delete(&mut conn, db.tenant(), &"freezer-3".parse().unwrap(), &[], from_ms(NOON)).await.unwrap();
    assert!(rejected(ask(&db, &by, &asked("freezer-3", json!({}))).await, Code::Rejected).contains("deleted"));

    let now = from_ms(NOON);
    let shown = state(&db, claim.id).await;
    assert_eq!((shown.state(now), shown.enrolled, shown.refused), ("used-up", 3, 4));
    assert_eq!(shown.last_refusal.unwrap(), "the claim is used up: as many devices as it was made for have come");
    let late = ask_at(&db, &by, &asked("freezer-5", json!({})), NOON + 3_600_000).await;
    rejected(late, Code::ClaimEnded);
    revoke(&mut conn, db.tenant(), claim.id, now).await.unwrap();
    rejected(ask(&db, &by, &asked("freezer-5", json!({}))).await, Code::ClaimEnded);
}

#[tokio::test]
async fn an_operator_decides_when_the_claim_says_so() {
    let db = TestDb::new().await;
    let (claim, _, by) = made(&db, &NewClaim { approval: Approval::Manual, max_devices: 1, ..new_claim() }).await;
    let requests = ["freezer-1", "freezer-2", "freezer-3"].map(|id| asked(id, json!({ "serial": id })));
    for request in &requests {
        assert_eq!(ask(&db, &by, request).await, Answer::Pending { is_new: true });
    }
    assert_eq!(ask(&db, &by, &requests[0]).await, Answer::Pending { is_new: false });
    assert_eq!((devices(&db).await, state(&db, claim.id).await.pending), (0, 3));
    let (mut conn, now, me) = (db.pool().acquire().await.unwrap(), from_ms(NOON + 5), UserId::new());
    let pending = Filter { state: Some(State::Pending), claim: Some(claim.id) };
    let (waiting, next) = request::page(&mut conn, db.tenant(), &pending, None, 2).await.unwrap();
    assert_eq!((waiting.len(), next), (2, Some(waiting[1].id)));

    let labels = Labels::try_from(std::collections::BTreeMap::from([("batch".to_owned(), "8".to_owned())])).unwrap();
    let with = Approve { group: Some("bergen".parse().unwrap()), labels, kind: None };
    let (kept, device) = request::approve(&mut conn, db.tenant(), waiting[0].id, &with, me, now).await.unwrap();
    assert_eq!((kept.state, kept.decided_by, kept.decided_at), (State::Approved, Some(me), Some(now)));
    assert_eq!((device.group.unwrap().as_str(), device.labels.as_map()["batch"].as_str()), ("bergen", "8"));
    assert_eq!(ask(&db, &by, &requests[0]).await, accepted("freezer-1", false));
    assert!(opens(&db, "freezer-1", TOKEN).await);

    let used_up = request::approve(&mut conn, db.tenant(), waiting[1].id, &Approve::default(), me, now).await;
    assert!(matches!(used_up, Err(Error::ClaimUsedUp(_))), "{used_up:?}");
    let no = request::reject(&mut conn, db.tenant(), waiting[1].id, Some("not ours"), me, now).await.unwrap();
    assert_eq!((no.state, no.reason.as_deref()), (State::Rejected, Some("not ours")));
    assert_eq!(rejected(ask(&db, &by, &requests[1]).await, Code::Rejected), "not ours");
    let twice = request::approve(&mut conn, db.tenant(), waiting[1].id, &Approve::default(), me, now).await;
    assert!(matches!(twice, Err(Error::Decided(_))), "{twice:?}");
    let unknown = request::reject(&mut conn, db.tenant(), ClaimRequestId::new(), None, me, now).await;
    assert!(matches!(unknown, Err(Error::NoSuchClaimRequest(_))));
    let bad = request::reject(&mut conn, db.tenant(), waiting[1].id, Some("\n"), me, now).await;
    assert!(matches!(bad, Err(Error::Invalid(_))));

    // What waits goes with its claim.
    revoke(&mut conn, db.tenant(), claim.id, now).await.unwrap();
    assert!(rejected(ask(&db, &by, &requests[2]).await, Code::Rejected).contains("revoked"));
    assert_eq!(state(&db, claim.id).await.pending, 0);
}

#[tokio::test]
async fn bounds_are_told() {
    let db = TestDb::new().await;
    let tight = Provisioning {
        max_claims: 2,
        max_pending: 1,
        max_claim_requests: 2,
        claim_requests_per_minute: 3,
        max_claim_s: 60,
        max_claim_devices: 5,
        ..settings()
    };
    let mut conn = db.pool().acquire().await.unwrap();
    let now = from_ms(NOON);
    let new = NewClaim { expires_in_s: 60, ..new_claim() };
    for bad in [
        NewClaim { name: " ".into(), ..new.clone() },
        NewClaim { expires_in_s: 61, ..new.clone() },
        NewClaim { expires_in_s: 0, ..new.clone() },
        NewClaim { max_devices: 6, ..new.clone() },
        NewClaim { max_devices: 0, ..new.clone() },
    ] {
        let refused = create(&mut conn, db.tenant(), UserId::new(), &bad, &tight, now).await;
        assert!(matches!(refused, Err(Error::Invalid(_))), "{refused:?}");
    }
    let manual = NewClaim { approval: Approval::Manual, ..new.clone() };
    let (_, secret) = create(&mut conn, db.tenant(), UserId::new(), &manual, &tight, now).await.unwrap();
    let (_, second) = create(&mut conn, db.tenant(), UserId::new(), &new, &tight, now).await.unwrap();
    let third = create(&mut conn, db.tenant(), UserId::new(), &new, &tight, now).await;
    assert!(matches!(third, Err(Error::TooMany { what: "claims", most: 2 })));
    create(&mut conn, db.tenant(), UserId::new(), &new, &tight, now + TimeDelta::seconds(60)).await.unwrap();

    let by = of_secret(&mut conn, secret.expose(), now).await.unwrap().unwrap();
    let from = Origin { asker: "c".into(), address: "a".into() };
    let ask = async |by: &Claimant, id: &str, at| {
        request::answer(db.pool(), by, &asked(id, json!({})), &from, &tight, from_ms(at)).await.unwrap()
    };
    assert_eq!(ask(&by, "freezer-1", NOON).await, Answer::Pending { is_new: true });
    assert!(rejected(ask(&by, "freezer-2", NOON).await, Code::Full).contains("wait for approval"));
    assert_eq!(ask(&by, "freezer-1", NOON).await, Answer::Pending { is_new: false });
    rejected(ask(&by, "freezer-1", NOON).await, Code::RateLimited);
    assert_eq!(ask(&by, "freezer-1", NOON + 60_000).await, Answer::Pending { is_new: false }, "a minute later");
    let by = of_secret(&mut conn, second.expose(), now).await.unwrap().unwrap();
    for id in ["freezer-5", "freezer-6"] {
        assert_eq!(ask(&by, id, NOON).await, accepted(id, true));
    }
    assert!(rejected(ask(&by, "freezer-7", NOON).await, Code::Full).contains("came by this claim"));
}

#[tokio::test]
async fn of_two_who_want_one_id_one_gets_it() {
    let db = TestDb::new().await;
    let (_, _, one) = made(&db, &new_claim()).await;
    let (_, _, other) = made(&db, &new_claim()).await;
    let mine = asked("freezer-1", json!({}));
    let theirs = asked("freezer-1", json!({ "token_sha256": hex::encode(Sha256::digest("theirs")) }));
    let (first, second, third) = tokio::join!(ask(&db, &one, &mine), ask(&db, &other, &theirs), ask(&db, &one, &mine));
    let outcomes = [&first, &second, &third].map(Answer::outcome);
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == "accepted").count(), 1, "{outcomes:?}");
    assert!(outcomes.contains(&"exists"), "{outcomes:?}");
    assert_eq!(devices(&db).await, 1);
}

#[test]
fn what_is_no_request_is_refused_with_a_word() {
    let hash = "0".repeat(64);
    let refused = |body: &str| Request::decode(body.as_bytes()).expect_err(body);
    let with = |field: &str| format!(r#"{{"id":"a","nonce":"{NONCE}","token_sha256":"{hash}"{field}}}"#);
    Request::decode(with("").as_bytes()).unwrap();
    for (body, said) in [
        ("", "JSON object"),
        ("[]", "JSON object"),
        ("{", "EOF"),
        ("{}", "missing field"),
        (&with(r#","x":1"#), "unknown field"),
        (&with(r#","id":"b""#), "duplicate field"),
        (&with(r#","public_key":"x""#), "either token_sha256 or public_key"),
        (&with("").replace("\"a\"", "\"_a\""), "id:"),
        (&with("").replace(NONCE, "short"), "nonce:"),
        (&with("").replace(NONCE, &"x".repeat(65)), "nonce:"),
        (&with("").replace(NONCE, "0123456789abcde\\n"), "nonce:"),
        (&with("").replace(&hash, "00"), "token_sha256:"),
        (&with("").replace(&hash, &"+0".repeat(32)), "token_sha256:"),
        (&with("").replace(&hash, &"é".repeat(32)), "token_sha256:"),
        (&with(r#","type":"x y""#), "type:"),
        (&with(r#","labels":{"":"x"}"#), "labels:"),
        (&with(&format!(r#","serial":"{}""#, "x".repeat(129))), "serial:"),
        (&with("").replace("token_sha256", "public_key"), "public_key:"),
        (&with("").replace("token_sha256", "public_key").replace(&hash, &"A".repeat(43)), "at random"),
        (&with(&format!(r#","serial":"{}""#, "x".repeat(request::MAX_BYTES))), "bytes"),
    ] {
        let rejection = refused(body);
        assert_eq!(rejection.code, Code::Malformed);
        assert!(rejection.message.contains(said), "{body:.100}: {}", rejection.message);
    }
}

/// By trying all ways of cutting the id.
fn naive_matches(pattern: &[u8], id: &[u8]) -> bool {
    match pattern {
        [] => id.is_empty(),
        [b'*', rest @ ..] => (0..=id.len()).any(|cut| naive_matches(rest, &id[cut..])),
        [letter, rest @ ..] => id.first() == Some(letter) && naive_matches(rest, &id[1..]),
    }
}

proptest! {
    #[test]
    fn a_pattern_matches_as_it_reads(pattern in "[ab*]{1,8}", id in "[ab]{0,10}") {
        let pattern: IdPattern = pattern.parse().unwrap();
        let text = pattern.to_string();
        prop_assert_eq!(pattern.matches(&id), naive_matches(text.as_bytes(), id.as_bytes()), "{} {}", pattern, id);
    }

    #[test]
    fn nothing_that_is_sent_panics(payload in "\\PC{0,80}|\\{\"(id|nonce|public_key|labels)\":(\"\\PC{0,9}\"|\\{\\})\\}") {
        let _ = Request::decode(payload.as_bytes());
    }
}

#[test]
fn what_is_no_pattern_is_refused() {
    for bad in ["", "_*", "a/*", "a b", &"x".repeat(65)] {
        assert!(bad.parse::<IdPattern>().is_err(), "{bad}");
    }
    for good in ["*", "freezer-*", "*-a*", "freezer-1", "**"] {
        assert!(good.parse::<IdPattern>().is_ok(), "{good}");
    }
}
