//! What the target does with an invite, and how its user joins then.

use super::*;

pub(super) async fn incompatible(session: &Session, _: &str) -> Outcome {
    let event = invitation(session)?;
    let event = room(session, |room| room.finish(event));
    ask_invite(session, event, "org.example.nothing").await?.is_error(400, "M_INCOMPATIBLE_ROOM_VERSION")
}

/// What is no invite, into a room into which nobody was invited yet; a good invite was taken before, so not every one is refused.
pub(super) async fn no_invite(session: &Session, change: impl Fn(&mut Object)) -> Outcome {
    refused_invite(session, |room, mut event| {
        change(&mut event);
        room.finish(event)
    })
    .await
}

async fn refused_invite(session: &Session, spoil: impl Fn(&HubRoom, Object) -> Object) -> Outcome {
    the_invite(session)?;
    let (room, mut event) = (other_room(session)?, invitation(session)?);
    event.insert("room_id".to_owned(), json!(room.room_id));
    ask_invite(session, spoil(&room, event), version()).await?.is_refusal()
}

pub(super) fn spoilt_signature(mut event: Object, server: &str) -> Object {
    let signature = SigningKey::generate().sign(b"something else");
    let of_server = event.get_mut("signatures").and_then(|all| all.get_mut(server)).and_then(Value::as_object_mut);
    for value in of_server.into_iter().flat_map(|keys| keys.values_mut()) {
        *value = json!(signature);
    }
    event
}

pub(super) async fn badly_signed_invite(session: &Session, _: &str) -> Outcome {
    refused_invite(session, |room, event| spoilt_signature(room.finish(event), room.identity.name.as_str())).await
}

pub(super) async fn incomplete(session: &Session, _: &str) -> Outcome {
    let uri = session.path(Endpoint::Invite, &session.txn())?;
    session.ask(&session.first, Ask::post(uri, json!({ "room_version": version() }))).await?.is_error(400, "M_BAD_JSON")
}

pub(super) async fn invite(session: &Session, _: &str) -> Outcome {
    lock(&session.ear.manners).inviting = true;
    let invited = invite_and_keep(session).await;
    lock(&session.ear.manners).inviting = false;
    invited
}

pub(super) async fn invite_and_keep(session: &Session) -> Outcome {
    let event = invitation(session)?;
    let event = room(session, |room| room.finish(event));
    let answer = ask_invite(session, event.clone(), version()).await?;
    answer.is_good()?;
    // Under the name that an older text had it says what it has to say all the same; the check fails after that.
    let (right, old) = (answer.field("pdu").cloned(), answer.field("event").cloned());
    let missing = right.is_none().then(|| fail("an object pdu", &answer));
    let Some(signed) = right.or(old) else { return missing.map_or(Ok(()), Err) };
    lock(&session.notes).invite = Some((signed.clone(), Value::Object(event.clone())));
    // What came back goes into the log if it is the same event.
    let same = id_of(&signed) == id_of(&Value::Object(event.clone()));
    let kept = if same { signed.as_object().cloned().unwrap_or(event) } else { event };
    room(session, |room| room.log.push(kept));
    missing.map_or(Ok(()), Err)
}

pub(super) fn the_invite(session: &Session) -> Result<(Value, Value), Unmet> {
    lock(&session.notes).invite.clone().ok_or_else(|| skip("the invite was not taken"))
}

pub(super) async fn countersigned(session: &Session, _: &str) -> Outcome {
    let (signed, sent) = the_invite(session)?;
    let mut bare = signed.as_object().cloned().unwrap_or_default();
    let signatures = bare.remove("signatures").unwrap_or_default();
    let mut before = sent.as_object().cloned().unwrap_or_default();
    let ours = before.remove("signatures").unwrap_or_default();
    ensure(bare == before, "the event as it was sent", || &signed)?;
    let name = session.first.name.as_str();
    ensure(signatures.get(name) == ours.get(name), "the hub's signature as it was", || &signed)?;
    let keys = session.keys_of(&session.target).await.ok_or_else(|| skip("the keys of the target are not known"))?;
    let mut redacted = redact(&before, Redaction::Draft);
    redacted.remove("signatures");
    verified(&canonical_json(&redacted), signatures.get(session.target.as_str()), &keys)
}

