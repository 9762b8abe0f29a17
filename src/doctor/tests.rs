//! Each cause is told from the others by what was answered.

use http::StatusCode;
use ruma::{server_name, user_id};
use serde_json::{Map, Value, json};

use super::diagnosis::{AsToken, Leads, OwnName, Ping, another, as_token, clocks, own_name, ping, reached};
use super::witness::Seen;
use super::{Finding, Outcome};
use crate::appservice::HomeserverError;

fn status(status: u16, body: Value) -> HomeserverError {
    let body: Map<String, Value> = body.as_object().unwrap().clone();
    let text = |name: &str| body.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    HomeserverError::Status {
        status: StatusCode::from_u16(status).unwrap(),
        errcode: text("errcode"),
        error: text("error"),
        body: body.clone(),
    }
}

fn expect(finding: &Finding, outcome: Outcome, found: &str) {
    assert!(finding.outcome == outcome && finding.found.contains(found), "{found}: got\n{finding}");
    assert_eq!(finding.fix.is_none(), outcome == Outcome::Pass, "{finding}");
}

#[test]
fn the_homeserver_is_there_or_not() {
    let url = "http://127.0.0.1:8008/";
    expect(&reached(url, &Ok(None)), Outcome::Pass, url);
    let refused = HomeserverError::Unreachable("Connection refused".to_owned());
    expect(
        &reached(url, &Err(refused)),
        Outcome::Fail,
        "Synapse is not reachable at http://127.0.0.1:8008/: not reach",
    );
    expect(&reached(url, &Err(status(404, json!({})))), Outcome::Fail, "no Matrix client API");
    expect(&reached(url, &Err(HomeserverError::BadAnswer(String::new()))), Outcome::Fail, "no Matrix client API");
}

#[test]
fn another_homeserver_is_told_by_its_name() {
    let found = |says| another("http://hs", server_name!("hs.example"), says);
    assert!(found(None).is_none() && found(Some("hs.example")).is_none());
    expect(&found(Some("other.example")).unwrap(), Outcome::Fail, "http://hs is the homeserver other.example, but");
}

#[test]
fn clocks_that_differ() {
    let date = Some("Thu, 01 Jan 2026 00:00:00 GMT");
    let same = 1_767_225_600_000;
    for (now, outcome, found) in [
        (same, Outcome::Pass, "it agrees"),
        (same + 9_000, Outcome::Pass, "it agrees"),
        (same + 30_000, Outcome::Warn, "29 s ahead of the homeserver's"),
        (same - 30_000, Outcome::Warn, "30 s behind the homeserver's"),
        (same + 3_600_000, Outcome::Fail, "3599 s ahead of"),
        (i64::MAX, Outcome::Fail, "ahead of"),
        (i64::MIN, Outcome::Fail, "behind"),
    ] {
        expect(&clocks("the homeserver", date, now), outcome, found);
    }
    expect(&clocks("the homeserver", None, same), Outcome::Warn, "no Date");
    expect(&clocks("the homeserver", Some("yesterday"), same), Outcome::Warn, "no Date");
}

#[test]
fn as_tokens() {
    let unknown = || Err(status(401, json!({ "errcode": "M_UNKNOWN_TOKEN", "error": "Invalid access token passed." })));
    let seen = |calls, refused| Some(Seen { calls, refused, ping: None });
    for (answer, probe, outcome, found) in [
        (Ok("@_isthmus:hs.example".to_owned()), None, Outcome::Pass, "@_isthmus:hs.example's"),
        (Ok("@_isthmus:other.example".to_owned()), None, Outcome::Fail, "the homeserver's name is other.example, but"),
        (Ok("@_bot:hs.example".to_owned()), None, Outcome::Fail, "it has another registration"),
        (unknown(), seen(0, 0), Outcome::Fail, "the registration is not loaded"),
        (unknown(), None, Outcome::Fail, "the registration is not loaded"),
        (unknown(), seen(1, 0), Outcome::Fail, "wrong as_token"),
        (unknown(), seen(0, 1), Outcome::Fail, "with other tokens than /r.yaml"),
        (Err(status(500, json!({}))), None, Outcome::Fail, "could not be tried: 500"),
    ] {
        let finding = as_token(&AsToken {
            file: "/r.yaml",
            answer: &answer,
            homeserver_name: server_name!("hs.example"),
            sender: user_id!("@_isthmus:hs.example"),
            probe,
        });
        expect(&finding, outcome, found);
    }
}

