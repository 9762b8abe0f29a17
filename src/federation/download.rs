//! Answers that are too large to be held: read as they come, not slower than a pace, by whoever passes them on. What others lead to
//! elsewhere is dialled within the same policy as servers are.

use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _};
use http::response::Parts;
use http::{HeaderMap, Method, StatusCode, Uri, header, request};
use http_body_util::{BodyDataStream, Full};
use hyper::body::Body as _;
use ruma::ServerName;
use tokio::time::Instant;
use url::{Host, Position, Url};

use super::client::{ERROR_LIMIT, failure};
use super::dialler::{Http, Reach, unreachable};
use super::{Client, Pace, RemoteError, x_matrix};

/// How long the body may pause, and how fast it has to come, in bytes a second.
const PAUSE: Duration = Duration::from_secs(20);
const RATE: u32 = 32 << 10;
/// How long an address may be to which an answer leads.
const LONGEST_URL: usize = 4_096;

/// A body as it comes.
pub type Bytewise = BoxStream<'static, Result<Bytes, RemoteError>>;

/// The head of an answer, with its body still to come.
pub enum Opened {
    /// Status 200.
    Body {
        /// Its headers.
        headers: HeaderMap,
        /// What `Content-Length` says; a body of another length ends with an error.
        length: Option<u64>,
        /// The body.
        body: Bytewise,
    },
    /// It is somewhere else.
    Elsewhere(String),
}

impl Client {
    /// Asks `destination` for what is at `uri`, and returns when the head of its answer is there: within `timeout`. Signed as GETs
    /// are, `linearized` or not, when it says which.
    pub async fn open(
        &self,
        destination: &ServerName,
        uri: &str,
        linearized: Option<bool>,
        timeout: Duration,
    ) -> Result<Opened, RemoteError> {
        let opening = async {
            let (http, at) = self.locate(destination, uri).await?;
            let mut request = http.request(Method::GET, at)?;
            if let Some(linearized) = linearized {
                let content = linearized.then_some(b"{}".as_slice());
                let (own, key) = self.own();
                request = request.header(
                    header::AUTHORIZATION,
                    x_matrix::header_for(own, destination, key, &Method::GET, uri, content),
                );
            }
            opened(http, request).await
        };
        in_time(timeout, opening).await
    }

    /// Asks for what is at `url`, to which another server has led, unsigned.
    pub async fn open_elsewhere(&self, url: &str, timeout: Duration) -> Result<Opened, RemoteError> {
        let (http, reach) = self.elsewhere();
        let uri = allowed(url, reach)?;
        in_time(timeout, async { opened(http, http.request(Method::GET, uri)?).await }).await
    }
}

/// An address to which another server has led, if it may be dialled: TLS, or plain to this machine where that is allowed.
fn allowed(text: &str, reach: Reach) -> Result<Uri, RemoteError> {
    let wrong = |problem: &str| RemoteError::BadAnswer(format!("it leads to an address {problem}"));
    if text.len() > LONGEST_URL {
        return Err(wrong("that is too long"));
    }
    let url: Url = text.parse().map_err(|_| wrong("that is no URL"))?;
    let loopback = match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        _ => false,
    };
    let plain = url.scheme() == "http" && loopback && reach == Reach::Everything;
    if url.scheme() != "https" && !plain {
        return Err(wrong("that is not https"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("with a user name"));
    }
    url[..Position::AfterQuery].parse().map_err(|_| wrong("that is no URL"))
}

async fn in_time<T>(
    timeout: Duration,
    opening: impl Future<Output = Result<T, RemoteError>>,
) -> Result<T, RemoteError> {
    // Boxed, or the futures of whoever asks would nest too deeply for the compiler.
    match tokio::time::timeout(timeout, Box::pin(opening)).await {
        Ok(opened) => opened,
        Err(_) => Err(RemoteError::Unreachable(format!("no answer within {timeout:?}"))),
    }
}

