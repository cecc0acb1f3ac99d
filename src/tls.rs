//! Certificates: read from files at the start, and again with each SIGHUP. Connections that are open keep theirs.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};

/// Where the certificates are, as PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The server's own, those that signed it behind it.
    pub cert: PathBuf,
    pub key: PathBuf,
    /// Who signs clients' certificates: then every client has to show one.
    pub client_ca: Option<PathBuf>,
}

/// What a server shows and asks for. Shared by everything that listens.
#[derive(Debug)]
pub struct Certificates {
    files: Files,
    current: RwLock<Arc<ServerConfig>>,
}

impl Certificates {
    /// Reads the files. Errors with which one cannot be used, and why.
    pub fn load(files: Files) -> Result<Self, String> {
        let current = RwLock::new(read(&files)?);
        Ok(Self { files, current })
    }

    /// What the next connection is served with.
    pub fn current(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads the files again. What cannot be used changes nothing.
    pub fn reload(&self) -> Result<(), String> {
        let fresh = read(&self.files)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// Whether others than its owner and its group may read the key.
    pub fn has_open_key(&self) -> bool {
        fs::metadata(&self.files.key).is_ok_and(|metadata| metadata.mode() & 0o007 != 0)
    }
}

fn read(files: &Files) -> Result<Arc<ServerConfig>, String> {
    let unusable = |path: &Path, why: &dyn std::fmt::Display| format!("{}: {why}", path.display());
    let chain = certificates(&files.cert)?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|why| unusable(&files.key, &why))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
    let builder = builder.map_err(|why| why.to_string())?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(path)? {
                roots.add(certificate).map_err(|why| unusable(path, &why))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|why| unusable(path, &why))?)
        }
    };
    builder.with_single_cert(chain, key).map(Arc::new).map_err(|why| unusable(&files.cert, &why))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let unusable = |why: &dyn std::fmt::Display| format!("{}: {why}", path.display());
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(|why| unusable(&why))?.collect();
    let found = found.map_err(|why| unusable(&why))?;
    if found.is_empty() { Err(unusable(&"there is no certificate in it")) } else { Ok(found) }
}

/// What asks this server on the same machine how it is: it trusts that very certificate and no other, and shows it where clients have to show
/// one. Errors with which file cannot be used, and why.
pub fn own_client(files: &Files) -> Result<Arc<ClientConfig>, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let chain = certificates(&files.cert)?;
    let own = chain.first().cloned().ok_or_else(|| format!("{}: there is no certificate in it", files.cert.display()))?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|why| format!("{}: {why}", files.key.display()))?;
    let verifier = Arc::new(Only { own, algorithms: provider.signature_verification_algorithms });
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().map_err(|why| why.to_string())?;
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let config = match files.client_ca {
        None => Ok(builder.with_no_client_auth()),
        Some(_) => builder.with_client_auth_cert(chain, key),
    };
    config.map(Arc::new).map_err(|why| why.to_string())
}

/// Accepts one certificate, whatever its names, from who has its key.
#[derive(Debug)]
struct Only {
    own: CertificateDer<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Only {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match *shown == self.own {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(rustls::Error::General("it shows another certificate than tls.cert_file".into())),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
