//! Peer-chosen strings in TEXT columns. PostgreSQL's TEXT cannot hold U+0000, so it is written as U+0001 U+0001, and U+0001
//! as U+0001 U+0002: every string has exactly one stored form, and no ordinary string changes.

use std::borrow::Cow;

/// The stored form of `value`.
pub fn encode(value: &str) -> Cow<'_, str> {
    if !value.contains(['\u{0}', '\u{1}']) {
        return Cow::Borrowed(value);
    }
    Cow::Owned(value.replace('\u{1}', "\u{1}\u{2}").replace('\u{0}', "\u{1}\u{1}"))
}

/// The string whose stored form is `stored`.
pub fn decode(stored: String) -> String {
    if !stored.contains('\u{1}') {
        return stored;
    }
    let mut decoded = String::with_capacity(stored.len());
    let mut rest = stored.chars();
    while let Some(character) = rest.next() {
        decoded.push(match character {
            '\u{1}' if rest.next() == Some('\u{1}') => '\u{0}',
            other => other,
        });
    }
    decoded
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::both_stores;
    use super::*;

    #[tokio::test]
    async fn hostile_strings_come_back_from_both_databases() {
        both_stores(|store| async move {
            let values =
                ["", "m.room.member", "a\u{0}b", "\u{0}", "\u{1}", "\u{1}\u{0}\u{2}", "\u{10ffff}\u{fffe}", "'; --"];
            for (id, value) in (1..).zip(values) {
                let stored = encode(value).into_owned();
                store
                    .write(move |tx| {
                        Box::pin(async move {
                            let sql = "INSERT INTO sequence (name, value) VALUES ($1, $2)";
                            sqlx::query(sql).bind(stored).bind(id).execute(tx).await?;
                            Ok(())
                        })
                    })
                    .await
                    .unwrap();
                let sql = "SELECT value FROM sequence WHERE name = $1";
                let (found,): (i64,) =
                    sqlx::query_as(sql).bind(encode(value).into_owned()).fetch_one(store.reader()).await.unwrap();
                assert_eq!(found, id, "{value:?}");
                let (name,): (String,) = sqlx::query_as("SELECT name FROM sequence WHERE value = $1")
                    .bind(id)
                    .fetch_one(store.reader())
                    .await
                    .unwrap();
                assert_eq!(decode(name), value);
            }
        })
        .await;
    }

    proptest! {
        #[test]
        fn every_string_comes_back_and_none_holds_nul(value in "[\u{0}\u{1}\u{2}a-c\u{e9}]{0,12}") {
            let stored = encode(&value).into_owned();
            prop_assert_eq!(stored.find(char::from(0)), None);
            prop_assert_eq!(decode(stored), value);
        }
    }
}