async fn opened(http: &Http, request: request::Builder) -> Result<Opened, RemoteError> {
    let request = request.body(Full::default()).map_err(|error| RemoteError::Unreachable(error.to_string()))?;
    let (Parts { status, headers, .. }, body) = http.exchange(request, usize::MAX).await?.into_parts();
    let length = body.size_hint().exact();
    let body = BodyDataStream::new(body).map(|chunk| chunk.map_err(|error| unreachable(&error)));
    let body = paced(body.boxed(), PAUSE, RATE);
    if status == StatusCode::OK {
        return Ok(Opened::Body { headers, length, body });
    }
    if status.is_redirection()
        && let Some(location) = headers.get(header::LOCATION).and_then(|location| location.to_str().ok())
    {
        return Ok(Opened::Elsewhere(location.to_owned()));
    }
    Err(failure(status, &headers, &beginning(body).await))
}

/// As much of an error's body as is read; its status says enough when that does not come.
async fn beginning(mut body: Bytewise) -> Vec<u8> {
    let mut read = Vec::new();
    while let Some(Ok(chunk)) = body.next().await {
        if read.len().saturating_add(chunk.len()) > ERROR_LIMIT {
            break;
        }
        read.extend_from_slice(&chunk);
    }
    read
}

/// A body that must come at a pace; the time that its reader takes does not count.
fn paced(body: Bytewise, pause: Duration, rate: u32) -> Bytewise {
    let begin = (body, Pace::new(pause, rate), Instant::now());
    let read = move |(mut body, mut pace, since): (Bytewise, Pace, Instant)| async move {
        pace.resume(since);
        let Ok(chunk) = tokio::time::timeout_at(pace.until(), body.next()).await else {
            let problem = format!("its answer paused for {pause:?}, or comes too slowly");
            return Err(RemoteError::Unreachable(problem));
        };
        let Some(chunk) = chunk.transpose()? else { return Ok(None) };
        pace.took(chunk.len());
        Ok(Some((chunk, (body, pace, Instant::now()))))
    };
    stream::try_unfold(begin, read).boxed()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::federation::ClientOptions;
    use crate::identity::SigningKey;

    fn client() -> Client {
        let key = Arc::new(SigningKey::generate());
        Client::new("g.example".try_into().unwrap(), key, ClientOptions::default()).unwrap()
    }

    #[tokio::test]
    async fn a_body_that_comes_too_slowly_is_given_up_and_a_slow_reader_costs_it_nothing() {
        let (pause, chunk) = (Duration::from_millis(200), || Ok(Bytes::from_static(b"x")));
        let stalls = stream::iter([chunk()]).chain(stream::pending()).boxed();
        let read: Vec<_> = paced(stalls, pause, 1 << 20).collect().await;
        assert!(matches!(read.as_slice(), [Ok(_), Err(RemoteError::Unreachable(_))]), "{read:?}");
        let trickles = stream::iter(std::iter::repeat_with(chunk)).then(|chunk| async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            chunk
        });
        let read: Vec<_> = paced(trickles.boxed(), pause, 1 << 20).collect().await;
        assert!((2..1_000).contains(&read.len()) && read.last().unwrap().is_err(), "{}", read.len());
        let mut whole = paced(stream::iter([chunk(), chunk()]).boxed(), Duration::from_millis(50), 1);
        assert!(whole.next().await.unwrap().is_ok());
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(whole.next().await.unwrap().is_ok() && whole.next().await.is_none());
    }

    #[tokio::test]
    async fn hc_57_hc_59_no_redirect_leads_into_private_networks_or_out_of_tls() {
        for url in [
            "https://127.0.0.1/x",
            "https://169.254.169.254/latest/meta-data",
            "https://[::1]/x",
            "https://localhost/x",
            "https://0x7f.1/x",
            "http://127.0.0.1:1/x",
            "http://cdn.example/x",
            "https://user:password@cdn.example/x",
            "file:///etc/passwd",
            "ftp://cdn.example/x",
            "/relative",
            "",
            &format!("https://cdn.example/{}", "x".repeat(5_000)),
        ] {
            let answer = client().open_elsewhere(url, Duration::from_secs(5)).await;
            let error = answer.err().unwrap().to_string();
            assert!(error.contains("leads to an address") || error.contains("may not be dialled"), "{url}: {error}");
        }
        for url in ["http://192.0.2.1/x", "http://cdn.example/x", "gopher://127.0.0.1/x"] {
            assert!(allowed(url, Reach::Everything).is_err(), "{url}");
        }
        assert!(allowed("http://127.0.0.1:1/x", Reach::Everything).is_ok());
    }
}
