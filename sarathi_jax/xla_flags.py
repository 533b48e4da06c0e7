# SPDX-License-Identifier: Apache-2.0
"""XLA's flags for serving on GPUs, by the version of JAX. For mains; no JAX.

XLA ends the process at a flag that it does not know, so each stands here with
the versions that it was tried with, and others go without.

XLA does not keep the matmuls' tuning on disk: what was tuned is in the compiled
programs, which JAX keeps (`runner/compiled.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
import dataclasses
import importlib.metadata
import re

Version = tuple[int, ...]
# A main has the GPU for itself; JAX would take three quarters of it.
MEMORY_FRACTION = 0.95


@dataclasses.dataclass(frozen=True, slots=True)
class Flag:
  """A flag of XLA, for versions of JAX in [since, before)."""

  name: str
  value: str
  since: Version
  before: Version


TABLE: tuple[Flag, ...] = (
  # Sampling branches on what the batch asks for, and its filters loop. XLA
  # puts branches into CUDA graphs, but none with a loop in it, and where a
  # branch is in no graph the host waits for the device at each step. It leaves
  # loops out by itself where the driver is older than CUDA 12.3.
  # Not +COLLECTIVES: it would make one graph of a step on several devices, too,
  # which is in parts between them otherwise, but was never tried on any.
  Flag('xla_gpu_enable_command_buffer', '+WHILE', (0, 10, 2), (0, 13)),
)


def flags(version: Version) -> str:
  """XLA_FLAGS for a version of JAX: (0, 10, 2)."""
  return ' '.join(f'--{flag.name}={flag.value}' for flag in TABLE
                  if flag.since <= version < flag.before)


def _ours() -> str:
  version = importlib.metadata.version('jax')
  return flags(tuple(map(int, re.findall(r'\d+', version)[:3])))


def unset(environ: Mapping[str, str]) -> str:
  """Those of the flags that nobody has set; the empty string if all are.

  Args:
    environ: os.environ.
  """
  given = environ.get('XLA_FLAGS', '')
  return ' '.join(flag for flag in _ours().split()
                  if flag.partition('=')[0] not in given)


def set_environment(environ: MutableMapping[str, str]) -> None:
  """To be called before JAX first computes; what the user has set wins.

  Args:
    environ: os.environ.
  """
  environ['XLA_FLAGS'] = f'{_ours()} {environ.get("XLA_FLAGS", "")}'.strip()
  environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', str(MEMORY_FRACTION))
