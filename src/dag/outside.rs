//! Handshakes of the gateway's users through other servers: their templates, and leaving, declining and knocking by them.
//! <https://spec.matrix.org/v1.16/server-server-api/#joining-rooms>

use std::time::Duration;

use http::StatusCode;
use ruma::{OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, ServerName, UserId};
use serde_json::{Value, json};

use super::Dag;
use super::build::sign;
use super::fetch::segment;
use super::pdu::Verified;
use super::version::{is_shared, rules_of};
use crate::event::{Family, Object, RoomVersion};
use crate::federation::{Call, RemoteError};
use crate::refusal::Refusal;
use crate::seam::{Draft, Membership, Outgoing};
use crate::store::dag::{InviteRow, invite as find_invite, put_invite, remove_invite};

/// How many servers are asked, one after the other.
const MAX_SERVERS: usize = 10;
/// How long each has for a template.
const TEMPLATE_TIME: Duration = Duration::from_secs(20);
/// The largest integer of canonical JSON.
const MAX_DEPTH: i64 = (1 << 53) - 1;

/// What a user of the gateway wants to be in a room.
#[derive(Debug, Clone)]
pub(super) struct Wish {
    pub room_id: OwnedRoomId,
    pub user_id: OwnedUserId,
    pub membership: Membership,
    /// The event's content but for the membership.
    pub content: Object,
    /// The versions that the room may have.
    pub versions: Vec<RoomVersion>,
    /// The server that has offered the room as one of LM's whose graph is shared. Some do so for every room, and do not share it.
    pub offered_by: Option<OwnedServerName>,
}

impl Wish {
    /// The event's content.
    pub fn content(&self) -> Object {
        let mut content = self.content.clone();
        content.remove("join_authorised_via_users_server");
        content.insert("membership".to_owned(), json!(self.membership.as_str()));
        content
    }

    /// What a server answered to it. One that has offered the room, and has looked at this, does not share the graph; of one that could not
    /// be asked, or could not answer, that is not said.
    pub fn refused(&self, server: &ServerName, error: RemoteError) -> Refusal {
        let has_looked = match &error {
            RemoteError::Status { status, .. } => {
                let later = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS];
                status.is_client_error() && !later.contains(status) && !error.is_busy()
            }
            RemoteError::BadAnswer(_) | RemoteError::Unreachable(_) => false,
        };
        let refusal = error.into_verdict(server);
        if has_looked { self.not_shared(server, refusal) } else { refusal }
    }

    /// The same of an answer that cannot be used for it.
    fn not_shared(&self, server: &ServerName, refusal: Refusal) -> Refusal {
        match refusal {
            Refusal::Remote { problem, .. } if self.offered_by.as_deref() == Some(server) => {
                tracing::info!(room = %self.room_id, %server, %problem, "not joined as a graph server");
                Refusal::GraphTemplate { server: server.to_string(), room_id: self.room_id.to_string() }
            }
            refusal => refusal,
        }
    }

    /// The event, for a room in which the gateway is.
    pub fn draft(&self, now: i64) -> Draft {
        Draft {
            sender: self.user_id.clone(),
            kind: "m.room.member".to_owned(),
            state_key: Some(self.user_id.to_string()),
            content: self.content(),
            origin_server_ts: now,
        }
    }
}

/// Leaving, declining and knocking.
impl Dag {
    /// Takes a user of the gateway out of a room: one in which the gateway is by an event of its own, one into which they were
    /// only invited, or at which they have knocked, through the server by which that came, or those in `via`.
    pub async fn leave(
        &self,
        room_id: &RoomId,
        user_id: &UserId,
        via: &[OwnedServerName],
        reason: Option<&str>,
    ) -> Result<(), Refusal> {
        let context = &self.shared.context;
        let mut wish = self.wish(room_id, user_id, Membership::Leave, Object::new())?;
        wish.content.extend(reason.map(|reason| ("reason".to_owned(), json!(reason))));
        if let Some(room) = self.shared.find(room_id).await?
            && room.core().has_server(&context.server_name)
        {
            let draft = wish.draft(context.clock.now_ms());
            return self.send_one(&room, Outgoing { draft, effect: None }).await.map(drop);
        }
        let invite = find_invite(&context.store, room_id, user_id).await?;
        if let Some(version) = invite.as_ref().and_then(|invite| RoomVersion::parse(&invite.version)) {
            wish.versions = vec![version];
        }
        let servers = self.candidates(room_id, user_id, via).await?;
        let nobody = || Refusal::NotFound(format!("a server through which {user_id} could leave {room_id}"));
        let mut told = None;
        for server in servers {
            match self.leave_through(&server, &wish).await {
                Ok(()) => {
                    let (room_id, user_id) = (room_id.to_owned(), user_id.to_owned());
                    let write = context
                        .store
                        .write(move |tx| Box::pin(async move { remove_invite(tx, &room_id, &user_id).await }));
                    return Ok(write.await?);
                }
                Err(refusal) => told = Some(weightier(told, refusal)),
            }
        }
        Err(told.unwrap_or_else(nobody))
    }

