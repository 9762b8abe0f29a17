//! What follows from a transaction that was not answered with 200, and how long a failing destination is left alone.

use std::time::Duration;

use http::StatusCode;

use crate::federation::RemoteError;

/// How often a server that stops at the first bad event may answer the same transaction with an error of its own before its events are
/// judged one by one, or a single event is given up.
const TRIES_STOPPING: u32 = 8;
/// For how long it must have done so before the single event is given up: a server that is heard of is tried every second.
const PATIENCE_STOPPING: Duration = Duration::from_secs(4 * 60);
/// The same for servers that promise to take what they can of a transaction: their errors come from bad days, which pass.
const TRIES: u32 = 24;
const PATIENCE: Duration = Duration::from_secs(24 * 3600);
/// How often an invite that goes to a hub like any other event may be answered with an error that has an errcode: it fails where
/// the hub does not reach the invited server, and whoever invites is to hear of that while they look.
const TRIES_INVITE: u32 = 3;

const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(6 * 3600);
/// How long a destination is left alone at most because it asks for it.
const LONGEST_ASKED: Duration = Duration::from_secs(3600);

/// A transaction that failed.
pub(super) struct Failure<'a> {
    /// How.
    pub error: &'a RemoteError,
    /// How many events are in it.
    pub events: usize,
    /// Whether the destination [stops at the first event](super::wire::Sender::stops_at_first) that it does not like.
    pub stops_at_first: bool,
    /// How often in a row it was answered in a way that [may be about its events](may_be_about_events), this time included.
    pub tries: u32,
    /// How long ago that began.
    pub lasting: Duration,
    /// Whether its one event is an invite by LPDU.
    pub is_invite: bool,
}

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The same again, later.
    Retry,
    /// Its events are sent one by one.
    Split,
    /// Its one event is refused for good.
    Refused,
    /// Its one event breaks the destination again and again, and is passed over.
    GiveUp,
}

pub(super) fn judge(failure: &Failure<'_>) -> Verdict {
    let refused = is_refusal(failure.error);
    let doubtful = may_be_about_events(failure.error);
    let (tries, patience) =
        if failure.stops_at_first { (TRIES_STOPPING, PATIENCE_STOPPING) } else { (TRIES, PATIENCE) };
    match failure.events {
        0 | 1 if refused => Verdict::Refused,
        0 | 1 if failure.is_invite && failure.tries >= TRIES_INVITE && doubtful && has_errcode(failure.error) => {
            Verdict::GiveUp
        }
        0 | 1 if doubtful && failure.tries >= tries && failure.lasting >= patience => Verdict::GiveUp,
        0 | 1 => Verdict::Retry,
        _ if refused || (doubtful && (failure.stops_at_first || failure.tries >= TRIES_STOPPING)) => Verdict::Split,
        _ => Verdict::Retry,
    }
}

/// Whether an answer says that the content is not wanted, rather than that the request came at a bad time or was not let in.
pub(super) fn is_refusal(error: &RemoteError) -> bool {
    match error {
        // A size is judged by any proxy on the way.
        RemoteError::Status { status, errcode, .. } => {
            is_about_content(*status)
                && !error.is_unrecognized()
                && !error.is_busy()
                && (!errcode.is_empty() || *status == StatusCode::PAYLOAD_TOO_LARGE)
        }
        _ => false,
    }
}

/// Whether the events may be to blame for an answer, or something that passes: a server that fails, or one, or a proxy before
/// it, that refuses without one of Matrix's error codes.
pub(super) fn may_be_about_events(error: &RemoteError) -> bool {
    match error {
        RemoteError::Status { status, errcode, .. } => {
            is_own_error(*status)
                || (is_about_content(*status) && errcode.is_empty() && !error.is_unrecognized() && !is_refusal(error))
        }
        _ => false,
    }
}

/// Whether the destination says itself, and no proxy before it, that it has no such endpoint.
pub(super) fn has_no_endpoint(error: &RemoteError) -> bool {
    error.is_unrecognized() && has_errcode(error)
}

/// Whether the destination answered itself, rather than a proxy in front of one that is away.
pub(super) fn answers(error: &RemoteError) -> bool {
    match error {
        RemoteError::Status { status, .. } => has_errcode(error) || !status.is_server_error() || is_own_error(*status),
        RemoteError::BadAnswer(_) => true,
        RemoteError::Unreachable(_) => false,
    }
}

fn has_errcode(error: &RemoteError) -> bool {
    matches!(error, RemoteError::Status { errcode, .. } if !errcode.is_empty())
}

