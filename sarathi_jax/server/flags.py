# SPDX-License-Identifier: Apache-2.0
"""The server's flags: they make a `ServerConfig`."""

from __future__ import annotations

from collections.abc import Iterable
import pathlib
import shlex
from typing import Any

from absl import flags

from sarathi_jax import errors
from sarathi_jax.server import config as config_lib
from sarathi_jax.server.guard import limits as limits_lib
from sarathi_jax.server.guard import tls

FLAGS = flags.FLAGS

# Field of ServerConfig -> (kind of flag, help).
_FLAGS: dict[str, tuple[Any, str]] = {
  'max_step_s': (
    flags.DEFINE_float, 'Seconds after which a step is taken to hang, as where '
    'a device or another host does: liveness is NOT_SERVING until it ends. '
    'Default: 300.'),
  'auth_tokens': (
    flags.DEFINE_string, 'A file of bearer tokens, a line each: NAME TOKEN '
    '[admin] [priority=N]. TOKEN may be sha256:HEX, N is the smallest priority '
    'to ask for. It may change any time.'),
  'reflection': (
    flags.DEFINE_bool, 'Whether the server describes its services.'),
  'control': (
    flags.DEFINE_bool, 'Whether sarathi.v1.Control is served. Default: only '
    'with --auth_tokens, or if no other machine can reach --host.'),
  'metrics_port': (
    flags.DEFINE_integer, 'The port of Prometheus\' metrics, /metrics.'),
  'metrics_prefix': (
    flags.DEFINE_string, 'Of the metrics\' names; vllm suits its dashboards.'),
  'http_port': (
    flags.DEFINE_integer, 'The port of the gateway, with OpenAI\'s HTTP; '
    'needs the extra gateway.'),
  'replicas': (
    flags.DEFINE_list, 'Further servers, host:port,host:port, that the '
    'gateway routes to.'),
  'gateway_args': (
    flags.DEFINE_string, 'Further arguments of the gateway, as in a shell.'),
  'trace_dir': (
    flags.DEFINE_string, 'Where a Chrome trace of all steps goes, and '
    'profiles.'),
  'request_log': (
    flags.DEFINE_string, 'A file that gets a line of JSON a request; - for '
    'standard error.'),
  'log_prompts': (
    flags.DEFINE_bool, 'Whether prompts are in --request_log.'),
  'otlp_endpoint': (
    flags.DEFINE_string, 'Where OpenTelemetry spans go, by gRPC, such as '
    'http://localhost:4317; needs the extra otel.'),
}
_TLS: dict[str, str] = {
  'tls_cert': 'Our certificate, PEM.',
  'tls_key': 'Its private key, PEM.',
  'tls_client_ca': 'Who vouches for clients, PEM; they need certificates then.',
}


def define_server_flags() -> None:
  """Defines a flag for the fields of ServerConfig, but for the address."""
  for name, (define, text) in _FLAGS.items():
    define(name, None, text)
  for name, row in limits_lib.ROWS.items():
    define = (flags.DEFINE_float if isinstance(row.default, float)
              else flags.DEFINE_integer)
    define(name, None, limits_lib.help_of(name))
  for name, text in _TLS.items():
    flags.DEFINE_string(name, None, text)


def server_config_from_flags() -> config_lib.ServerConfig:
  """The configuration that the flags ask for.

  Raises:
    ConfigError: it can't work.
  """
  given = _given(_FLAGS)
  for name in ('auth_tokens', 'trace_dir'):
    if name in given:
      given[name] = pathlib.Path(given[name]).expanduser()
  given['replicas'] = tuple(given.get('replicas', ()))
  if 'gateway_args' in given:
    try:
      given['gateway_args'] = tuple(shlex.split(given['gateway_args']))
    except ValueError as error:
      raise errors.ConfigError(
        f'gateway_args={given["gateway_args"]!r}: {error}.') from error
  limits = limits_lib.Limits(**_given(limits_lib.ROWS))
  return config_lib.ServerConfig(
    host=FLAGS.host, port=FLAGS.port, drain_s=FLAGS.drain_s, limits=limits,
    tls=_tls(), **given)


def _given(names: Iterable[str]) -> dict[str, Any]:
  return {name: FLAGS[name].value for name in names
          if FLAGS[name].value is not None}


def _tls() -> tls.TlsFiles | None:
  files = {name.removeprefix('tls_'): pathlib.Path(path).expanduser()
           for name, path in _given(_TLS).items()}
  if not files:
    return None
  if not {'cert', 'key'} <= set(files):
    raise errors.ConfigError(
      'tls_cert and tls_key: one can\'t be without the other.')
  return tls.TlsFiles(**files)