    /// Refuses an invite that a user of the gateway got into a room elsewhere.
    pub async fn decline(&self, room_id: &RoomId, user_id: &UserId, reason: Option<&str>) -> Result<(), Refusal> {
        if find_invite(&self.shared.context.store, room_id, user_id).await?.is_none() {
            return Err(Refusal::NotFound(format!("an invite of {user_id} into {room_id}")));
        }
        self.leave(room_id, user_id, &[], reason).await
    }

    async fn leave_through(&self, server: &ServerName, wish: &Wish) -> Result<(), Refusal> {
        let (_, leave) = self.make_at(server, wish).await?;
        self.send_to(server, "v2/send_leave", &leave, wish).await.map(drop)
    }

    /// Knocks, as a user of the gateway, at a room that lives elsewhere. What is told of the room then.
    pub async fn knock(
        &self,
        room_id: &RoomId,
        via: &[OwnedServerName],
        user_id: &UserId,
        content: Object,
    ) -> Result<Vec<Object>, Refusal> {
        let wish = self.wish(room_id, user_id, Membership::Knock, content)?;
        if let Some(room) = self.shared.find(room_id).await?
            && room.core().has_server(&self.shared.context.server_name)
        {
            let draft = wish.draft(self.shared.context.clock.now_ms());
            self.send_one(&room, Outgoing { draft, effect: None }).await?;
            return Ok(Vec::new());
        }
        let mut told = None;
        for server in self.candidates(room_id, user_id, via).await? {
            match self.knock_through(&server, &wish).await {
                Ok(state) => return Ok(state),
                Err(refusal) => told = Some(weightier(told, refusal)),
            }
        }
        Err(told.unwrap_or_else(|| Refusal::NotFound(format!("a server that has {room_id}"))))
    }

    async fn knock_through(&self, server: &ServerName, wish: &Wish) -> Result<Vec<Object>, Refusal> {
        let (version, knock) = self.make_at(server, wish).await?;
        let mut answer = self.send_to(server, "v1/send_knock", &knock, wish).await?;
        // By this the knock can be taken back.
        let row = InviteRow {
            version: version.as_str().to_owned(),
            via: server.to_owned(),
            json: knock.pdu().raw.get().as_bytes().to_vec(),
        };
        let (room_id, user_id) = (wish.room_id.clone(), wish.user_id.clone());
        let store = &self.shared.context.store;
        store.write(move |tx| Box::pin(async move { put_invite(tx, &room_id, &user_id, &row).await })).await?;
        Ok(super::fetch::take_events(&mut answer, "knock_room_state", super::invite::MAX_STRIPPED))
    }
}

/// Templates.
impl Dag {
    /// What a user of the gateway wants, in a room of any version that is a graph.
    pub(super) fn wish(
        &self,
        room_id: &RoomId,
        user_id: &UserId,
        membership: Membership,
        content: Object,
    ) -> Result<Wish, Refusal> {
        let own = &self.shared.context.server_name;
        if user_id.server_name() != own {
            return Err(Refusal::Forbidden(format!("{user_id} is not a user of {own}")));
        }
        let versions = RoomVersion::of(Family::Graph).collect();
        let (room_id, user_id) = (room_id.to_owned(), user_id.to_owned());
        Ok(Wish { room_id, user_id, membership, content, versions, offered_by: None })
    }

