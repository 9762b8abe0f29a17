//! What the suite found: one row for each check, the summary, and both as text and as JSON.

use std::fmt;

use serde_json::{Value, json};

/// How a check ended that did not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unmet {
    /// The server does not do what it must.
    Fail {
        /// What was expected.
        expected: String,
        /// What came.
        found: String,
    },
    /// It could not be looked at, and why.
    Skip(String),
}

/// How a check ended.
pub type Outcome = Result<(), Unmet>;

/// It does not do what it must.
pub(super) fn fail(expected: impl Into<String>, found: impl fmt::Display) -> Unmet {
    Unmet::Fail { expected: expected.into(), found: cut(&found.to_string()) }
}

/// It cannot be looked at.
pub(super) fn skip(why: impl Into<String>) -> Unmet {
    Unmet::Skip(cut(&why.into()))
}

/// Passes when `holds`.
pub(super) fn ensure<F: fmt::Display>(holds: bool, expected: impl Into<String>, found: impl FnOnce() -> F) -> Outcome {
    if holds { Ok(()) } else { Err(fail(expected, found())) }
}

/// How much of what came is shown.
const SHOWN: usize = 600;

/// What a peer sent, shortened, and without what would take over a terminal.
fn cut(text: &str) -> String {
    let clean = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let mut shown: String = text.chars().take(SHOWN).map(clean).collect();
    if text.chars().count() > SHOWN {
        shown.push('…');
    }
    shown
}

/// One check with how it ended.
#[derive(Debug, Clone)]
pub struct Row {
    /// Its number, which never changes.
    pub id: &'static str,
    /// The draft's section.
    pub section: &'static str,
    /// What must hold.
    pub title: &'static str,
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took, in milliseconds.
    pub took_ms: u128,
}

impl Row {
    fn word(&self) -> &'static str {
        match &self.outcome {
            Ok(()) => "PASS",
            Err(Unmet::Fail { .. }) => "FAIL",
            Err(Unmet::Skip(_)) => "SKIP",
        }
    }

    fn json(&self) -> Value {
        let mut row = json!({ "check": self.id, "section": self.section, "title": self.title, "result": self.word(),
            "took_ms": u64::try_from(self.took_ms).unwrap_or(u64::MAX) });
        match (&self.outcome, row.as_object_mut()) {
            (Err(Unmet::Fail { expected, found }), Some(row)) => {
                row.insert("expected".to_owned(), json!(expected));
                row.insert("found".to_owned(), json!(found));
            }
            (Err(Unmet::Skip(why)), Some(row)) => {
                row.insert("why".to_owned(), json!(why));
            }
            _ => {}
        }
        row
    }
}

impl fmt::Display for Row {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}  {}  {} ({})", self.word(), self.id, self.title, self.section)?;
        match &self.outcome {
            Ok(()) => Ok(()),
            Err(Unmet::Fail { expected, found }) => {
                write!(formatter, "\n      expected: {expected}\n      found:    {found}")
            }
            Err(Unmet::Skip(why)) => write!(formatter, "\n      {why}"),
        }
    }
}

/// All rows.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// In the order in which they were run.
    pub rows: Vec<Row>,
}

impl Report {
    /// How many passed, failed and were skipped.
    pub fn counts(&self) -> (usize, usize, usize) {
        let count = |word| self.rows.iter().filter(|row| row.word() == word).count();
        (count("PASS"), count("FAIL"), count("SKIP"))
    }

    /// The numbers of the checks that failed.
    pub fn failed(&self) -> Vec<&'static str> {
        self.rows.iter().filter(|row| row.word() == "FAIL").map(|row| row.id).collect()
    }

    /// The numbers of the checks that were skipped.
    pub fn skipped(&self) -> Vec<&'static str> {
        self.rows.iter().filter(|row| row.word() == "SKIP").map(|row| row.id).collect()
    }

    /// Whether nothing failed and something passed: where nothing could be looked at, nothing good was found.
    pub fn is_good(&self) -> bool {
        let (passed, failed, _) = self.counts();
        passed > 0 && failed == 0
    }

    /// In a sentence, and where nothing passed in another one that says why.
    pub fn summary(&self) -> String {
        let (passed, failed, skipped) = self.counts();
        let counts = format!("{passed} passed, {failed} failed, {skipped} skipped, of {} checks.", self.rows.len());
        if passed > 0 {
            return counts;
        }
        let why = self.rows.iter().find_map(|row| match &row.outcome {
            Err(Unmet::Fail { found, .. }) => Some(format!("{}: {found}", row.id)),
            _ => None,
        });
        let skipped = || {
            self.rows.iter().find_map(|row| match &row.outcome {
                Err(Unmet::Skip(why)) => Some(format!("{}: {why}", row.id)),
                _ => None,
            })
        };
        let why = why.or_else(skipped).unwrap_or_else(|| "no check was run".to_owned());
        format!("{counts} Nothing passed, so nothing is known to be right of this server ({why}).")
    }

    /// As JSON.
    pub fn json(&self, target: &str) -> Value {
        let (passed, failed, skipped) = self.counts();
        json!({ "target": target, "passed": passed, "failed": failed, "skipped": skipped,
            "good": self.is_good(), "checks": self.rows.iter().map(Row::json).collect::<Vec<_>>() })
    }
}