fn is_about_content(status: StatusCode) -> bool {
    let about_request = [
        StatusCode::UNAUTHORIZED,
        StatusCode::METHOD_NOT_ALLOWED,
        StatusCode::PROXY_AUTHENTICATION_REQUIRED,
        StatusCode::REQUEST_TIMEOUT,
        StatusCode::TOO_EARLY,
        StatusCode::TOO_MANY_REQUESTS,
    ];
    status.is_client_error() && !about_request.contains(&status)
}

/// Whether a status comes from the server itself, rather than from a proxy in front of one that is away.
fn is_own_error(status: StatusCode) -> bool {
    let from_proxy = [StatusCode::BAD_GATEWAY, StatusCode::SERVICE_UNAVAILABLE, StatusCode::GATEWAY_TIMEOUT];
    status.is_server_error() && !from_proxy.contains(&status)
}

/// How long a destination is left alone after so many failures in a row; `random` is from 0 to 1, so that destinations that
/// failed together are not tried together.
pub(super) fn backoff(failures: i64, random: f64) -> Duration {
    let doublings = u32::try_from(failures.saturating_sub(1).clamp(0, 20)).unwrap_or(0);
    let delay = FIRST.saturating_mul(1 << doublings).min(LONGEST);
    delay.mul_f64(0.8 + 0.2 * random.clamp(0.0, 1.0))
}

/// How long a destination is still left alone that was not to be tried before a time. One that is further off than it can
/// be was noted before the clock was set back, and nobody knows how long ago.
pub(super) fn still_alone(retry_at: i64, now_ms: i64, failures: i64) -> Duration {
    let left = Duration::from_millis(u64::try_from(retry_at.saturating_sub(now_ms)).unwrap_or(0));
    let longest = backoff(failures, 1.0).max(LONGEST_ASKED);
    if left <= longest { left } else { Duration::ZERO }
}

