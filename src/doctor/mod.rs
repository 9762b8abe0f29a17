//! `isthmus doctor`: walks the deployment, names the cause of what is wrong and what to change. Works beside a running gateway
//! and, by listening in its place, without one.

mod diagnosis;
mod federation;
mod homeserver;
mod local;
#[cfg(test)]
mod tests;
mod witness;

use std::fmt;
use std::sync::Arc;

use self::witness::Witness;
use crate::appservice::Registration;
use crate::clock::SharedClock;
use crate::config::Config;
use crate::identity::SigningKey;

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is as it should be.
    Pass,
    /// It works, but not as it should, or could not be checked.
    Warn,
    /// It does not work.
    Fail,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was checked.
    pub check: &'static str,
    /// How it came out.
    pub outcome: Outcome,
    /// What was found, with its cause when it is bad.
    pub found: String,
    /// What to do about it.
    pub fix: Option<String>,
}

impl Finding {
    fn pass(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, outcome: Outcome::Pass, found: found.into(), fix: None }
    }

    fn warn(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, outcome: Outcome::Warn, found: found.into(), fix: Some(fix.into()) }
    }

    fn fail(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, outcome: Outcome::Fail, found: found.into(), fix: Some(fix.into()) }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.outcome {
            Outcome::Pass => "pass",
            Outcome::Warn => "WARN",
            Outcome::Fail => "FAIL",
        };
        write!(formatter, "{mark}  {}: {}", self.check, self.found)?;
        if let Some(fix) = &self.fix {
            write!(formatter, "\n      -> {fix}")?;
        }
        Ok(())
    }
}

/// Checks everything in turn; `report` is told of each check when it is done.
pub async fn examine(config: &Config, clock: SharedClock, mut report: impl FnMut(&Finding)) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut note = |finding: Finding| {
        report(&finding);
        findings.push(finding);
    };
    let (key, finding) = local::signing_key(config);
    note(finding);
    note(local::database(config).await);
    local::space(config).into_iter().for_each(&mut note);
    note(local::open_files());
    note(local::media(config));
    let registration = config.appservice.as_ref().map(|appservice| Registration::load(&appservice.registration));
    let hs_token = match &registration {
        Some(Ok(registration)) => Some(registration.hs_token.clone()),
        _ => None,
    };
    // With a key that is not written anywhere yet, the answer can still be known for the gateway's own.
    let key = Arc::new(key.unwrap_or_else(SigningKey::generate));
    let (witness, listening) = Witness::call(config, key.clone(), hs_token, clock.clone()).await;
    listening.into_iter().for_each(&mut note);
    if let Some(settings) = &config.appservice {
        match registration {
            Some(Ok(registration)) => {
                local::registration(config, settings, &registration).into_iter().for_each(&mut note);
                homeserver::examine(config, settings, &registration, &witness, &clock, &mut note).await;
            }
            Some(Err(error)) => note(local::unusable(&error)),
            None => {}
        }
    }
    match federation::client(config, key.clone()) {
        Ok(client) => {
            federation::clock(config, &client, &clock).await.into_iter().for_each(&mut note);
            note(federation::own_name(config, &client, key, &witness).await);
        }
        Err(finding) => note(finding),
    }
    witness.dismiss().await;
    findings
}
