//! How long after its acknowledgement a line is seen: in the live tail, and by a search. Of a server as shipped, over MQTT and REST.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::{Figure, Wanted, ask};
use crate::broker::identities;
use crate::frame::{self, Session};
use crate::generator::Identity;
use crate::server::{EMAIL, Kind, PASSWORD, Server};

/// Lines that are timed in the tail.
const LINES: u16 = 300;
/// Of these so many are searched for too, one in so many.
const SEARCHED: u16 = 10;
/// Between two lines.
const PAUSE: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(20);

/// When each line was seen, by its number.
type Seen = Arc<Mutex<HashMap<u16, Instant>>>;

/// Times lines, one after the other.
pub(super) async fn run(muster: &Path, dir: &Path) -> anyhow::Result<Vec<Figure>> {
    let identities = identities(muster, &[Kind::Muster], dir, 1).await?;
    let server = Server::start(Kind::Muster, dir, muster).await?;
    let found = measure(&server, identities.first().context("a device")?).await;
    server.stop().await?;
    let (mut tail, mut search) = found?;
    let figure = |what: &str, ours, most| Figure {
        what: what.to_owned(),
        ours,
        theirs: None,
        wanted: Some(Wanted::AtMost(most)),
    };
    Ok(vec![
        figure("from PUBACK to the live tail, p95, ms", ask::ms(&mut tail, 95), 300.0),
        figure("from PUBACK to a search that finds the line, p95, ms", ask::ms(&mut search, 95), 2000.0),
    ])
}

async fn measure(server: &Server, device: &Identity) -> anyhow::Result<(Vec<Duration>, Vec<Duration>)> {
    let url = format!("{}/api/v1", server.url.as_deref().context("Muster has an address")?);
    let http = reqwest::Client::builder().no_proxy().build()?;
    let login = json!({ "email": EMAIL, "password": PASSWORD, "cookie": false });
    let login = http.post(format!("{url}/auth/login")).json(&login).send().await?.error_for_status()?;
    let login: Value = login.json().await?;
    let token = login["access_token"].as_str().context("a token")?.to_owned();
    let seen = Seen::default();
    let tail = http.get(format!("{url}/logs/tail?q=probe")).bearer_auth(&token).send().await?.error_for_status()?;
    let reader = tokio::spawn(read(tail, seen.clone()));
    let mut socket = connect(server, device).await?;
    let topic = format!("fleet/v1/main/{}/logs", device.id);
    let (mut acknowledged, mut searched) = (HashMap::new(), Vec::new());
    for nth in 1..=LINES {
        let line = json!({ "message": format!("probe n{nth} of the benchmark"), "seq": nth }).to_string();
        socket.write_all(&frame::publish(&topic, nth, line.as_bytes())).await?;
        ensure!(answer(&mut socket).await? == 0x40, "expected PUBACK");
        let at = Instant::now();
        acknowledged.insert(nth, at);
        if nth % SEARCHED == 0 {
            let search = format!("{url}/logs/search?limit=1&q=n{nth}");
            let found = timeout(PATIENCE, find(&http, &search, &token));
            found.await.context("a line that was acknowledged is not found")??;
            searched.push(at.elapsed());
        }
        sleep(PAUSE).await;
    }
    let all = async {
        while seen.lock().len() < usize::from(LINES) {
            sleep(PAUSE).await;
        }
    };
    timeout(PATIENCE, all).await.context("the tail lacks lines")?;
    reader.abort();
    let seen = seen.lock();
    Ok((acknowledged.iter().map(|(nth, at)| seen[nth].saturating_duration_since(*at)).collect(), searched))
}

/// Notes when a line came.
async fn read(mut tail: reqwest::Response, seen: Seen) -> anyhow::Result<()> {
    let mut text = String::new();
    while let Some(chunk) = tail.chunk().await? {
        let now = Instant::now();
        text.push_str(&String::from_utf8_lossy(&chunk));
        while let Some((event, rest)) = text.split_once('\n') {
            let number = event.split_once("probe n").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
            if let Some(number) = number {
                seen.lock().entry(number).or_insert(now);
            }
            text = rest.to_owned();
        }
    }
    Ok(())
}

async fn find(http: &reqwest::Client, url: &str, token: &str) -> anyhow::Result<()> {
    loop {
        let page: Value = http.get(url).bearer_auth(token).send().await?.error_for_status()?.json().await?;
        if page["items"].as_array().is_some_and(|items| !items.is_empty()) {
            return Ok(());
        }
        sleep(PAUSE).await;
    }
}

async fn connect(server: &Server, device: &Identity) -> anyhow::Result<TcpStream> {
    let mut socket = TcpStream::connect(server.mqtt).await?;
    socket.set_nodelay(true)?;
    socket.write_all(&frame::connect(Session::Clean, &device.id, &device.username, &device.password)).await?;
    ensure!(answer(&mut socket).await? == 0x20, "expected CONNACK");
    Ok(socket)
}

/// The first byte of a packet of four, which CONNACK and PUBACK of MQTT 3.1.1 are; refusals are errors.
async fn answer(socket: &mut TcpStream) -> anyhow::Result<u8> {
    let mut packet = [0; 4];
    timeout(PATIENCE, socket.read_exact(&mut packet)).await??;
    if packet[0] == 0x20 && packet[3] != 0 {
        bail!("the server let nobody in: {}", packet[3]);
    }
    Ok(packet[0])
}
