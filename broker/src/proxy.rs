//! The PROXY protocol, version 2: a proxy in front says in a few bytes whose connection this is.
//!
//! Holds: only those in `mqtt.proxy_trusted` are believed, and whoever is not is closed before it is read. A header is
//! small, whole and first, or the connection ends.

use std::net::SocketAddr;

use ipnet::IpNet;
use ppp::v2::{Addresses, Command, Header, Protocol};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::{Instant, timeout_at};

/// Bytes up to the length of the rest.
const FIXED_BYTES: usize = 16;
/// Largest header that is read, in bytes: addresses and some extensions.
const MAX_HEADER_BYTES: usize = 4096;

/// Why a connection ends before its first packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bad {
    /// It does not come from a trusted proxy.
    Untrusted,
    /// It does not begin with a header of version 2 for a stream.
    Header,
    /// The header was not there in time.
    Late,
}

/// Whether an address is that of a proxy that is believed.
pub(crate) fn is_trusted(trusted: &[IpNet], peer: SocketAddr) -> bool {
    let address = peer.ip().to_canonical();
    trusted.iter().any(|network| network.contains(&address))
}

/// Reads the header: whom the proxy speaks for. `None` when it speaks for itself, or for somebody without an address.
pub(crate) async fn read(socket: &mut (impl AsyncRead + Unpin), due: Instant) -> Result<Option<SocketAddr>, Bad> {
    timeout_at(due, read_header(socket)).await.unwrap_or(Err(Bad::Late))
}

async fn read_header(socket: &mut (impl AsyncRead + Unpin)) -> Result<Option<SocketAddr>, Bad> {
    let mut header = vec![0; FIXED_BYTES];
    socket.read_exact(&mut header).await.map_err(|_| Bad::Header)?;
    if !header.starts_with(ppp::v2::PROTOCOL_PREFIX) {
        return Err(Bad::Header);
    }
    let length = usize::from(u16::from_be_bytes([header[14], header[15]]));
    if FIXED_BYTES + length > MAX_HEADER_BYTES {
        return Err(Bad::Header);
    }
    header.resize(FIXED_BYTES + length, 0);
    socket.read_exact(&mut header[FIXED_BYTES..]).await.map_err(|_| Bad::Header)?;
    understand(&header)
}

