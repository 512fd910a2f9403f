# SPDX-License-Identifier: Apache-2.0
"""A certificate authority for tests: real certificates, by OpenSSL."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates for whoever is named."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.root = Certificate(directory / "ca.crt", directory / "ca.key")
        self._openssl("req", "-x509", *self._key(self.root), "-subj", "/CN=authority")

    def certificate(self, name: str, *extensions: str) -> Certificate:
        """A certificate for somebody, with extensions as ``subjectAltName=IP:127.0.0.1``."""
        made = Certificate(self.directory / f"{name}.crt", self.directory / f"{name}.key")
        words = [word for one in extensions for word in ("-addext", one)]
        issuer = ["-CA", str(self.root.certificate), "-CAkey", str(self.root.key)]
        self._openssl("req", "-x509", *self._key(made), *issuer, "-subj", f"/CN={name}", *words)
        return made

    def _key(self, made: Certificate) -> list[str]:
        files = ["-keyout", str(made.key), "-out", str(made.certificate)]
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *files]

    def _openssl(self, *words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True)
