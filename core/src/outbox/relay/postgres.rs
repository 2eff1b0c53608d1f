//! A connection to PostgreSQL that comes back by itself.
//!
//! Statements are prepared once: planning one takes a millisecond, whatever it has to do. What we want of the session is
//! asked for when the connection is made, never with `SET`, which in a pool would stay behind for the application. A pool
//! that refuses such wishes is used without them; and there statements have no name and go out as parse, bind and execute
//! in one write, so PgBouncer may hand each of them to another session.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use futures_util::{StreamExt, pin_mut};
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Config, Row, SimpleQueryMessage};

use super::store::{Answer, Executor};
use super::tls::{self, Tls};
use crate::error::{Error, ErrorKind, Result, nearest};
use crate::outbox::dialect::{Dialect, Style};
use crate::outbox::statement::{Param, Statement};
use crate::outbox::table::{RELAY_RIGHTS, Table};
use crate::transport::Task;

/// A statement that takes longer is given up, with its connection: the other side may be gone without a word.
const PATIENCE: Duration = Duration::from_secs(60);
/// For a new connection.
const CONNECT: Duration = Duration::from_secs(10);

/// What we want of a session. A commit need not wait for the disk: if the server loses it with its power, a claim or a
/// mark is made again, and at worst an event is published twice, with the same id. The planner must walk the index in
/// order, whatever it thinks of a table that was empty when it was last looked at, and not think twice. And a claim that stops in the middle
/// must not keep the others waiting.
const WISHES: &str = "-c synchronous_commit=off -c default_transaction_isolation=read\\ committed -c enable_seqscan=off \
                      -c enable_bitmapscan=off -c jit=off -c max_parallel_workers_per_gather=0 \
                      -c plan_cache_mode=force_generic_plan \
                      -c idle_in_transaction_session_timeout=10s";

/// Where and how to connect.
#[derive(Clone)]
pub(super) struct Server {
    config: Config,
    tls: Tls,
    /// For messages: without the password.
    name: String,
    pooled: Arc<AtomicBool>,
}

