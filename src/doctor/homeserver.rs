//! The checks that need the homeserver.

use http::StatusCode;
use rand::Rng as _;
use rand::rngs::OsRng;
use url::Url;

use super::Finding;
use super::diagnosis::{self, AsToken, Leads, Ping};
use super::witness::{Seen, Witness};
use crate::appservice::{Homeserver, Registration};
use crate::clock::SharedClock;
use crate::config::{self, Config};

/// Checks in turn whether the homeserver is there, knows the appservice, reaches it, and asks it over federation.
pub(super) async fn examine(
    config: &Config,
    settings: &config::Appservice,
    registration: &Registration,
    witness: &Witness,
    clock: &SharedClock,
    note: &mut impl FnMut(Finding),
) {
    let homeserver =
        Homeserver::new(settings.homeserver_url.clone(), registration.as_token.clone(), &config.federation.custom_ca);
    let homeserver = match homeserver {
        Ok(homeserver) => homeserver,
        Err(error) => {
            let fix = "correct `federation.custom_ca`, or install the system's certificate authorities";
            return note(Finding::fail("homeserver", error.to_string(), fix));
        }
    };
    let there = homeserver.versions().await;
    note(diagnosis::reached(settings.homeserver_url.as_str(), &there));
    let Ok(date) = there else { return };
    note(diagnosis::clocks("the homeserver", date.as_deref(), clock.now_ms()));
    let says = homeserver.server_name().await;
    if let Some(other) =
        diagnosis::another(settings.homeserver_url.as_str(), &settings.homeserver_name, says.as_deref())
    {
        return note(other);
    }

    let sender = match registration.sender(&settings.homeserver_name) {
        Ok(sender) => sender,
        Err(error) => {
            let found = format!("sender_localpart makes no user ID: {error}");
            return note(Finding::fail("registration", found, "run `isthmus register` again and restart Synapse"));
        }
    };
    let answer = homeserver.whoami().await;
    let probe = match &answer {
        Ok(_) => None,
        Err(_) => arrives(&homeserver, settings, witness).await,
    };
    let is_known = answer.is_ok();
    let file = settings.registration.display().to_string();
    note(diagnosis::as_token(&AsToken {
        file: &file,
        answer: &answer,
        homeserver_name: &settings.homeserver_name,
        sender: &sender,
        probe,
    }));
    if is_known {
        note(ping(config, settings, &homeserver, registration, witness).await);
    }
    let nobody = format!("#doctor-{}:{}", random(), config.server_name);
    note(diagnosis::federation(&config.server_name, &homeserver.look_up(&nobody).await));
}

async fn ping(
    config: &Config,
    settings: &config::Appservice,
    homeserver: &Homeserver,
    registration: &Registration,
    witness: &Witness,
) -> Finding {
    let file = settings.registration.display().to_string();
    let leads = leads(config, registration, witness).await;
    let transaction_id = format!("doctor-{}", random());
    let before = witness.seen().await;
    let answer = homeserver.ping(&registration.id, &transaction_id).await.map(drop);
    let after = witness.seen().await;
    let url = registration.url.as_deref().unwrap_or("nothing");
    let transaction_id = &transaction_id;
    diagnosis::ping(&Ping { file: &file, url, leads, transaction_id, answer: &answer, before, after })
}

/// Where the registration's URL leads from this machine.
async fn leads(config: &Config, registration: &Registration, witness: &Witness) -> Leads {
    let Some(url) = registration.url.as_deref().and_then(|url| Url::parse(url).ok()) else { return Leads::Elsewhere };
    let transaction_id = format!("doctor-{}", random());
    let Ok(caller) = Homeserver::new(url, registration.hs_token.clone(), &config.federation.custom_ca) else {
        return Leads::Elsewhere;
    };
    let before = witness.seen().await;
    let answer = caller.call_appservice(&transaction_id).await;
    let after = witness.seen().await;
    let refused = |seen: &Option<Seen>| seen.as_ref().map_or(0, |seen| seen.refused);
    match answer {
        Ok(()) if after.as_ref().is_none_or(|seen| seen.ping == Some(transaction_id)) => Leads::Here,
        Err(error) if error.status() == Some(StatusCode::FORBIDDEN) && refused(&after) > refused(&before) => {
            Leads::HereWithAnotherToken
        }
        _ => Leads::Elsewhere,
    }
}

/// Without a token that the homeserver knows there is still one thing that makes it call its appservice: somebody asks for an
/// alias in the appservice's namespace. What arrived of that?
async fn arrives(homeserver: &Homeserver, settings: &config::Appservice, witness: &Witness) -> Option<Seen> {
    let before = witness.seen().await?;
    // Of a form that the gateway refuses without asking anybody.
    let nobody = format!("#lm_doctor-{}:{}", random(), settings.homeserver_name);
    let _ = homeserver.look_up(&nobody).await;
    let after = witness.seen().await?;
    Some(Seen {
        calls: after.calls.saturating_sub(before.calls),
        refused: after.refused.saturating_sub(before.refused),
        ping: None,
    })
}

fn random() -> String {
    format!("{:08x}", OsRng.r#gen::<u32>())
}
