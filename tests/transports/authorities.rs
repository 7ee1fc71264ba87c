//! Authorities of tenants vouch for devices: without a restart, within their tenant, until they are disabled or take back.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::{Secure, reading};
use crate::harness::Fleet;
use crate::harness::packet::Connect;
use crate::harness::pki::{Authority, Identity};
use crate::harness::raw::Version::V5;

/// Registers somebody's authority.
async fn register(fleet: &Fleet, authority: &Authority, name: &str) -> Value {
    let (status, nonce) = fleet.call(Method::POST, "/api/v1/authorities/nonce", None).await;
    assert_eq!(status, StatusCode::OK, "{nonce}");
    let proof = authority.client(nonce["nonce"].as_str().expect("a text")).certificate;
    let certificate = &authority.certificate;
    let new = json!({ "name": name, "kind": "registered", "certificate_pem": certificate, "proof_pem": proof });
    fleet.make("/api/v1/authorities", new).await
}

fn path(authority: &Value) -> String {
    format!("/api/v1/authorities/{}", authority["id"].as_str().expect("an id"))
}

async fn patch(fleet: &Fleet, authority: &Value, change: Value) {
    let (status, answer) = fleet.call(Method::PATCH, &path(authority), Some(change)).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
}

/// Another tenant, with a device of each of these names.
async fn other_tenant(fleet: &Fleet, devices: &[&str]) {
    sqlx::query("insert into tenant (id, created_at) values ('acme', now())").execute(fleet.db()).await.expect("a row");
    for id in devices {
        let device = "insert into device (tenant_key, id, created_at, updated_at)
                      select key, $1, now(), now() from tenant where id = 'acme'";
        sqlx::query(device).bind(id).execute(fleet.db()).await.expect("a row");
    }
}

/// Gives an authority to the other tenant.
async fn hand_over(fleet: &Fleet, authority: &Value) {
    let given =
        sqlx::query("update authority set tenant_key = (select key from tenant where id = 'acme') where name = $1")
            .bind(authority["name"].as_str())
            .execute(fleet.db())
            .await
            .expect("a row");
    assert_eq!(given.rows_affected(), 1);
}

#[tokio::test]
async fn a_registered_authority_vouches_at_once_until_it_is_disabled() {
    let secure = Secure::start().await;
    let device = secure.fleet.enrol("boiler-1").await;
    let theirs = Authority::new("theirs");
    let (by_name, bare) = (theirs.client("main/boiler-1"), theirs.client("boiler-1"));
    assert_eq!(secure.shows(&by_name, V5).await, 0x87, "nobody knows the authority");
    let registered = register(&secure.fleet, &theirs, "theirs").await;
    for (value, identity) in [(1, &by_name), (2, &bare)] {
        let (mut client, code) = secure.hello(Some(identity), &Connect::new(V5, "a", None)).await;
        assert_eq!(code, 0);
        assert_eq!(client.publish(reading(&device, value)).await, 0);
    }
    for nobody in [
        theirs.client("main/boiler-2"),
        theirs.client("acme/boiler-1"),
        theirs.server(),
        theirs.client_between("main/boiler-1", -10, -1),
        Authority::new("theirs").client("main/boiler-1"),
    ] {
        assert_eq!(secure.shows(&nobody, V5).await, 0x87, "{nobody:?}");
    }
    let open = secure.hello(Some(&by_name), &Connect::new(V5, "b", None)).await.0;
    patch(&secure.fleet, &registered, json!({ "disabled": true })).await;
    open.ends_with(0x98, "its authority was disabled").await;
    assert_eq!(secure.shows(&by_name, V5).await, 0x87);
    patch(&secure.fleet, &registered, json!({ "disabled": false })).await;
    let open = secure.hello(Some(&by_name), &Connect::new(V5, "b", None)).await;
    assert_eq!(open.1, 0);
    patch(&secure.fleet, &registered, json!({ "disabled": true })).await;
    open.0.ends_with(0x98, "again").await;
    assert_eq!(secure.fleet.call(Method::DELETE, &path(&registered), None).await.0, StatusCode::NO_CONTENT);
    assert_eq!(secure.shows(&by_name, V5).await, 0x87);
}

#[tokio::test]
async fn a_chain_may_have_an_authority_between() {
    let secure = Secure::start().await;
    secure.fleet.enrol("boiler-1").await;
    let root = Authority::new("root");
    let (line, elsewhere) = (root.intermediate("line 3"), Authority::new("elsewhere").intermediate("line 3"));
    register(&secure.fleet, &root, "root").await;
    for (between, expected) in [(&line, 0), (&elsewhere, 0x87)] {
        let own = between.client("main/boiler-1");
        let chain = Identity { certificate: format!("{}{}", own.certificate, between.certificate), ..own.clone() };
        assert_eq!(secure.shows(&chain, V5).await, expected);
        assert_eq!(secure.shows(&own, V5).await, 0x87, "alone it leads nowhere");
    }
}

