//! From what was answered to its cause. Pure: one input, one finding.

use http::StatusCode;
use ruma::{ServerName, UserId};

use super::Finding;
use super::witness::Seen;
use crate::appservice::HomeserverError;

/// Clocks that differ by more than this are worth a word, in milliseconds.
const SKEW_WARN: i64 = 10_000;
/// Clocks that differ by more than this break things.
const SKEW_FAIL: i64 = 60_000;

const CLOCK: &str = "clock";

/// `GET /versions`.
pub(super) fn reached(url: &str, answer: &Result<Option<String>, HomeserverError>) -> Finding {
    const CHECK: &str = "homeserver";
    match answer {
        Ok(_) => Finding::pass(CHECK, format!("{url} answers")),
        Err(HomeserverError::Status { .. } | HomeserverError::BadAnswer(_)) => Finding::fail(
            CHECK,
            format!("something answers at {url}, but no Matrix client API: {}", shown(answer)),
            "correct `appservice.homeserver_url`: it is the URL to which /_matrix/client is added",
        ),
        Err(error) => Finding::fail(
            CHECK,
            format!("Synapse is not reachable at {url}: {error}"),
            "start Synapse, or correct `appservice.homeserver_url`",
        ),
    }
}

/// Whether the server at the URL says that it is another than the configuration has it.
pub(super) fn another(url: &str, configured: &ServerName, says: Option<&str>) -> Option<Finding> {
    let says = says.filter(|says| *says != configured.as_str())?;
    Some(Finding::fail(
        "homeserver",
        format!("{url} is the homeserver {says}, but `appservice.homeserver_name` is {configured}"),
        "correct `appservice.homeserver_url`; if it is the name that is wrong, correct it, run `isthmus register` again, and \
         restart Synapse",
    ))
}

/// Another server's `Date` against this machine's clock.
pub(super) fn clocks(server: &str, date: Option<&str>, now_ms: i64) -> Finding {
    let theirs = date.and_then(|date| httpdate::parse_http_date(date).ok());
    let theirs = theirs.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    let Some(theirs) = theirs.and_then(|since| i64::try_from(since.as_millis()).ok()) else {
        return Finding::warn(CLOCK, format!("{server}'s answer has no Date to compare with"), "check it by hand");
    };
    // The Date has no fractions of a second.
    let skew = now_ms.saturating_sub(theirs.saturating_add(500));
    let seconds = skew.unsigned_abs() / 1000;
    let direction = if skew > 0 { "ahead of" } else { "behind" };
    let found = format!("this machine's clock is {seconds} s {direction} {server}'s");
    let fix = "synchronize both machines by NTP: events and keys with times in the future are refused by other servers";
    match skew.saturating_abs() {
        skew if skew > SKEW_FAIL => Finding::fail(CLOCK, found, fix),
        skew if skew > SKEW_WARN => Finding::warn(CLOCK, found, fix),
        _ => Finding::pass(CLOCK, format!("it agrees with {server}'s")),
    }
}

/// No server on another machine could be asked for its time.
pub(super) fn clock_is_alone() -> Finding {
    Finding::warn(
        CLOCK,
        "it was compared with no server on another machine, so nobody knows whether it is right",
        "see to it that NTP keeps it (`timedatectl` says whether); servers that `federation.resolve`, `access.hubs` or \
         `access.matrix_servers` name are asked for their time",
    )
}

/// What is known when the as_token was tried.
pub(super) struct AsToken<'a> {
    /// The registration file.
    pub(super) file: &'a str,
    /// `GET /account/whoami` with it.
    pub(super) answer: &'a Result<String, HomeserverError>,
    /// The homeserver's name in the configuration.
    pub(super) homeserver_name: &'a ServerName,
    /// The appservice's user.
    pub(super) sender: &'a UserId,
    /// What arrived of a look-up that the homeserver passes on to its appservice, when the token was not known.
    pub(super) probe: Option<Seen>,
}