impl Server {
    /// Reads a URL as libpq and SQLAlchemy write them. `InvalidConfig` for any other; never with its password.
    pub fn parse(url: &str) -> Result<Self> {
        let (scheme, rest) = url.split_once("://").unwrap_or_default();
        let family = scheme.split('+').next().unwrap_or_default();
        if !matches!(family, "postgres" | "postgresql") {
            return Err(match family {
                "sqlite" => Error::unsupported(
                    "an outbox in an SQLite file is relayed through the application's own driver: pass an executor instead of a URL",
                ),
                _ => Error::invalid_config(format!(
                    "the database URL of a relay is like postgres://user:password@host/database or mysql://…, and not {scheme:?}"
                )),
            });
        }
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (mut asked, mut kept) = (tls::Asked::default(), Vec::new());
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            kept.extend(asked.read(pair)?);
        }
        let mut config = Config::from_str(&format!("postgresql://{place}?{}", kept.join("&"))).map_err(|cause| {
            let why = std::error::Error::source(&cause).map_or_else(|| cause.to_string(), ToString::to_string);
            let names = [
                "sslmode",
                "sslrootcert",
                "sslcert",
                "sslkey",
                "application_name",
                "connect_timeout",
                "options",
                "keepalives",
            ];
            let near = why.split('`').nth(1).and_then(|word| nearest(word, names));
            let hint = near.map_or(String::new(), |near| format!("; did you mean {near}?"));
            Error::invalid_config(format!("the database URL is not valid: {why}{hint}"))
        })?;
        if config.get_password().is_none()
            && let Ok(password) = std::env::var("PGPASSWORD")
        {
            config.password(password);
        }
        if config.get_application_name().is_none() {
            config.application_name("polybus relay");
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT);
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(Duration::from_secs(30));
        }
        config.keepalives_idle(Duration::from_secs(30));
        let tls = Tls::new(&asked)?;
        let name = name(&config);
        Ok(Self { config, tls, name, pooled: Arc::default() })
    }

    /// Whether the server turned out to be a pool, which cannot pass notifications on.
    pub fn is_pooled(&self) -> bool {
        self.pooled.load(Ordering::Relaxed)
    }

    /// Who is connected to what, without a password.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The configuration, for a connection of another kind.
    pub fn plain(&self) -> (Config, Tls) {
        (self.config.clone(), self.tls.clone())
    }

    async fn connect(&self) -> Result<Client> {
        let wishes = self.config.get_options().map_or(WISHES.to_owned(), |own| format!("{WISHES} {own}"));
        if !self.is_pooled() {
            match self.open(self.config.clone().options(&wishes)).await {
                Err(cause) if refuses_wishes(&cause) => {
                    log::info!(
                        "{} takes no options when a session begins: it is used as a pool of connections",
                        self.name
                    );
                    self.pooled.store(true, Ordering::Relaxed);
                }
                Err(cause) => return Err(self.explain(cause, None)),
                // A pool may be told to swallow wishes instead of refusing them.
                Ok(client) => {
                    let heard = client.simple_query("SHOW enable_seqscan").await;
                    let heard = heard.map_err(|cause| self.explain(cause, None))?;
                    let off = |message: &SimpleQueryMessage| matches!(message, SimpleQueryMessage::Row(row) if row.get(0) == Some("off"));
                    self.pooled.store(!heard.iter().any(off), Ordering::Relaxed);
                    return Ok(client);
                }
            }
        }
        self.open(&self.config).await.map_err(|cause| self.explain(cause, None))
    }

    async fn open(&self, config: &Config) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = config.connect(self.tls.clone()).await?;
        // Ends with the client. What goes wrong is told to those whose statements fail.
        tokio::spawn(async move { drop(connection.await) });
        Ok(client)
    }

    /// What `cause` means, and what to do.
    pub fn explain(&self, cause: tokio_postgres::Error, table: Option<&Table>) -> Error {
        let name = &self.name;
        if let Some(error) = tls::explain(name, &cause) {
            return error.caused_by(cause);
        }
        let Some(db) = cause.as_db_error() else {
            let why = std::error::Error::source(&cause).map_or_else(|| cause.to_string(), ToString::to_string);
            let config = cause.to_string().starts_with("invalid configuration");
            let kind = if config { ErrorKind::AuthFailed } else { ErrorKind::ConnectionFailed };
            return Error::new(kind, format!("the database {name} cannot be reached: {why}")).caused_by(cause);
        };
        let (code, said) = (db.code(), db.message());
        let error = match *code {
            SqlState::INVALID_PASSWORD | SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
                // As the server words it. Whatever else it says is told as it is.
                let check = match said {
                    _ if said.contains("certificate") => "give sslcert and sslkey, and a certificate for this user",
                    _ if said.contains("no encryption") => "it may want TLS: give sslmode=require, or verify-full",
                    _ => "check user and password of the URL",
                };
                Error::new(ErrorKind::AuthFailed, format!("the database {name} refused the user: {said}; {check}"))
            }
            SqlState::INVALID_CATALOG_NAME => {
                Error::invalid_config(format!("{name}: {said}; check the last part of the URL"))
            }
            SqlState::UNDEFINED_TABLE | SqlState::UNDEFINED_COLUMN | SqlState::INVALID_SCHEMA_NAME => {
                let told = match table {
                    Some(table) => table.missing(Dialect::Postgres, "Outbox").message().to_owned(),
                    None => said.to_owned(),
                };
                Error::invalid_config(format!("{told}, or of the command: polybus outbox ddl --dialect postgres"))
            }
            SqlState::INSUFFICIENT_PRIVILEGE => {
                let user = self.config.get_user();
                let grant = table.map(|table| table.grant(Dialect::Postgres, RELAY_RIGHTS, user));
                let grant = grant.unwrap_or_else(|| "GRANT it".to_owned());
                let message = format!("the user of {name} may not do what a relay does: {said}; run: {grant}");
                Error::new(ErrorKind::AuthFailed, message)
            }
            // Of a server that has not taken over yet, or not any more: this ends.
            SqlState::READ_ONLY_SQL_TRANSACTION => Error::connection_failed(format!(
                "{name} is read-only: {said}; if it stays so, give the URL of the primary, and a user without \
                 default_transaction_read_only"
            )),
            _ => Error::connection_failed(format!("{name}: {said} ({})", code.code())),
        };
        error.caused_by(cause)
    }
}

/// `user@host:port/database`.
fn name(config: &Config) -> String {
    let host = match config.get_hosts().first() {
        Some(Host::Tcp(host)) => host.clone(),
        #[cfg(unix)]
        Some(Host::Unix(path)) => path.display().to_string(),
        None => String::new(),
    };
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let user = config.get_user().map_or(String::new(), |user| format!("{user}@"));
    let tls = if config.get_ssl_mode() == SslMode::Require { " (TLS)" } else { "" };
    format!("{user}{host}:{port}/{}{tls}", config.get_dbname().unwrap_or_default())
}