/// How long a destination that has failed so wants to be left alone, within reason: where it is overloaded or unwell.
pub(super) fn asked_for(error: &RemoteError) -> Duration {
    match error {
        RemoteError::Status { status, retry_after: Some(asked), .. }
            if *status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() =>
        {
            (*asked).min(LONGEST_ASKED)
        }
        _ => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(status: u16, errcode: &str, events: usize, stops_at_first: bool, tries: u32) -> Verdict {
        let error = RemoteError::Status {
            status: StatusCode::from_u16(status).unwrap(),
            errcode: errcode.to_owned(),
            error: String::new(),
            retry_after: None,
            hub_server: None,
        };
        let lasting = if stops_at_first { PATIENCE_STOPPING } else { PATIENCE };
        let after = |lasting| Failure { error: &error, events, stops_at_first, tries, lasting, is_invite: false };
        let soon = judge(&after(Duration::from_secs(60)));
        let late = judge(&after(lasting));
        assert!(soon == late || (soon, late) == (Verdict::Retry, Verdict::GiveUp), "{soon:?} {late:?}");
        late
    }

    #[test]
    fn a_proxy_before_a_server_that_is_away_is_not_its_answer() {
        let said = |status: u16, errcode: &str| {
            answers(&RemoteError::Status {
                status: StatusCode::from_u16(status).unwrap(),
                errcode: errcode.to_owned(),
                error: String::new(),
                retry_after: None,
                hub_server: None,
            })
        };
        assert!([(500, ""), (503, "M_UNKNOWN"), (401, ""), (429, ""), (404, "")].into_iter().all(|(a, b)| said(a, b)));
        assert!(![502, 503, 504].into_iter().any(|status| said(status, "")));
        assert!(!answers(&RemoteError::Unreachable("gone".to_owned())));
    }

    #[test]
    fn a_destination_is_not_left_alone_for_longer_than_it_can_be() {
        let hours = |hours: i64| hours * 3_600_000;
        for (failures, retry_at, left) in [
            (1, 0, 0),
            (1, 5, 5),
            (1, hours(1), hours(1)),
            (1, hours(1) + 1, 0),
            (1, hours(24), 0),
            (20, hours(6), hours(6)),
            (20, hours(24), 0),
            (20, i64::MAX, 0),
        ] {
            let still = still_alone(retry_at, 0, failures);
            assert_eq!(still.as_millis(), u128::try_from(left).unwrap(), "{failures} {retry_at}");
        }
    }

    #[test]
    fn verdicts() {
        use Verdict::*;
        for (status, errcode, events, stops_at_first, tries, expected) in [
            // One bad event must not hold up the others.
            (500, "M_UNKNOWN", 50, true, 1, Split),
            (500, "M_UNKNOWN", 50, false, 1, Retry),
            (500, "M_UNKNOWN", 50, false, TRIES_STOPPING, Split),
            (400, "M_BAD_JSON", 50, false, 1, Split),
            (413, "", 2, true, 1, Split),
            (403, "M_FORBIDDEN", 1, false, 1, Refused),
            (404, "M_NOT_FOUND", 1, true, 1, Refused),
            (500, "", 1, true, 1, Retry),
            (500, "", 1, true, TRIES_STOPPING, GiveUp),
            (500, "", 1, false, TRIES_STOPPING, Retry),
            (500, "", 1, false, TRIES, GiveUp),
            // What is not about the events never costs one.
            (502, "", 1, true, 1000, Retry),
            (503, "", 50, true, 1000, Retry),
            (504, "", 1, true, 1000, Retry),
            (429, "M_LIMIT_EXCEEDED", 1, true, 1000, Retry),
            (401, "M_UNAUTHORIZED", 1, true, 1000, Retry),
            (404, "", 1, true, 1000, Retry),
            // It is about another transaction.
            (400, "M_BAD_STATE", 1, true, 1000, Retry),
            (400, "M_BAD_STATE", 50, false, 1000, Retry),
            (404, "M_UNRECOGNIZED", 1, true, 1000, Retry),
            // A proxy's word on an event is not believed at once.
            (403, "", 50, false, 1, Retry),
            (403, "", 50, false, TRIES_STOPPING, Split),
            (403, "", 1, false, TRIES_STOPPING, Retry),
            (403, "", 1, false, TRIES, GiveUp),
            (400, "", 1, true, 1, Retry),
            (400, "", 1, true, TRIES_STOPPING, GiveUp),
            (302, "", 1, true, 1000, Retry),
        ] {
            assert_eq!(
                verdict(status, errcode, events, stops_at_first, tries),
                expected,
                "{status} {errcode} {events}"
            );
        }
        let away = RemoteError::Unreachable(String::new());
        assert_eq!(
            judge(&Failure {
                error: &away,
                events: 1,
                stops_at_first: true,
                tries: 1000,
                lasting: PATIENCE,
                is_invite: true
            }),
            Retry
        );
    }

    #[test]
    fn an_invite_that_a_hub_fails_on_is_given_up_soon() {
        for (status, errcode, tries, expected) in [
            (500, "M_UNKNOWN", TRIES_INVITE - 1, Verdict::Retry),
            (500, "M_UNKNOWN", TRIES_INVITE, Verdict::GiveUp),
            (500, "", TRIES_INVITE, Verdict::Retry),
            (503, "M_UNKNOWN", TRIES_INVITE, Verdict::Retry),
        ] {
            for stops_at_first in [false, true] {
                let error = RemoteError::Status {
                    status: StatusCode::from_u16(status).unwrap(),
                    errcode: errcode.to_owned(),
                    error: String::new(),
                    retry_after: None,
                    hub_server: None,
                };
                let lasting = Duration::from_secs(3);
                let failure = Failure { error: &error, events: 1, stops_at_first, tries, lasting, is_invite: true };
                assert_eq!(judge(&failure), expected, "{status} {errcode} {tries}");
                assert_eq!(judge(&Failure { is_invite: false, ..failure }), Verdict::Retry);
            }
        }
    }

    #[test]
    fn a_destination_may_ask_to_be_left_alone_for_an_hour_at_most() {
        let asked = |status: u16, seconds: Option<u64>| {
            asked_for(&RemoteError::Status {
                status: StatusCode::from_u16(status).unwrap(),
                errcode: String::new(),
                error: String::new(),
                retry_after: seconds.map(Duration::from_secs),
                hub_server: None,
            })
        };
        assert_eq!(asked(429, Some(90)), Duration::from_secs(90));
        assert_eq!(asked(503, Some(90)), Duration::from_secs(90));
        assert_eq!(asked(429, Some(u64::MAX)), LONGEST_ASKED);
        assert_eq!(asked(429, None), Duration::ZERO);
        assert_eq!(asked(403, Some(90)), Duration::ZERO, "that answer is about the events");
        assert_eq!(asked_for(&RemoteError::Unreachable(String::new())), Duration::ZERO);
    }

    #[test]
    fn hc_60_backoff_grows_to_hours_and_no_further() {
        assert_eq!(backoff(1, 1.0), FIRST);
        assert_eq!(backoff(2, 1.0), 2 * FIRST);
        assert_eq!(backoff(8, 1.0), 128 * FIRST);
        for failures in [20, 100, i64::MAX] {
            assert_eq!(backoff(failures, 1.0), LONGEST);
            assert!(backoff(failures, 0.0) >= LONGEST / 2);
        }
        assert!(backoff(0, 0.0) > Duration::ZERO && backoff(i64::MIN, 0.0) > Duration::ZERO);
    }
}
