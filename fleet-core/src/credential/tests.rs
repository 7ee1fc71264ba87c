//! What credentials promise.

use super::*;
use crate::clock::from_ms;
use crate::device::{self, NewDevice, Patch};
use crate::testing::TestDb;

const NOON: i64 = 1_763_722_800_000;

fn boiler() -> DeviceId {
    "boiler-1".parse().unwrap()
}

async fn enrolled(db: &TestDb) -> Issued {
    let mut tx = db.pool().begin().await.unwrap();
    let (_, issued) = device::enrol(&mut tx, db.tenant(), &NewDevice::named(boiler()), from_ms(NOON)).await.unwrap();
    tx.commit().await.unwrap();
    issued
}

async fn opens(db: &TestDb, issued: &Issued, at_ms: i64) -> bool {
    let mut conn = db.pool().acquire().await.unwrap();
    let secret = issued.password.expose().as_bytes();
    verify(&mut conn, &issued.username, secret, from_ms(at_ms)).await.unwrap().is_some()
}

async fn rotated(db: &TestDb, overlap_s: u64, at_ms: i64) -> Issued {
    let mut tx = db.pool().begin().await.unwrap();
    let issued = rotate(&mut tx, db.tenant(), &boiler(), overlap_s, from_ms(at_ms)).await.unwrap();
    tx.commit().await.unwrap();
    issued
}

#[tokio::test]
async fn a_secret_opens_the_door_for_its_device_alone() {
    let db = TestDb::new().await;
    let issued = enrolled(&db).await;
    assert_eq!(issued.username, "main/boiler-1");
    assert_eq!(URL_SAFE_NO_PAD.decode(issued.password.expose()).unwrap().len(), 32);
    let mut conn = db.pool().acquire().await.unwrap();
    let secret = issued.password.expose().as_bytes().to_vec();
    let now = from_ms(NOON);
    let found = verify(&mut conn, "main/boiler-1", &secret, now).await.unwrap().expect("the right secret");
    assert!(matches!(found.who, Who::Device { id, .. } if id == boiler()));
    for username in ["main/boiler-2", "other/boiler-1", "boiler-1", "main/", "/", "", "main/a/b", "main/\0"] {
        assert_eq!(verify(&mut conn, username, &secret, now).await.unwrap(), None, "{username:?}");
    }
    for wrong in [&b""[..], b"x", &secret[1..], &[secret.as_slice(), b"x"].concat(), b"\0"] {
        assert_eq!(verify(&mut conn, "main/boiler-1", wrong, now).await.unwrap(), None);
    }
    assert!(!format!("{issued:?}").contains(issued.password.expose()));
}

#[tokio::test]
async fn many_are_told_apart_by_one_statement() {
    let db = TestDb::new().await;
    let boiler = enrolled(&db).await;
    let mut conn = db.pool().acquire().await.unwrap();
    let pump = NewDevice::named("pump-1".parse().unwrap());
    let (_, pump) = device::enrol(&mut conn, db.tenant(), &pump, from_ms(NOON)).await.unwrap();
    let offer = |issued: &Issued, secret: &Issued| (issued.username.clone(), secret.password.expose().to_owned());
    let mut asked = vec![
        offer(&boiler, &boiler),
        ("main/nobody".into(), boiler.password.expose().to_owned()),
        offer(&pump, &boiler),
        ("main/\0".into(), String::new()),
        offer(&pump, &pump),
        offer(&boiler, &boiler),
        offer(&boiler, &pump),
    ];
    let verified = async |conn: &mut PgConnection, asked: &[(String, String)]| -> Vec<Option<String>> {
        let offers: Vec<_> =
            asked.iter().map(|(username, secret)| Offer { username, secret: secret.as_bytes() }).collect();
        let found = verify_many(conn, &offers, from_ms(NOON)).await.unwrap();
        let id = |principal: Principal| match principal.who {
            Who::Device { id, .. } => id.to_string(),
            Who::User { .. } | Who::Claim { .. } => panic!("no device"),
        };
        found.into_iter().map(|found| found.map(id)).collect()
    };
    let found = verified(&mut conn, &asked).await;
    let some = |id: &str| Some(id.to_owned());
    assert_eq!(found, [some("boiler-1"), None, None, None, some("pump-1"), some("boiler-1"), None]);
    asked.retain(|(username, _)| username.contains('\0'));
    assert_eq!(verified(&mut conn, &asked).await, [None], "not a word to the database");
    assert!(verified(&mut conn, &[]).await.is_empty());
}

