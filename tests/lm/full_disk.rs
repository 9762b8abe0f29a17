//! A hub whose disk is full: it says that it has failed, and whoever sent something sends it again (INV-6).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::world::{World, assert_dense, message};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_6_hc_82_what_does_not_fit_on_the_disk_is_not_acknowledged_and_comes_again() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let failed = Arc::new(AtomicUsize::new(0));
    let counted = failed.clone();
    hub.meddle(move |request, next| {
        let counted = counted.clone();
        async move {
            let response = next.run(request).await;
            if response.status().is_server_error() {
                counted.fetch_add(1, Ordering::SeqCst);
            }
            response
        }
    });
    let mut expected = Vec::new();
    for round in 0..3 {
        // The database may not grow any more. It may again when the connection is made anew, which a failure has it be.
        let write = hub.context.store.write(|tx| {
            Box::pin(async move {
                sqlx::query("PRAGMA max_page_count = 1").execute(tx).await?;
                Ok(())
            })
        });
        write.await.unwrap();
        let before = failed.load(Ordering::SeqCst);
        for number in 0..4 {
            let body = format!("{round} {number} {}", "x".repeat(50_000));
            part.send(&room, message(&part.user("alice"), &body)).await.unwrap();
            expected.push(body);
        }
        // A server that failed is left alone for a while, unless something is heard of it.
        for _ in 0..200 {
            part.context.outbound.retry(&hub.name);
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            if failed.load(Ordering::SeqCst) > before {
                break;
            }
        }
        assert!(failed.load(Ordering::SeqCst) > before, "everything fitted");
        part.context.outbound.retry(&hub.name);
        let wanted = expected.clone();
        let all = hub.wait(&room, "everything", |log| super::world::bodies(log).len() >= wanted.len()).await;
        assert_eq!(super::world::bodies(&all), expected, "each once and in order");
        assert_dense(&all);
    }
    let at_part = part.wait(&room, "everything", |log| super::world::bodies(log).len() == expected.len()).await;
    assert_eq!(super::world::bodies(&at_part), expected);
}