/// Whether the homeserver knows the as_token, and if not, why.
pub(super) fn as_token(input: &AsToken<'_>) -> Finding {
    const CHECK: &str = "as_token";
    let AsToken { file, answer, homeserver_name, sender, probe } = input;
    match answer {
        Ok(user_id) if user_id == sender.as_str() => {
            Finding::pass(CHECK, format!("the homeserver knows it as {user_id}'s"))
        }
        Ok(user_id) => {
            let theirs = UserId::parse(user_id).ok();
            match theirs.filter(|user_id| user_id.server_name() != *homeserver_name) {
                Some(user_id) => Finding::fail(
                    CHECK,
                    format!(
                        "the homeserver's name is {}, but `appservice.homeserver_name` is {homeserver_name}",
                        user_id.server_name()
                    ),
                    "correct it, run `isthmus register` again, and restart Synapse",
                ),
                None => Finding::fail(
                    CHECK,
                    format!("the homeserver knows it as {user_id}'s, not {sender}'s: it has another registration"),
                    format!("let app_service_config_files in homeserver.yaml name {file}, and restart Synapse"),
                ),
            }
        }
        Err(error) if error.errcode() == "M_UNKNOWN_TOKEN" || error.status() == Some(StatusCode::UNAUTHORIZED) => {
            match probe {
                Some(Seen { calls, .. }) if *calls > 0 => Finding::fail(
                    CHECK,
                    format!(
                        "wrong as_token: Synapse has loaded a registration of isthmus, but its as_token is not the one in {file}"
                    ),
                    format!("give Synapse the same file {file} and restart it"),
                ),
                Some(Seen { refused, .. }) if *refused > 0 => Finding::fail(
                    CHECK,
                    format!(
                        "Synapse has loaded a registration of isthmus with other tokens than {file}, perhaps an older one"
                    ),
                    format!("give Synapse the file {file} and restart it"),
                ),
                _ => Finding::fail(
                    CHECK,
                    format!("the registration is not loaded: Synapse does not know the as_token of {file}"),
                    format!("add {file} to app_service_config_files in homeserver.yaml and restart Synapse"),
                ),
            }
        }
        Err(error) => Finding::fail(CHECK, format!("it could not be tried: {error}"), "look at Synapse's log"),
    }
}

/// Where the registration's URL leads from this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leads {
    /// To this gateway.
    Here,
    /// To this gateway, which knows another hs_token than the registration file has.
    HereWithAnotherToken,
    /// Somewhere else, or nowhere.
    Elsewhere,
}

/// What is known when the homeserver was asked to ping.
pub(super) struct Ping<'a> {
    /// The registration file.
    pub(super) file: &'a str,
    /// The URL in the registration file; the homeserver may have loaded another.
    pub(super) url: &'a str,
    /// Where that URL leads.
    pub(super) leads: Leads,
    /// The transaction ID that was sent.
    pub(super) transaction_id: &'a str,
    /// What the homeserver answered.
    pub(super) answer: &'a Result<(), HomeserverError>,
    /// What had arrived before.
    pub(super) before: Option<Seen>,
    /// What had arrived after.
    pub(super) after: Option<Seen>,
}

/// Whether the homeserver reaches the gateway, and if not, why.
pub(super) fn ping(input: &Ping<'_>) -> Finding {
    const CHECK: &str = "ping";
    let Ping { file, url, leads, transaction_id, answer, before, after } = input;
    let set_url =
        "run `isthmus register --url URL` with a URL at which Synapse reaches this gateway, and restart Synapse";
    let wrong_url = |what: &str| match leads {
        Leads::Here | Leads::HereWithAnotherToken => Finding::fail(
            CHECK,
            format!(
                "Synapse does not reach this gateway: it {what}; but {url}, which the registration file has, leads here from \
                 this machine"
            ),
            format!("restart Synapse, which may have loaded an older file; if that does not help, {set_url}"),
        ),
        Leads::Elsewhere => Finding::fail(
            CHECK,
            format!(
                "wrong URL in the registration: {url} does not lead to this gateway from this machine, and Synapse {what}"
            ),
            set_url,
        ),
    };
    let arrived_refused = match (before, after) {
        (Some(before), Some(after)) => Some(after.refused > before.refused),
        _ => None,
    };
    let error = match answer {
        Ok(()) => {
            return match after {
                Some(seen) if seen.ping.as_deref() != Some(*transaction_id) => {
                    wrong_url("called something that is not this gateway")
                }
                Some(_) if *leads == Leads::HereWithAnotherToken => Finding::fail(
                    CHECK,
                    format!(
                        "wrong hs_token: {file} has another than the one by which the running gateway and Synapse still know \
                         each other"
                    ),
                    "restart Synapse and the gateway, so that both read the file, or bring back the file that they have read",
                ),
                Some(_) => Finding::pass(CHECK, "Synapse reaches this gateway with the right hs_token"),
                None => {
                    Finding::warn(CHECK, format!("{url} answered Synapse"), "whether it was this gateway is not known")
                }
            };
        }
        Err(error) => error,
    };
    let HomeserverError::Status { errcode, error: text, body, .. } = error else {
        return Finding::fail(CHECK, format!("Synapse did not answer: {error}"), "look at Synapse's log");
    };
    match errcode.as_str() {
        "M_URL_NOT_SET" => {
            let found = "the registration that Synapse has loaded has no URL, so Synapse never calls this gateway";
            Finding::fail(CHECK, found, set_url)
        }
        "M_CONNECTION_FAILED" => wrong_url(&format!("could not connect: {text}")),
        "M_CONNECTION_TIMEOUT" => wrong_url("got no answer in time, perhaps because of a firewall"),
        "M_BAD_STATUS" => {
            let status = body.get("status").and_then(serde_json::Value::as_u64).unwrap_or_default();
            match (status, arrived_refused) {
                (401 | 403, Some(true) | None) => Finding::fail(
                    CHECK,
                    "wrong hs_token: Synapse reaches this gateway with another hs_token than the registration file's",
                    "give Synapse the same registration file and restart it (the gateway too, if the file is newer)",
                ),
                _ => wrong_url(&format!("got {status} from something that is not this gateway")),
            }
        }
        "M_UNRECOGNIZED" => Finding::warn(
            CHECK,
            "this homeserver cannot ping appservices, so whether it reaches the gateway was not checked",
            "update it",
        ),
        _ => Finding::fail(CHECK, format!("Synapse refused to ping: {error}"), "look at Synapse's log"),
    }
}

