//! A page that says how the gateway is, for a glance with a browser.

use std::fmt::Write as _;

use super::{Health, Held, Status};

/// The page.
pub(super) fn render(health: &Health) -> String {
    let mut rows = String::new();
    let mut row = |name: &str, value: &str| {
        // Writing to a string does not fail.
        let _ = write!(rows, "<tr><th>{}</th><td>{}</td></tr>", escape(name), escape(value));
    };
    row("server name", health.server_name.as_str());
    row("version", &health.version);
    let state = match health.status {
        Status::Ok => "all is well",
        Status::Degraded => "something is wrong, the rest goes on",
        Status::Failing => "it cannot work",
    };
    row("state", state);
    for problem in &health.problems {
        row("problem", problem);
    }
    for past in &health.past {
        row("over by now", past);
    }
    if let Some(homeserver) = &health.homeserver {
        row("homeserver", if homeserver.reachable { "reachable" } else { "not reachable" });
    }
    for (state, count) in &health.portals {
        row(&format!("portals, {state}"), &count.to_string());
    }
    row("events to carry over", &health.inbox.waiting.to_string());
    row("events to come back from hubs", &health.echoes.waiting.to_string());
    row("events of hubs that are missing here", &health.missing.waiting.to_string());
    row("events of Matrix rooms before which others are missing", &health.graph_missing.waiting.to_string());
    if health.catching_up.rooms > 0 {
        let (fetched, taken) = (health.catching_up.fetched, health.catching_up.taken);
        row("events of long absences", &format!("{fetched} fetched so far, {taken} taken"));
    }
    row("events to send", &health.outbound.waiting.to_string());
    for failing in &health.outbound.failing {
        let error = failing.error.as_deref().unwrap_or_default();
        row(&failing.server, &format!("{} waiting, {} failures in a row: {error}", failing.waiting, failing.failures));
    }
    for Held { server, room_id, tries, error, .. } in &health.outbound.held {
        row(server, &format!("{room_id} waits there for one event, {tries} failures in a row: {error}"));
    }
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta http-equiv=\"refresh\" content=\"10\">\
         <title>isthmus {name}</title><style>body{{font:1rem sans-serif;margin:2rem}}th{{text-align:left;\
         padding-right:2rem;font-weight:normal;color:#666}}</style><h1>isthmus</h1><table>{rows}</table></html>",
        name = escape(health.server_name.as_str())
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::{CatchingUp, Failing, Files, HubFaults, Outbound, Uncorrected, Waiting};
    use super::*;

    #[test]
    fn what_peers_say_is_escaped() {
        let failing = Failing {
            server: "s".to_owned(),
            waiting: 1,
            failures: 1,
            since: 0,
            answers: true,
            retry_at: 0,
            error: Some("<script>alert(\"&\")".to_owned()),
        };
        let held = Held {
            server: "h".to_owned(),
            room_id: "!r".to_owned(),
            feed: "log".to_owned(),
            tries: 2,
            since: 0,
            retry_at: 0,
            error: "<script>".to_owned(),
        };
        let page = render(&Health {
            ok: true,
            status: Status::Ok,
            problems: Vec::new(),
            past: vec!["a fault".to_owned()],
            server_name: "g.example".try_into().unwrap(),
            version: "1".to_owned(),
            homeserver: None,
            inbox: Waiting::default(),
            echoes: Waiting::default(),
            missing: Waiting::default(),
            graph_missing: Waiting::default(),
            hub_faults: HubFaults::default(),
            owed_leaves: Waiting::default(),
            leaves_given_up: 0,
            uncorrected: Uncorrected::default(),
            catching_up: CatchingUp::default(),
            events_of_unknown_rooms: 0,
            media: Files::default(),
            outbound: Outbound { waiting: 1, failing: vec![failing], held: vec![held] },
            portals: [("active".to_owned(), 3)].into(),
        });
        assert!(page.contains("&lt;script&gt;alert(&quot;&amp;&quot;)") && !page.contains("<script"), "{page}");
        assert!(page.contains("<td>!r waits there for one event, 2 failures in a row: &lt;script&gt;</td>"), "{page}");
        assert!(page.contains("<th>over by now</th><td>a fault</td>"), "{page}");
        assert!(page.contains("<th>portals, active</th><td>3</td>"), "{page}");
    }
}
