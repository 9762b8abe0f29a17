//! A bridge that carries nothing over: it notes what it is asked, and answers as a test wants.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures::future::BoxFuture;
use isthmus::event::Edu;
use isthmus::identity::Side;
use isthmus::refusal::Refusal;
use isthmus::seam::{AliasTarget, Between, EventEffect, Handshake, Invite, Profile, Uninvited};
use ruma::{OwnedEventId, OwnedRoomId, OwnedUserId, RoomId, ServerName, UserId};
use tokio::sync::watch;

/// The bridge of the tests of one side.
#[derive(Default)]
pub struct Watcher {
    /// Changes with every commit that a room's events went into the inbox with.
    pub news: watch::Sender<u64>,
    pub gates: Mutex<Vec<Handshake>>,
    pub invites: Mutex<Vec<Invite>>,
    pub refused: Mutex<Vec<(OwnedEventId, String)>>,
    /// What went to another hub under another name: the LPDU, and what replaced it.
    pub replaced: Arc<Mutex<Vec<(OwnedEventId, OwnedEventId)>>>,
    /// Users whom the other side would not have.
    pub unwanted: Mutex<Vec<OwnedUserId>>,
    /// Why the other side would have nobody.
    pub closed: Mutex<Option<Refusal>>,
    /// What is done before an invite is signed.
    pub before_signing: Mutex<Option<Hook>>,
    /// The devices of this server's users.
    pub devices: Mutex<Vec<(OwnedUserId, String)>>,
    /// What other servers' users did besides events.
    pub edus: Mutex<Vec<(Side, Edu)>>,
    /// Rooms into which users of this server are invited and in which it is not, of the linear side.
    pub pending: Mutex<Vec<OwnedRoomId>>,
    /// Invites that have ended.
    pub ended: Mutex<Vec<Uninvited>>,
    /// Where aliases lead.
    pub aliases: Mutex<Vec<(String, AliasTarget)>>,
}

/// Something asynchronous that a test does in between.
pub type Hook = Box<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>;

#[async_trait]
impl Between for Watcher {
    async fn gate(&self, handshake: &Handshake) -> Result<(), Refusal> {
        self.gates.lock().unwrap().push(handshake.clone());
        if let Some(why) = &*self.closed.lock().unwrap() {
            return Err(why.clone());
        }
        match self.unwanted.lock().unwrap().contains(&handshake.user_id) {
            true => Err(Refusal::Forbidden("the other side would not have this user".to_owned())),
            false => Ok(()),
        }
    }

    fn watches(&self, _side: Side, _room_id: &RoomId) -> bool {
        true
    }

    fn accepted(&self, _side: Side, _room_id: &RoomId) {
        self.news.send_modify(|news| *news += 1);
    }

    fn edu(&self, side: Side, edu: Edu) {
        self.edus.lock().unwrap().push((side, edu));
    }

    fn has_device(&self, user_id: &UserId, device: &str) -> bool {
        self.devices.lock().unwrap().iter().any(|(user, known)| user == user_id && known == device)
    }

    async fn invited(&self, invite: Invite) -> Result<(), Refusal> {
        let before = self.before_signing.lock().unwrap().as_ref().map(|hook| hook());
        if let Some(before) = before {
            before.await;
        }
        if self.unwanted.lock().unwrap().contains(&invite.target) {
            return Err(Refusal::Forbidden("does not want to be invited".to_owned()));
        }
        self.invites.lock().unwrap().push(invite);
        self.news.send_modify(|news| *news += 1);
        Ok(())
    }

    fn invited_into(&self, room_id: &RoomId) -> Option<Side> {
        self.pending.lock().unwrap().iter().any(|pending| pending == room_id).then_some(Side::Lm)
    }

    async fn uninvited(&self, ended: Uninvited) -> Result<(), Refusal> {
        self.ended.lock().unwrap().push(ended);
        self.news.send_modify(|news| *news += 1);
        Ok(())
    }

    async fn alias(
        &self,
        alias: &str,
        _asked_by: Option<&ServerName>,
        _side: Option<Side>,
    ) -> Result<AliasTarget, Refusal> {
        let aliases = self.aliases.lock().unwrap();
        let found = aliases.iter().find(|(known, _)| alias == known);
        found.map(|(_, target)| target.clone()).ok_or_else(|| Refusal::NotFound(format!("alias {alias}")))
    }

    async fn profile(&self, _side: Side, user_id: &UserId) -> Result<Profile, Refusal> {
        Ok(Profile { displayname: Some(user_id.localpart().to_owned()), avatar_url: None })
    }

    async fn lpdu_refused(&self, _room_id: &RoomId, lpdu_id: &OwnedEventId, error: &str) -> Result<(), Refusal> {
        self.refused.lock().unwrap().push((lpdu_id.clone(), error.to_owned()));
        self.news.send_modify(|news| *news += 1);
        Ok(())
    }

    fn lpdu_replaced(&self, lpdu_id: &OwnedEventId, _by_lpdu: bool) -> Option<EventEffect> {
        let (replaced, old) = (self.replaced.clone(), lpdu_id.clone());
        Some(EventEffect::new(move |_, new| {
            Box::pin(async move {
                replaced.lock().unwrap().push((old, new));
                Ok(())
            })
        }))
    }
}
