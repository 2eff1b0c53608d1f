//! TLS to MariaDB.

use polybus_conformance::certificates::Certificates;
use polybus_conformance::maria_server::MariaServer;
use polybus_core::ErrorKind;
use polybus_core::Result;
use polybus_core::outbox::relay::{Relay, RelayOptions};

use crate::ground::{Ground, Memo};

async fn check(ground: &Ground<MariaServer>, query: &str) -> Result<()> {
    let url = format!("{}?{query}", ground.server.url());
    Relay::new(&url, Memo::new(), RelayOptions::default())?.check().await
}

#[tokio::test]
async fn certificates_are_checked_as_ssl_mode_says() {
    let certificates = Certificates::new();
    let ground = Ground { server: MariaServer::with(Some(certificates.clone())) };
    ground.make("polybus_outbox");
    ground.server.sql("ALTER USER relay REQUIRE SSL");
    let authority = format!("ssl-ca={}", certificates.authority().display());
    let verified = format!("{authority}&ssl-mode=verify_ca");
    for query in ["", "ssl-mode=required", "ssl=true", &authority, &verified] {
        check(&ground, query).await.unwrap_or_else(|error| panic!("{query}: {error}"));
    }
    assert_eq!(check(&ground, "ssl-mode=disabled").await.unwrap_err().kind(), ErrorKind::AuthFailed);
    let unknown = check(&ground, "ssl-mode=verify_identity").await.unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::ConnectionFailed, "{unknown}");
    // Another authority did not sign it.
    let other = format!("ssl-mode=verify_ca&ssl-ca={}", Certificates::new().authority().display());
    assert!(check(&ground, &other).await.is_err());
}

#[tokio::test]
async fn a_server_without_tls_is_used_unless_it_is_required() {
    let ground = Ground::<MariaServer>::on();
    check(&ground, "").await.unwrap();
    let error = check(&ground, "ssl-mode=required").await.unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidConfig && error.message().contains("no TLS"), "{error}");
}