    /// The servers to ask: those named, the one that an invite came from, some that were in the room when the gateway was, and
    /// the one that the room's ID names; each once and not ourselves.
    pub(super) async fn candidates(
        &self,
        room_id: &RoomId,
        user_id: &UserId,
        via: &[OwnedServerName],
    ) -> Result<Vec<OwnedServerName>, Refusal> {
        let invite = find_invite(&self.shared.context.store, room_id, user_id).await?;
        let room = self.shared.find(room_id).await?;
        let known: Vec<_> =
            room.iter().flat_map(|room| room.core().servers.keys().cloned().collect::<Vec<_>>()).collect();
        let named = invite.map(|invite| invite.via).into_iter().chain(via.iter().cloned());
        let all = named.chain(room_id.server_name().map(ToOwned::to_owned)).chain(known);
        let mut servers: Vec<OwnedServerName> = Vec::new();
        for server in all {
            if servers.len() < MAX_SERVERS && server != self.shared.context.server_name && !servers.contains(&server) {
                servers.push(server);
            }
        }
        Ok(servers)
    }

    /// Asks a server for a template and makes the signed event of it; with the room's version.
    pub(super) async fn make_at(&self, server: &ServerName, wish: &Wish) -> Result<(RoomVersion, Verified), Refusal> {
        let context = &self.shared.context;
        let verb = wish.membership.as_str();
        let (room, user) = (segment(wish.room_id.as_str()), segment(wish.user_id.as_str()));
        let mut uri = format!("/_matrix/federation/v1/make_{verb}/{room}/{user}");
        if wish.membership != Membership::Leave {
            let versions: Vec<_> =
                wish.versions.iter().map(|version| format!("ver={}", segment(version.as_str()))).collect();
            uri = format!("{uri}?{}", versions.join("&"));
        }
        let call = Call { timeout: TEMPLATE_TIME, limit: 1 << 20, ..Call::get(uri) };
        let answer = context.client.call(server, call, false).await.map_err(|error| wish.refused(server, error))?;
        let version = version_of(&answer, wish)?;
        let template = answer.get("event").and_then(Value::as_object);
        let template = template.ok_or_else(|| bad(server, "its template has no event".to_owned()));
        let made = template.and_then(|template| event_of(server, template, wish, version, context.clock.now_ms()));
        let event = made.map_err(|refusal| wish.not_shared(server, refusal))?;
        Ok((version, sign(event, version, context.server_name.as_str(), &context.signing_key)?))
    }

    pub(super) async fn send_to(
        &self,
        server: &ServerName,
        path: &str,
        event: &Verified,
        wish: &Wish,
    ) -> Result<Object, Refusal> {
        let call = Call::put(send_uri(path, event, wish), body_of(event));
        self.shared.context.client.call(server, call, false).await.map_err(|error| error.into_verdict(server))
    }
}

/// Where the event of a handshake is sent.
pub(super) fn send_uri(path: &str, event: &Verified, wish: &Wish) -> String {
    let (room, event) = (segment(wish.room_id.as_str()), segment(event.pdu().event_id.as_str()));
    format!("/_matrix/federation/{path}/{room}/{event}")
}

/// The event as it is sent.
pub(super) fn body_of(event: &Verified) -> Object {
    event.pdu().to_value().as_object().cloned().unwrap_or_default()
}

pub(super) fn bad(server: &ServerName, problem: String) -> Refusal {
    Refusal::Remote { server: server.to_string(), problem }
}

/// What is told of two servers' refusals: the first that decides it is worth more than one that only could not be asked.
pub(super) fn weightier(told: Option<Refusal>, new: Refusal) -> Refusal {
    match told {
        Some(told) if !told.is_transient() || new.is_transient() => told,
        _ => new,
    }
}

/// The room's version, which must be one of those that were named.
fn version_of(answer: &Object, wish: &Wish) -> Result<RoomVersion, Refusal> {
    let version = match (answer.get("room_version").and_then(Value::as_str), wish.versions.as_slice()) {
        // Of a room into which somebody was invited it is known.
        (None, [version]) => version.as_str(),
        (None, _) => "1",
        (Some(version), _) => version,
    };
    RoomVersion::parse(version)
        .filter(|version| wish.versions.contains(version))
        .ok_or_else(|| Refusal::IncompatibleRoomVersion(version.chars().take(100).collect()))
}

