# SPDX-License-Identifier: Apache-2.0
"""Converts a Hugging Face checkpoint for sarathi_jax.

  python -m checkpoints_convert \\
    --source=DIR_OR_HUB_ID --target=DIR [--dtype=bfloat16] [--verify] \\
    [--quantize=int4] [--lora=DIR] [--tp=4 --pp=2]
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
import rich.console
import tqdm

from sarathi_jax.cli import mains
from sarathi_jax.models import quantization

_SOURCE = flags.DEFINE_string(
  'source',
  None,
  'A Hugging Face checkpoint: a folder, or an id on the hub.',
  required=True,
)
_TARGET = flags.DEFINE_string(
  'target',
  None,
  'The folder to write the converted checkpoint to. It must '
  'be empty or absent.',
  required=True,
)
_DTYPE = flags.DEFINE_enum(
  'dtype',
  None,
  ['bfloat16', 'float16', 'float32'],
  'The dtype to store the parameters in. By default they keep the dtype that '
  'most of the checkpoint has.',
)
_TP = flags.DEFINE_integer(
  'tp',
  1,
  'Tensor parallelism to write files for: the number of devices that '
  'will share a layer. No file then holds parts of two devices. Any mesh can '
  'load the checkpoint all the same.',
  lower_bound=1,
)
_PP = flags.DEFINE_integer(
  'pp',
  1,
  'Pipeline parallelism to write files for: the number of pipeline '
  'stages. No file then holds parts of two stages. Any mesh can load the '
  'checkpoint all the same.',
  lower_bound=1,
)
_VERIFY = flags.DEFINE_bool(
  'verify',
  False,
  'Read the converted checkpoint back and compare it with '
  'its source, bit by bit.',
)

_SAMPLING_DEFAULTS = flags.DEFINE_bool(
  'sampling_defaults',
  True,
  'Keep the sampling parameters that '
  'generation_config.json recommends, for requests that do not set their own. '
  'A recommendation that is not supported is then an error.',
)
_QUANTIZE = flags.DEFINE_enum(
  'quantize',
  None,
  tuple(quantization.CODES),
  'Round the matrices of a checkpoint of 16 or 32 bits: to 8, with a scale for '
  'each output, linear layers, experts and the output matrix; to 4, with a '
  'scale for each group of rows, all but the output matrix. Prints by layer '
  'what that loses. By default they stay as they are.',
)
_QUANTIZE_GROUP = flags.DEFINE_integer(
  'quantize_group',
  None,
  'Inputs of an output that have a scale in common, with --quantize: 128 by '
  'default for int4, 32 for mxfp4, all for 8 bits. Fewer lose less, and are '
  'more scales. Devices that share a layer share whole groups.',
  lower_bound=1,
)
_KEEP_MXFP4 = flags.DEFINE_bool(
  'keep_mxfp4',
  None,
  "Keep matrices that are in MXFP4, gpt-oss's experts, in their 4 bits: a "
  'fourth of the memory. That is the default, but with --quantize. By '
  '--nokeep_mxfp4 they become of --dtype, of which bfloat16 loses nothing.',
)
_LORA = flags.DEFINE_string(
  'lora',
  None,
  'The folder, or the id on the hub, of a LoRA adapter of this checkpoint, as '
  'PEFT writes it. It is merged into the weights, so that serving it costs '
  'nothing more.',
)
_ALLOW_NONFINITE = flags.DEFINE_bool(
  'allow_nonfinite',
  False,
  'Convert a checkpoint even if it holds weights '
  'that are NaN or infinite. A request whose logits they ruin ends with the '
  'reason error.',
)


@contextlib.contextmanager
def _bar(title: str, total: int) -> Iterator[Any]:
  """Shows a progress bar in bytes (see `convert.Bar`)."""
  with tqdm.tqdm(
    total=total, desc=title, unit='B', unit_scale=True, mininterval=0.5
  ) as bar:
    yield bar.update


def main() -> None:
  # Conversion computes nothing, so it should not occupy an accelerator. JAX
  # reads this when it is imported, which is why the imports are here.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  from checkpoints_convert import convert
  from checkpoints_convert import source
  from sarathi_jax.models import parallel

  start = time.monotonic()
  plan = convert.convert(
    source.locate(_SOURCE.value),
    pathlib.Path(_TARGET.value),
    dtype=_DTYPE.value,
    check=_VERIFY.value,
    bar=_bar,
    parallelism=parallel.Parallelism(tp=_TP.value, pp=_PP.value),
    sampling_defaults=_SAMPLING_DEFAULTS.value,
    allow_nonfinite=_ALLOW_NONFINITE.value,
    quantize=_QUANTIZE.value,
    quantize_group=_QUANTIZE_GROUP.value,
    keep_mxfp4=_KEEP_MXFP4.value,
    lora=source.locate(_LORA.value) if _LORA.value else None,
  )
  seconds = time.monotonic() - start
  if plan.left_out:
    print(plan.left_out)
  if plan.lost is not None:
    rich.console.Console().print(
      plan.lost.table(f'Lost by {_QUANTIZE.value}, %, root mean square')
    )
  how = plan.model.quantization
  dtypes = f'{how.codes} and {plan.dtype}' if how else plan.dtype
  print(
    f'{_TARGET.value}: {plan.model.family}, {dtypes}, '
    f'{f"with {plan.adapter} merged, " if plan.adapter else ""}'
    f'{tqdm.tqdm.format_sizeof(plan.num_bytes, "B")} in {seconds:.1f} s'
    f'{", verified" if _VERIFY.value else ""}'
  )


def run() -> None:
  """Runs `main`; the console script `sarathi-convert` calls it."""
  mains.run(main, verbosity=logging.ERROR)
