//! isthmus: a bridging gateway between full Matrix and Linearized Matrix. This page is the contents page of the house:
//! `lm` and `dag` do not know each other, `event` and `identity` know neither, and only `bridge` sees both sides.

pub mod admin;
pub mod appservice;
pub mod bridge;
pub mod clock;
pub mod config;
pub mod conformance;
pub mod dag;
pub mod doctor;
pub mod event;
pub mod federation;
pub mod gateway;
pub(crate) mod guard;
pub mod identity;
pub mod lm;
pub mod media;
pub mod refusal;
pub mod seam;
pub mod store;
