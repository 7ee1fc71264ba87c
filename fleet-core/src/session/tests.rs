use std::time::Instant;

use proptest::prelude::*;

use super::*;
use crate::clock::Clock;
use crate::gateway::Children;
use crate::policy::{Permission, Role};
use crate::telemetry::fixture::{NOW, enrol};
use crate::testing::TestDb;
use crate::{retained, user};

/// A database and a device in it.
struct Fleet {
    db: TestDb,
    conn: PgConnection,
    owner: Principal,
}

impl Fleet {
    async fn new() -> Self {
        let db = TestDb::new().await;
        let mut conn = connect(&db.options()).await.unwrap();
        let owner = device(&mut conn, db.tenant(), "boiler-1").await;
        Self { db, conn, owner }
    }

    /// A session of the device, begun.
    async fn session(&mut self, name: &str) -> SessionId {
        let new = new_session(&self.owner, name);
        begin(&mut self.conn, std::slice::from_ref(&new)).await.unwrap();
        new.id
    }

    async fn loaded(&mut self) -> Vec<Stored> {
        load(&mut self.conn, Clock::system().now()).await.unwrap()
    }

    /// Its client has gone, having been sent everything up to this place.
    async fn left(&mut self, id: SessionId, sent_to: i64) {
        let left = Leave { id, expires_ms: None, expiry_s: NEVER, sent_to, keep_will: false, now_ms: NOW };
        leave(&mut self.conn, &[left]).await.unwrap();
    }

    /// What waits for the session, read page by page.
    async fn queue(&mut self, session: SessionId) -> Vec<Queued> {
        page(&mut self.conn, &[(session, 0)], 10_000, i64::MAX).await.unwrap()
    }

    async fn offsets(&mut self, session: SessionId) -> Vec<i64> {
        self.queue(session).await.iter().map(|queued| queued.offset).collect()
    }

    /// Puts messages with these payloads in the queue, from offset 1.
    async fn fill(&mut self, session: SessionId, payloads: &[&str]) {
        let messages: Vec<_> = payloads.iter().map(|payload| message("a", payload)).collect();
        let rows: Vec<_> = (0..messages.len()).map(|nth| row(session, nth)).collect();
        enqueue(&mut self.conn, &messages, &rows).await.unwrap();
    }

    async fn rows_of_all_tables(&mut self) -> i64 {
        sqlx::query_scalar!(
            r#"
            select (select count(*) from session) + (select count(*) from session_subscription)
                   + (select count(*) from session_message) + (select count(*) from session_received) as "count!"
            "#
        )
        .fetch_one(&mut self.conn)
        .await
        .unwrap()
    }
}

async fn device(conn: &mut PgConnection, tenant: TenantKey, id: &str) -> Principal {
    let key = enrol(conn, tenant, id).await;
    let who = Who::Device { key, id: id.parse().unwrap(), children: Children::default() };
    Principal { tenant, tenant_id: "main".parse().unwrap(), who, proof: Proof::default() }
}

fn new_session(owner: &Principal, name: &str) -> NewSession {
    NewSession {
        id: SessionId::new(),
        name: name.to_owned(),
        owner: owner.clone(),
        client_id: format!("client-{name}"),
        expiry_s: 3_600,
        will: None,
        now_ms: NOW,
    }
}

fn message(topic: &str, payload: &str) -> Message {
    Message {
        topic: topic.to_owned(),
        payload: payload.to_owned().into(),
        qos: 1,
        retain: false,
        properties: None,
        accepted_ms: NOW,
        expires_ms: None,
    }
}

/// The message of that index at the offset after it, as it is.
fn row(session: SessionId, nth: usize) -> Enqueue {
    let offset = i64::try_from(nth).unwrap() + 1;
    Enqueue { session, offset, message: nth, qos: 1, retain: false, subscription_ids: Vec::new() }
}

