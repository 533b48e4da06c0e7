# SPDX-License-Identifier: Apache-2.0
"""XLA's flags for serving, by JAX's version. For mains; loads no JAX.

XLA ends the process at a flag that it does not know. So each flag is listed
with the versions that it was tried with, and other versions go without it.

XLA does not keep the matmuls' tuning on disk: the compiled programs include it,
and JAX keeps these (`runner/compiled.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
import dataclasses
import importlib.metadata
import re

Version = tuple[int, ...]
# The fraction of a GPU's memory to take: a main has the GPU for itself. JAX's
# own default is three quarters.
MEMORY_FRACTION = 0.95
_CPU_DEVICES = '--xla_force_host_platform_device_count'


@dataclasses.dataclass(frozen=True, slots=True)
class Flag:
  """A flag of XLA, for versions of JAX in [since, before)."""

  name: str
  value: str
  since: Version
  before: Version


TABLE: tuple[Flag, ...] = (
  # Sampling branches on what the batch asks for, and what it tells of likely
  # tokens loops, as do filters where there is no kernel for them. XLA puts
  # branches into CUDA graphs, but without this flag none with a loop in
  # it. Where a branch is in no graph, the host waits for the device at each
  # step. XLA leaves loops out by itself if the driver is older than CUDA 12.3.
  # Not +COLLECTIVES: it would make one graph of a step on several devices, too,
  # where collectives now separate its parts, but it was never tried.
  Flag('xla_gpu_enable_command_buffer', '+WHILE', (0, 10, 2), (0, 13)),
  # XLA cuts matmuls of few rows along what they sum over, before it looks for
  # the fastest kernel: of 64 rows all of a layer, into 2 to 8 parts. These go
  # through memory as float32, and keep sums of the residual stream out of the
  # norms that read them. cuBLASLt may still split by itself, where that wins.
  Flag('xla_gpu_experimental_force_split_k', '1', (0, 10, 2), (0, 13)),
)


def flags(version: Version) -> str:
  """Returns XLA_FLAGS for a version of JAX, such as (0, 10, 2)."""
  return ' '.join(
    f'--{flag.name}={flag.value}'
    for flag in TABLE
    if flag.since <= version < flag.before
  )


def _ours() -> str:
  version = importlib.metadata.version('jax')
  return flags(tuple(map(int, re.findall(r'\d+', version)[:3])))


def unset(environ: Mapping[str, str]) -> str:
  """Returns those of the flags that nobody has set; '' if all are set.

  Args:
    environ: os.environ.
  """
  given = environ.get('XLA_FLAGS', '')
  return ' '.join(
    flag for flag in _ours().split() if flag.partition('=')[0] not in given
  )


def set_environment(environ: MutableMapping[str, str]) -> None:
  """Sets the flags, and JAX's share of a GPU's memory, in the environment.

  Call it before JAX first computes. What the user has set takes precedence.

  Args:
    environ: os.environ.
  """
  environ['XLA_FLAGS'] = f'{_ours()} {environ.get("XLA_FLAGS", "")}'.strip()
  environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', str(MEMORY_FRACTION))


def make_cpu_devices(
  environ: MutableMapping[str, str], num_devices: int
) -> None:
  """Makes devices of a CPU, for what has several (`--tp`, `--pp`).

  Call it before JAX first computes. Changes nothing for one, nor if the user
  has said how many there are, and nothing on a GPU.

  Args:
    environ: os.environ.
    num_devices: how many.
  """
  given = environ.get('XLA_FLAGS', '')
  is_said = _CPU_DEVICES in given or 'JAX_NUM_CPU_DEVICES' in environ
  if num_devices > 1 and not is_said:
    environ['XLA_FLAGS'] = f'{given} {_CPU_DEVICES}={num_devices}'.strip()
