# SPDX-License-Identifier: Apache-2.0
"""The random models that engines are compared on, made once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import pathlib
import subprocess

from sarathi_jax import config as config_lib
from sarathi_jax.benchmarks import common
from sarathi_jax.checkpoint import whole_folder

WORKERS = pathlib.Path(__file__).parent / 'peer_workers'
# Llamas, and a Qwen3-MoE; `peer_workers/make_model.py` says their shapes.
SIZES = ('43m', '150m', '236m-moe')


def made(size: str, python: str) -> pathlib.Path:
  """Returns the folder of a random float32 model, as transformers writes it.

  Args:
    size: one of `SIZES`.
    python: the Python of an environment with torch and transformers.
  """
  return _once(
    _folder() / f'{family(size)}-{size}',
    lambda folder: _run(
      [python, str(WORKERS / 'make_model.py'), str(folder), size]
    ),
  )


def family(size: str) -> str:
  """Returns the name of the family that a size is of."""
  return 'qwen3' if size.endswith('moe') else 'llama'


def openvino(model: pathlib.Path, python: str) -> pathlib.Path:
  """Returns the folder, beside a model, of its export for OpenVINO.

  Args:
    model: a folder that transformers wrote.
    python: the Python of an environment with optimum-intel.
  """
  command = pathlib.Path(python).parent / 'optimum-cli'
  return _once(
    model.with_name(f'{model.name}-openvino'),
    lambda folder: _run(
      [
        str(command),
        'export',
        'openvino',
        '--model',
        str(model),
        '--task',
        'text-generation-with-past',
        '--weight-format',
        'fp32',
        str(folder),
      ]
    ),
  )


def _folder() -> pathlib.Path:
  return pathlib.Path(config_lib.default_cache_dir()) / 'peers'


def _once(
  path: pathlib.Path, make: Callable[[pathlib.Path], None]
) -> pathlib.Path:
  """Makes a folder if it is not there; never leaves half of it."""
  if not path.is_dir():
    whole_folder.make(path, make)
  return path


def _run(command: Sequence[str]) -> None:
  """Runs a program of a peer; PeerError with the end of its output."""
  done = subprocess.run(
    command,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  if done.returncode:
    raise common.PeerError(
      f'{" ".join(command)} failed:\n{done.stdout[-4000:]}'
    )
