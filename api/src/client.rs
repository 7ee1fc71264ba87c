//! The other end of a request: its address, whether it speaks https, how its refresh token is kept.
//!
//! Holds: what a header says about either is believed of the proxies in `http.trusted_proxies` only; from anybody else
//! it can make the cookie safer, and nothing else. The cookie is `__Host-` and Secure unless the request came over plain
//! http from this machine to its own name for itself, so that a first try needs no certificate (ADR 9).

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use axum::extract::{ConnectInfo, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderMap, HeaderName, HeaderValue, header};
use axum_extra::extract::CookieJar;
use axum_extra::extract::cookie::{Cookie, SameSite};
use chrono::{DateTime, Utc};
use fleet_core::audit::{Actor, Author, Source};
use fleet_core::config::{CookieSecure, Secret};
use fleet_core::id::TenantKey;
use fleet_core::login_session::Origin;
use ipnet::IpNet;

use crate::door::RequestId;
use crate::state::App;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// Browsers take a cookie of this name from https alone, for this host alone, and for all its paths.
const SECURE_COOKIE: &str = "__Host-muster_refresh";
const PLAIN_COOKIE: &str = "muster_refresh";
const SECURE_OIDC: &str = "__Host-muster_oidc";
const PLAIN_OIDC: &str = "muster_oidc";
const PLAIN_PATH: &str = "/api/v1/auth";

/// The other end of a request.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    /// Its address, of a proxy's client where the proxy is trusted.
    pub(crate) address: Option<IpAddr>,
    user_agent: Option<String>,
    request_id: Option<String>,
    /// Whether its cookie is for https alone.
    secure: bool,
    /// What it calls this server.
    server: String,
}

impl Client {
    /// Where a login comes from.
    pub(crate) fn origin(&self) -> Origin {
        let address = self.address.map(|address| address.to_string());
        Origin { address, user_agent: self.user_agent.clone() }
    }

    /// Where a request comes from, for the audit.
    pub(crate) fn source(&self) -> Source {
        let Origin { address, user_agent } = self.origin();
        Source { address, request_id: self.request_id.clone(), user_agent }
    }

    /// Somebody who does something by this request, in that tenant.
    pub(crate) fn author(&self, tenant: TenantKey, actor: Actor) -> Author {
        Author { tenant, actor, source: self.source() }
    }

    /// A path of this server as a link that can be handed out.
    pub(crate) fn link(&self, path: &str) -> String {
        format!("{}{path}", self.server)
    }

    /// Sets the cookie by which a browser keeps a refresh token, until the login ends.
    pub(crate) fn keep(&self, token: &Secret, now: DateTime<Utc>, until: DateTime<Utc>) -> CookieJar {
        self.set(token.expose().to_owned(), (until - now).to_std().unwrap_or_default())
    }

    /// Takes the cookie from the browser.
    pub(crate) fn forget(&self) -> CookieJar {
        self.set(String::new(), Duration::ZERO)
    }

    fn set(&self, value: String, age: Duration) -> CookieJar {
        let (name, path) = if self.secure { (SECURE_COOKIE, "/") } else { (PLAIN_COOKIE, PLAIN_PATH) };
        let age = age.try_into().unwrap_or_default();
        let cookie = Cookie::build((name, value)).path(path).max_age(age).http_only(true).secure(self.secure);
        CookieJar::new().add(cookie.same_site(SameSite::Strict))
    }

    /// Sets the cookie by which a browser is known when it comes back from the provider.
    pub(crate) fn send_away(&self, secret: &Secret, seconds: u64) -> CookieJar {
        self.set_lax(secret.expose().to_owned(), Duration::from_secs(seconds))
    }

    /// Takes that cookie from the browser.
    pub(crate) fn came_back(&self) -> CookieJar {
        self.set_lax(String::new(), Duration::ZERO)
    }

    /// Sent along too when another site leads here, as the provider does.
    fn set_lax(&self, value: String, age: Duration) -> CookieJar {
        let (name, path) = if self.secure { (SECURE_OIDC, "/") } else { (PLAIN_OIDC, PLAIN_PATH) };
        let age = age.try_into().unwrap_or_default();
        let cookie = Cookie::build((name, value)).path(path).max_age(age).http_only(true).secure(self.secure);
        CookieJar::new().add(cookie.same_site(SameSite::Lax))
    }

    /// By what the browser was known when it was sent to the provider.
    pub(crate) fn browser(&self, headers: &HeaderMap) -> Option<Secret> {
        let name = if self.secure { SECURE_OIDC } else { PLAIN_OIDC };
        CookieJar::from_headers(headers).get(name).map(|cookie| Secret::from(cookie.value().to_owned()))
    }

    /// The refresh token that the browser keeps.
    pub(crate) fn refresh_token(&self, headers: &HeaderMap) -> Option<Secret> {
        let name = if self.secure { SECURE_COOKIE } else { PLAIN_COOKIE };
        CookieJar::from_headers(headers).get(name).map(|cookie| Secret::from(cookie.value().to_owned()))
    }
}

