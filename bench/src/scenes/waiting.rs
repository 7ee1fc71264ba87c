//! Connections and sessions that do nothing: how fast they come, and what they take.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use super::{Figures, Stage, What, grown_kib};
use crate::frame::{GOODBYE, Session};
use crate::generator::{Identity, at_once, enter, subscribe};
use crate::process;
use crate::server::Kind;

/// Clean sessions connect, and later subscribe.
pub(super) async fn idle(stage: &Stage<'_>, kind: Kind) -> anyhow::Result<Figures> {
    let server = stage.start(kind).await?;
    let before = process::rss(server.pid);
    let (started, (broker, postgres)) = (Instant::now(), server.cpu());
    let come = async |identity| Ok((enter(server.mqtt, identity, Session::Clean).await?, identity));
    let mut sockets: Vec<(TcpStream, &Identity)> = at_once(stage.identities.iter(), come).await;
    let ramp = started.elapsed();
    let (broker_to, postgres_to) = server.cpu();
    let us = |spent: Duration| spent.as_secs_f64() * 1e6 / sockets.len().max(1) as f64;
    let (broker, postgres) = (us(broker_to.saturating_sub(broker)), us(postgres_to.saturating_sub(postgres)));
    let failed = stage.identities.len() - sockets.len();
    let connection = grown_kib(&server, before, sockets.len()).await;
    for (socket, identity) in &mut sockets {
        subscribe(socket, &identity.commands()).await?;
    }
    let subscribed = grown_kib(&server, before, sockets.len()).await;
    drop(sockets);
    server.stop().await?;
    Ok(vec![
        (What::Ramp, ramp.as_secs_f64()),
        (What::RampCpu, broker + postgres),
        (What::RampPostgres, postgres),
        (What::Failed, failed as f64),
        (What::Connection, connection),
        (What::Subscribed, subscribed),
    ])
}

/// Kept sessions connect and subscribe; their clients go; Muster starts again with them.
pub(super) async fn kept(stage: &Stage<'_>, kind: Kind) -> anyhow::Result<Figures> {
    let server = stage.start(kind).await?;
    let before = process::rss(server.pid);
    let mut sockets = at_once(stage.identities.iter(), |identity| begin(server.mqtt, identity)).await;
    let count = sockets.len();
    let mut figures = vec![(What::Kept, grown_kib(&server, before, count).await)];
    for socket in &mut sockets {
        socket.write_all(&GOODBYE).await?;
    }
    drop(sockets);
    figures.push((What::Away, grown_kib(&server, before, count).await));
    server.stop().await?;
    if kind == Kind::Muster {
        let server = stage.start(kind).await?;
        // What a server takes that restores none was measured above.
        figures.push((What::Restored, grown_kib(&server, before, count).await));
        // The next round is to find none.
        let ending = at_once(stage.identities.iter(), |identity| enter(server.mqtt, identity, Session::Clean)).await;
        drop(ending);
        server.stop().await?;
    }
    Ok(figures)
}

async fn begin(server: SocketAddr, identity: &Identity) -> io::Result<TcpStream> {
    let mut socket = enter(server, identity, Session::Kept).await?;
    subscribe(&mut socket, &identity.commands()).await?;
    Ok(socket)
}
