//! From the URL to what we connect to. Nothing is opened here but the certificate files that the URL names.

use percent_encoding::percent_decode_str;
use redis::io::tcp::TcpSettings;
use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisConnectionInfo};

use crate::error::{Error, Result, nearest};
use crate::transport::redact;

/// What the URL says.
#[derive(Debug, Clone)]
pub(super) struct Address {
    pub layout: Layout,
    hosts: Vec<(String, u16)>,
    login: Login,
    sentinel_login: Login,
    database: i64,
    tls: Option<Files>,
}

/// Where the server with our keys is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Layout {
    /// At the one address.
    Single,
    /// Sentinels name the master of this name.
    Sentinel(String),
    /// Each slot has its node.
    Cluster,
}

#[derive(Clone, Default)]
struct Login {
    user: Option<String>,
    password: Option<String>,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Login({:?}, {})", self.user, if self.password.is_some() { "***" } else { "no password" })
    }
}

/// PEM files.
#[derive(Debug, Clone, Default)]
struct Files {
    ca: Option<String>,
    cert: Option<String>,
    key: Option<String>,
}

const PARAMETERS: [&str; 6] = ["tls", "ca_file", "cert_file", "key_file", "sentinel_user", "sentinel_password"];

impl Address {
    /// Parses what follows `scheme://`. `InvalidConfig` says what is wrong, without the password.
    pub fn parse(scheme: &str, rest: &str) -> Result<Self> {
        let wrong = |what: String| {
            let shown = redact(&format!("{scheme}://{rest}"));
            Error::invalid_config(format!(
                "{shown:?} {what}; write one like redis://user:password@localhost:6379/0, redis+sentinel://host1,host2/mymaster or redis+cluster://host1,host2"
            ))
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (login, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
        let sentinel = scheme.starts_with("redis+sentinel");
        let default_port = if sentinel { 26379 } else { 6379 };
        let hosts = hosts.split(',').map(|host| split_host(host, default_port));
        let hosts = hosts.collect::<Option<Vec<_>>>().ok_or_else(|| wrong("has no valid host and port".into()))?;

        let path: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let (layout, database) = match (scheme, path.as_slice()) {
            ("redis+sentinel", [name]) => (Layout::Sentinel(decoded(name)), None),
            ("redis+sentinel", [name, database]) => (Layout::Sentinel(decoded(name)), Some(*database)),
            ("redis+sentinel", _) => return Err(wrong("does not name the master that the sentinels watch".into())),
            ("redis+cluster", []) => (Layout::Cluster, None),
            ("redis+cluster", _) => return Err(wrong("names a database, and a cluster has only one".into())),
            (_, []) => (Layout::Single, None),
            (_, [database]) => (Layout::Single, Some(*database)),
            _ => return Err(wrong("has a path that is not a database number".into())),
        };
        if layout == Layout::Single && hosts.len() > 1 {
            return Err(wrong("names several hosts".into()));
        }
        let database = database.unwrap_or("0").parse();
        let database: u16 = database.map_err(|_| wrong("has a database that is not a number".into()))?;

        let (mut tls, mut files) = (scheme == "rediss", Files::default());
        let mut sentinel_login = Login::default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decoded(value);
            match name {
                "tls" if matches!(value.as_str(), "true" | "false") => tls = tls || value == "true",
                "tls" => return Err(wrong("has a tls= that is neither true nor false".into())),
                "ca_file" => files.ca = Some(value),
                "cert_file" => files.cert = Some(value),
                "key_file" => files.key = Some(value),
                "sentinel_user" => sentinel_login.user = Some(value),
                "sentinel_password" => sentinel_login.password = Some(value),
                other => {
                    let hint =
                        nearest(other, PARAMETERS).map_or(String::new(), |near| format!(", did you mean {near}?"));
                    return Err(wrong(format!("has the unknown parameter {other:?}{hint}")));
                }
            }
        }
        if files.cert.is_some() != files.key.is_some() {
            return Err(wrong("needs cert_file and key_file together".into()));
        }
        if !tls && (files.ca.is_some() || files.cert.is_some()) {
            return Err(wrong("names certificate files without TLS: use rediss:// or tls=true".into()));
        }
        Ok(Self {
            layout,
            hosts,
            login: Login::parse(login),
            sentinel_login,
            database: i64::from(database),
            tls: tls.then_some(files),
        })
    }

    /// What to connect to first: the server, the sentinels or some nodes of the cluster.
    pub fn seeds(&self) -> &[(String, u16)] {
        &self.hosts
    }

    /// For people: the hosts, nothing secret.
    pub fn describe(&self) -> String {
        self.hosts.iter().map(|(host, port)| format!("{host}:{port}")).collect::<Vec<_>>().join(",")
    }

    /// How to reach a server with our keys. `InvalidConfig` when a certificate file cannot be read.
    pub fn server(&self, (host, port): &(String, u16)) -> Result<redis::Client> {
        self.client(host, *port, &self.login, self.database)
    }

    /// How to reach a sentinel.
    pub fn sentinel(&self, (host, port): &(String, u16)) -> Result<redis::Client> {
        self.client(host, *port, &self.sentinel_login, 0)
    }

    fn client(&self, host: &str, port: u16, login: &Login, database: i64) -> Result<redis::Client> {
        let unusable = |cause: redis::RedisError| {
            Error::invalid_config(format!("{host}:{port} cannot be used: {cause}")).caused_by(cause)
        };
        let address = match &self.tls {
            None => ConnectionAddr::Tcp(host.to_owned(), port),
            Some(_) => ConnectionAddr::TcpTls { host: host.to_owned(), port, insecure: false, tls_params: None },
        };
        let mut settings = RedisConnectionInfo::default().set_db(database).set_protocol(redis::ProtocolVersion::RESP3);
        if let Some(user) = &login.user {
            settings = settings.set_username(user);
        }
        if let Some(password) = &login.password {
            settings = settings.set_password(password);
        }
        // A peer that went away without a word is noticed by the kernel too, not only by our own deadlines.
        let keepalive = socket2::TcpKeepalive::new().with_time(std::time::Duration::from_secs(15));
        let info: ConnectionInfo = address
            .into_connection_info()
            .map_err(unusable)?
            .set_redis_settings(settings)
            .set_tcp_settings(TcpSettings::default().set_nodelay(true).set_keepalive(keepalive));
        match &self.tls {
            None => redis::Client::open(info).map_err(unusable),
            Some(files) => {
                provide_cryptography();
                redis::Client::build_with_tls(info, files.read()?).map_err(unusable)
            }
        }
    }
}

impl Login {
    fn parse(text: &str) -> Self {
        let (user, password) = text.split_once(':').map_or((text, None), |(user, word)| (user, Some(word)));
        let user = Some(decoded(user)).filter(|user| !user.is_empty());
        Self { user, password: password.map(decoded).filter(|password| !password.is_empty()) }
    }
}

impl Files {
    fn read(&self) -> Result<redis::TlsCertificates> {
        let read = |path: &String| {
            std::fs::read(path).map_err(|cause| {
                Error::invalid_config(format!("cannot read the certificate file {path:?}: {cause}")).caused_by(cause)
            })
        };
        let client_tls = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => {
                Some(redis::ClientTlsConfig { client_cert: read(cert)?, client_key: read(key)? })
            }
            _ => None,
        };
        Ok(redis::TlsCertificates { client_tls, root_cert: self.ca.as_ref().map(read).transpose()? })
    }
}

