# SPDX-License-Identifier: Apache-2.0
"""TLS and mutual TLS from files, which may be renewed while we serve."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import pathlib
import ssl
from typing import TypeVar

import grpc

from sarathi_jax import errors
from sarathi_jax.server.guard import renewed

T = TypeVar('T')


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
  """The files that TLS needs, in PEM.

  Attributes:
    cert: our certificate, and those that vouch for it.
    key: its private key.
    client_ca: the authorities that vouch for clients; with it, clients need
      certificates.
  """

  cert: pathlib.Path
  key: pathlib.Path
  client_ca: pathlib.Path | None = None

  @property
  def paths(self) -> tuple[pathlib.Path, ...]:
    return tuple(filter(None, (self.cert, self.key, self.client_ca)))


def credentials(files: TlsFiles) -> grpc.ServerCredentials:
  """Makes credentials that follow the files: each handshake looks for new.

  Raises:
    ConfigError: a file can't be read, or isn't PEM.
  """
  found = _renewed(files, _read)
  last = found.get()

  def fetch() -> grpc.ServerCertificateConfiguration | None:
    nonlocal last
    before, last = last, found.get()
    return None if last is before else last

  return grpc.dynamic_ssl_server_credentials(
    last,
    fetch,  # type: ignore[arg-type]  # the stub forgets None
    require_client_authentication=files.client_ca is not None,
  )


def contexts(files: TlsFiles) -> Callable[[], ssl.SSLContext]:
  """Returns what makes Python's context of the files, as they are now.

  Raises:
    ConfigError: a file can't be used.
  """
  return _renewed(files, _context).get


def _renewed(
  files: TlsFiles, read: Callable[[TlsFiles], T]
) -> renewed.Renewed[T]:
  return renewed.Renewed(
    'The certificates', files.paths, functools.partial(read, files)
  )


def _context(files: TlsFiles) -> ssl.SSLContext:
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  try:
    context.load_cert_chain(files.cert, files.key)
    if files.client_ca is not None:
      context.load_verify_locations(files.client_ca)
      context.verify_mode = ssl.CERT_REQUIRED
  except OSError as error:  # SSLError is one.
    raise errors.ConfigError(
      f"tls_cert={str(files.cert)!r}, tls_key={str(files.key)!r}: can't be "
      f'used: {error}.'
    ) from error
  return context


def _read(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
  def read(field: str, path: pathlib.Path) -> bytes:
    try:
      data = path.read_bytes()
    except OSError as error:
      raise errors.ConfigError(
        f"{field}={str(path)!r}: can't be read: {error.strerror}."
      ) from error
    if b'-----BEGIN ' not in data:
      raise errors.ConfigError(f'{field}={str(path)!r}: is not PEM.')
    return data

  client_ca = (
    None if files.client_ca is None else read('tls_client_ca', files.client_ca)
  )
  return grpc.ssl_server_certificate_configuration(
    [(read('tls_key', files.key), read('tls_cert', files.cert))], client_ca
  )
