# SPDX-License-Identifier: Apache-2.0
"""Measures how fast a checkpoint converts, against a copy, and its memory.

  python -m sarathi_jax.benchmarks.convert --layers=8 --runs=3

Makes a checkpoint of random numbers with Llama-2-7B's widths. Then takes turns:
a copy of the file, synced as a conversion is, and a conversion in a process of
its own.
"""

from __future__ import annotations

from collections.abc import Iterator
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags
import numpy as np
import rich.console
import rich.progress

from sarathi_jax.benchmarks import common
from sarathi_jax.cli import mains

FLAGS = flags.FLAGS
_WIDTH, _INNER, _VOCAB = 4096, 11008, 32000
_MIB = 2**20


def define_flags() -> None:
  flags.DEFINE_integer(
    'layers', 4, 'Layers of the checkpoint, 0.4 GB each.', lower_bound=1
  )
  flags.DEFINE_integer(
    'runs', 3, 'Rounds, each of a copy and a conversion.', lower_bound=1
  )
  flags.DEFINE_string(
    'folder', None, 'Folder to write checkpoints to. Default: a temporary one.'
  )
  flags.DEFINE_string('json', None, 'File to write the results to, as JSON.')


def _shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
  yield 'model.embed_tokens.weight', (_VOCAB, _WIDTH)
  yield 'lm_head.weight', (_VOCAB, _WIDTH)
  yield 'model.norm.weight', (_WIDTH,)
  for layer in range(layers):
    prefix = f'model.layers.{layer}'
    for norm in ('input', 'post_attention'):
      yield f'{prefix}.{norm}_layernorm.weight', (_WIDTH,)
    for name in 'qkvo':
      yield f'{prefix}.self_attn.{name}_proj.weight', (_WIDTH, _WIDTH)
    for name in ('gate', 'up'):
      yield f'{prefix}.mlp.{name}_proj.weight', (_INNER, _WIDTH)
    yield f'{prefix}.mlp.down_proj.weight', (_WIDTH, _INNER)


def make_checkpoint(folder: pathlib.Path, layers: int) -> pathlib.Path:
  """Writes a Hugging Face checkpoint in bfloat16; returns its big file."""
  folder.mkdir()
  header, end = {}, 0
  for name, shape in _shapes(layers):
    start, end = end, end + 2 * math.prod(shape)
    header[name] = dict(dtype='BF16', shape=shape, data_offsets=[start, end])
  encoded = json.dumps(header).encode()
  path = folder / 'model.safetensors'
  with path.open('wb') as file:
    file.write(len(encoded).to_bytes(8, 'little') + encoded)
    for start in range(0, end, 16 * _MIB):
      bits = os.urandom(min(16 * _MIB, end - start))
      # One bit of each exponent is cleared, so no number is NaN or infinite.
      file.write((np.frombuffer(bits, np.uint16) & 0xBFFF).data)
  (folder / 'config.json').write_text(
    json.dumps(
      dict(
        architectures=['LlamaForCausalLM'],
        vocab_size=_VOCAB,
        hidden_size=_WIDTH,
        intermediate_size=_INNER,
        num_hidden_layers=layers,
        num_attention_heads=32,
        max_position_embeddings=4096,
      )
    )
  )
  return path


def copy(path: pathlib.Path, target: pathlib.Path) -> float:
  """Copies a file; returns the seconds until it is on the disk."""
  start = time.perf_counter()
  shutil.copyfile(path, target)
  with target.open('rb') as file:
    os.fsync(file.fileno())
  seconds = time.perf_counter() - start
  target.unlink()
  return seconds


# Times the conversion alone: importing JAX and orbax takes seconds, however
# large the checkpoint is.
_CONVERT = """
import os, pathlib, resource, sys, time
os.environ['JAX_PLATFORMS'] = 'cpu'
from absl import logging
logging.set_verbosity(logging.ERROR)
from checkpoints_convert import convert
start = time.perf_counter()
convert.convert(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
print(time.perf_counter() - start,
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def convert(folder: pathlib.Path, target: pathlib.Path) -> tuple[float, float]:
  """Converts; returns seconds until on the disk, and peak MiB of memory."""
  done = subprocess.run(
    [sys.executable, '-c', _CONVERT, str(folder), str(target)],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  shutil.rmtree(target)
  seconds, kib = map(float, done.stdout.split())
  return seconds, kib / 1024


def run(path: pathlib.Path, folder: pathlib.Path) -> dict[str, float]:
  """Runs one round: a copy and a conversion."""
  gigabytes = path.stat().st_size / 1e9
  copied = copy(path, folder / 'copy')
  converted, peak = convert(path.parent, folder / 'out')
  return {
    'copy_gb_per_s': gigabytes / copied,
    'convert_gb_per_s': gigabytes / converted,
    'of_copy': copied / converted,
    'peak_mib': peak,
  }


def main() -> None:
  console = rich.console.Console(highlight=False)
  with tempfile.TemporaryDirectory(dir=FLAGS.folder) as name:
    folder = pathlib.Path(name)
    with console.status('Making a checkpoint'):
      path = make_checkpoint(folder / 'hf', FLAGS.layers)
    gigabytes = path.stat().st_size / 1e9
    rows = [
      run(path, folder)
      for _ in rich.progress.track(
        range(FLAGS.runs),
        'Copying and converting',
        console=console,
        transient=True,
      )
    ]
  shown = [{'run': str(i), **row} for i, row in enumerate(rows, 1)]
  medians = {
    key: statistics.median(row[key] for row in rows) for key in rows[0]
  }
  console.print(
    common.table([*shown, {'run': 'median', **medians}], f'{gigabytes:.2f} GB')
  )
  common.write_json(
    FLAGS.json,
    'convert',
    FLAGS,
    rows,
    gigabytes=gigabytes,
    largest_tensor_mib=2 * _VOCAB * _WIDTH / _MIB,
  )


if __name__ == '__main__':
  mains.run(main, define_flags)