#[tokio::test]
async fn a_disabled_device_stays_outside() {
    let db = TestDb::new().await;
    let issued = enrolled(&db).await;
    for disabled in [true, false] {
        let patch = Patch { disabled: Some(disabled), ..Patch::default() };
        let mut tx = db.pool().begin().await.unwrap();
        device::update(&mut tx, db.tenant(), &boiler(), &patch, &[], from_ms(NOON)).await.unwrap();
        tx.commit().await.unwrap();
        assert_eq!(opens(&db, &issued, NOON).await, !disabled);
    }
}

#[tokio::test]
async fn a_rotation_overlaps_as_long_as_asked() {
    let db = TestDb::new().await;
    let first = enrolled(&db).await;
    let second = rotated(&db, 60, NOON).await;
    assert!(opens(&db, &first, NOON + 59_999).await);
    assert!(!opens(&db, &first, NOON + 60_000).await);
    assert!(opens(&db, &second, NOON + 60_000).await);
    // Two are valid: the older one goes at once, the newer one overlaps.
    let third = rotated(&db, 60, NOON + 1000).await;
    assert!(!opens(&db, &first, NOON + 1000).await);
    assert!(opens(&db, &second, NOON + 1000).await);
    assert!(opens(&db, &third, NOON + 1000).await);
    // Without an overlap, only the new one is left.
    let fourth = rotated(&db, 0, NOON + 2000).await;
    assert!(!opens(&db, &second, NOON + 2000).await);
    assert!(!opens(&db, &third, NOON + 2000).await);
    assert!(opens(&db, &fourth, NOON + 2000).await);
    let mut conn = db.pool().acquire().await.unwrap();
    let endless = rotate(&mut conn, db.tenant(), &boiler(), MAX_OVERLAP_S + 1, from_ms(NOON)).await;
    assert!(matches!(endless, Err(Error::Invalid(_))), "{endless:?}");
}

#[tokio::test]
async fn of_many_who_ask_for_the_second_one_gets_it() {
    let db = TestDb::new().await;
    enrolled(&db).await;
    let ask = || async {
        let mut tx = db.pool().begin().await.unwrap();
        let issued = issue(&mut tx, db.tenant(), &boiler(), from_ms(NOON)).await;
        tx.commit().await.unwrap();
        issued
    };
    let (a, b, c, d) = tokio::join!(ask(), ask(), ask(), ask());
    let issued = [a, b, c, d];
    assert_eq!(issued.iter().filter(|one| one.is_ok()).count(), 1, "{issued:?}");
    assert!(issued.iter().filter_map(|one| one.as_ref().err()).all(|e| matches!(e, Error::TooManyCredentials(_))));
}

#[tokio::test]
async fn a_revoked_credential_is_dead_at_once_and_makes_room() {
    let db = TestDb::new().await;
    let issued = enrolled(&db).await;
    let mut conn = db.pool().acquire().await.unwrap();
    issue(&mut conn, db.tenant(), &boiler(), from_ms(NOON)).await.unwrap();
    revoke(&mut conn, db.tenant(), &boiler(), issued.id, Reason::default(), from_ms(NOON + 1)).await.unwrap();
    assert!(!opens(&db, &issued, NOON).await);
    revoke(&mut conn, db.tenant(), &boiler(), issued.id, Reason::default(), from_ms(NOON + 9)).await.unwrap();
    let listed = list(&mut conn, db.tenant(), &boiler()).await.unwrap();
    let revoked = listed.iter().find(|one| one.id == issued.id).unwrap();
    assert_eq!(revoked.revoked_at, Some(from_ms(NOON + 1)), "the first time counts");
    issue(&mut conn, db.tenant(), &boiler(), from_ms(NOON + 2)).await.unwrap();
    let unknown =
        revoke(&mut conn, db.tenant(), &boiler(), CredentialId::new(), Reason::default(), from_ms(NOON)).await;
    assert!(matches!(unknown, Err(Error::NoSuchCredential(_))));
    let other = list(&mut conn, db.tenant(), &"other".parse().unwrap()).await;
    assert!(matches!(other, Err(Error::NoSuchDevice(_))));
}

