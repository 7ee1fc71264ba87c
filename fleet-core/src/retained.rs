//! Retained messages: the newest of each topic, for whoever subscribes later.
//!
//! Holds: one message a topic. Each change is one statement that may come again with the same outcome.
//! Ignorant of: subscriptions, expiry (the caller forgets what has expired).

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use sqlx::types::Json;

use crate::Result;
use crate::clock::from_ms;
use crate::session::{Message, Properties, column, last_of_each, qos};

/// All retained messages, in no order; for the start of the server.
pub async fn load(db: &mut PgConnection) -> Result<Vec<Message>> {
    let rows = sqlx::query!(
        r#"
        select topic, qos, payload, properties as "properties: Json<Properties>", accepted_at, expires_at
          from retained_message
        "#
    )
    .fetch_all(db)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Message {
            topic: row.topic,
            payload: row.payload.into(),
            qos: qos(row.qos),
            retain: true,
            properties: row.properties.map(|properties| properties.0),
            accepted_ms: row.accepted_at.timestamp_millis(),
            expires_ms: row.expires_at.map(|at| at.timestamp_millis()),
        })
        .collect())
}

/// Keeps messages, each in place of the one its topic had; of several for one topic the last.
pub async fn put(db: &mut PgConnection, messages: &[Message]) -> Result<()> {
    let messages = last_of_each(messages, |message| message.topic.as_str());
    if messages.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "
        insert into retained_message (digest, topic, qos, payload, properties, accepted_at, expires_at)
        select sha256(convert_to(m.topic, 'UTF8')), m.*
          from unnest($1::text[], $2::smallint[], $3::bytea[], $4::jsonb[], $5::timestamptz[], $6::timestamptz[]) as m (topic)
   on conflict (digest) do update
           set qos = excluded.qos, payload = excluded.payload, properties = excluded.properties,
               accepted_at = excluded.accepted_at, expires_at = excluded.expires_at
        ",
        &column(&messages, |message| message.topic.as_str()) as &[&str],
        &column(&messages, |message| i16::from(message.qos)),
        &column(&messages, |message| message.payload.as_ref()) as &[&[u8]],
        &column(&messages, |message| message.properties.as_ref().map(Json)) as &[Option<Json<&Properties>>],
        &column(&messages, |message| from_ms(message.accepted_ms)),
        &column(&messages, |message| message.expires_ms.map(from_ms)) as &[Option<DateTime<Utc>>],
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Forgets the messages of topics.
pub async fn forget(db: &mut PgConnection, topics: &[String]) -> Result<()> {
    if topics.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "
        delete from retained_message r using unnest($1::text[]) as t (topic)
         where r.digest = sha256(convert_to(t.topic, 'UTF8'))
        ",
        topics,
    )
    .execute(db)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::fixture::NOW;
    use crate::testing::TestDb;

    fn message(topic: &str, payload: &'static [u8]) -> Message {
        Message {
            topic: topic.to_owned(),
            payload: payload.into(),
            qos: 2,
            retain: true,
            properties: None,
            accepted_ms: NOW,
            expires_ms: None,
        }
    }

    async fn kept(db: &mut PgConnection) -> Vec<Message> {
        let mut kept = load(db).await.unwrap();
        kept.sort_by(|a, b| a.topic.cmp(&b.topic));
        kept
    }

    #[tokio::test]
    async fn the_newest_message_of_a_topic_is_kept_until_it_is_forgotten() {
        let db = TestDb::new().await;
        let mut conn = db.pool().acquire().await.unwrap();
        let properties = Properties { correlation_data: Some(vec![0, 255]), ..Properties::default() };
        let full = Message { properties: Some(properties), expires_ms: Some(NOW + 1), ..message("b", &[0, 255]) };
        let long = message(&"tøpic/".repeat(10_000), b"long");
        put(&mut conn, &[message("a", b"old"), message("b", b"old"), long.clone()]).await.unwrap();
        put(&mut conn, &[message("b", b"older"), full.clone(), Message { qos: 0, ..message("a", b"") }]).await.unwrap();
        assert_eq!(kept(&mut conn).await, [Message { qos: 0, ..message("a", b"") }, full, long.clone()]);
        forget(&mut conn, &["b".to_owned(), "b".to_owned(), "c".to_owned(), "a".to_owned()]).await.unwrap();
        assert_eq!(kept(&mut conn).await, [long]);
    }
}
