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
    flags.DEFINE_float,
    'Seconds after which a step of the engine is taken to '
    'hang, as when a device or another host hangs. The health service then '
    'reports liveness as NOT_SERVING until the step ends. Default: 300.',
  ),
  'auth_tokens': (
    flags.DEFINE_string,
    'File of the bearer tokens that let clients call, one '
    'per line: NAME TOKEN [admin] [priority=N]. TOKEN may be sha256:HEX; N is '
    'the smallest priority that its requests may ask for. A change of the file '
    'counts from the next call on. Default: who reaches the port may call.',
  ),
  'reflection': (
    flags.DEFINE_bool,
    "Whether gRPC clients can list the server's services "
    'and messages (server reflection). Default: true.',
  ),
  'control': (
    flags.DEFINE_bool,
    'Whether to serve sarathi.v1.Control, by which '
    'administrators pause the server, replace weights and record profiles. '
    'Default: only with --auth_tokens, or if no other machine can reach '
    '--host.',
  ),
  'kv_events': (
    flags.DEFINE_bool,
    'Whether VllmEngine.SubscribeKvEvents tells gateways what the KV cache '
    "holds: the token ids of everybody's prompts and outputs but of those with "
    'a cache_salt; with --auth_tokens of all, to administrators alone. '
    'Default: only with --auth_tokens, or if no other machine can reach '
    '--host.',
  ),
  'metrics_port': (
    flags.DEFINE_integer,
    'Port at which Prometheus scrapes metrics, '
    '/metrics; 0 for any that is free. Default: no metrics.',
  ),
  'metrics_prefix': (
    flags.DEFINE_string,
    'What the names of metrics begin with; vllm suits '
    'dashboards made for vLLM. Default: sarathi.',
  ),
  'http_port': (
    flags.DEFINE_integer,
    "Port at which to serve OpenAI's HTTP: chats, completions, models, "
    'tokenize; 0 for any that is free. --auth_tokens and --tls_cert guard it, '
    'too. Default: no HTTP.',
  ),
  'gateway_port': (
    flags.DEFINE_integer,
    "Port at which a gateway, smg, serves OpenAI's HTTP for several servers, "
    'and its responses API; needs the extra sarathi-jax[gateway]. Default: no '
    'gateway.',
  ),
  'replicas': (
    flags.DEFINE_list,
    'Further gRPC servers, HOST:PORT,HOST:PORT, that the '
    'gateway of --gateway_port routes requests to.',
  ),
  'gateway_args': (
    flags.DEFINE_string,
    'Further arguments for the gateway of --gateway_port, '
    'smg launch, quoted as in a shell.',
  ),
  'trace_dir': (
    flags.DEFINE_string,
    'Folder to write a Chrome trace of all steps, and '
    'profiles, into. Default: neither is written.',
  ),
  'request_log': (
    flags.DEFINE_string,
    'File to add a line of JSON to for each request that '
    'ends; - for standard error. Default: no such log.',
  ),
  'log_prompts': (
    flags.DEFINE_bool,
    'Whether the lines of --request_log have the token ids '
    'of prompts. Default: false.',
  ),
  'otlp_endpoint': (
    flags.DEFINE_string,
    'Collector to send an OpenTelemetry span for each '
    'request to, by gRPC, such as http://localhost:4317; needs the extra '
    'sarathi-jax[otel]. Default: no spans.',
  ),
}
_TLS: dict[str, str] = {
  'tls_cert': "File with the server's certificate and those that vouch for "
  'it, PEM; with --tls_key. Default: no TLS.',
  'tls_key': 'File with the private key of --tls_cert, PEM.',
  'tls_client_ca': 'File with the certificate authorities that vouch for '
  'clients, PEM. Clients then need certificates (mutual TLS).',
}


def define_server_flags() -> None:
  """Defines flags for the fields of ServerConfig, but for the address."""
  for name, (define, text) in _FLAGS.items():
    define(name, None, text)
  for name, row in limits_lib.ROWS.items():
    define = (
      flags.DEFINE_float
      if isinstance(row.default, float)
      else flags.DEFINE_integer
    )
    define(name, None, limits_lib.help_of(name))
  for name, text in _TLS.items():
    flags.DEFINE_string(name, None, text)


def server_config_from_flags() -> config_lib.ServerConfig:
  """Returns the configuration that the flags ask for.

  Raises:
    ConfigError: the configuration can't work.
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
        f'gateway_args={given["gateway_args"]!r}: {error}.'
      ) from error
  limits = limits_lib.Limits(**_given(limits_lib.ROWS))
  return config_lib.ServerConfig(
    host=FLAGS.host,
    port=FLAGS.port,
    drain_s=FLAGS.drain_s,
    limits=limits,
    tls=_tls(),
    **given,
  )


def _given(names: Iterable[str]) -> dict[str, Any]:
  return {
    name: FLAGS[name].value for name in names if FLAGS[name].value is not None
  }


def _tls() -> tls.TlsFiles | None:
  files = {
    name.removeprefix('tls_'): pathlib.Path(path).expanduser()
    for name, path in _given(_TLS).items()
  }
  if not files:
    return None
  if not {'cert', 'key'} <= set(files):
    raise errors.ConfigError(
      "tls_cert and tls_key: one can't be without the other."
    )
  return tls.TlsFiles(**files)
