//! Delegation by `.well-known`.

use super::*;

#[tokio::test]
async fn hc_56_well_known_within_bounds() {
    let authority = Authority::new();
    let to = |location: &str| (StatusCode::FOUND, [(header::LOCATION, location.to_owned())]).into_response();
    let server = Server::tls(&authority, &["localhost"], move |seen| match seen.uri.as_str() {
        "/good" => axum::Json(json!({ "m.server": "fed.example" })).into_response(),
        "/hops/5" => to("/good"),
        hops if hops.starts_with("/hops/") => {
            let hop: u32 = hops.trim_start_matches("/hops/").parse().unwrap();
            to(&format!("/hops/{}", hop + 1))
        }
        "/loop" => to("/loop"),
        "/http" => to("http://localhost/good"),
        "/metadata" => to("https://169.254.169.254/latest"),
        "/file" => to("file:///etc/passwd"),
        "/large" => axum::Json(json!({ "m.server": "fed.example", "x": "x".repeat(51 << 10) })).into_response(),
        "/endless" => endless().into_response(),
        "/broken" => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        _ => StatusCode::NOT_FOUND.into_response(),
    });
    let tls = tls_config(&[authority.file()]).unwrap();
    let http = Http::new(tls.clone(), Reach::Everything, Itself, answers());
    let url = |path: &str| -> Url { format!("https://localhost:{}{path}", server.address.port()).parse().unwrap() };
    let day = Duration::from_secs(24 * 3600);
    let good = Outcome::Delegates(server_name!("fed.example").to_owned(), day);
    for (path, expected) in [
        ("/good", good.clone()),
        ("/hops/1", good),
        ("/hops/0", Outcome::Absent),
        ("/loop", Outcome::Absent),
        ("/http", Outcome::Absent),
        ("/file", Outcome::Absent),
        ("/large", Outcome::Absent),
        ("/endless", Outcome::Absent),
        ("/none", Outcome::Absent),
        ("/broken", Outcome::Failed),
    ] {
        assert_eq!(fetch_from(&http, url(path)).await, expected, "{path}");
    }
    let seen = server.seen.lock().unwrap().len();
    let guarded = Http::new(tls, Reach::Public, Itself, answers());
    assert_eq!(fetch_from(&guarded, url("/metadata")).await, Outcome::Failed);
    assert_eq!(server.seen.lock().unwrap().len(), seen, "nothing private is dialled");
}

#[tokio::test]
async fn hc_56_well_known_is_asked_for_once_until_it_is_outdated() {
    let authority = Authority::new();
    let server = Server::tls(&authority, &["one.example", "none.example"], |seen| {
        match seen.headers[header::HOST].to_str().unwrap() {
            "one.example" => axum::Json(json!({ "m.server": "fed.example:443" })).into_response(),
            _ => StatusCode::NOT_FOUND.into_response(),
        }
    });
    let tls = tls_config(&[authority.file()]).unwrap();
    let http = Arc::new(Http::new(tls, Reach::Everything, Loopback(server.address.port()), answers()));
    let network = Network::new(http, SrvTargets::new());
    let asked = || std::mem::take(&mut *server.seen.lock().unwrap()).len();
    for (host, delegate) in [("one.example", Some(server_name!("fed.example:443").to_owned())), ("none.example", None)]
    {
        let hosts = [host.to_owned(), host.to_uppercase()];
        for _ in 0..2 {
            let answers = futures::future::join_all((0..10).map(|n| network.delegate(&hosts[n % 2]))).await;
            assert!(answers.iter().all(|answer| *answer == delegate), "{answers:?}");
        }
        assert_eq!(asked(), 1, "{host}");
        network.outdate(host).await;
        assert_eq!(network.delegate(host).await, delegate);
        assert_eq!(asked(), 1, "{host}");
    }
}
