//! Where a MySQL or MariaDB is, how to connect to it, and what its errors mean.

use std::path::PathBuf;
use std::time::Duration;

use mysql_async::{Conn, DriverError, Opts, OptsBuilder, SslOpts};
use percent_encoding::percent_decode_str;

use crate::error::{Error, ErrorKind, Result, nearest};
use crate::outbox::dialect::Dialect;
use crate::outbox::table::Table;

/// Options of URLs that say something about a pool or a driver and nothing about the server: they change nothing here.
const IGNORED: [&str; 9] = [
    "charset",
    "collation",
    "connection_limit",
    "connectionlimit",
    "pool_timeout",
    "socket_timeout",
    "connect_timeout",
    "timezone",
    "statement_cache_size",
];
const KNOWN: [&str; 5] = ["ssl-mode", "ssl-ca", "socket", "charset", "connect_timeout"];

/// How much of TLS is wanted, as `--ssl-mode` of the mysql client says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tls {
    Disabled,
    Preferred,
    Required,
    VerifyCa,
    VerifyIdentity,
}

/// Where and how to connect.
#[derive(Clone)]
pub(super) struct Server {
    plain: Opts,
    encrypted: Opts,
    tls: Tls,
    /// For messages: without the password.
    name: String,
}

impl Server {
    /// Whether a URL is one of ours: `mysql://`, `mariadb://`, and with a driver of Python's behind a plus sign.
    pub fn is_meant(url: &str) -> bool {
        let scheme = url.split("://").next().unwrap_or_default();
        matches!(scheme.split('+').next(), Some("mysql" | "mariadb"))
    }

    /// Reads a URL as SQLAlchemy, mysql2 and Prisma write them. `InvalidConfig` for any other; never with its password.
    pub fn parse(url: &str) -> Result<Self> {
        let wrong = |why: &str| Error::invalid_config(format!("the database URL is not valid: {why}"));
        let rest = url.split_once("://").map_or("", |(_, rest)| rest);
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, database) = place.split_once('/').unwrap_or((place, ""));
        let (login, address) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (user, password) = match login.split_once(':') {
            Some((user, password)) => (user, Some(decoded(password))),
            None => (login, None),
        };
        let (host, port) = match address.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => {
                (host, port.parse().map_err(|_| wrong("the port is not a number from 1 to 65535"))?)
            }
            _ => (address, 3306_u16),
        };
        let host = match host.trim_start_matches('[').trim_end_matches(']') {
            "" => "localhost",
            host => host,
        };
        let (user, database) = (decoded(user), decoded(database));
        let password = password.or_else(|| std::env::var("MYSQL_PWD").ok());
        let (mut tls, mut root, mut socket) = (None, None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (option, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (option, value) = (decoded(option).to_lowercase().replace('_', "-"), decoded(value));
            match &*option {
                "ssl-mode" | "sslmode" | "ssl" => tls = Some(mode(&value)?),
                "ssl-verify-identity" if value == "true" => tls = Some(Tls::VerifyIdentity),
                "ssl-verify-identity" | "ssl-verify-cert" | "ssl-check-hostname" => {}
                "ssl-ca" | "sslca" | "sslrootcert" => root = Some(value),
                "socket" | "unix-socket" => socket = Some(value),
                _ if IGNORED.contains(&&*option.replace('-', "_")) => {}
                _ => {
                    let hint = nearest(&option, KNOWN).map_or(String::new(), |near| format!("; did you mean {near}?"));
                    return Err(wrong(&format!("unknown option {option}{hint}")));
                }
            }
        }
        // Whoever names an authority wants it to be asked.
        let tls = tls.unwrap_or(if root.is_some() { Tls::VerifyIdentity } else { Tls::Preferred });
        let plain = OptsBuilder::default()
            .ip_or_hostname(host)
            .tcp_port(port)
            .user(Some(&*user).filter(|user| !user.is_empty()))
            .pass(password)
            .db_name(Some(&*database).filter(|database| !database.is_empty()))
            .socket(socket.as_deref())
            .prefer_socket(false)
            .stmt_cache_size(0)
            .client_found_rows(true)
            .tcp_keepalive(Some(Duration::from_secs(30)));
        let encrypted = plain.clone().ssl_opts(Some(ssl(tls, root)?));
        let at = if user.is_empty() { String::new() } else { format!("{user}@") };
        let place = socket.unwrap_or_else(|| format!("{host}:{port}"));
        let secure = if matches!(tls, Tls::Disabled | Tls::Preferred) { "" } else { " (TLS)" };
        let name = format!("{at}{place}/{database}{secure}");
        Ok(Self { plain: plain.into(), encrypted: encrypted.into(), tls, name })
    }

    /// Who is connected to what, without a password.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A new connection.
    pub async fn open(&self) -> Result<Conn, mysql_async::Error> {
        if self.tls != Tls::Disabled && self.plain.socket().is_none() {
            match Conn::new(self.encrypted.clone()).await {
                Err(mysql_async::Error::Driver(DriverError::NoClientSslFlagFromServer))
                    if self.tls == Tls::Preferred => {}
                opened => return opened,
            }
        }
        Conn::new(self.plain.clone()).await
    }

    /// What `cause` means, and what to do.
    pub fn explain(&self, cause: mysql_async::Error, table: Option<&Table>) -> Error {
        let name = &self.name;
        let error = match &cause {
            mysql_async::Error::Server(told) => self.told(told, table),
            mysql_async::Error::Driver(DriverError::NoClientSslFlagFromServer) => {
                Error::invalid_config(format!("the database {name} offers no TLS; ssl-mode=disabled goes without it"))
            }
            mysql_async::Error::Driver(
                DriverError::UnknownAuthPlugin { .. }
                | DriverError::MysqlOldPasswordDisabled
                | DriverError::CleartextPluginDisabled,
            ) => Error::new(
                ErrorKind::AuthFailed,
                format!(
                    "{name} wants the user to log in as it cannot be done here: {cause}; give a user with caching_sha2_password or mysql_native_password"
                ),
            ),
            _ => Error::connection_failed(format!("the database {name} cannot be reached: {cause}")),
        };
        error.caused_by(cause)
    }

    fn told(&self, told: &mysql_async::ServerError, table: Option<&Table>) -> Error {
        let (name, said) = (&self.name, &told.message);
        let refused = |advice: &str| Error::new(ErrorKind::AuthFailed, format!("{name}: {said}; {advice}"));
        match told.code {
            1045 | 1698 | 1130 | 1251 | 1820 | 1862 | 3118 | 4151 => Error::new(
                ErrorKind::AuthFailed,
                format!("the database {name} refused the user: {said}; check user and password of the URL"),
            ),
            1044 | 1142 | 1143 | 1227 => refused(
                "the user may not do what a relay does: GRANT SELECT, UPDATE, DELETE on the table (or check the last part of the URL)",
            ),
            1046 | 1049 => Error::invalid_config(format!("{name}: {said}; check the last part of the URL")),
            1146 | 1054 | 1176 => {
                let told = match table {
                    Some(table) => table.missing(Dialect::MySql, "Outbox").message().to_owned(),
                    None => said.clone(),
                };
                Error::invalid_config(format!("{told} ({said})"))
            }
            1064 => Error::unsupported(format!(
                "{name} does not understand what the relay asks: {said}; it works on MySQL 8.0.16, MariaDB 10.6, and newer"
            )),
            1290 | 1792 | 1836 => Error::connection_failed(format!(
                "{name} is read-only: {said}; give the URL of the primary, and no user with a read-only session"
            )),
            1665 => Error::invalid_config(format!("{name}: {said}; the relay wants binlog_format MIXED or ROW")),
            code => Error::connection_failed(format!("{name}: {said} ({code})")),
        }
    }
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn mode(text: &str) -> Result<Tls> {
    match &*text.to_lowercase().replace('-', "_") {
        "disabled" | "disable" | "false" | "0" => Ok(Tls::Disabled),
        "preferred" | "prefer" => Ok(Tls::Preferred),
        "required" | "require" | "true" | "1" => Ok(Tls::Required),
        "verify_ca" => Ok(Tls::VerifyCa),
        "verify_identity" | "verify_full" => Ok(Tls::VerifyIdentity),
        _ => Err(Error::invalid_config(
            "ssl-mode of the database URL is one of disabled, preferred, required, verify_ca and verify_identity",
        )),
    }
}

