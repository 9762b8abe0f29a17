//! The other servers: signed requests to them, their keys, and the check of what they sign.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use http::{HeaderMap, Method, StatusCode};
use isthmus::event::{Object, Pdu, VerifyKey, VerifyKeys, canonical_json, verify_object};
use isthmus::federation::authorization_header;
use isthmus::identity::SigningKey;
use ruma::api::federation::authentication::XMatrix;
use ruma::{OwnedServerName, ServerName};
use serde_json::{Value, json};
use url::Url;

use super::server::Fault;

/// The draft's endpoints as they are called until it is finished.
pub const UNSTABLE: &str = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02";

type Keys = BTreeMap<String, VerifyKey>;

/// The way to other servers.
pub struct Network {
    pub server_name: OwnedServerName,
    pub key: Arc<SigningKey>,
    http: reqwest::Client,
    resolve: BTreeMap<OwnedServerName, Url>,
    known: Mutex<HashMap<OwnedServerName, Keys>>,
}

impl Network {
    pub fn new(
        server_name: OwnedServerName,
        key: Arc<SigningKey>,
        ca: Option<&std::path::Path>,
        resolve: BTreeMap<OwnedServerName, Url>,
    ) -> Result<Self> {
        // Whoever is first installs it for the process.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let mut builder = reqwest::Client::builder().timeout(Duration::from_secs(60));
        if let Some(ca) = ca {
            let pem = std::fs::read(ca).with_context(|| format!("reading {}", ca.display()))?;
            builder = builder.tls_certs_merge([reqwest::Certificate::from_pem(&pem)?]);
        }
        Ok(Self { server_name, key, http: builder.build()?, resolve, known: Mutex::default() })
    }

    fn base(&self, server: &ServerName) -> String {
        match self.resolve.get(server) {
            Some(url) => url.as_str().trim_end_matches('/').to_owned(),
            None if server.port().is_some() => format!("https://{server}"),
            None => format!("https://{server}:8448"),
        }
    }

    /// A signed request. Where there is no body, `{}` is signed, as the draft has it.
    pub async fn call(
        &self,
        to: &ServerName,
        method: Method,
        path: &str,
        body: Option<&Object>,
    ) -> Result<Object, Fault> {
        let none = Object::new();
        let content = body.unwrap_or(&none);
        let header = authorization_header(&self.server_name, to, &self.key, &method, path, Some(content));
        let mut request = self.http.request(method, format!("{}{path}", self.base(to)));
        request = request.header(http::header::AUTHORIZATION, header);
        if let Some(body) = body {
            request = request.header(http::header::CONTENT_TYPE, "application/json").body(canonical_json(body));
        }
        let unreachable = |error: reqwest::Error| Fault::unreachable(to, &error);
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        let answer: Object = response.json().await.map_err(unreachable)?;
        if status.is_success() {
            return Ok(answer);
        }
        let text = |key: &str| answer.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        Err(Fault { status, errcode: text("errcode"), error: text("error") })
    }

