//! PostgreSQL over TLS, with authorities of the test's own.

use polybus_conformance::certificates::Certificates;
use polybus_core::outbox::relay::{Relay, RelayOptions};
use polybus_core::{ErrorKind, Result};

use crate::ground::{Ground, Memo, event, insert, working};

fn relay(ground: &Ground, user: &str, params: &str) -> Result<Relay> {
    let options = RelayOptions { listen: false, ..RelayOptions::default() };
    Relay::new(&format!("{}?{params}", ground.server.url_of(user)), Memo::new(), options)
}

/// It works, and whether over TLS is in `pg_stat_ssl`.
async fn works(ground: &Ground, params: &str, encrypted: bool) {
    let relay = relay(ground, "postgres", params).unwrap();
    relay.check().await.unwrap_or_else(|error| panic!("{params}: {error}"));
    let sql = "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'polybus relay'";
    assert_eq!(ground.server.sql(sql), if encrypted { "t" } else { "f" }, "{params}");
}

/// It ends at once, with an error that says all of this.
async fn refused(ground: &Ground, user: &str, params: &str, kind: ErrorKind, words: &[&str]) {
    let error = match relay(ground, user, params) {
        Ok(relay) => polybus_conformance::within(relay.run()).await.unwrap_err(),
        Err(error) => error,
    };
    let told = error.message();
    assert!(error.kind() == kind && words.iter().all(|word| told.contains(word)), "{params}: {error:?}");
    assert!(!format!("{error:?}").contains("secret"), "{error:?}");
}

/// Files of an authority, as parameters.
fn root(certificates: &Certificates) -> String {
    format!("sslrootcert={}", certificates.authority().display())
}

fn client(certificates: &Certificates) -> String {
    let (certificate, key) = certificates.client();
    format!("sslcert={}&sslkey={}", certificate.display(), key.display())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_sslmode_checks_what_it_says() {
    let mut ground = Ground::new();
    for params in ["", "sslmode=disable", "sslmode=allow", "sslmode=prefer"] {
        works(&ground, params, false).await;
    }
    for mode in ["require", "verify-ca", "verify-full"] {
        let params = format!("sslmode={mode}");
        refused(&ground, "postgres", &params, ErrorKind::InvalidConfig, &["offers no TLS", "sslmode=disable"]).await;
    }

    let (ours, other) = (Certificates::new(), Certificates::new());
    ground.server.offer_tls(&ours, "");
    let (right, wrong) = (root(&ours), root(&other));
    works(&ground, "sslmode=disable", false).await;
    for params in ["sslmode=prefer", "sslmode=require", "ssl=true", "ssl=require", "sslnegotiation=postgres"] {
        works(&ground, params, true).await;
    }
    for mode in ["require", "verify-ca", "verify-full"] {
        works(&ground, &format!("sslmode={mode}&{right}"), true).await;
        let params = format!("sslmode={mode}&{wrong}");
        refused(&ground, "postgres", &params, ErrorKind::InvalidConfig, &["no authority", "sslrootcert"]).await;
    }
    // Those that browsers trust have not signed it either.
    for params in ["sslmode=verify-full", "sslmode=verify-ca&sslrootcert=system"] {
        refused(&ground, "postgres", params, ErrorKind::InvalidConfig, &["no authority", "sslrootcert"]).await;
    }
    // It is for 127.0.0.1 and localhost.
    let at = |host: &str| format!("host={host}&hostaddr=127.0.0.1&{right}");
    let elsewhere = |params: &str| {
        let url = format!("postgres://postgres@/postgres?port={}&{params}", ground.server.port());
        Relay::new(&url, Memo::new(), RelayOptions::default()).unwrap()
    };
    elsewhere(&format!("{}&sslmode=verify-full", at("localhost"))).check().await.unwrap();
    elsewhere(&format!("{}&sslmode=verify-ca", at("db.example"))).check().await.unwrap();
    let error = elsewhere(&format!("{}&sslmode=verify-full", at("db.example"))).run().await.unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidConfig, "{error:?}");
    assert!(["db.example", "another host", "verify-ca"].iter().all(|word| error.message().contains(word)), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_shows_its_certificate_and_all_of_the_relay_works() {
    let (ours, other) = (Certificates::new(), Certificates::new());
    let mut ground = Ground::new();
    ground.server.sql("GRANT SELECT, INSERT, UPDATE, DELETE ON polybus_outbox TO shop");
    let rules =
        "hostssl all shop 127.0.0.1/32 scram-sha-256 clientcert=verify-ca\nhostnossl all shop 127.0.0.1/32 reject";
    ground.server.offer_tls(&ours, rules);
    let full = format!("sslmode=verify-full&{}", root(&ours));
    let denied = ErrorKind::AuthFailed;
    refused(&ground, "shop:secret", &full, denied, &["certificate", "sslcert and sslkey"]).await;
    refused(&ground, "shop:secret", &format!("{full}&{}", client(&other)), denied, &["sslcert and sslkey"]).await;
    refused(&ground, "shop:secret", "sslmode=disable", denied, &["sslmode=require"]).await;
    refused(&ground, "shop:wr0ng", &format!("{full}&{}", client(&ours)), denied, &["password"]).await;

    let bus = Memo::new();
    let url = format!("{}?{full}&{}", ground.server.url_of("shop:secret"), client(&ours));
    let relay = Relay::new(&url, bus.clone(), RelayOptions::default()).unwrap();
    let writer = ground.server.connect().await;
    working(&[relay], async {
        insert(&writer, &event(1, None)).await;
        ground.until_delivered(&writer, 1).await;
        // The one that listens is encrypted, too.
        let sql =
            "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE query LIKE 'LISTEN%' AND ssl";
        polybus_conformance::eventually("it listens over TLS", || async {
            Ok(writer.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 1)
        })
        .await;
    })
    .await;
    assert_eq!(bus.numbers(), [1]);
}

#[test]
fn files_and_words_that_are_wrong_are_named_before_anything_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("not a certificate.pem");
    std::fs::write(&file, "hello").unwrap();
    let text = file.display().to_string().replace(' ', "%20");
    let ours = Certificates::new();
    let (certificate, key) = ours.client();
    let (_, other) = ours.server();
    for (params, words) in [
        ("sslmode=verify-al".to_owned(), ["sslmode=verify-al", "verify-full"]),
        ("sslmode=verify-ca&sslrootcert=/no/such/file".to_owned(), ["sslrootcert", "/no/such/file"]),
        (format!("sslmode=verify-ca&sslrootcert={text}"), ["sslrootcert", "not a certificate.pem"]),
        (format!("sslcert={}", certificate.display()), ["sslcert and sslkey", "takes both"]),
        (format!("sslkey={}", key.display()), ["sslcert and sslkey", "takes both"]),
        (format!("sslcert={}&sslkey={text}", certificate.display()), ["sslkey", "not a certificate.pem"]),
        (format!("sslcert={}&sslkey={}", certificate.display(), other.display()), ["sslcert", "cannot be used"]),
        ("sslpasswrd=x".to_owned(), ["not valid", "sslpasswrd"]),
    ] {
        let url = format!("postgres://shop:secret@h/d?{params}");
        let error = Relay::new(&url, Memo::new(), RelayOptions::default()).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{params}: {error}");
        assert!(words.iter().all(|word| error.message().contains(word)), "{params}: {error}");
        assert!(!format!("{error:?}").contains("secret"), "{error:?}");
    }
}