/// The event to be signed. Of the template only where it stands in the graph is taken, and by whose word a join is let in that
/// has to meet conditions.
fn event_of(
    server: &ServerName,
    template: &Object,
    wish: &Wish,
    version: RoomVersion,
    now: i64,
) -> Result<Object, Refusal> {
    let wrong = |field: &str, found: &Value| bad(server, format!("{field} of its template is {found}"));
    let user = wish.user_id.as_str();
    let mut content = wish.content();
    let absent = Value::Null;
    let field = |name: &str| template.get(name).unwrap_or(&absent);
    if wish.membership != Membership::Leave {
        let theirs =
            [("type", "m.room.member"), ("sender", user), ("state_key", user), ("room_id", wish.room_id.as_str())];
        for (name, expected) in theirs {
            if field(name) != expected {
                return Err(wrong(name, field(name)));
            }
        }
        let membership = field("content").get("membership").unwrap_or(&absent);
        if membership != wish.membership.as_str() {
            return Err(wrong("membership", membership));
        }
    }
    if wish.membership == Membership::Join
        && let Some(voucher) = field("content").get("join_authorised_via_users_server")
        && rules_of(version)?.authorization.restricted_join_rule
    {
        let is_of_server = voucher.as_str().and_then(|user| <&UserId>::try_from(user).ok());
        if is_of_server.is_none_or(|voucher| voucher.server_name() != server) {
            return Err(wrong("join_authorised_via_users_server", voucher));
        }
        content.insert("join_authorised_via_users_server".to_owned(), voucher.clone());
    }
    let mut event = Object::from_iter([
        ("type".to_owned(), json!("m.room.member")),
        ("room_id".to_owned(), json!(wish.room_id)),
        ("sender".to_owned(), json!(user)),
        ("state_key".to_owned(), json!(user)),
        ("content".to_owned(), Value::Object(content)),
        ("origin_server_ts".to_owned(), json!(now)),
    ]);
    for name in ["prev_events", "auth_events"] {
        let ids = field(name).as_array().filter(|ids| ids.iter().all(Value::is_string) && !ids.is_empty());
        event.insert(name.to_owned(), json!(ids.ok_or_else(|| wrong(name, field(name)))?));
    }
    // Events of shared rooms have none.
    if !is_shared(version) {
        let depth = field("depth").as_i64().filter(|depth| (1..=MAX_DEPTH).contains(depth));
        event.insert("depth".to_owned(), json!(depth.ok_or_else(|| wrong("depth", field("depth")))?));
    }
    Ok(event)
}

#[cfg(test)]
mod tests {
    use ruma::{room_id, server_name, user_id};

    use super::*;

    fn wish(membership: Membership) -> Wish {
        Wish {
            room_id: room_id!("!room:other.example").to_owned(),
            user_id: user_id!("@lm_bob_hub.example:gateway.example").to_owned(),
            membership,
            content: Object::from_iter([
                ("displayname".to_owned(), json!("Bob")),
                ("join_authorised_via_users_server".to_owned(), json!("@bot:gateway.example")),
            ]),
            versions: vec![RoomVersion::V9, RoomVersion::V11],
            offered_by: None,
        }
    }

    #[test]
    fn who_has_offered_a_graph_and_has_looked_does_not_share_it_and_who_was_away_has_not_said() {
        let (hub, other) = (server_name!("hub.example"), server_name!("other.example"));
        let wish = Wish { offered_by: Some(hub.to_owned()), ..wish(Membership::Join) };
        let status = |status: StatusCode, errcode: &str| RemoteError::Status {
            status,
            errcode: errcode.to_owned(),
            error: "no".to_owned(),
            retry_after: None,
            hub_server: None,
        };
        let code = |server: &ServerName, error: RemoteError| wish.refused(server, error).code();
        for (number, errcode) in [(400, "M_BAD_JSON"), (404, "M_UNRECOGNIZED"), (405, "")] {
            let status = status(StatusCode::from_u16(number).unwrap(), errcode);
            assert_eq!(code(hub, status.clone()), "graph_template", "{number} {errcode}");
            // It has offered nothing.
            assert_eq!(code(other, status), "remote", "{number} {errcode}");
        }
        for (number, errcode) in
            [(500, "M_UNKNOWN"), (502, ""), (503, "M_UNKNOWN"), (504, ""), (429, "M_LIMIT_EXCEEDED"), (408, "")]
        {
            let status = status(StatusCode::from_u16(number).unwrap(), errcode);
            assert_eq!(code(hub, status), "remote", "{number} {errcode}");
        }
        assert_eq!(code(hub, RemoteError::Unreachable("refused".to_owned())), "remote");
        assert_eq!(code(hub, RemoteError::BadAnswer("<html>".to_owned())), "remote");
        assert_eq!(code(hub, status(StatusCode::FORBIDDEN, "M_FORBIDDEN")), "forbidden");
    }

