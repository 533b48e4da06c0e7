# SPDX-License-Identifier: Apache-2.0
"""What a server is asked to be: frozen, checked once."""

from __future__ import annotations

import dataclasses
import ipaddress
import pathlib
import re

from sarathi_jax import config as config_lib
from sarathi_jax.server.guard import tls as tls_lib
from sarathi_jax.server.queue import admission


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
  """Where the server listens, whom it serves, and what it reports.

  Attributes:
    host: address to listen at.
    port: port of gRPC; 0 for any that is free.
    drain_s: how long open requests may go on after SIGTERM, seconds.
    max_step_s: seconds after which a step is taken to hang: liveness is
      NOT_SERVING until it ends.
    limits: the most that the server takes on.
    auth_tokens: a file of bearer tokens, see auth.py; None: who can reach
      the port may call.
    tls: None for plain text.
    reflection: whether the server describes its services.
    control: whether sarathi.v1.Control is served; None: only if tokens guard
      it, or no other machine can reach the port.
    kv_events: whether VllmEngine.SubscribeKvEvents tells what the KV cache
      holds, of whosever prompts; None: as for `control`.
    metrics_port: where Prometheus scrapes metrics over HTTP; 0 for any port
      that is free, None for no metrics.
    metrics_prefix: what names of metrics begin with; 'vllm' suits dashboards
      of vLLM.
    http_port: where we serve OpenAI's HTTP; 0 for any port that is free, None
      for none.
    gateway_port: where the gateway, smg, serves OpenAI's HTTP; None for no
      gateway.
    replicas: other servers, host:port, that the gateway routes to as well.
    gateway_args: further arguments of the gateway.
    trace_dir: folder for a Chrome trace of all steps, and profiles; None for
      neither.
    request_log: file that gets a line of JSON for each request; '-' for
      standard error, None for no log.
    log_prompts: whether `request_log` has prompts' token ids.
    otlp_endpoint: collector that OpenTelemetry spans are sent to; None for no
      spans.
  """

  host: str = '127.0.0.1'
  port: int = 50051
  drain_s: float = 30.0
  max_step_s: float = 300.0
  limits: admission.Limits = dataclasses.field(default_factory=admission.Limits)
  auth_tokens: pathlib.Path | None = None
  tls: tls_lib.TlsFiles | None = None
  reflection: bool = True
  control: bool | None = None
  kv_events: bool | None = None
  metrics_port: int | None = None
  metrics_prefix: str = 'sarathi'
  http_port: int | None = None
  gateway_port: int | None = None
  replicas: tuple[str, ...] = ()
  gateway_args: tuple[str, ...] = ()
  trace_dir: pathlib.Path | None = None
  request_log: str | None = None
  log_prompts: bool = False
  otlp_endpoint: str | None = None

  def __post_init__(self) -> None:
    for field in ('port', 'metrics_port', 'http_port', 'gateway_port'):
      value = getattr(self, field)
      config_lib.check(
        value is None or 0 <= value < 2**16,
        field,
        value,
        'must be in [0, 65535]',
      )
    config_lib.check(
      self.gateway_port != 0,
      'gateway_port',
      0,
      'must be a port, as the gateway is another process',
    )
    config_lib.check(self.drain_s >= 0, 'drain_s', self.drain_s, 'must be >= 0')
    config_lib.check(
      self.max_step_s > 0, 'max_step_s', self.max_step_s, 'must be > 0'
    )
    config_lib.check(
      re.fullmatch('[a-zA-Z_][a-zA-Z0-9_]*', self.metrics_prefix) is not None,
      'metrics_prefix',
      self.metrics_prefix,
      'must be letters, digits and underscores',
    )
    config_lib.check(
      not self.log_prompts or self.request_log is not None,
      'log_prompts',
      self.log_prompts,
      'needs request_log',
    )
    for field in ('replicas', 'gateway_args'):
      config_lib.check(
        not getattr(self, field) or self.gateway_port is not None,
        field,
        getattr(self, field),
        'needs gateway_port',
      )
    config_lib.check(
      self.gateway_port is None or self.tls is None,
      'gateway_port',
      self.gateway_port,
      'the gateway speaks to us in plain text, so it excludes tls; give it '
      'a certificate of its own with gateway_args, and us host=127.0.0.1',
    )
    config_lib.check(
      self.gateway_port is None or self.auth_tokens is None,
      'gateway_port',
      self.gateway_port,
      'the gateway sends us no token, so it excludes '
      'auth_tokens; give it --api-key with gateway_args, and us '
      'host=127.0.0.1',
    )

  @property
  def serves_control(self) -> bool:
    return self._is_guarded if self.control is None else self.control

  @property
  def serves_kv_events(self) -> bool:
    return self._is_guarded if self.kv_events is None else self.kv_events

  @property
  def _is_guarded(self) -> bool:
    """Whether nobody calls who runs neither the server nor the machine."""
    return self.auth_tokens is not None or self.is_local

  @property
  def is_local(self) -> bool:
    """Whether no other machine can reach the server."""
    try:
      return ipaddress.ip_address(self.host).is_loopback
    except ValueError:
      return self.host == 'localhost'

  @property
  def address(self) -> str:
    """The host as it is written in an address."""
    return f'[{self.host}]' if ':' in self.host else self.host
