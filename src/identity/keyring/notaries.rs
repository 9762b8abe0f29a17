//! Asking notaries: other servers are believed about the keys of one that does not answer, as far as the admin names them. What they
//! give must be signed by them and by the server itself, and, where keys of that server are known, by one of those.
//! Source: draft-ralston-mimi-linearized-matrix-04, section "Retrieving Server Keys" (`int-transport-get-server-keys`).

use std::sync::Arc;
use std::time::Duration;

use ruma::ServerName;
use serde_json::Value;

use super::{Inner, Told};
use crate::event::{Object, verify_object};
use crate::identity::server_keys::{ServerKeys, Validity};
use crate::refusal::Refusal;

/// How long all notaries together may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// How many answers of one server a notary is believed to remember.
const ANSWERS: usize = 8;

impl Inner {
    /// What the first notary that knows something says of `server`, added to what was known before. Notaries do not vouch for each
    /// other.
    pub(super) async fn ask_notaries(
        self: &Arc<Self>,
        server: &ServerName,
        before: Option<&ServerKeys>,
        now_ms: i64,
    ) -> Option<Told> {
        let notaries = &self.trust.notaries;
        if notaries.iter().any(|notary| notary == server) {
            return None;
        }
        let asking = async {
            for notary in notaries {
                match self.ask_notary(notary, server, before, now_ms).await {
                    Ok(told) => return Some(told),
                    Err(problem) => tracing::info!(%server, %notary, problem, "a notary is of no help"),
                }
            }
            None
        };
        tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| {
            tracing::info!(%server, "no notary has answered in time");
            None
        })
    }

    async fn ask_notary(
        self: &Arc<Self>,
        notary: &ServerName,
        server: &ServerName,
        before: Option<&ServerKeys>,
        now_ms: i64,
    ) -> Result<Told, String> {
        // Such as are valid now; or else any, with which what was signed in their time can be checked.
        let mut told = ServerKeys::none(server);
        let mut problem = "it knows nothing".to_owned();
        for minimum in [now_ms, 0] {
            let answer = self.fetcher.ask_notary(notary, server, minimum).await;
            let answer = answer.map_err(|refusal| refusal.to_string())?;
            let entries = answer.get("server_keys").and_then(Value::as_array).ok_or("server_keys is no array")?;
            for entry in entries.iter().filter_map(Value::as_object).take(ANSWERS) {
                let vouched = self.vouched(notary, server, entry, now_ms).await.and_then(|keys| {
                    before.map_or(Ok(()), |before| before.may_be_told(&keys, entry, now_ms))?;
                    Ok(keys)
                });
                match vouched {
                    Ok(keys) => told = ServerKeys::and_by_notary(Some(&told), keys, now_ms)?,
                    Err(why) => problem = why,
                }
            }
            if !told.current.is_empty() {
                // Whoever asks this server as a notary gets what it was told by the servers themselves alone.
                let keys = ServerKeys::and_by_notary(before, told, now_ms)?;
                return Ok(Told { keys, answers: Vec::new() });
            }
        }
        Err(problem)
    }

    /// The keys in one of a notary's answers, when it and the server have signed them.
    async fn vouched(
        self: &Arc<Self>,
        notary: &ServerName,
        server: &ServerName,
        entry: &Object,
        now_ms: i64,
    ) -> Result<ServerKeys, String> {
        let signatures = entry.get("signatures").and_then(|all| all.get(notary.as_str())).and_then(Value::as_object);
        let wanted: Vec<&str> =
            signatures.into_iter().flat_map(|keys| keys.keys().map(String::as_str)).take(20).collect();
        let lookup = self.lookup(notary, None).await;
        let known = lookup.keys.as_ref().ok_or("the notary's own keys are not to be had")?;
        let valid = |id: &&str| Some(((*id).to_owned(), known.key(id, Validity::Now, now_ms)?.clone()));
        let keys = wanted.iter().filter_map(valid).collect();
        let shown = |refusal: Refusal| refusal.to_string();
        verify_object(entry, notary.as_str(), &keys).map_err(shown)?;
        ServerKeys::check(entry, server, now_ms, &self.trust.denied)
    }
}