    fn template(wish: &Wish) -> Value {
        json!({
            "type": "m.room.member", "sender": wish.user_id, "state_key": wish.user_id, "room_id": wish.room_id,
            "content": { "membership": wish.membership.as_str(), "evil": true }, "origin_server_ts": 1, "origin": "evil",
            "depth": 7, "prev_events": [format!("${}", "p".repeat(43))], "auth_events": [format!("${}", "a".repeat(43))],
            "hashes": { "sha256": "x" }, "signatures": { "gateway.example": {} }, "redacts": "$x", "hub_server": "x",
        })
    }

    fn made(wish: &Wish, template: &Value) -> Result<Object, Refusal> {
        event_of(server_name!("other.example"), template.as_object().unwrap(), wish, RoomVersion::V11, 1000)
    }

    #[test]
    fn of_a_template_only_the_place_in_the_graph_is_taken() {
        let wish = wish(Membership::Join);
        let event = made(&wish, &template(&wish)).unwrap();
        let keys: Vec<_> = event.keys().map(String::as_str).collect();
        let ours = [
            "auth_events",
            "content",
            "depth",
            "origin_server_ts",
            "prev_events",
            "room_id",
            "sender",
            "state_key",
            "type",
        ];
        assert_eq!(keys.iter().collect::<std::collections::BTreeSet<_>>(), ours.iter().collect());
        assert_eq!(event["content"], json!({ "membership": "join", "displayname": "Bob" }));
        assert_eq!(event["origin_server_ts"], 1000);
    }

    #[test]
    fn hc_38_a_template_for_something_else_is_not_signed() {
        let wish = wish(Membership::Join);
        for (field, value) in [
            ("type", json!("m.room.power_levels")),
            ("sender", json!("@isthmus:gateway.example")),
            ("state_key", json!("@isthmus:gateway.example")),
            ("room_id", json!("!other:other.example")),
            ("content", json!({ "membership": "leave" })),
            (
                "content",
                json!({ "membership": "join", "join_authorised_via_users_server": "@isthmus:gateway.example" }),
            ),
            ("content", json!({ "membership": "join", "join_authorised_via_users_server": 7 })),
            ("prev_events", json!([])),
            ("prev_events", json!([["$old", {}]])),
            ("auth_events", json!({})),
            ("depth", json!("7")),
            ("depth", json!(1_i64 << 53)),
            ("depth", json!(-1)),
        ] {
            let mut template = template(&wish);
            template[field] = value.clone();
            assert_eq!(made(&wish, &template).unwrap_err().code(), "remote", "{field}: {value}");
        }
        let mut template = template(&wish);
        template["content"]["join_authorised_via_users_server"] = json!("@admin:other.example");
        let event = made(&wish, &template).unwrap();
        assert_eq!(event["content"]["join_authorised_via_users_server"], "@admin:other.example");
    }

    #[test]
    fn hc_40_a_room_has_a_version_that_was_asked_for() {
        let wish = wish(Membership::Join);
        for (answer, expected) in [
            (json!({ "room_version": "11" }), Some(RoomVersion::V11)),
            (json!({ "room_version": "12" }), None),
            (json!({ "room_version": "org.example" }), None),
            (json!({}), None),
        ] {
            assert_eq!(version_of(answer.as_object().unwrap(), &wish).ok(), expected, "{answer}");
        }
    }
}
