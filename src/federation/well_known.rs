//! `/.well-known/matrix/server`: fetched within bounds, and for how long an answer is believed.
//! <https://spec.matrix.org/latest/server-server-api/#getwell-knownmatrixserver>

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderMap, Method, StatusCode, Uri, header};
use http_body_util::Full;
use ruma::OwnedServerName;
use serde::Deserialize;
use url::Url;

use super::RemoteError;
use super::dialler::Http;

const TIMEOUT: Duration = Duration::from_secs(10);
const MAX_SIZE: usize = 50 << 10;
const MAX_REDIRECTS: usize = 5;

const HOUR: Duration = Duration::from_secs(3600);
const DEFAULT_LIFETIME: Duration = Duration::from_secs(24 * 3600);
const MIN_LIFETIME: Duration = Duration::from_secs(300);
const MAX_LIFETIME: Duration = Duration::from_secs(48 * 3600);
const FIRST_BACKOFF: Duration = Duration::from_secs(60);

/// What a fetch has come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The host delegates to this server name, and says so for this long.
    Delegates(OwnedServerName, Duration),
    /// The host answered, and does not delegate.
    Absent,
    /// The host could not be asked.
    Failed,
}

/// What is remembered of one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// To what it delegates.
    pub delegate: Option<OwnedServerName>,
    /// When it is to be asked again.
    pub ask_again: Instant,
    /// Until when `delegate` may stand although the host cannot be asked.
    believed_until: Instant,
    failures: u32,
}

/// What is remembered after an outcome. A delegation outlives failures to ask again, up to two days after it was last seen;
/// after each failure in a row the host is left alone for longer, up to an hour.
pub(super) fn remember(previous: Option<&Entry>, outcome: Outcome, now: Instant) -> Entry {
    if let Outcome::Delegates(name, lifetime) = outcome {
        let ask_again = now + lifetime.clamp(MIN_LIFETIME, MAX_LIFETIME);
        return Entry { delegate: Some(name), ask_again, believed_until: now + MAX_LIFETIME, failures: 0 };
    }
    let failures = previous.map_or(0, |entry| entry.failures).saturating_add(1);
    let backoff = FIRST_BACKOFF.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(HOUR);
    let stands = previous.filter(|entry| outcome == Outcome::Failed && entry.believed_until > now);
    Entry {
        delegate: stands.and_then(|entry| entry.delegate.clone()),
        ask_again: now + backoff,
        believed_until: stands.map_or(now, |entry| entry.believed_until),
        failures,
    }
}

/// Asks `host`, which is a name without port.
pub(super) async fn fetch(http: Arc<Http>, host: &str) -> Outcome {
    match Url::parse(&format!("https://{host}/.well-known/matrix/server")) {
        Ok(url) => fetch_from(&http, url).await,
        Err(_) => Outcome::Absent,
    }
}

pub(super) async fn fetch_from(http: &Http, url: Url) -> Outcome {
    match tokio::time::timeout(TIMEOUT, follow(http, url)).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(RemoteError::BadAnswer(_))) => Outcome::Absent,
        Ok(Err(_)) | Err(_) => Outcome::Failed,
    }
}

async fn follow(http: &Http, mut url: Url) -> Result<Outcome, RemoteError> {
    for _ in 0..=MAX_REDIRECTS {
        // Every hop passes the dialler's checks anew.
        let uri: Uri = url.as_str().parse().map_err(|error| RemoteError::BadAnswer(format!("{url}: {error}")))?;
        let request = http.request(Method::GET, uri)?.body(Full::default());
        let request = request.map_err(|error| RemoteError::Unreachable(error.to_string()))?;
        let answer = http.send(url.host_str().unwrap_or_default(), request, TIMEOUT, MAX_SIZE, 0).await?;
        if answer.status == StatusCode::OK {
            return Ok(read(&answer.headers, &answer.body));
        }
        if !answer.status.is_redirection() {
            return Ok(if answer.status.is_server_error() { Outcome::Failed } else { Outcome::Absent });
        }
        let next = answer.headers.get(header::LOCATION).and_then(|location| location.to_str().ok());
        match next.and_then(|location| url.join(location).ok()) {
            Some(next) if next.scheme() == "https" => url = next,
            _ => return Ok(Outcome::Absent),
        }
    }
    Ok(Outcome::Absent)
}

