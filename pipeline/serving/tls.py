"""Mutual TLS between a run's reward servers and its trainers: keys made per run, readable by their owner alone.

Another user of the cluster who reaches the port has no client certificate, and Triton hangs up.
"""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import uuid
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pipeline.run import atomic
from pipeline.serving.wire import SERVER_NAME

_VALID = datetime.timedelta(days=365)
_RENEW = datetime.timedelta(days=60)
"""Certificates with less time left than this are made anew, longer than any job may run."""

logger = logging.getLogger(__name__)


def ensure(folder: Path) -> Path:
    """Make `folder` (0700) with ca.pem, server.pem, server.key, client.pem and client.key, unless they are there.

    Made beside and renamed: a folder that exists is complete. Two servers that begin at once agree on one of theirs.
    Keys that others could read meanwhile are made anew.
    """
    atomic.private_folder(folder.parent)
    if (folder / "ca.pem").exists():
        if _expiry(folder) - _now() > _RENEW and not _seen(folder):
            return folder
        shutil.rmtree(folder)
    making = folder.with_name(f".{folder.name}.{os.uname().nodename}.{uuid.uuid4().hex[:8]}")
    with atomic.disk_errors(making):
        making.mkdir(mode=0o700, parents=True)
        _write_all(making)
        try:
            making.rename(folder)
        except OSError:
            shutil.rmtree(making)
            if not (folder / "ca.pem").exists():
                raise
    return folder


def _write_all(folder: Path) -> None:
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _certificate("hh-pipeline run", authority_key, None)
    _write(folder / "ca.pem", authority.public_bytes(serialization.Encoding.PEM))
    for role, name, usage in (
        ("server", SERVER_NAME, ExtendedKeyUsageOID.SERVER_AUTH),
        ("client", "trainer.hh-pipeline", ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(name, key, (authority, authority_key), usage)
        _write(folder / f"{role}.pem", certificate.public_bytes(serialization.Encoding.PEM))
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        _write(folder / f"{role}.key", key.private_bytes(encoding, form, serialization.NoEncryption()))
    # The authority's key is kept nowhere: nobody can make a further certificate for this run.


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None,
    usage: x509.ObjectIdentifier | None = None,
) -> x509.Certificate:
    """A certificate for `name`, signed by the issuer, or by itself as an authority."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = _now()
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks of nodes differ
        .not_valid_after(now + _VALID)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if usage is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return builder.sign(issuer[1] if issuer else key, hashes.SHA256())


def _write(path: Path, data: bytes) -> None:
    atomic.write_bytes(path, data, mode=0o600)


def _seen(folder: Path) -> bool:
    """Whether others may read the keys: somebody has opened the run directory to them."""
    loose = [path for path in folder.glob("*.key") if path.stat().st_mode & 0o077]
    if loose:
        logger.warning("%s: other users could read it; all certificates of this run are made anew", loose[0])
    return bool(loose)


def _expiry(folder: Path) -> datetime.datetime:
    return x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes()).not_valid_after_utc


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
