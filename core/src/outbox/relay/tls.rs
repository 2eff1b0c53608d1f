//! TLS for PostgreSQL, over the rustls that the house has anyway.
//!
//! As with libpq, `sslmode` says how much is checked: `prefer` and `require` encrypt and trust whoever answers, `verify-ca`
//! wants a certificate that an authority in `sslrootcert` has signed, `verify-full` also that it is for the host of the
//! URL; `require` with a `sslrootcert` is `verify-ca`. Without `sslrootcert` (or with `system`) the authorities are those
//! that browsers trust. `sslcert` and `sslkey` are the client's own.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};
use tokio_rustls::TlsConnector;

use crate::error::{Error, ErrorKind, Result};

const MODES: &str = "disable, allow, prefer, require, verify-ca or verify-full";

/// What a URL asks for.
#[derive(Debug, Default)]
pub(super) struct Asked {
    check: Check,
    encrypted: bool,
    root: Option<String>,
    certificate: Option<String>,
    key: Option<String>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Check {
    #[default]
    Nothing,
    Chain,
    Name,
}

impl Asked {
    /// Reads a parameter of a URL, `name=value`, and returns what of it is for others.
    pub fn read(&mut self, pair: &str) -> Result<Option<String>> {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let path = || Some(percent_encoding::percent_decode_str(value).decode_utf8_lossy().into_owned());
        match name {
            "sslmode" | "ssl" => {
                let mode = match value {
                    "disable" | "false" => "disable",
                    "allow" | "prefer" => "prefer",
                    "require" | "true" | "verify-ca" | "verify-full" => "require",
                    other => {
                        return Err(Error::invalid_config(format!(
                            "the database URL has {name}={other}; give {MODES}"
                        )));
                    }
                };
                self.encrypted = mode == "require";
                self.check = match value {
                    "verify-ca" => Check::Chain,
                    "verify-full" => Check::Name,
                    _ => Check::Nothing,
                };
                return Ok(Some(format!("sslmode={mode}")));
            }
            "sslrootcert" => self.root = path(),
            "sslcert" => self.certificate = path(),
            "sslkey" => self.key = path(),
            "sslpassword" => {
                return Err(Error::unsupported(
                    "a relay reads no encrypted keys (sslpassword); give a sslkey that only its user may read",
                ));
            }
            _ => return Ok(Some(pair.to_owned())),
        }
        Ok(None)
    }
}

/// Makes connections encrypted.
#[derive(Clone)]
pub(super) struct Tls(TlsConnector);

impl Tls {
    /// Reads the files. `InvalidConfig` says which of them cannot be used.
    pub fn new(asked: &Asked) -> Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let own = asked.root.as_deref().filter(|path| *path != "system");
        let check = match asked.check {
            Check::Nothing if own.is_some() && asked.encrypted => Check::Chain, // as libpq does
            check => check,
        };
        let config = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|cause| unusable("TLS", "", &cause))?;
        let roots = match (check, own) {
            (Check::Nothing, _) => RootCertStore::empty(),
            (_, None) => RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() },
            (_, Some(path)) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates("sslrootcert", path)? {
                    roots.add(certificate).map_err(|cause| unusable("sslrootcert", path, &cause))?;
                }
                roots
            }
        };
        let verifier: Arc<dyn ServerCertVerifier> = match check {
            Check::Name => WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|cause| unusable("sslrootcert", own.unwrap_or_default(), &cause))?,
            check => Arc::new(AnyName { provider, roots: (check == Check::Chain).then_some(roots) }),
        };
        let config = config.dangerous().with_custom_certificate_verifier(verifier);
        let config = match (&asked.certificate, &asked.key) {
            (None, None) => config.with_no_client_auth(),
            (Some(certificate), Some(key)) => {
                let chain = certificates("sslcert", certificate)?;
                let read = PrivateKeyDer::from_pem_file(key).map_err(|cause| unusable("sslkey", key, &cause))?;
                config.with_client_auth_cert(chain, read).map_err(|cause| unusable("sslcert", certificate, &cause))?
            }
            _ => {
                return Err(Error::invalid_config(
                    "the database URL has one of sslcert and sslkey; a client's certificate takes both",
                ));
            }
        };
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }
}

fn certificates(option: &str, path: &str) -> Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(certificates) if certificates.is_empty() => Err(unusable(option, path, &"it holds no certificate (PEM)")),
        read => read.map_err(|cause| unusable(option, path, &cause)),
    }
}

fn unusable(option: &str, path: &str, why: &dyn fmt::Display) -> Error {
    Error::invalid_config(format!("{option} {path:?} of the database URL cannot be used: {why}"))
}

/// What a failed handshake with the database `name` means, and what to do; none for what is no matter of TLS.
pub(super) fn explain(name: &str, cause: &tokio_postgres::Error) -> Option<Error> {
    let source = std::error::Error::source(cause)?;
    if source.to_string() == "server does not support TLS" {
        return Some(Error::invalid_config(format!(
            "the database {name} offers no TLS; turn it on there (ssl = on), or give sslmode=disable or prefer"
        )));
    }
    let inner = source.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    Some(match inner.and_then(|inner| inner.downcast_ref::<rustls::Error>())? {
        // The latter: another authority of the same name.
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            Error::invalid_config(format!(
                "the certificate of the database {name} is signed by no authority that is trusted here; give the file with \
             its authority as sslrootcert"
            ))
        }
        rustls::Error::InvalidCertificate(
            wrong @ (CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }),
        ) => Error::invalid_config(format!(
            "the certificate of the database {name} is for another host ({wrong}); connect by a name that it has, or \
             give sslmode=verify-ca"
        )),
        rustls::Error::InvalidCertificate(why) => {
            Error::invalid_config(format!("the certificate of the database {name} is not valid: {why}"))
        }
        rustls::Error::AlertReceived(alert) => Error::new(
            ErrorKind::AuthFailed,
            format!("the database {name} refused our side of TLS ({alert:?}); check sslcert and sslkey"),
        ),
        _ => return None,
    })
}

/// Trusts a certificate whatever name it has: every one, or those that an authority of ours has signed.
#[derive(Debug)]
struct AnyName {
    provider: Arc<CryptoProvider>,
    roots: Option<RootCertStore>,
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(roots) = &self.roots {
            let known = self.provider.signature_verification_algorithms.all;
            let certificate = ParsedCertificate::try_from(certificate)?;
            verify_server_cert_signed_by_trust_anchor(&certificate, roots, intermediates, now, known)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> MakeTlsConnect<S> for Tls {
    type Stream = Stream<S>;
    type TlsConnect = Connect;
    type Error = io::Error;

    fn make_tls_connect(&mut self, domain: &str) -> io::Result<Connect> {
        let name = ServerName::try_from(domain.to_owned()).map_err(io::Error::other)?;
        Ok(Connect(self.0.clone(), name))
    }
}

pub(super) struct Connect(TlsConnector, ServerName<'static>);

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> TlsConnect<S> for Connect {
    type Stream = Stream<S>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Stream<S>>> + Send>>;

    fn connect(self, stream: S) -> Self::Future {
        Box::pin(async move { self.0.connect(self.1, stream).await.map(Stream) })
    }
}

pub(super) struct Stream<S>(tokio_rustls::client::TlsStream<S>);

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream for Stream<S> {
    fn channel_binding(&self) -> ChannelBinding {
        ChannelBinding::none()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Stream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Stream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