/// Whether the homeserver asks the gateway over federation.
pub(super) fn federation(server_name: &ServerName, answer: &Result<(), HomeserverError>) -> Finding {
    const CHECK: &str = "federation with the homeserver";
    match answer {
        Ok(()) => Finding::pass(CHECK, format!("the homeserver asks {server_name}")),
        Err(error) if error.status() == Some(StatusCode::NOT_FOUND) => {
            Finding::pass(CHECK, format!("the homeserver asks {server_name}"))
        }
        Err(error) => Finding::fail(
            CHECK,
            format!("the homeserver cannot ask {server_name} over federation: {error}"),
            format!(
                "from the homeserver's machine, {server_name} must resolve and be reached with a certificate that Synapse \
                 trusts (federation_custom_ca_list), at an address that federation_ip_range_blacklist and \
                 federation_domain_whitelist allow; and this gateway must reach the homeserver's keys"
            ),
        ),
    }
}

/// What is known when the gateway's own server name was resolved as a peer would.
pub(super) struct OwnName<'a> {
    /// The name.
    pub(super) server_name: &'a ServerName,
    /// The key that the gateway has.
    pub(super) key: (&'a str, String),
    /// Whether the gateway or the doctor in its place listens.
    pub(super) listens: bool,
    /// What came back: its server name and the public key under the gateway's key ID, or why nothing.
    pub(super) answer: Result<(Option<String>, Option<String>), String>,
}

/// Whether the server name leads back to the gateway.
pub(super) fn own_name(input: &OwnName<'_>) -> Finding {
    const CHECK: &str = "server name";
    let OwnName { server_name, key: (key_id, public), listens, answer } = input;
    let lead = "let DNS, or .well-known/matrix/server (`listen.well_known` says what this gateway answers there), or an SRV \
                record of this name lead to this gateway's listener or to the reverse proxy before it";
    match answer {
        Ok((name, _)) if name.as_deref() != Some(server_name.as_str()) => {
            let name = name.as_deref().unwrap_or("nobody");
            let found = format!("{server_name} does not lead to this gateway: the server there says that it is {name}");
            Finding::fail(CHECK, found, lead)
        }
        Ok((_, Some(found))) if found == public => {
            Finding::pass(CHECK, format!("{server_name} leads back to this gateway, which has the key {key_id}"))
        }
        Ok(_) => Finding::fail(
            CHECK,
            format!("{server_name} leads to a server that does not have this gateway's key {key_id}"),
            format!("{lead}; or, if the running gateway has another key, restart it"),
        ),
        Err(problem) => {
            let (cause, fix) = unreached(problem, *listens, lead);
            Finding::fail(CHECK, format!("{server_name} does not lead back to this gateway: {cause}"), fix)
        }
    }
}

fn unreached(problem: &str, listens: bool, lead: &str) -> (String, String) {
    let has = |part: &str| problem.contains(part);
    if has("may not be dialled") {
        let fix = "let it resolve to a public address, or set `federation.allow_private_networks` where all servers are on \
                   private networks";
        return (format!("its address is private ({problem})"), fix.to_owned());
    }
    if has("corrupt message") || has("InvalidContentType") {
        let fix = "give the listener a certificate (`listen.tls_certificate` and `listen.tls_private_key`), or let the name lead \
                   to a reverse proxy that has one";
        return (format!("what is there answers in plain http ({problem})"), fix.to_owned());
    }
    if has("certificate") {
        let cause = if has("Expired") || has("expired") {
            "its certificate has expired"
        } else if has("NotValidForName") || has("not valid for name") {
            "its certificate is for another name"
        } else if has("UnknownIssuer") || has("unknown issuer") || has("self-signed") {
            "its certificate is of an authority that is not trusted"
        } else {
            "its certificate is not accepted"
        };
        let fix = "give the listener or the reverse proxy a certificate for this name with its whole chain, of an authority \
                   that other servers trust (a private one goes into `federation.custom_ca`)";
        return (format!("{cause} ({problem})"), fix.to_owned());
    }
    if !listens {
        return (problem.to_owned(), format!("nothing listens here, see above; then {lead}"));
    }
    (problem.to_owned(), lead.to_owned())
}

fn shown<T>(answer: &Result<T, HomeserverError>) -> String {
    answer.as_ref().err().map(ToString::to_string).unwrap_or_default()
}