/// rustls wants one cryptography provider for the process; a program that chose its own keeps it.
fn provide_cryptography() {
    drop(rustls::crypto::ring::default_provider().install_default());
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn split_host(text: &str, default_port: u16) -> Option<(String, u16)> {
    // [::1]:6379
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, "")) => (host, None),
        Some((host, port)) => (host, Some(port.strip_prefix(':')?)),
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    let port = port.map_or(Some(default_port), |port| port.parse().ok())?;
    (!host.is_empty() && !host.contains(char::is_whitespace)).then(|| (host.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(url: &str) -> Result<Address> {
        let (scheme, rest) = url.split_once("://").unwrap();
        Address::parse(scheme, rest)
    }

    #[test]
    fn reads_every_form() {
        let one = parsed("redis://us%40er:p%3Ass@[::1]:7000/3").unwrap();
        assert_eq!((one.seeds(), one.database), (&[("::1".to_owned(), 7000)][..], 3));
        assert_eq!((one.login.user.as_deref(), one.login.password.as_deref()), (Some("us@er"), Some("p:ss")));
        assert!(!format!("{one:?}").contains("p:ss"));
        let watched = parsed("redis+sentinel://:pw@a,b:1/mymaster/2?sentinel_password=x&tls=true").unwrap();
        assert_eq!(watched.layout, Layout::Sentinel("mymaster".into()));
        assert_eq!((watched.seeds()[0].1, watched.seeds()[1].1, watched.database), (26379, 1, 2));
        assert_eq!(watched.login.user, None);
        assert!(watched.tls.is_some());
        assert_eq!(parsed("redis+cluster://a:1,b:2").unwrap().describe(), "a:1,b:2");
        assert_eq!(parsed("redis://localhost").unwrap().seeds()[0].1, 6379);
    }

    #[test]
    fn says_what_is_wrong_and_keeps_the_password() {
        for (url, part) in [
            ("redis://", "host"),
            ("redis://h:port", "host"),
            ("redis://:secret@h/x", "number"),
            ("redis://a,b", "several"),
            ("redis+sentinel://a", "master"),
            ("redis+cluster://a/1", "only one"),
            ("redis://:secret@h?tsl=true", "did you mean tls"),
            ("rediss://h?cert_file=x", "together"),
            ("redis://h?ca_file=x", "without TLS"),
        ] {
            let error = parsed(url).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::InvalidConfig, "{url}");
            assert!(error.message().contains(part), "{url}: {error}");
            assert!(!error.message().contains("secret"), "{url}: {error}");
        }
    }
}