#[test]
fn pings() {
    let seen = |calls, refused, ping: &str| Some(Seen { calls, refused, ping: Some(ping.to_owned()) });
    let bad_status =
        |code: u16| Err(status(502, json!({ "errcode": "M_BAD_STATUS", "error": "HTTP", "status": code })));
    let error = |code: u16, errcode: &str| Err(status(code, json!({ "errcode": errcode, "error": "why" })));
    for (answer, after, outcome, found) in [
        (Ok(()), seen(1, 0, "t"), Outcome::Pass, "reaches this gateway"),
        (
            Ok(()),
            seen(1, 0, "other"),
            Outcome::Fail,
            "wrong URL in the registration: http://g does not lead to this gateway from this machine, and Synapse called some",
        ),
        (Ok(()), None, Outcome::Warn, "answered Synapse"),
        (bad_status(403), seen(0, 1, ""), Outcome::Fail, "wrong hs_token"),
        (bad_status(403), seen(0, 0, ""), Outcome::Fail, "from this machine, and Synapse got 403"),
        (bad_status(404), seen(0, 0, ""), Outcome::Fail, "and Synapse got 404 from something that is not"),
        (bad_status(403), None, Outcome::Fail, "wrong hs_token"),
        (error(502, "M_CONNECTION_FAILED"), seen(0, 0, ""), Outcome::Fail, "and Synapse could not connect: why"),
        (error(504, "M_CONNECTION_TIMEOUT"), seen(0, 0, ""), Outcome::Fail, "got no answer in time"),
        (error(400, "M_URL_NOT_SET"), seen(0, 0, ""), Outcome::Fail, "has no URL"),
        (error(404, "M_UNRECOGNIZED"), seen(0, 0, ""), Outcome::Warn, "cannot ping"),
        (error(403, "M_FORBIDDEN"), seen(0, 0, ""), Outcome::Fail, "refused to ping: 403"),
        (Err(HomeserverError::Unreachable("x".to_owned())), None, Outcome::Fail, "did not answer"),
    ] {
        let before = seen(0, 0, "earlier");
        let (file, url, leads, transaction_id) = ("/r.yaml", "http://g", Leads::Elsewhere, "t");
        let finding = ping(&Ping { file, url, leads, transaction_id, answer: &answer, before, after });
        expect(&finding, outcome, found);
    }
    let (answer, before, after) = (error(502, "M_CONNECTION_FAILED"), seen(0, 0, ""), seen(0, 0, ""));
    let (file, url, transaction_id) = ("/r.yaml", "http://g", "t");
    let finding = ping(&Ping { file, url, leads: Leads::Here, transaction_id, answer: &answer, before, after });
    expect(
        &finding,
        Outcome::Fail,
        "it could not connect: why; but http://g, which the registration file has, leads here",
    );
    assert!(finding.fix.unwrap().starts_with("restart Synapse"));
    let (leads, before, after) = (Leads::HereWithAnotherToken, seen(0, 0, ""), seen(1, 1, "t"));
    let finding = ping(&Ping { file, url, leads, transaction_id, answer: &Ok(()), before, after });
    expect(&finding, Outcome::Fail, "wrong hs_token: /r.yaml has another");
}

#[test]
fn where_the_server_name_leads() {
    let text = |text: &str| Some(text.to_owned());
    for (answer, outcome, found) in [
        (Ok((text("g.example"), text("KEY"))), Outcome::Pass, "leads back"),
        (Ok((text("g.example"), text("OTHER"))), Outcome::Fail, "does not have this gateway's key ed25519:a"),
        (Ok((text("g.example"), None)), Outcome::Fail, "does not have this gateway's key"),
        (Ok((text("x.example"), text("KEY"))), Outcome::Fail, "says that it is x.example"),
        (Ok((None, None)), Outcome::Fail, "says that it is nobody"),
        (Err("not reachable: 10.0.0.1 may not be dialled".to_owned()), Outcome::Fail, "its address is private"),
        (Err("invalid peer certificate: UnknownIssuer".to_owned()), Outcome::Fail, "an authority that is not trusted"),
        (Err("invalid peer certificate: Expired".to_owned()), Outcome::Fail, "has expired"),
        (Err("invalid peer certificate: NotValidForName".to_owned()), Outcome::Fail, "for another name"),
        (Err("received corrupt message of type InvalidContentType".to_owned()), Outcome::Fail, "answers in plain http"),
        (Err("Connection refused".to_owned()), Outcome::Fail, "does not lead back to this gateway: Connection refused"),
    ] {
        let key = ("ed25519:a", "KEY".to_owned());
        let finding = own_name(&OwnName { server_name: server_name!("g.example"), key, listens: true, answer });
        expect(&finding, outcome, found);
    }
}