fn rich() -> Properties {
    Properties {
        payload_is_utf8: Some(true),
        content_type: Some("text/plain; ünïcode 🦀 \u{1}\"\\".to_owned()),
        response_topic: Some("app/main/answers".to_owned()),
        correlation_data: Some((0..=255).collect()),
        user_properties: [("b", "1"), ("a", "2"), ("b", "1"), ("", "")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into(),
    }
}

fn will() -> Will {
    let payload = bytes::Bytes::from_static(&[0, 255, b'x']);
    let message =
        Message { payload, retain: true, properties: Some(rich()), expires_ms: Some(NOW + 9), ..message("w", "") };
    Will { message, delay_s: u32::MAX }
}

fn subscription(filter: &str) -> Subscription {
    Subscription {
        filter: filter.to_owned(),
        qos: 2,
        no_local: true,
        retain_as_published: false,
        subscription_id: Some(268_435_455),
    }
}

#[tokio::test]
async fn a_session_is_loaded_as_it_began() {
    let mut fleet = Fleet::new().await;
    let user = admin(&mut fleet).await;
    let of_device = NewSession { will: Some(will()), ..new_session(&fleet.owner, "one") };
    let of_user = NewSession { expiry_s: NEVER, ..new_session(&user, "two") };
    begin(&mut fleet.conn, &[of_device.clone(), of_user.clone()]).await.unwrap();
    let expected = [of_device, of_user].map(|new| Stored {
        id: new.id,
        name: new.name,
        owner: new.owner,
        client_id: new.client_id,
        expiry_s: new.expiry_s,
        connected: true,
        expires_ms: None,
        will: new.will,
        subscriptions: Vec::new(),
        queued: 0,
        queued_bytes: 0,
        last_offset: 0,
        sent_to: 0,
        dropped: 0,
    });
    assert_eq!(fleet.loaded().await, expected);
    assert!(expected[1].owner.may(Permission::DevicesRead));
}

async fn admin(fleet: &mut Fleet) -> Principal {
    let conn = &mut fleet.conn;
    user::ensure_admin(conn, None, Some(&"correct horse".to_owned().into()), &Clock::system()).await.unwrap().unwrap();
    let id = sqlx::query_scalar!(r#"select id as "id: UserId" from app_user"#).fetch_one(&mut *conn).await.unwrap();
    Principal {
        who: Who::User { id, key: None, grants: Grants::of(Some(Role::Admin)), platform: true },
        ..fleet.owner.clone()
    }
}

#[tokio::test]
async fn a_session_comes_and_goes() {
    let mut fleet = Fleet::new().await;
    let id = fleet.session("one").await;
    let wills = |kept: bool| Resume { id, expiry_s: 60, will: kept.then(will), now_ms: NOW + 1 };
    let away = Leave { id, expires_ms: Some(NOW + 7), expiry_s: 5, sent_to: 42, keep_will: true, now_ms: NOW + 2 };

    resume(&mut fleet.conn, &[wills(false), wills(true)]).await.unwrap();
    leave(&mut fleet.conn, &[away]).await.unwrap();
    let stored = fleet.loaded().await.remove(0);
    assert_eq!((stored.connected, stored.expires_ms, stored.expiry_s), (false, Some(NOW + 7), 5));
    assert_eq!((stored.sent_to, stored.will), (42, Some(will())));

    resume(&mut fleet.conn, &[wills(true)]).await.unwrap();
    let stored = fleet.loaded().await.remove(0);
    assert_eq!((stored.connected, stored.expires_ms, stored.expiry_s), (true, None, 60));
    leave(&mut fleet.conn, &[Leave { keep_will: false, expires_ms: None, ..away }]).await.unwrap();
    let stored = fleet.loaded().await.remove(0);
    assert_eq!((stored.connected, stored.expires_ms, stored.will), (false, None, None));

    resume(&mut fleet.conn, &[wills(true)]).await.unwrap();
    clear_wills(&mut fleet.conn, &[id]).await.unwrap();
    assert_eq!(fleet.loaded().await[0].will, None);
}

#[tokio::test]
async fn a_subscription_is_kept_until_it_is_replaced_or_taken_back() {
    let mut fleet = Fleet::new().await;
    let (one, two) = (fleet.session("one").await, fleet.session("two").await);
    // Longer than an index takes, and not to be compressed.
    let long = [(); 200].map(|()| Uuid::new_v4().simple().to_string()).join("/");
    let long = format!("z{long}");
    let filters = ["$share/g/app/+/x", "app/#", &long];
    let wanted: Vec<_> = filters.iter().map(|filter| (one, subscription(filter))).collect();
    subscribe(&mut fleet.conn, &wanted).await.unwrap();
    let changed = Subscription {
        qos: 0,
        no_local: false,
        retain_as_published: true,
        subscription_id: None,
        ..subscription("app/#")
    };
    subscribe(&mut fleet.conn, &[(one, changed.clone()), (two, subscription("app/#"))]).await.unwrap();
    let stored = fleet.loaded().await;
    assert_eq!(stored[0].subscriptions, [subscription(filters[0]), changed.clone(), subscription(&long)]);
    assert_eq!(stored[1].subscriptions, [subscription("app/#")]);
    unsubscribe(&mut fleet.conn, &[(one, filters[0].to_owned()), (one, long), (two, "app".to_owned())]).await.unwrap();
    let stored = fleet.loaded().await;
    assert_eq!((&stored[0].subscriptions[..], stored[1].subscriptions.len()), (&[changed][..], 1));
}

#[tokio::test]
async fn a_message_waits_as_it_was_for_each_of_its_sessions() {
    let mut fleet = Fleet::new().await;
    let (one, two) = (fleet.session("one").await, fleet.session("two").await);
    let plain = message("ünï/code", "");
    let full = Message {
        payload: (0..=255).collect::<Vec<u8>>().into(),
        properties: Some(rich()),
        expires_ms: Some(NOW + 5),
        ..message("app/main/x", "")
    };
    let rows = [
        Enqueue { session: two, offset: 7, message: 1, qos: 2, retain: true, subscription_ids: vec![1, 268_435_455] },
        Enqueue { session: one, offset: 2, message: 1, qos: 1, retain: false, subscription_ids: vec![3] },
        Enqueue { session: one, offset: 1, message: 0, qos: 2, retain: false, subscription_ids: vec![] },
    ];
    enqueue(&mut fleet.conn, &[plain.clone(), full.clone()], &rows).await.unwrap();
    let wanted = |session, offset, message, subscription_ids: &[u32]| Queued {
        session,
        offset,
        released: false,
        message,
        subscription_ids: subscription_ids.to_vec(),
    };
    let of_one = [wanted(one, 1, Message { qos: 2, ..plain }, &[]), wanted(one, 2, full.clone(), &[3])];
    let of_two = wanted(two, 7, Message { qos: 2, retain: true, ..full }, &[1, 268_435_455]);
    assert_eq!(fleet.queue(one).await, of_one);
    assert_eq!(page(&mut fleet.conn, &[(two, 6), (one, 1)], 10, 0).await.unwrap(), [of_one[1].clone(), of_two.clone()]);
    let stored = fleet.loaded().await;
    assert_eq!((stored[0].last_offset, stored[1].last_offset), (2, 7));
    let bytes = |queue: &[Queued]| queue.iter().map(|queued| row_bytes(&queued.message).cast_signed()).sum::<i64>();
    assert_eq!((stored[0].queued, stored[0].queued_bytes), (2, bytes(&of_one)));
    assert_eq!((stored[1].queued, stored[1].queued_bytes), (1, bytes(&[of_two])));
}

#[tokio::test]
async fn a_batch_that_comes_again_changes_nothing() {
    let mut fleet = Fleet::new().await;
    let new = new_session(&fleet.owner, "one");
    let mut seen = Vec::new();
    for _ in 0..2 {
        begin(&mut fleet.conn, std::slice::from_ref(&new)).await.unwrap();
        for _ in 0..2 {
            subscribe(&mut fleet.conn, &[(new.id, subscription("a"))]).await.unwrap();
            fleet.fill(new.id, &["1", "2", "3"]).await;
            receive(&mut fleet.conn, &[(new.id, 9)]).await.unwrap();
            release(&mut fleet.conn, &[(new.id, 2)]).await.unwrap();
            complete(&mut fleet.conn, &[(new.id, 8)]).await.unwrap();
        }
        acknowledge(&mut fleet.conn, &[(new.id, 1), (new.id, 1)]).await.unwrap();
        seen.push((fleet.loaded().await, fleet.queue(new.id).await, fleet.rows_of_all_tables().await));
    }
    assert_eq!(seen[0], seen[1]);
    assert_eq!((seen[0].2, seen[0].0[0].last_offset), (5, 3));
}

#[tokio::test]
async fn a_later_session_of_the_same_name_takes_the_place_of_an_earlier_one() {
    let mut fleet = Fleet::new().await;
    let old = fleet.session("one").await;
    let other = fleet.session("two").await;
    for session in [old, other] {
        subscribe(&mut fleet.conn, &[(session, subscription("a"))]).await.unwrap();
        fleet.fill(session, &["1"]).await;
        receive(&mut fleet.conn, &[(session, 9)]).await.unwrap();
    }
    let [first, second] = [(); 2].map(|()| new_session(&fleet.owner, "one"));
    begin(&mut fleet.conn, &[first, second.clone()]).await.unwrap();
    let stored = fleet.loaded().await;
    assert_eq!(stored.iter().map(|stored| stored.id).collect::<Vec<_>>(), [other, second.id]);
    assert_eq!((stored[1].queued, stored[1].subscriptions.len(), stored[1].last_offset), (0, 0, 0));
    assert_eq!(fleet.rows_of_all_tables().await, 5);
    assert_eq!(received(&mut fleet.conn, &[old, other]).await.unwrap(), [(other, 9)]);
}

#[tokio::test]
async fn a_session_ends_with_all_that_hangs_on_it() {
    let mut fleet = Fleet::new().await;
    let (one, two) = (fleet.session("one").await, fleet.session("two").await);
    for session in [one, two] {
        subscribe(&mut fleet.conn, &[(session, subscription("a"))]).await.unwrap();
        fleet.fill(session, &["1", "2"]).await;
        receive(&mut fleet.conn, &[(session, 9)]).await.unwrap();
    }
    end(&mut fleet.conn, &[one]).await.unwrap();
    assert_eq!(fleet.rows_of_all_tables().await, 5);
    assert_eq!(fleet.loaded().await[0].id, two);
}

#[tokio::test]
async fn a_session_goes_with_its_owner_and_disturbs_nobody() {
    let mut fleet = Fleet::new().await;
    let gone = device(&mut fleet.conn, fleet.db.tenant(), "gone").await;
    let new = new_session(&gone, "gone");
    begin(&mut fleet.conn, std::slice::from_ref(&new)).await.unwrap();
    let (gone, left) = (new.id, fleet.session("left").await);
    fleet.fill(gone, &["1"]).await;
    receive(&mut fleet.conn, &[(gone, 9)]).await.unwrap();
    sqlx::query!("delete from device where id = 'gone'").execute(&mut fleet.conn).await.unwrap();
    assert_eq!(fleet.queue(gone).await, []);

    let conn = &mut fleet.conn;
    begin(conn, &[NewSession { id: SessionId::new(), ..new }]).await.unwrap();
    subscribe(conn, &[(gone, subscription("a")), (left, subscription("a"))]).await.unwrap();
    enqueue(conn, &[message("a", "")], &[gone, left].map(|session| Enqueue { offset: 2, ..row(session, 0) }))
        .await
        .unwrap();
    receive(conn, &[(gone, 10), (left, 10)]).await.unwrap();
    dropped(conn, &[(gone, 1), (left, 2), (left, 3)]).await.unwrap();
    resume(conn, &[Resume { id: gone, expiry_s: 0, will: None, now_ms: NOW }]).await.unwrap();
    release(conn, &[(gone, 2)]).await.unwrap();

    let stored = fleet.loaded().await;
    assert_eq!((stored.len(), stored[0].id, stored[0].dropped, stored[0].queued), (1, left, 5, 1));
    assert_eq!(received(&mut fleet.conn, &[gone, left]).await.unwrap(), [(left, 10)]);
    assert_eq!(fleet.rows_of_all_tables().await, 4);
}

#[tokio::test]
async fn what_a_session_left_that_went_with_its_owner_can_be_ended() {
    let mut fleet = Fleet::new().await;
    let id = fleet.session("one").await;
    fleet.fill(id, &["1"]).await;
    receive(&mut fleet.conn, &[(id, 9)]).await.unwrap();
    sqlx::query!("delete from device").execute(&mut fleet.conn).await.unwrap();
    assert_eq!(fleet.rows_of_all_tables().await, 2);
    end(&mut fleet.conn, &[id]).await.unwrap();
    assert_eq!(fleet.rows_of_all_tables().await, 0);
}

#[tokio::test]
async fn a_page_is_bounded_in_messages_and_bytes() {
    let mut fleet = Fleet::new().await;
    let (one, two) = (fleet.session("one").await, fleet.session("two").await);
    let payload = "x".repeat(100);
    for session in [one, two] {
        fleet.fill(session, &[payload.as_str(); 5]).await;
    }
    let each = row_bytes(&message("a", &payload)).cast_signed();
    for (after, limit, max_bytes, expected) in [
        (0, 10, i64::MAX, &[1, 2, 3, 4, 5][..]),
        (0, 3, i64::MAX, &[1, 2, 3]),
        (2, 2, i64::MAX, &[3, 4]),
        (1, 10, 3 * each, &[2, 3, 4]),
        (1, 10, 3 * each - 1, &[2, 3]),
        (3, 10, 0, &[4]),
        (5, 10, i64::MAX, &[]),
        (0, 0, i64::MAX, &[]),
    ] {
        let found = page(&mut fleet.conn, &[(two, after), (one, after)], limit, max_bytes).await.unwrap();
        let expected: Vec<_> =
            [one, two].iter().flat_map(|session| expected.iter().map(move |offset| (*session, *offset))).collect();
        assert_eq!(found.iter().map(|queued| (queued.session, queued.offset)).collect::<Vec<_>>(), expected);
    }
}

#[tokio::test]
async fn an_acknowledged_message_is_gone_and_its_offset_is_not_given_again() {
    let mut fleet = Fleet::new().await;
    let id = fleet.session("one").await;
    fleet.fill(id, &["1", "2", "3"]).await;
    acknowledge(&mut fleet.conn, &[(id, 3), (id, 1), (SessionId::new(), 2), (id, 77)]).await.unwrap();
    assert_eq!(fleet.offsets(id).await, [2]);
    assert_eq!(fleet.loaded().await[0].last_offset, 3);
}

#[tokio::test]
async fn a_released_message_keeps_its_place_and_nothing_else() {
    let mut fleet = Fleet::new().await;
    let id = fleet.session("one").await;
    let full = Message { properties: Some(rich()), qos: 2, ..message("app/x", "payload") };
    enqueue(&mut fleet.conn, std::slice::from_ref(&full), &[Enqueue { qos: 2, ..row(id, 0) }]).await.unwrap();
    release(&mut fleet.conn, &[(id, 1), (id, 2)]).await.unwrap();
    let queue = fleet.queue(id).await;
    let left = Message { payload: bytes::Bytes::new(), properties: None, ..full };
    assert_eq!((queue.len(), queue[0].released, &queue[0].message), (1, true, &left));
    assert_eq!(fleet.loaded().await[0].queued_bytes, row_bytes(&left).cast_signed());
    fleet.left(id, 1).await;
    assert_eq!(expire_messages(&mut fleet.conn, NOW, NOW + 1, 10).await.unwrap(), []);
    acknowledge(&mut fleet.conn, &[(id, 1)]).await.unwrap();
    assert_eq!(fleet.loaded().await[0].queued, 0);
}

#[tokio::test]
async fn messages_go_when_their_time_has_passed_or_when_they_are_old() {
    let mut fleet = Fleet::new().await;
    let (one, two) = (fleet.session("one").await, fleet.session("two").await);
    let messages: Vec<_> = (0..10)
        .map(|nth| Message {
            accepted_ms: NOW + nth,
            expires_ms: (nth % 2 == 0).then_some(NOW + 100 + nth),
            ..message("a", &"x".repeat(usize::try_from(nth).unwrap()))
        })
        .collect();
    let rows: Vec<_> = [one, two].iter().flat_map(|session| (0..10).map(|nth| row(*session, nth))).collect();
    enqueue(&mut fleet.conn, &messages, &rows).await.unwrap();

    assert_eq!(expire_messages(&mut fleet.conn, NOW + 102, NOW + 2, 100).await.unwrap(), [], "they are connected");
    fleet.left(one, 0).await;
    fleet.left(two, 1).await;
    assert_eq!(expire_messages(&mut fleet.conn, NOW + 99, NOW, 100).await.unwrap(), []);
    let bytes = |gone: &[usize]| gone.iter().map(|nth| row_bytes(&messages[*nth]).cast_signed()).sum::<i64>();
    let gone =
        |session, gone: &[usize]| Expired { session, messages: i64::try_from(gone.len()).unwrap(), bytes: bytes(gone) };
    let unsent = expire_messages(&mut fleet.conn, NOW + 100, 0, 100).await.unwrap();
    assert_eq!(unsent, [gone(one, &[0])], "the delivery of the other has begun");
    let due = expire_messages(&mut fleet.conn, NOW + 102, NOW + 2, 100).await.unwrap();
    assert_eq!(due, [gone(one, &[1, 2]), gone(two, &[0, 1, 2])], "however far it got, it is too old");
    let old = expire_messages(&mut fleet.conn, NOW, NOW + 5, 100).await.unwrap();
    assert_eq!(old, [gone(one, &[3, 4]), gone(two, &[3, 4])]);
    assert_eq!(fleet.offsets(one).await, [6, 7, 8, 9, 10]);
    assert_eq!(expire_messages(&mut fleet.conn, NOW, 0, 100).await.unwrap(), [], "0: however old");

    let mut rounds = Vec::new();
    loop {
        let gone = expire_messages(&mut fleet.conn, NOW + 1_000, NOW + 1_000, 4).await.unwrap();
        rounds.push(gone.iter().map(|expired| expired.messages).sum::<i64>());
        if rounds.last() < Some(&4) {
            break;
        }
    }
    assert_eq!(rounds, [4, 4, 2], "in bounded rounds");
}

#[tokio::test]
async fn received_packet_ids_are_open_until_completed() {
    let mut fleet = Fleet::new().await;
    let (one, two) = (fleet.session("one").await, fleet.session("two").await);
    receive(&mut fleet.conn, &[(two, 1), (one, u16::MAX), (one, 7), (one, 7)]).await.unwrap();
    complete(&mut fleet.conn, &[(one, 7), (two, 7)]).await.unwrap();
    assert_eq!(received(&mut fleet.conn, &[two, one]).await.unwrap(), [(one, u16::MAX), (two, 1)]);
    assert_eq!(received(&mut fleet.conn, &[two]).await.unwrap(), [(two, 1)]);
}

#[tokio::test]
async fn nothing_to_do_is_done() {
    let mut fleet = Fleet::new().await;
    let conn = &mut fleet.conn;
    begin(conn, &[]).await.unwrap();
    resume(conn, &[]).await.unwrap();
    leave(conn, &[]).await.unwrap();
    clear_wills(conn, &[]).await.unwrap();
    end(conn, &[]).await.unwrap();
    subscribe(conn, &[]).await.unwrap();
    unsubscribe(conn, &[]).await.unwrap();
    enqueue(conn, &[], &[]).await.unwrap();
    acknowledge(conn, &[]).await.unwrap();
    release(conn, &[]).await.unwrap();
    receive(conn, &[]).await.unwrap();
    complete(conn, &[]).await.unwrap();
    dropped(conn, &[]).await.unwrap();
    assert_eq!(received(conn, &[]).await.unwrap(), []);
    assert_eq!(page(conn, &[], 1, 1).await.unwrap(), []);
    retained::put(conn, &[]).await.unwrap();
    retained::forget(conn, &[]).await.unwrap();
    let beyond = enqueue(conn, &[], &[row(SessionId::new(), 0)]).await;
    assert!(matches!(beyond, Err(Error::Internal(_))), "{beyond:?}");
}

proptest! {
    #[test]
    fn properties_are_read_as_they_were_written(
        payload_is_utf8: Option<bool>,
        content_type in prop::option::of("\\PC{0,9}"),
        response_topic in prop::option::of(".{0,9}"),
        correlation_data: Option<Vec<u8>>,
        user_properties in prop::collection::vec((".{0,9}", ".{0,9}"), 0..4),
    ) {
        let properties =
            Properties { payload_is_utf8, content_type, response_topic, correlation_data, user_properties };
        let json = serde_json::to_value(&properties).unwrap();
        prop_assert!(json.as_object().unwrap().values().all(|value| !value.is_null()), "absent fields are left out");
        prop_assert_eq!(serde_json::from_value::<Properties>(json).unwrap(), properties);
    }
}

/// Prints what a message costs the database: run by hand, with `--run-ignored only --no-capture`.
#[tokio::test]
#[ignore = "a measurement"]
async fn measure_enqueue_and_acknowledge() {
    const BATCH: i64 = 1_000;
    const ROUNDS: i64 = 100;
    let mut fleet = Fleet::new().await;
    for sessions in [1, 10, 1_000] {
        let new: Vec<_> = (0..sessions).map(|nth| new_session(&fleet.owner, &format!("s{nth}"))).collect();
        begin(&mut fleet.conn, &new).await.unwrap();
        let messages: Vec<_> = (0..BATCH).map(|_| message("app/main/line-3/jobs", &"x".repeat(200))).collect();
        let (mut filling, mut emptying) = (0.0, 0.0);
        for round in 0..ROUNDS {
            let places: Vec<_> = (0..BATCH)
                .map(|nth| (new[usize::try_from(nth).unwrap() % new.len()].id, round * BATCH + nth))
                .collect();
            let rows: Vec<_> = places
                .iter()
                .enumerate()
                .map(|(nth, (session, offset))| Enqueue { offset: *offset, ..row(*session, nth) })
                .collect();
            let begun = Instant::now();
            enqueue(&mut fleet.conn, &messages, &rows).await.unwrap();
            filling += begun.elapsed().as_secs_f64();
            let begun = Instant::now();
            acknowledge(&mut fleet.conn, &places).await.unwrap();
            emptying += begun.elapsed().as_secs_f64();
        }
        #[expect(clippy::cast_precision_loss, reason = "a measurement")]
        let count = (BATCH * ROUNDS) as f64;
        println!(
            "{sessions} sessions: enqueue {:.0} rows/s, acknowledge {:.0} rows/s, both {:.0} rows/s",
            count / filling,
            count / emptying,
            count / (filling + emptying)
        );
    }
}

/// Prints how long a start takes, and small batches beside much that waits: run by hand, as above.
#[tokio::test]
#[ignore = "a measurement"]
async fn measure_many_sessions() {
    const SESSIONS: usize = 100_000;
    let mut fleet = Fleet::new().await;
    let new: Vec<_> = (0..SESSIONS).map(|nth| new_session(&fleet.owner, &format!("s{nth}"))).collect();
    let begun = Instant::now();
    for some in new.chunks(5_000) {
        begin(&mut fleet.conn, some).await.unwrap();
        let wanted: Vec<_> =
            some.iter().flat_map(|new| ["a", "b"].map(|filter| (new.id, subscription(filter)))).collect();
        subscribe(&mut fleet.conn, &wanted).await.unwrap();
    }
    println!("{SESSIONS} sessions begun and subscribed twice: {:?}", begun.elapsed());
    let begun = Instant::now();
    let messages = vec![message("app/main/line-3/jobs", &"x".repeat(200)); 1];
    for some in new.chunks(5_000) {
        for offset in 1..=10 {
            let rows: Vec<_> = some.iter().map(|new| Enqueue { offset, ..row(new.id, 0) }).collect();
            enqueue(&mut fleet.conn, &messages, &rows).await.unwrap();
        }
    }
    println!("10 messages for each: {:?}", begun.elapsed());
    let begun = Instant::now();
    assert_eq!(fleet.loaded().await.len(), SESSIONS);
    println!("load: {:?}", begun.elapsed());
    for size in [1, 100, 1_000] {
        let some = &new[7_000..7_000 + size];
        let rows: Vec<_> = some.iter().map(|new| Enqueue { offset: 11, ..row(new.id, 0) }).collect();
        let begun = Instant::now();
        enqueue(&mut fleet.conn, &messages, &rows).await.unwrap();
        let enqueued = begun.elapsed();
        let wanted: Vec<_> = some.iter().map(|new| (new.id, 0)).collect();
        let begun = Instant::now();
        assert_eq!(page(&mut fleet.conn, &wanted, 5, i64::MAX).await.unwrap().len(), size * 5);
        let paged = begun.elapsed();
        let places: Vec<_> = some.iter().map(|new| (new.id, 11)).collect();
        let begun = Instant::now();
        acknowledge(&mut fleet.conn, &places).await.unwrap();
        println!("for {size}: enqueue {enqueued:?}, page of 5 {paged:?}, acknowledge {:?}", begun.elapsed());
    }
    sqlx::query("update session set connected = false").execute(&mut fleet.conn).await.unwrap();
    let begun = Instant::now();
    assert_eq!(expire_messages(&mut fleet.conn, NOW, NOW, 10_000).await.unwrap(), []);
    println!("nothing to expire: {:?}", begun.elapsed());
    let begun = Instant::now();
    expire_messages(&mut fleet.conn, NOW, NOW + 1, 10_000).await.unwrap();
    println!("10,000 expired: {:?}", begun.elapsed());
    let begun = Instant::now();
    end(&mut fleet.conn, &column(&new[..1_000], |new| new.id)).await.unwrap();
    println!("1,000 ended: {:?}", begun.elapsed());
}
