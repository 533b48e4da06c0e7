# SPDX-License-Identifier: Apache-2.0
"""Converts a Hugging Face checkpoint for sarathi_jax.

  python -m checkpoints_convert \\
    --source=DIR_OR_HUB_ID --target=DIR [--dtype=bfloat16] [--verify] \\
    [--tp=4 --pp=2]
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
import pathlib
import time
from typing import Any

from absl import flags
from absl import logging
import tqdm

from sarathi_jax.cli import mains

_SOURCE = flags.DEFINE_string(
  'source', None, 'A Hugging Face checkpoint: a folder, or an id on the hub.',
  required=True)
_TARGET = flags.DEFINE_string(
  'target', None, 'The folder to make.', required=True)
_DTYPE = flags.DEFINE_enum(
  'dtype', None, ['bfloat16', 'float16', 'float32'],
  'What to store the parameters in; by default, what they are in.')
_TP = flags.DEFINE_integer(
  'tp', 1, 'Devices that will share a layer: no file holds parts of two. Any '
  'mesh loads the checkpoint all the same.', lower_bound=1)
_PP = flags.DEFINE_integer(
  'pp', 1, 'Pipeline stages, likewise.', lower_bound=1)
_VERIFY = flags.DEFINE_bool(
  'verify', False, 'Read everything back and compare it, bit by bit.')

_SAMPLING_DEFAULTS = flags.DEFINE_bool(
  'sampling_defaults', True, 'Keep the sampling that generation_config.json '
  'recommends, for requests that do not say; what of it is not supported is '
  'an error then.')
_ALLOW_NONFINITE = flags.DEFINE_bool(
  'allow_nonfinite', False, 'Convert weights that are NaN or infinite, too. '
  'Requests whose logits are ruined by them end with the reason error.')


@contextlib.contextmanager
def _bar(title: str, total: int) -> Iterator[Any]:
  """A progress bar in bytes."""
  with tqdm.tqdm(total=total, desc=title, unit='B', unit_scale=True,
                 mininterval=0.5) as bar:
    yield bar.update


def main() -> None:
  # Nothing is computed, so no accelerator is to be taken. JAX reads this when
  # it is imported, which is why the imports are here.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  from checkpoints_convert import convert
  from checkpoints_convert import source
  from sarathi_jax.models import parallel
  start = time.monotonic()
  plan = convert.convert(
    source.locate(_SOURCE.value), pathlib.Path(_TARGET.value),
    dtype=_DTYPE.value, check=_VERIFY.value, bar=_bar,
    parallelism=parallel.Parallelism(tp=_TP.value, pp=_PP.value),
    sampling_defaults=_SAMPLING_DEFAULTS.value,
    allow_nonfinite=_ALLOW_NONFINITE.value)
  seconds = time.monotonic() - start
  print(f'{_TARGET.value}: {plan.model.family}, {plan.dtype}, '
        f'{tqdm.tqdm.format_sizeof(plan.num_bytes, "B")} in {seconds:.1f} s'
        f'{", verified" if _VERIFY.value else ""}')


def run() -> None:
  """The console script `sarathi-convert`."""
  mains.run(main, verbosity=logging.ERROR)