/// Passes when there is a signature by a known key and all by known keys are right.
pub(super) fn verified(
    message: &[u8],
    signatures: Option<&Value>,
    keys: &std::collections::BTreeMap<String, VerifyKey>,
) -> Outcome {
    let signatures = signatures.and_then(Value::as_object).cloned().unwrap_or_default();
    let known: Vec<_> = signatures.iter().filter_map(|(id, signature)| Some((keys.get(id)?, signature))).collect();
    ensure(!known.is_empty(), "a signature by one of the target's keys", || Value::Object(signatures.clone()))?;
    for (key, signature) in known {
        let right = key.verify(message, signature.as_str().unwrap_or_default());
        ensure(right.is_ok(), "a signature that verifies", || signature)?;
    }
    Ok(())
}

/// The request for a template, for which somebody at the target may have to accept the invite.
pub(super) async fn template_asked(session: &Session) -> Result<Arrival, Unmet> {
    the_invite(session)?;
    let asked = session
        .ear
        .wait(session.patience, |arrivals| arrivals.iter().find(|arrival| arrival.endpoint == "make_join").cloned());
    asked.await.ok_or_else(|| skip(format!("nobody accepted the invite within {:?}", session.patience)))
}

pub(super) async fn asks_for_template(session: &Session, _: &str) -> Outcome {
    let asked = template_asked(session).await?;
    let wanted = format!("ver={}", version());
    let named = percent_encoding::percent_decode_str(&asked.uri).decode_utf8_lossy().into_owned();
    ensure(asked.method == "GET" && named.contains(&wanted), format!("GET make_join with {wanted}"), || &named)
}

/// The join that the target sent.
pub(super) async fn the_join(session: &Session) -> Result<Object, Unmet> {
    the_invite(session)?;
    let sent = session.ear.wait(session.patience, |arrivals| {
        arrivals.iter().find(|arrival| arrival.endpoint == "send_join" && arrival.answered.is_some()).cloned()
    });
    let sent = sent.await.ok_or_else(|| skip(format!("nobody joined within {:?}", session.patience)))?;
    Ok(sent.body.as_ref().and_then(Value::as_object).cloned().unwrap_or_default())
}

pub(super) type LpduProperty = fn(&Session, &Object) -> bool;

pub(super) fn lpdu_form(_: &Session, lpdu: &Object) -> bool {
    let hashes = lpdu.get("hashes").and_then(Value::as_object);
    !lpdu.contains_key("auth_events")
        && !lpdu.contains_key("prev_events")
        && hashes.is_some_and(|hashes| hashes.len() == 1 && hashes.contains_key("lpdu"))
}

pub(super) fn lpdu_hub(session: &Session, lpdu: &Object) -> bool {
    lpdu.get("hub_server") == Some(&json!(session.first.name))
}

pub(super) fn lpdu_hashed(_: &Session, lpdu: &Object) -> bool {
    let found = lpdu.get("hashes").and_then(|hashes| hashes.pointer("/lpdu/sha256")).and_then(Value::as_str);
    found == Some(lpdu_hash(lpdu).as_str())
}

pub(super) async fn join_is(session: &Session, expected: &str, holds: LpduProperty) -> Outcome {
    let join = the_join(session).await?;
    ensure(holds(session, &join), expected, || Value::Object(join.clone()))
}

pub(super) async fn lpdu_signed(session: &Session, lpdu: &Object) -> Outcome {
    let keys = session.keys_of(&session.target).await.ok_or_else(|| skip("the keys of the target are not known"))?;
    let mut redacted = redact(lpdu, Redaction::Draft);
    let signatures = redacted.remove("signatures").unwrap_or_default();
    verified(&canonical_json(&redacted), signatures.get(session.target.as_str()), &keys)
}

pub(super) async fn join_signed(session: &Session, _: &str) -> Outcome {
    let join = the_join(session).await?;
    lpdu_signed(session, &join).await
}