#[tokio::test]
async fn what_is_on_an_uploaded_list_is_refused_and_sent_away() {
    let secure = Secure::start().await;
    let (boiler, _) = (secure.fleet.enrol("boiler-1").await, secure.fleet.enrol("pump-1").await);
    let theirs = Authority::new("theirs");
    let registered = register(&secure.fleet, &theirs, "theirs").await;
    let (taken_back, good) = (theirs.client("main/boiler-1"), theirs.client("main/pump-1"));
    let open = secure.hello(Some(&taken_back), &Connect::new(V5, "a", None)).await.0;
    let mut other = secure.hello(Some(&good), &Connect::new(V5, "b", None)).await.0;
    // One that is registered by itself falls under the list as well.
    let pinned = format!("/api/v1/devices/{}/credentials", boiler.id);
    let own = theirs.client("a name of its own");
    secure.fleet.make(&pinned, json!({ "certificate": own.certificate })).await;
    let pinned = secure.hello(Some(&own), &Connect::new(V5, "c", None)).await;
    assert_eq!(pinned.1, 0);
    let upload = async |list: String| {
        let crl = format!("{}/crl", path(&registered));
        let (status, answer) = secure.fleet.call(Method::PUT, &crl, Some(json!({ "crl_pem": list }))).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
    };
    upload(theirs.takes_back(&taken_back)).await;
    open.ends_with(0x98, "its authority took it back").await;
    other.is_quiet("it is not on the list").await;
    assert_eq!(secure.shows(&taken_back, V5).await, 0x87);
    assert_eq!(secure.shows(&good, V5).await, 0);
    upload(theirs.takes_back(&own)).await;
    pinned.0.ends_with(0x98, "its authority took it back").await;
    assert_eq!(secure.shows(&own, V5).await, 0x87);
    assert_eq!(secure.shows(&taken_back, V5).await, 0, "it is on the list no more");
}

#[tokio::test]
async fn an_authority_of_one_tenant_says_nothing_in_another() {
    let secure = Secure::start().await;
    let fleet = &secure.fleet;
    let device = fleet.enrol("boiler-1").await;
    other_tenant(fleet, &["boiler-1", "pump-1"]).await;
    let theirs = Authority::new("theirs");
    let registered = register(fleet, &theirs, "theirs").await;
    hand_over(fleet, &registered).await;
    assert_eq!(secure.shows(&theirs.client("main/boiler-1"), V5).await, 0x87, "whatever it says of itself");
    for name in ["acme/boiler-1", "boiler-1"] {
        let (mut client, code) = secure.hello(Some(&theirs.client(name)), &Connect::new(V5, "a", None)).await;
        assert_eq!(code, 0, "{name}");
        let into_main = client.publish(reading(&device, 1)).await;
        assert_eq!(into_main, 0x87, "{name} is a device of acme");
    }
    // Its owner has the word over somebody elsewhere who registered the certificate of its device first.
    let of_pump = theirs.client("acme/pump-1");
    fleet.make("/api/v1/devices/boiler-1/credentials", json!({ "certificate": of_pump.certificate })).await;
    let (mut client, code) = secure.hello(Some(&of_pump), &Connect::new(V5, "a", None)).await;
    assert_eq!((code, client.publish(reading(&device, 1)).await), (0, 0x87));
    // With an authority in both a name without a tenant is nobody's.
    register(fleet, &theirs, "here as well").await;
    assert_eq!(secure.shows(&theirs.client("boiler-1"), V5).await, 0x87);
    for name in ["main/boiler-1", "acme/boiler-1"] {
        assert_eq!(secure.shows(&theirs.client(name), V5).await, 0, "{name}");
    }
}

#[tokio::test]
async fn a_signed_certificate_ends_with_its_authority_and_with_its_device() {
    let secure = Secure::start().await;
    let fleet = &secure.fleet;
    let (boiler, pump) = (fleet.enrol("boiler-1").await, fleet.enrol("pump-1").await);
    let authority = super::renewal::authority(fleet).await;
    let (of_boiler, _) = super::renewal::sign(fleet, &boiler, None).await;
    let (of_pump, _) = super::renewal::sign(fleet, &pump, None).await;
    let by_boiler = secure.hello(Some(&of_boiler), &Connect::new(V5, "", None)).await.0;
    let by_pump = secure.hello(Some(&of_pump), &Connect::new(V5, "", None)).await.0;
    assert_eq!(fleet.call(Method::DELETE, "/api/v1/devices/pump-1", None).await.0, StatusCode::NO_CONTENT);
    by_pump.ends_with(0x98, "the device was deleted").await;
    fleet.enrol("pump-1").await;
    assert_eq!(secure.shows(&of_pump, V5).await, 0x87, "it is of no use to another device of that name");
    patch(fleet, &authority, json!({ "disabled": true })).await;
    by_boiler.ends_with(0x98, "its authority was disabled").await;
    assert_eq!(secure.shows(&of_boiler, V5).await, 0x87);
}
