//! A certificate authority of a test's own, made with the openssl program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use tempfile::TempDir;

const AUTHORITY: &str = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n";
const SERVER: &str = "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\n";
const CLIENT: &str = "extendedKeyUsage=clientAuth\n";

/// An authority, and what it signed: a server's certificate for the loopback, and a client's. Files live as long as one
/// of the clones.
#[derive(Clone)]
pub struct Certificates(Arc<TempDir>);

impl Certificates {
    #[allow(clippy::new_without_default, reason = "each one is another authority: not a default value")]
    pub fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("polybus-tls-").tempdir().unwrap();
        for (name, extensions) in [("ca", AUTHORITY), ("server", SERVER), ("client", CLIENT)] {
            sign(folder.path(), name, extensions);
        }
        Self(Arc::new(folder))
    }

    /// What signed the others.
    pub fn authority(&self) -> PathBuf {
        self.0.path().join("ca.crt")
    }

    /// Certificate and key of a server.
    pub fn server(&self) -> (PathBuf, PathBuf) {
        self.pair("server")
    }

    /// Certificate and key of a client.
    pub fn client(&self) -> (PathBuf, PathBuf) {
        self.pair("client")
    }

    fn pair(&self, name: &str) -> (PathBuf, PathBuf) {
        (self.0.path().join(format!("{name}.crt")), self.0.path().join(format!("{name}.key")))
    }
}

/// Makes `<name>.key` and `<name>.crt`, signed by the authority, which signs itself.
fn sign(folder: &Path, name: &str, extensions: &str) {
    // Nothing of the machine's openssl.cnf gets in, such as extensions that it adds to every certificate.
    fs::write(folder.join("request.cnf"), "[req]\ndistinguished_name=name\n[name]\n").unwrap();
    fs::write(folder.join("extensions"), extensions).unwrap();
    let (key, request, certificate) = (format!("{name}.key"), format!("{name}.csr"), format!("{name}.crt"));
    let subject = format!("/CN=polybus test {name}");
    let kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-config", "request.cnf"];
    openssl(folder, &[&["req", "-subj", &subject, "-keyout", &key, "-out", &request], &kind[..]].concat());
    let signer: &[&str] = match name {
        "ca" => &["-signkey", "ca.key"],
        _ => &["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"],
    };
    let sign = ["x509", "-req", "-days", "2", "-extfile", "extensions", "-in", &request, "-out", &certificate];
    openssl(folder, &[&sign, signer].concat());
}

fn openssl(folder: &Path, arguments: &[&str]) {
    let run = Command::new("openssl").args(arguments).current_dir(folder).stdin(Stdio::null()).output();
    let output = run.expect("openssl is needed: run `make setup`");
    assert!(output.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