#[derive(Deserialize)]
struct Body {
    #[serde(rename = "m.server")]
    server: OwnedServerName,
}

fn read(headers: &HeaderMap, body: &[u8]) -> Outcome {
    match serde_json::from_slice::<Body>(body) {
        Ok(body) => Outcome::Delegates(body.server, lifetime(headers)),
        Err(_) => Outcome::Absent,
    }
}

/// From `Cache-Control`: `max-age`, or nothing at all when it must not be kept (the shortest lifetime then holds).
fn lifetime(headers: &HeaderMap) -> Duration {
    let mut lifetime = None;
    for value in headers.get_all(header::CACHE_CONTROL) {
        for directive in value.to_str().unwrap_or_default().split(',') {
            let directive = directive.trim().to_ascii_lowercase();
            if matches!(directive.as_str(), "no-store" | "no-cache") {
                return Duration::ZERO;
            }
            if let Some(seconds) = directive.strip_prefix("max-age=") {
                lifetime = seconds.trim_matches('"').parse().ok().map(Duration::from_secs);
            }
        }
    }
    lifetime.unwrap_or(DEFAULT_LIFETIME)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> OwnedServerName {
        text.try_into().unwrap()
    }

    fn headers(cache_control: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::CACHE_CONTROL, cache_control.parse().unwrap());
        headers
    }

    #[test]
    fn hc_56_bad_bodies_delegate_to_nothing() {
        for body in [
            "",
            "null",
            "[]",
            "{}",
            r#"{"m.server":1}"#,
            r#"{"m.server":""}"#,
            r#"{"m.server":"a b"}"#,
            r#"{"m.server":"a"#,
        ] {
            assert_eq!(read(&HeaderMap::new(), body.as_bytes()), Outcome::Absent, "{body}");
        }
        let good = read(&HeaderMap::new(), br#"{"m.server":"fed.example:443","other":{}}"#);
        assert_eq!(good, Outcome::Delegates(name("fed.example:443"), DEFAULT_LIFETIME));
    }

    #[test]
    fn hc_56_lifetimes_are_clamped() {
        let now = Instant::now();
        for (header, expected) in [
            ("max-age=3600", HOUR),
            ("public, Max-Age=7200", 2 * HOUR),
            ("max-age=99999999999", MAX_LIFETIME),
            ("max-age=99999999999999999999999999", DEFAULT_LIFETIME),
            ("max-age=-1", DEFAULT_LIFETIME),
            ("max-age=0", MIN_LIFETIME),
            ("no-store", MIN_LIFETIME),
            ("max-age=3600, no-cache", MIN_LIFETIME),
            ("immutable", DEFAULT_LIFETIME),
        ] {
            let outcome = Outcome::Delegates(name("a.example"), lifetime(&headers(header)));
            assert_eq!(remember(None, outcome, now).ask_again, now + expected, "{header}");
        }
    }

    #[test]
    fn hc_56_errors_back_off_and_do_not_undo_a_delegation_at_once() {
        let now = Instant::now();
        let mut entry = remember(None, Outcome::Failed, now);
        assert_eq!((entry.delegate.clone(), entry.ask_again), (None, now + FIRST_BACKOFF));
        for _ in 0..20 {
            let next = remember(Some(&entry), Outcome::Failed, now);
            assert!(next.ask_again >= entry.ask_again && next.ask_again <= now + HOUR);
            entry = next;
        }
        assert_eq!(entry.ask_again, now + HOUR);
        let good = remember(Some(&entry), Outcome::Delegates(name("a.example"), HOUR), now);
        let later = now + 2 * HOUR;
        let kept = remember(Some(&good), Outcome::Failed, later);
        assert_eq!((kept.delegate.clone(), kept.ask_again), (Some(name("a.example")), later + FIRST_BACKOFF));
        assert_eq!(remember(Some(&kept), Outcome::Failed, now + MAX_LIFETIME).delegate, None);
        // Told that there is none, nothing is kept.
        assert_eq!(remember(Some(&kept), Outcome::Absent, later).delegate, None);
    }
}