/// PgBouncer and its kind say so as a protocol violation or as an unknown feature.
fn refuses_wishes(cause: &tokio_postgres::Error) -> bool {
    cause.as_db_error().is_some_and(|db| {
        let protocol = matches!(*db.code(), SqlState::PROTOCOL_VIOLATION | SqlState::CONNECTION_EXCEPTION);
        protocol || *db.code() == SqlState::FEATURE_NOT_SUPPORTED
    })
}

/// One connection. Made when it is needed, and again when it was lost.
pub(super) struct Postgres {
    server: Server,
    table: Table,
    session: Mutex<Option<Arc<Session>>>,
    connecting: tokio::sync::Mutex<()>,
    connections: AtomicU64,
}

impl Postgres {
    pub fn executor(server: Server, table: Table) -> Arc<Handle> {
        let inner = Self {
            server,
            table,
            session: Mutex::default(),
            connecting: tokio::sync::Mutex::default(),
            connections: AtomicU64::new(0),
        };
        Arc::new(Handle(Arc::new(inner)))
    }

    fn connected(&self) -> Option<Arc<Session>> {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        session.as_ref().filter(|session| !session.client.is_closed()).cloned()
    }

    async fn session(&self) -> Result<Arc<Session>> {
        if let Some(session) = self.connected() {
            return Ok(session);
        }
        let _one = self.connecting.lock().await;
        if let Some(session) = self.connected() {
            return Ok(session);
        }
        // The whole of it: a server that accepts and then says nothing is as good as none.
        let connected = tokio::time::timeout(CONNECT, self.server.connect()).await;
        let name = self.server.name();
        let late = |_| Error::connection_failed(format!("the database {name} did not answer within {CONNECT:?}"));
        let client = connected.map_err(late)??;
        let prepared = (!self.server.is_pooled()).then(Mutex::default);
        let session = Arc::new(Session { client, prepared, turn: tokio::sync::Mutex::default() });
        self.connections.fetch_add(1, Ordering::Relaxed);
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = Some(session.clone());
        Ok(session)
    }

    fn forget(&self, lost: &Arc<Session>) {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if session.as_ref().is_some_and(|session| Arc::ptr_eq(session, lost)) {
            *session = None;
        }
    }

    async fn run(&self, statement: Statement) -> Result<Answer> {
        self.in_session(async |session| {
            let turn = session.turn.lock().await;
            let prepared = session.prepare(&statement).await?;
            sent(session.send(&statement, prepared), turn).await
        })
        .await
    }

    async fn run_both(&self, first: Statement, second: Statement) -> Result<[Answer; 2]> {
        self.in_session(async |session| {
            let turn = session.turn.lock().await;
            let prepared = (session.prepare(&first).await?, session.prepare(&second).await?);
            // Polled in this order, so they are sent in this order, before the first answer.
            let both = async {
                tokio::join!(
                    biased;
                    session.client.batch_execute("BEGIN ISOLATION LEVEL READ COMMITTED"),
                    session.send(&first, prepared.0),
                    session.send(&second, prepared.1),
                    session.client.batch_execute("COMMIT"),
                )
            };
            let (begun, first, second, ended) = sent(both, turn).await;
            begun?;
            let answers = [first?, second?];
            ended?;
            Ok(answers)
        })
        .await
    }

    async fn in_session<T>(&self, work: impl AsyncFnOnce(&Session) -> Result<T, tokio_postgres::Error>) -> Result<T> {
        let session = self.session().await?;
        match tokio::time::timeout(PATIENCE, work(&session)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(cause)) => {
                let code = cause.code().map_or("", SqlState::code);
                // A pool that took our wishes may still hand us to a session that knows nothing of what we prepared.
                if UNPREPARED.contains(&code) {
                    self.server.pooled.store(true, Ordering::Relaxed);
                }
                if cause.is_closed()
                    || code.starts_with("57P")
                    || UNPREPARED.contains(&code)
                    || ELSEWHERE.contains(&code)
                {
                    self.forget(&session);
                }
                Err(self.server.explain(cause, Some(&self.table)))
            }
            Err(_) => {
                self.forget(&session);
                let name = self.server.name();
                Err(Error::connection_failed(format!("the database {name} did not answer within {PATIENCE:?}")))
            }
        }
    }
}

/// A prepared statement that is not there, or already is.
const UNPREPARED: [&str; 2] = ["26000", "42P05"];
/// What a new connection may mend. A pool may move us to a server that is going down (57P…), and say so without ending our
/// connection; one that is read-only (25006) may not be the primary any more, and ours was meant for that; a plan may not
/// fit the table any more (0A000).
const ELSEWHERE: [&str; 2] = ["25006", "0A000"];