impl FromRequestParts<App> for Client {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Infallible> {
        let peer = peer(&parts.extensions);
        let address = peer.map(|peer| address(peer, &parts.headers, &app.http.trusted_proxies));
        let text = |name| parts.headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let secure = match app.auth.cookie_secure {
            CookieSecure::Always => true,
            CookieSecure::Never => false,
            CookieSecure::Auto => {
                let https = app.http.public_url.starts_with("https:")
                    || text(FORWARDED_PROTO).is_some_and(|proto| proto.eq_ignore_ascii_case("https"))
                    || text(header::ORIGIN).is_some_and(|origin| origin.starts_with("https:"));
                https || !peer.is_some_and(|peer| peer.is_loopback()) || !text(header::HOST).is_some_and(is_own_name)
            }
        };
        let https = peer.is_some_and(|peer| is_told_https(peer, &parts.headers, &app.http.trusted_proxies));
        let said =
            || format!("{}://{}", if https { "https" } else { "http" }, text(header::HOST).unwrap_or("localhost"));
        let server = Some(&app.http.public_url).filter(|url| !url.is_empty()).cloned().unwrap_or_else(said);
        let user_agent = text(header::USER_AGENT).map(str::to_owned);
        let request_id = parts.extensions.get::<RequestId>().map(|id| id.0.clone());
        Ok(Self { address, user_agent, request_id, secure, server })
    }
}

/// Whether the request came to its proxy over https; known only of trusted ones.
pub(crate) fn is_https(request: &Request, trusted: &[IpNet]) -> bool {
    peer(request.extensions()).is_some_and(|peer| is_told_https(peer, request.headers(), trusted))
}

fn is_told_https(peer: IpAddr, headers: &HeaderMap, trusted: &[IpNet]) -> bool {
    let said = headers.get(FORWARDED_PROTO).is_some_and(|proto| proto.as_bytes().eq_ignore_ascii_case(b"https"));
    said && is_trusted(peer, trusted)
}

/// Who opened the connection.
fn peer(extensions: &Extensions) -> Option<IpAddr> {
    extensions.get::<ConnectInfo<SocketAddr>>().map(|info| info.0.ip().to_canonical())
}

fn is_trusted(address: IpAddr, trusted: &[IpNet]) -> bool {
    trusted.iter().any(|network| network.contains(&address))
}

/// The last address that no trusted proxy has: each proxy appends whom it was asked by, and what stands before the first
/// stranger anybody may have written.
fn address(peer: IpAddr, headers: &HeaderMap, trusted: &[IpNet]) -> IpAddr {
    let told = headers.get_all(FORWARDED_FOR).iter().filter_map(|value| value.to_str().ok());
    let told = told.flat_map(|value| value.split(',')).map(parse).collect::<Vec<_>>();
    let mut last = peer;
    for next in told.into_iter().rev() {
        match next {
            Some(next) if is_trusted(last, trusted) => last = next,
            _ => break,
        }
    }
    last
}

/// An address, maybe with a port.
fn parse(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let address = text.parse().or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()));
    address.ok().map(|address| address.to_canonical())
}

/// Whether a `Host` is a name by which a machine calls itself.
fn is_own_name(host: &str) -> bool {
    let name = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()));
    let name = name.map_or(host, |(name, _)| name);
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn found(peer: &str, forwarded: &[&str]) -> String {
        let trusted = ["10.0.0.0/8".parse().unwrap(), "2001:db8::/32".parse().unwrap()];
        let mut headers = HeaderMap::new();
        for value in forwarded {
            headers.append(FORWARDED_FOR, value.parse().unwrap());
        }
        address(peer.parse().unwrap(), &headers, &trusted).to_string()
    }

    #[test]
    fn only_trusted_proxies_tell_whom_they_speak_for() {
        assert_eq!(found("192.0.2.1", &["198.51.100.7"]), "192.0.2.1", "a stranger tells nothing");
        assert_eq!(found("10.0.0.1", &[]), "10.0.0.1");
        assert_eq!(found("10.0.0.1", &["198.51.100.7"]), "198.51.100.7");
        assert_eq!(found("10.0.0.1", &["203.0.113.9, 198.51.100.7"]), "198.51.100.7", "what stood before is hearsay");
        assert_eq!(found("10.0.0.1", &["198.51.100.7, 10.0.0.2"]), "198.51.100.7", "two proxies");
        assert_eq!(found("10.0.0.1", &["198.51.100.7", "10.0.0.2"]), "198.51.100.7", "in two headers");
        assert_eq!(found("2001:db8::1", &["[2001:db9::7]:4711"]), "2001:db9::7");
        assert_eq!(found("10.0.0.1", &["198.51.100.7:4711"]), "198.51.100.7");
        assert_eq!(found("10.0.0.1", &["::ffff:198.51.100.7"]), "198.51.100.7");
        assert_eq!(found("10.0.0.1", &["198.51.100.7, unknown"]), "10.0.0.1", "what cannot be read ends the chain");
    }

    #[test]
    fn a_machine_has_few_names_for_itself() {
        for own in ["localhost", "LocalHost:8080", "127.0.0.1:8080", "127.0.0.1", "[::1]:8080", "[::1]"] {
            assert!(is_own_name(own), "{own}");
        }
        for other in ["", "muster.example.com", "localhost.example.com:80", "192.0.2.1:8080", "127.0.0.1.example.com"] {
            assert!(!is_own_name(other), "{other}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_read(text in "[ -~]{0,100}") {
            let peer = "10.0.0.1".parse().unwrap();
            let headers = HeaderMap::from_iter([(FORWARDED_FOR, text.parse().unwrap())]);
            address(peer, &headers, &["0.0.0.0/0".parse().unwrap()]);
            prop_assert_eq!(address(peer, &headers, &[]), peer);
            is_own_name(&text);
        }
    }
}