#[tokio::test]
async fn a_device_that_rotates_for_years_stays_small() {
    let db = TestDb::new().await;
    enrolled(&db).await;
    for n in 0..MAX_ENDED + 5 {
        rotated(&db, 0, NOON + i64::try_from(n).unwrap()).await;
    }
    let mut conn = db.pool().acquire().await.unwrap();
    let listed = list(&mut conn, db.tenant(), &boiler()).await.unwrap();
    // The one that ended last was still valid when the old ones were forgotten.
    assert!(listed.len() <= MAX_ENDED + MAX_VALID, "{}", listed.len());
    assert!(listed.is_sorted_by_key(|one| std::cmp::Reverse(one.created_at)));
    assert!(listed[0].is_valid(from_ms(NOON + 1000)));
}

/// A certificate of its own key, valid from long before noon to long after.
fn certificate(name: &str) -> Certificate {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    Certificate::from_der(params.self_signed(&key).unwrap().der()).unwrap()
}

async fn who(db: &TestDb, shown: &Certificate, is_vouched_for: bool, at: DateTime<Utc>) -> Option<String> {
    let mut conn = db.pool().acquire().await.unwrap();
    let found = match registration(&mut conn, shown, TimeDelta::zero(), at).await.unwrap() {
        Some(registered) => registered.holder?,
        None if is_vouched_for => of_name(&mut conn, shown).await.unwrap()?,
        None => return None,
    };
    let Who::Device { id, .. } = found.who else { panic!("a user") };
    Some(format!("{}/{id}", found.tenant_id))
}

#[tokio::test]
async fn a_registered_certificate_opens_the_door_until_it_is_revoked_or_ends() {
    let db = TestDb::new().await;
    enrolled(&db).await;
    let (mine, now) = (certificate("main/pump-1"), from_ms(NOON));
    assert_eq!(who(&db, &mine, false, now).await, None);
    let mut conn = db.pool().acquire().await.unwrap();
    let registered = register(&mut conn, db.tenant(), &boiler(), &mine, now).await.unwrap();
    let found = || who(&db, &mine, false, now);
    assert_eq!(found().await.as_deref(), Some("main/boiler-1"));
    assert_eq!(who(&db, &mine, false, mine.not_after).await, None);
    let listed = list(&mut conn, db.tenant(), &boiler()).await.unwrap();
    let used = Registered { first_used_at: Some(now), ..registered.certificate.clone().unwrap() };
    let used = Credential { certificate: Some(used), ..registered.clone() };
    assert_eq!(listed.iter().find(|one| one.certificate.is_some()), Some(&used));
    // Its registration counts, whatever an authority says of its name.
    let pump = NewDevice::named("pump-1".parse().unwrap());
    device::enrol(&mut conn, db.tenant(), &pump, now).await.unwrap();
    assert_eq!(who(&db, &mine, true, now).await.as_deref(), Some("main/boiler-1"));
    revoke(&mut conn, db.tenant(), &boiler(), registered.id, Reason::default(), now).await.unwrap();
    assert_eq!(found().await, None);
    assert_eq!(who(&db, &mine, true, now).await, None, "a revoked one stays refused");
    register(&mut conn, db.tenant(), &pump.id, &mine, now).await.unwrap();
    assert_eq!(found().await.as_deref(), Some("main/pump-1"), "until it is registered anew");
}

#[tokio::test]
async fn a_certificate_that_an_authority_vouches_for_opens_the_door_for_its_device() {
    let db = TestDb::new().await;
    enrolled(&db).await;
    let now = from_ms(NOON);
    let mine = certificate("main/boiler-1");
    assert_eq!(who(&db, &mine, true, now).await.as_deref(), Some("main/boiler-1"));
    assert_eq!(who(&db, &mine, false, now).await, None, "else anybody could make one");
    for nobody in ["main/pump-1", "other/boiler-1", "no device", "main/"] {
        assert_eq!(who(&db, &certificate(nobody), true, now).await, None, "{nobody}");
    }
    let mut conn = db.pool().acquire().await.unwrap();
    let found = of_name(&mut conn, &mine).await.unwrap().unwrap();
    assert_eq!(found.proof, Proof { valid_until: Some(mine.not_after), ..Proof::default() });
    let patch = Patch { disabled: Some(true), ..Patch::default() };
    device::update(&mut conn, db.tenant(), &boiler(), &patch, &[], now).await.unwrap();
    assert_eq!(who(&db, &mine, true, now).await, None, "disabled");
}

