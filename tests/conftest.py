# SPDX-License-Identifier: Apache-2.0
"""Strictness for all tests: types and ranks in JAX, no network, no luck.

JAX is told by its environment variables, so that tests of the layers without
JAX need not load it, and the processes that tests start are strict, too.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator
import gc
import importlib.metadata
import os
import pathlib
import shutil
import signal
import tempfile
import time

import hypothesis
import pytest

os.environ.update(
  JAX_NUM_CPU_DEVICES='8',
  JAX_NUMPY_DTYPE_PROMOTION='strict',
  JAX_NUMPY_RANK_PROMOTION='raise',
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.1',
  HF_HUB_OFFLINE='1',
)
# What one process compiled, the others need not: those that run tests beside
# this one, and those that tests start.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(
    prefix='sarathi_jax_compiled_'
  )
  atexit.register(
    shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True
  )

# LLVM is given a program whole: in parts, for more threads than there are cores
# left, it takes a tenth longer. How XLA makes loops by MLIR takes twice as long
# to compile. The newest JAX has no other way, so that is tested, too.
_FLAGS = ['--xla_cpu_parallel_codegen_split_count=1']
if importlib.metadata.version('jax').startswith('0.10.'):
  _FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join(
  (*_FLAGS, os.environ.get('XLA_FLAGS', ''))
).strip()

# What JAX has traced stays: looking through it for garbage takes ever longer.
gc.set_threshold(20_000, 50, 50)
# Programs that nobody has any more keep their memory until then, in pieces, and
# those that JAX keeps for functions until it is told. Linux gives a process
# 65,530 pieces; LLVM ends it by a segmentation fault if there is none.
_MAPS = pathlib.Path('/proc/self/maps')
# To count them takes longer than most tests.
_MANY_MAPS = 40_000
_SECONDS_BETWEEN = 3

# A shell's background jobs ignore Ctrl-C, and so would what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# On a busy machine time says nothing about the code.
hypothesis.settings.register_profile(
  'project',
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile('project')


def pytest_collection_finish() -> None:
  """Leaves what was imported out of all searches for garbage.

  To go through it takes two seconds, which pytest alone does twice at the end.
  """
  gc.freeze()


_counted_at_s = [time.monotonic()]


def pytest_runtest_teardown() -> None:
  now = time.monotonic()
  if now < _counted_at_s[-1] + _SECONDS_BETWEEN or not _MAPS.exists():
    return
  _counted_at_s[-1] = now
  if _has_many_maps():
    gc.collect()
  if _has_many_maps():
    import jax

    jax.clear_caches()
    gc.collect()


def _has_many_maps() -> bool:
  return _MAPS.read_bytes().count(b'\n') > _MANY_MAPS


# Their tests share what takes long to compile. Processes take tests from one
# another at the end: it is to be others, or two compile the same.
_FIRST = (
  'windows_equivalence_test.py',
  'parallel_test.py',
  'equivalence_test.py',
  'prefix_equivalence_test.py',
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  items.sort(key=lambda item: item.path.name not in _FIRST)


@pytest.fixture(scope='module', autouse=True)
def _training_mixes_types(request: pytest.FixtureRequest) -> Iterator[None]:
  """optax's own updates multiply integers by floats."""
  if 'quickstart' not in request.path.parts:
    yield
    return
  import jax

  with (
    pytest.MonkeyPatch.context() as patch,
    jax.numpy_dtype_promotion('standard'),
  ):
    patch.setenv('JAX_NUMPY_DTYPE_PROMOTION', 'standard')
    yield