/// A connection.
struct Session {
    client: Client,
    /// What was prepared on it, by its text. `None`: it may be another session for each statement.
    prepared: Option<Mutex<HashMap<String, tokio_postgres::Statement>>>,
    /// While a statement is prepared, those that were given later wait.
    turn: tokio::sync::Mutex<()>,
}

/// Begins `work`, which sends what it has to send, ends the `turn`, and waits for the answer.
async fn sent<T>(work: impl Future<Output = T>, turn: tokio::sync::MutexGuard<'_, ()>) -> T {
    pin_mut!(work);
    let begun = futures_util::poll!(&mut work);
    drop(turn);
    match begun {
        Poll::Ready(answer) => answer,
        Poll::Pending => work.await,
    }
}

impl Session {
    async fn prepare(&self, statement: &Statement) -> Result<Option<tokio_postgres::Statement>, tokio_postgres::Error> {
        let Some(known) = &self.prepared else { return Ok(None) };
        let known = || known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(prepared) = known().get(&statement.sql) {
            return Ok(Some(prepared.clone()));
        }
        let types: Vec<_> = typed(statement).map(|(_, of)| of).collect();
        let prepared = self.client.prepare_typed(&statement.sql, &types).await?;
        known().insert(statement.sql.clone(), prepared.clone());
        Ok(Some(prepared))
    }

    async fn send(
        &self,
        statement: &Statement,
        prepared: Option<tokio_postgres::Statement>,
    ) -> Result<Answer, tokio_postgres::Error> {
        let stream = match prepared {
            Some(prepared) => self.client.query_raw(&prepared, typed(statement).map(|(value, _)| value)).await?,
            None => self.client.query_typed_raw(&statement.sql, typed(statement)).await?,
        };
        pin_mut!(stream);
        let mut rows = Vec::new();
        while let Some(row) = stream.next().await {
            rows.push(cells(&row?)?);
        }
        Ok(Answer { affected: stream.rows_affected().unwrap_or(0), rows })
    }
}

fn typed(statement: &Statement) -> impl ExactSizeIterator<Item = (&(dyn ToSql + Sync), Type)> {
    statement.params.iter().map(|param| -> (&(dyn ToSql + Sync), Type) {
        match param {
            Param::Null => (&None::<&str>, Type::TEXT),
            Param::Integer(number) => (number, Type::INT8),
            Param::Text(text) => (text, Type::TEXT),
        }
    })
}

fn cells(row: &Row) -> Result<Vec<Param>, tokio_postgres::Error> {
    let cell = |(index, column): (usize, &tokio_postgres::Column)| {
        Ok(match *column.type_() {
            Type::INT8 => row.try_get::<_, Option<i64>>(index)?.into(),
            _ => row.try_get::<_, Option<String>>(index)?.into(),
        })
    };
    row.columns().iter().enumerate().map(cell).collect()
}

/// What the relay holds of a connection.
pub(super) struct Handle(Arc<Postgres>);

impl Executor for Handle {
    fn run(&self, statement: Statement) -> Task<Result<Answer>> {
        let connection = self.0.clone();
        Box::pin(async move { connection.run(statement).await })
    }

    fn run_both(&self, first: Statement, second: Statement) -> Option<Task<Result<[Answer; 2]>>> {
        let connection = self.0.clone();
        Some(Box::pin(async move { connection.run_both(first, second).await }))
    }

    fn dialect(&self) -> Dialect {
        Dialect::Postgres
    }

    fn style(&self) -> Style {
        Style::Dollar
    }

    fn connection(&self) -> u64 {
        self.0.connections.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_urls_and_never_shows_their_password() {
        let url = "postgresql+asyncpg://shop:secret@db.example:5433/orders?sslmode=verify-full";
        assert_eq!(Server::parse(url).unwrap().name(), "shop@db.example:5433/orders (TLS)");
        for (url, said) in [
            ("postgres://shop:secret@h/d?sslmod=require", "did you mean sslmode"),
            ("postgres://shop:secret@h:port/d", "not valid"),
            ("sqlite:///secret.db", "executor"),
            ("secret", "postgres://"),
        ] {
            let error = Server::parse(url).map(drop).unwrap_err();
            assert!(error.message().contains(said), "{error}");
            assert!(!format!("{error:?}").contains("secret"), "{error:?}");
        }
    }
}