#[tokio::test]
async fn certificates_are_counted_apart_from_tokens_and_belong_to_one_device() {
    let db = TestDb::new().await;
    let token = enrolled(&db).await;
    let now = from_ms(NOON);
    let (one, two, three) = (certificate("1"), certificate("2"), certificate("3"));
    let mut conn = db.pool().acquire().await.unwrap();
    let first = register(&mut conn, db.tenant(), &boiler(), &one, now).await.unwrap();
    let twice = register(&mut conn, db.tenant(), &boiler(), &one, now).await;
    assert!(matches!(twice, Err(Error::CertificateTaken)), "{twice:?}");
    register(&mut conn, db.tenant(), &boiler(), &two, now).await.unwrap();
    let many = register(&mut conn, db.tenant(), &boiler(), &three, now).await;
    assert!(matches!(many, Err(Error::TooManyCredentials(_))), "{many:?}");
    issue(&mut conn, db.tenant(), &boiler(), now).await.expect("tokens have numbers of their own");
    rotated(&db, 0, NOON).await;
    assert!(!opens(&db, &token, NOON).await);
    assert!(who(&db, &one, false, now).await.is_some(), "a rotation is about tokens");
    revoke(&mut conn, db.tenant(), &boiler(), first.id, Reason::default(), now).await.unwrap();
    register(&mut conn, db.tenant(), &boiler(), &three, now).await.unwrap();
    let late = register(&mut conn, db.tenant(), &boiler(), &certificate("4"), one.not_after).await;
    assert!(matches!(late, Err(Error::Invalid(_))), "{late:?}");
    let nobody = register(&mut conn, db.tenant(), &"nobody".parse().unwrap(), &certificate("5"), now).await;
    assert!(matches!(nobody, Err(Error::NoSuchDevice(_))), "{nobody:?}");
}

#[tokio::test]
async fn a_revoked_certificate_is_not_forgotten_before_its_end() {
    let db = TestDb::new().await;
    enrolled(&db).await;
    let (mine, now) = (certificate("main/boiler-1"), from_ms(NOON));
    let mut conn = db.pool().acquire().await.unwrap();
    let registered = register(&mut conn, db.tenant(), &boiler(), &mine, now).await.unwrap();
    revoke(&mut conn, db.tenant(), &boiler(), registered.id, Reason::default(), now).await.unwrap();
    for n in 0..MAX_ENDED + 5 {
        rotated(&db, 0, NOON + 1000 + i64::try_from(n).unwrap()).await;
    }
    assert_eq!(who(&db, &mine, true, now).await, None);
}

#[tokio::test]
async fn what_is_known_of_a_certificate_is_no_password() {
    let db = TestDb::new().await;
    enrolled(&db).await;
    let mine = certificate("whatever");
    let mut conn = db.pool().acquire().await.unwrap();
    register(&mut conn, db.tenant(), &boiler(), &mine, from_ms(NOON)).await.unwrap();
    for known in [mine.fingerprint.as_bytes(), mine.fingerprint.to_string().as_bytes()] {
        assert_eq!(verify(&mut conn, "main/boiler-1", known, from_ms(NOON)).await.unwrap(), None);
    }
}

#[tokio::test]
async fn a_device_counts_as_expiring_by_its_last_certificate() {
    let db = TestDb::new().await;
    enrolled(&db).await;
    let now = from_ms(NOON);
    let mut conn = db.pool().acquire().await.unwrap();
    let ends_in = |days| Certificate { not_after: now + TimeDelta::days(days), ..certificate("x") };
    let counted = async |conn: &mut PgConnection, at| {
        let Expiring { day, week, month } = expiring(conn, at).await.unwrap();
        (day, week, month)
    };
    assert_eq!(counted(&mut conn, now).await, (0, 0, 0), "a token does not expire");
    register(&mut conn, db.tenant(), &boiler(), &ends_in(5), now).await.unwrap();
    assert_eq!(counted(&mut conn, now).await, (0, 1, 1));
    assert_eq!(counted(&mut conn, now + TimeDelta::days(4)).await, (1, 1, 1));
    assert_eq!(counted(&mut conn, now + TimeDelta::days(5)).await, (0, 0, 0), "it has ended");
    let later = register(&mut conn, db.tenant(), &boiler(), &ends_in(60), now).await.unwrap();
    assert_eq!(counted(&mut conn, now).await, (0, 0, 0), "there is a newer one");
    assert_eq!(counted(&mut conn, now + TimeDelta::days(30)).await, (0, 0, 1));
    revoke(&mut conn, db.tenant(), &boiler(), later.id, Reason::default(), now).await.unwrap();
    assert_eq!(counted(&mut conn, now).await, (0, 1, 1));
}