fn ssl(tls: Tls, root: Option<String>) -> Result<SslOpts> {
    let mut ssl = SslOpts::default();
    if let Some(path) = root {
        let path = PathBuf::from(path);
        std::fs::metadata(&path).map_err(|cause| {
            Error::invalid_config(format!("ssl-ca {} cannot be used: {cause}", path.display())).caused_by(cause)
        })?;
        ssl = ssl.with_root_certs(vec![path.into()]).with_disable_built_in_roots(true);
    }
    Ok(match tls {
        Tls::VerifyIdentity => ssl,
        Tls::VerifyCa => ssl.with_danger_skip_domain_validation(true),
        _ => ssl.with_danger_accept_invalid_certs(true),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_urls_and_never_shows_their_password() {
        for (url, name) in [
            ("mysql://shop:secret@db.example/orders", "shop@db.example:3306/orders"),
            ("mysql+pymysql://shop:s%40:/c@db:3307/orders?charset=utf8mb4", "shop@db:3307/orders"),
            ("mariadb+mariadbconnector://shop@[::1]:3307/d?ssl-mode=REQUIRED", "shop@::1:3307/d (TLS)"),
            ("mysql://u@/d?unix_socket=/run/mysqld/mysqld.sock", "u@/run/mysqld/mysqld.sock/d"),
        ] {
            assert!(Server::is_meant(url));
            // A slash in a password is to be escaped: everybody reads it as the end of the server's name.
            let url = url.replace("/c@", "%2Fc@");
            assert_eq!(Server::parse(&url).unwrap().name(), name);
        }
        let server = Server::parse("mysql://shop:s%40c@db/d").unwrap();
        assert_eq!((server.plain.pass(), server.plain.user()), (Some("s@c"), Some("shop")));
        for (url, said) in [
            ("mysql://shop:secret@h/d?ssl-mod=required", "did you mean ssl-mode"),
            ("mysql://shop:secret@h/d?ssl-mode=maybe", "verify_identity"),
            ("mysql://shop:secret@h:port/d", "port"),
            ("mysql://shop:secret@h/d?ssl-ca=/nowhere.pem", "ssl-ca"),
        ] {
            let error = Server::parse(url).map(drop).unwrap_err();
            assert!(error.message().contains(said) && !format!("{error:?}").contains("secret"), "{error:?}");
        }
    }
}
