//! The schema: older ones are brought up to date with what is in them, newer ones are left alone.

use ruma::event_id;
use sqlx::migrate::Migrator;

use super::testing::both_databases;
use super::*;

async fn connect(url: &str) -> AnyConnection {
    sqlx::any::install_default_drivers();
    let url = if url.starts_with("sqlite:") { format!("{url}?mode=rwc") } else { url.to_owned() };
    AnyConnection::connect(&url).await.unwrap()
}

#[tokio::test]
async fn hc_83_a_schema_of_a_newer_program_is_refused_and_left_as_it_is() {
    both_databases(|url| async move {
        Store::open(&url).await.unwrap().close().await;
        let mut connection = connect(&url).await;
        let tomorrow = "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
                        SELECT 9999, 'of tomorrow', success, checksum, 0 FROM _sqlx_migrations WHERE version = 1";
        sqlx::query(tomorrow).execute(&mut connection).await.unwrap();
        for _ in 0..2 {
            let error = Store::open(&url).await.err().expect("a newer schema is not touched");
            assert!(matches!(error, StoreError::Migration(_)) && error.to_string().contains("9999"), "{error}");
        }
        let versions: Vec<i64> = sqlx::query_scalar("SELECT version FROM _sqlx_migrations ORDER BY version")
            .fetch_all(&mut connection)
            .await
            .unwrap();
        assert_eq!(versions.last(), Some(&9999));
        connection.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn hc_83_every_older_schema_is_brought_up_to_date_with_what_is_in_it() {
    // From the one on that has logs.
    let versions: Vec<i64> = sqlx::migrate!().iter().map(|migration| migration.version).filter(|v| *v >= 4).collect();
    assert!(versions.len() > 5);
    for version in versions {
        both_databases(|url| async move {
            let older = sqlx::migrate!().iter().filter(|migration| migration.version <= version).cloned().collect();
            let mut connection = connect(&url).await;
            Migrator::with_migrations(older).run(&mut connection).await.unwrap();
            let room = "INSERT INTO lm_rooms (room_id, version, hub, redaction, head) \
                        VALUES ('!r:hub.example', 'I.1', 'hub.example', 'draft', 0)";
            sqlx::query(room).execute(&mut connection).await.unwrap();
            let event = "INSERT INTO lm_events (room_id, position, event_id, json) \
                         VALUES ('!r:hub.example', 0, '$first', $1)";
            sqlx::query(event).bind(b"{}".as_slice()).execute(&mut connection).await.unwrap();
            connection.close().await.unwrap();
            for _ in 0..2 {
                let store = Store::open(&url).await.unwrap();
                let event = lm::event(&store, event_id!("$first")).await.unwrap().unwrap();
                assert_eq!((event.position, event.room_id.as_str()), (0, "!r:hub.example"), "from {version}");
                store.close().await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_file_that_is_no_database_is_told_of_with_advice() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("db");
    std::fs::write(&file, vec![b'x'; 9000]).unwrap();
    let Err(error) = Store::open(&format!("sqlite://{}", file.display())).await else { panic!("it is no database") };
    let error = error.to_string();
    assert!(error.contains("not a database") && error.contains("restore the file from a backup"), "{error}");
}