fn understand(header: &[u8]) -> Result<Option<SocketAddr>, Bad> {
    let header = Header::try_from(header).map_err(|_| Bad::Header)?;
    match (header.command, header.protocol, header.addresses) {
        (Command::Proxy, Protocol::Datagram, _) => Err(Bad::Header),
        (Command::Proxy, _, Addresses::IPv4(ip)) => Ok(Some((ip.source_address, ip.source_port).into())),
        (Command::Proxy, _, Addresses::IPv6(ip)) => Ok(Some((ip.source_address, ip.source_port).into())),
        // Health checks are of the proxy itself.
        (Command::Local, ..) | (Command::Proxy, _, Addresses::Unspecified | Addresses::Unix(_)) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ppp::v2::{Builder, Type, Version};
    use proptest::prelude::*;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    fn header(command: Command, protocol: Protocol, addresses: impl Into<Addresses>) -> Vec<u8> {
        Builder::with_addresses(Version::Two | command, protocol, addresses).build().unwrap()
    }

    fn addresses(source: &str, destination: &str) -> (SocketAddr, SocketAddr) {
        (source.parse().unwrap(), destination.parse().unwrap())
    }

    #[tokio::test]
    async fn a_header_tells_the_peer_and_leaves_what_follows() {
        for (source, destination) in [("203.0.113.7:4711", "10.0.0.1:1883"), ("[2001:db8::7]:4711", "[::1]:1883")] {
            let mut bytes = header(Command::Proxy, Protocol::Stream, addresses(source, destination));
            bytes.extend(b"CONNECT");
            let mut socket = bytes.as_slice();
            assert_eq!(read(&mut socket, soon()).await, Ok(Some(source.parse().unwrap())));
            assert_eq!(socket, b"CONNECT");
        }
    }

    #[tokio::test]
    async fn extensions_are_read_past() {
        let (source, destination) = addresses("203.0.113.7:4711", "10.0.0.1:1883");
        let bytes = Builder::with_addresses(Version::Two | Command::Proxy, Protocol::Stream, (source, destination))
            .write_tlv(Type::Authority, b"mqtt.example.com")
            .unwrap()
            .build()
            .unwrap();
        assert_eq!(read(&mut bytes.as_slice(), soon()).await, Ok(Some(source)));
    }

    #[tokio::test]
    async fn a_proxy_that_speaks_for_itself_or_for_nobody_keeps_its_own_address() {
        let pair = || addresses("203.0.113.7:4711", "10.0.0.1:1883");
        let local = header(Command::Local, Protocol::Unspecified, Addresses::Unspecified);
        let told_nonetheless = header(Command::Local, Protocol::Stream, pair());
        let unknown = header(Command::Proxy, Protocol::Unspecified, Addresses::Unspecified);
        for bytes in [local, told_nonetheless, unknown] {
            assert_eq!(read(&mut bytes.as_slice(), soon()).await, Ok(None));
        }
        let datagram = header(Command::Proxy, Protocol::Datagram, pair());
        assert_eq!(read(&mut datagram.as_slice(), soon()).await, Err(Bad::Header));
    }

    #[tokio::test]
    async fn what_is_no_header_ends_the_connection() {
        let (source, destination) = addresses("203.0.113.7:4711", "10.0.0.1:1883");
        let good = header(Command::Proxy, Protocol::Stream, (source, destination));
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            bytes
        };
        let long = [&good[..14], &u16::MAX.to_be_bytes(), &vec![0; 65_535]].concat();
        for bad in [
            b"".to_vec(),
            b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 1883\r\n".to_vec(),
            [0x10, 13, 0, 4].repeat(8),
            good[..good.len() - 1].to_vec(),
            with(12, 0x11),
            with(12, 0x2F),
            with(13, 0xF1),
            with(15, 11),
            long,
        ] {
            assert_eq!(read(&mut bad.as_slice(), soon()).await, Err(Bad::Header), "{bad:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_header_that_does_not_come_is_not_waited_for() {
        let (mut socket, _other) = tokio::io::duplex(64);
        assert_eq!(read(&mut socket, soon()).await, Err(Bad::Late));
    }

    #[test]
    fn only_the_named_networks_are_trusted() {
        let trusted: Vec<IpNet> = ["10.0.0.0/8", "2001:db8::/32"].map(|network| network.parse().unwrap()).into();
        for (peer, expected) in [
            ("10.1.2.3:1", true),
            ("[::ffff:10.1.2.3]:1", true),
            ("[2001:db8::1]:1", true),
            ("11.0.0.1:1", false),
            ("127.0.0.1:1", false),
            ("[::1]:1", false),
        ] {
            assert_eq!(is_trusted(&trusted, peer.parse().unwrap()), expected, "{peer}");
        }
        assert!(!is_trusted(&[], "10.0.0.1:1".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_as_far_as_the_header_goes(
            command in 0_u8..=255, family in 0_u8..=255, told in 0_u16..6000, body in prop::collection::vec(any::<u8>(), 0..6000),
        ) {
            let fixed = [ppp::v2::PROTOCOL_PREFIX, &[command, family], &told.to_be_bytes()].concat();
            let bytes = [fixed.as_slice(), &body].concat();
            let mut socket = bytes.as_slice();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let answer = runtime.block_on(read(&mut socket, soon()));
            if answer.is_ok() {
                prop_assert_eq!(bytes.len() - socket.len(), FIXED_BYTES + usize::from(told));
            }
            prop_assert!(bytes.len() - socket.len() <= MAX_HEADER_BYTES);
        }

        #[test]
        fn nothing_panics(bytes: Vec<u8>) {
            let _ = understand(&bytes);
        }
    }
}