    /// What a signed GET is answered with, as it is.
    pub async fn get(&self, to: &ServerName, path: &str) -> Result<(HeaderMap, Vec<u8>)> {
        let header = authorization_header(&self.server_name, to, &self.key, &Method::GET, path, Some(&Object::new()));
        let request = self.http.get(format!("{}{path}", self.base(to)));
        let response = request.header(http::header::AUTHORIZATION, header).send().await?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body = response.bytes().await?;
        ensure!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&body));
        Ok((headers, body.to_vec()))
    }

    /// A request to one of the draft's endpoints: under its unstable name, then, where that is not known, under its final one.
    pub async fn call_lm(
        &self,
        to: &ServerName,
        method: Method,
        version: &str,
        path: &str,
        body: Option<&Object>,
    ) -> Result<Object, Fault> {
        match self.call(to, method.clone(), &format!("{UNSTABLE}/{path}"), body).await {
            Err(fault) if fault.errcode == "M_UNRECOGNIZED" => {
                self.call(to, method, &format!("/_matrix/federation/{version}/{path}"), body).await
            }
            answer => answer,
        }
    }

    /// The keys of a server, asked for anew when one of `wanted` is not known yet.
    pub async fn keys(&self, server: &ServerName, wanted: &[String]) -> Result<Keys> {
        if server == self.server_name {
            let own = VerifyKey::from_base64(&self.key.public_base64())?;
            return Ok(Keys::from([(self.key.id().to_owned(), own)]));
        }
        let known = |known: &HashMap<OwnedServerName, Keys>| known.get(server).cloned();
        if let Some(keys) = self.known.lock().ok().and_then(|lock| known(&lock))
            && wanted.iter().all(|id| keys.contains_key(id))
        {
            return Ok(keys);
        }
        let url = format!("{}/_matrix/key/v2/server", self.base(server));
        let answer: Object = self.http.get(url).send().await?.json().await?;
        ensure!(answer.get("server_name").and_then(Value::as_str) == Some(server.as_str()), "keys of another server");
        let mut keys = Keys::new();
        for (id, key) in answer.get("verify_keys").and_then(Value::as_object).into_iter().flatten() {
            let key = key.get("key").and_then(Value::as_str).ok_or_else(|| anyhow!("no key in {id}"))?;
            keys.insert(id.clone(), VerifyKey::from_base64(key)?);
        }
        verify_object(&answer, server.as_str(), &keys)?;
        if let Ok(mut known) = self.known.lock() {
            known.insert(server.to_owned(), keys.clone());
        }
        Ok(keys)
    }

    /// The keys that are needed to check the signatures of an event by `servers`.
    pub async fn keys_for(&self, event: &Object, servers: &[OwnedServerName]) -> Result<VerifyKeys> {
        let mut keys = VerifyKeys::new();
        for server in servers {
            let signed = event.get("signatures").and_then(|all| all.get(server.as_str())).and_then(Value::as_object);
            let wanted: Vec<String> = signed.into_iter().flat_map(|signed| signed.keys().cloned()).collect();
            keys.insert(server.clone(), self.keys(server, &wanted).await?);
        }
        Ok(keys)
    }

    /// Checks the signatures that a finished event must have.
    pub async fn verify(&self, event: &Pdu) -> Result<()> {
        let keys = self.keys_for(&event.json, &event.required_signers()).await?;
        Ok(event.verify_signatures(&keys, isthmus::event::Redaction::Draft)?)
    }

    /// The server that signed a request to us.
    pub async fn origin(
        &self,
        method: &Method,
        uri: &str,
        headers: &HeaderMap,
        body: Option<&Object>,
    ) -> Result<OwnedServerName> {
        let mut origin = None;
        for header in headers.get_all(http::header::AUTHORIZATION) {
            let header = XMatrix::parse(header.to_str()?)?;
            ensure!(header.destination.as_deref() == Some(&*self.server_name), "not signed for {}", self.server_name);
            let id = header.key.to_string();
            let keys = self.keys(&header.origin, std::slice::from_ref(&id)).await?;
            let key = keys.get(&id).ok_or_else(|| anyhow!("{} has no key {id}", header.origin))?;
            let message = |content: Option<&Object>| {
                let mut signed = json!({ "method": method.as_str(), "uri": uri, "origin": header.origin,
                    "destination": self.server_name });
                if let (Some(content), Some(signed)) = (content, signed.as_object_mut()) {
                    signed.insert("content".to_owned(), Value::Object(content.clone()));
                }
                signed.as_object().map(canonical_json).unwrap_or_default()
            };
            let signature = header.sig.encode();
            let forms = match body {
                Some(body) => vec![message(Some(body))],
                None => vec![message(None), message(Some(&Object::new()))],
            };
            if !forms.iter().any(|form| key.verify(form, &signature).is_ok()) {
                bail!("the signature of {} does not verify", header.origin);
            }
            ensure!(origin.is_none_or(|before| before == header.origin), "signed by two servers");
            origin = Some(header.origin);
        }
        origin.ok_or_else(|| anyhow!("the request is not signed"))
    }
}

impl Fault {
    fn unreachable(server: &ServerName, error: &reqwest::Error) -> Self {
        let error = format!("{server}: {}", error.to_string().chars().take(300).collect::<String>());
        Self { status: StatusCode::BAD_GATEWAY, errcode: String::new(), error }
    }
}

/// A path segment, percent-encoded.
pub fn segment(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}
