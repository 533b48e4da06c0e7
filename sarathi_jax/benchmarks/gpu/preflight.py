# SPDX-License-Identifier: Apache-2.0
"""Checks that must pass before others are worth their time, and remedies.

Each of these has failed on GPUs elsewhere, and would fail all that follows.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import importlib.metadata
import shutil
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import ragged_paged_attention as rpa
from pallas_kernels.aot import toolkit
from pallas_kernels.ragged_paged_attention import arg_spec
from pallas_kernels.ragged_paged_attention import arg_specs
from sarathi_jax.benchmarks import journal as journal_lib
from sarathi_jax.benchmarks.gpu import engine
from sarathi_jax.benchmarks.gpu import sizes
from sarathi_jax.benchmarks.gpu import timing

_EXP, _FILTERED = 'exp', 'filtered step, twice'
# For bfloat16, as in the kernels' tests; a wrong page is off by 0.1 and more.
_TOLERANCE = 2e-2


@dataclasses.dataclass(frozen=True, slots=True)
class Remedy:
  """Flags of XLA that may mend a point that failed.

  Attributes:
    point: the point that failed.
    name: what the remedy does.
    flags: finds the flags; None where there are none here.
  """

  point: str
  name: str
  flags: Callable[[], str | None]


def _cuda_data_dir() -> str | None:
  """Finds CUDA's compiler, in NVIDIA's wheels or an installed CUDA."""
  found = toolkit.find()
  return None if found is None else f'--xla_gpu_cuda_data_dir={found}'


# In the order in which they are tried.
REMEDIES: tuple[Remedy, ...] = (
  Remedy(_EXP, 'tell XLA where ptxas and libdevice are', _cuda_data_dir),
  # XLA of late 2025 crashed where such a graph was run a second time.
  Remedy(
    _FILTERED,
    'no loops in CUDA graphs',
    lambda: '--xla_gpu_enable_command_buffer=-WHILE',
  ),
  Remedy(
    _FILTERED, 'no CUDA graphs', lambda: '--xla_gpu_enable_command_buffer='
  ),
  Remedy(
    _FILTERED,
    "do not keep the autotuner's results",
    lambda: '--xla_gpu_dump_autotune_results_to=',
  ),
)


def run(size: sizes.Size, journal: journal_lib.Journal) -> None:
  """Runs all checks, and measures what later stages are compared with."""
  journal.measure('machine', _machine)
  journal.measure(_EXP, _exp)
  journal.measure('kernel against reference', functools.partial(_kernel, size))
  journal.measure(_FILTERED, functools.partial(_filtered, size))
  journal.measure(
    'limits', lambda: dict(timing.limits(size.copy_bytes, size.matmul_n))
  )


def _machine() -> journal_lib.Row:
  """Returns facts that every result needs to be understood."""
  packages = (
    'jax',
    'jaxlib',
    'jax-cuda13-plugin',
    'jax-cuda12-plugin',
    'numpy',
    'torch',
  )
  return {
    'gpu': _nvidia_smi(),
    'devices': len(jax.devices()),
    'packages': ' '.join(
      f'{dist.name}={dist.version}'
      for dist in importlib.metadata.distributions()
      if dist.name in packages
    ),
  }


def _nvidia_smi() -> str | None:
  """Returns driver, memory, power limit and clocks."""
  if not (command := shutil.which('nvidia-smi')):
    return None
  fields = 'name,driver_version,memory.total,power.limit,clocks.max.sm'
  asked = subprocess.run(
    [command, f'--query-gpu={fields}', '--format=csv,noheader'],
    capture_output=True,
    text=True,
    check=False,
    timeout=20,
  )
  return asked.stdout.strip() or asked.stderr.strip()[:200]


def _exp() -> journal_lib.Row:
  """Computes exp, which needs libdevice and ptxas, as XLA finds them."""
  x = jnp.linspace(-3, 3, 1 << 16)
  worst = np.abs(np.asarray(jax.jit(jnp.exp)(x)) / np.exp(np.asarray(x)) - 1)
  _check(worst.max() < 1e-5, f'exp is off by {worst.max():.2g}')
  return {'worst': float(worst.max())}


def _kernel(size: sizes.Size) -> journal_lib.Row:
  spec = arg_specs.BY_NAME[size.kernel_spec]
  arrays = arg_spec.make(spec, unused=float('nan'))
  found: dict[str, Any] = {}
  for name in (size.attention, 'reference'):
    k_pages, v_pages = rpa.pages_from_rows(
      arrays['k_pages'], arrays['v_pages'], name
    )
    attend: Any = functools.partial(
      rpa.ragged_paged_attention, **spec.options, implementation=name
    )
    if name != 'reference':
      attend = jax.jit(attend)
    found[name] = np.asarray(
      attend(**(arrays | {'k_pages': k_pages, 'v_pages': v_pages})), np.float32
    )[: sum(spec.all_q_lens)]
  worst = np.abs(found[size.attention] - found['reference']).max()
  _check(bool(worst < _TOLERANCE), f'attention is off by {worst:.2g}')
  return {'worst': float(worst)}


def _filtered(size: sizes.Size) -> journal_lib.Row:
  """Runs one layer of the model; filters are loops in branches in a graph."""
  model = dataclasses.replace(size.model, num_layers=1)
  runner = engine.make_runner(
    model, engine.make_params(model, size.dtype), size.config
  )
  point = dataclasses.replace(size.varied, filtered=True)
  batch = point.batch(size.config.page_size)
  runner.compile(runner.program_for(batch))
  first, second = (runner.fetch(runner.launch(batch)) for _ in range(2))
  _check(first.tokens == second.tokens, 'the second step drew other tokens')
  return {'distinct': len(set(first.tokens)), 'of': len(first.tokens)}


def _check(ok: bool, error: str) -> None:
  if not ok:
    raise ValueError(error)
