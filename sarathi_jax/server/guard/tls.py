# SPDX-License-Identifier: Apache-2.0
"""TLS and mutual TLS from files, which may be renewed while we serve."""

from __future__ import annotations

import dataclasses
import pathlib
import ssl

from absl import logging
import grpc

from sarathi_jax import errors


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


def credentials(files: TlsFiles) -> grpc.ServerCredentials:
  """Makes credentials that follow the files: each handshake looks for new.

  Raises:
    ConfigError: a file can't be read, or isn't PEM.
  """
  config = _read(files)
  state = _stamps(files)

  def fetch() -> grpc.ServerCertificateConfiguration | None:
    nonlocal state
    try:
      if (now := _stamps(files)) == state:
        return None
      state, renewed = now, _read(files)
    except (OSError, errors.ConfigError) as error:
      logging.error('The certificate stays as it was: %s', error)
      return None
    logging.info('Read %s anew.', files.cert)
    return renewed

  return grpc.dynamic_ssl_server_credentials(
    config,
    fetch,  # type: ignore[arg-type]  # the stub forgets None
    require_client_authentication=files.client_ca is not None,
  )


class Contexts:
  """Python's contexts of the same files; each call looks for new ones.

  Raises:
    ConfigError: a file can't be used.
  """

  def __init__(self, files: TlsFiles) -> None:
    self._files = files
    self._state, self._context = _stamps(files), _context(files)

  def __call__(self) -> ssl.SSLContext:
    try:
      if (now := _stamps(self._files)) != self._state:
        self._state, self._context = now, _context(self._files)
    except (OSError, errors.ConfigError) as error:
      logging.error('The certificate stays as it was: %s', error)
    return self._context


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


def _stamps(files: TlsFiles) -> tuple[tuple[int, int], ...]:
  paths = (files.cert, files.key, files.client_ca)
  stats = [path.stat() for path in paths if path is not None]
  return tuple((stat.st_mtime_ns, stat.st_ino) for stat in stats)


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
