# SPDX-License-Identifier: Apache-2.0
"""One conversion, from a folder to a folder, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np

from checkpoints_convert import changes
from checkpoints_convert import coded
from checkpoints_convert import extra_layers
from checkpoints_convert import generation as generation_lib
from checkpoints_convert import hf_config
from checkpoints_convert import lora as lora_lib
from checkpoints_convert import mxfp4
from checkpoints_convert import nested
from checkpoints_convert import orbax_writer
from checkpoints_convert import packed
from checkpoints_convert import quantization_config
from checkpoints_convert import quantized
from checkpoints_convert import quantizing
from checkpoints_convert import rules as rules_lib
from checkpoints_convert import safetensors_reader
from checkpoints_convert import staging as staging_lib
from checkpoints_convert import tied
from checkpoints_convert import tokenizer_files
from checkpoints_convert import transforms
from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import parallel
from sarathi_jax.models import quantization as quantization_lib
from sarathi_jax.models import quantized as quantized_lib
from sarathi_jax.models import tree

# The dtypes that parameters can have -> what safetensors calls them.
DTYPES: Mapping[str, str] = {
  'bfloat16': 'BF16',
  'float16': 'F16',
  'float32': 'F32',
}

# Makes a progress bar of a title and a total of bytes: a context manager that
# gives an `orbax_writer.Progress`.
Bar = Callable[[str, int], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def no_bar(title: str, total: int) -> Iterator[orbax_writer.Progress]:
  """Shows nothing; stands in for a progress bar (see `Bar`)."""
  del title, total
  yield lambda num_bytes: None


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
  """A conversion, checked as far as can be before anything is written.

  Attributes:
    folder: of the Hugging Face checkpoint.
    model: its model's configuration.
    dtype: what its parameters become, such as 'bfloat16'.
    leaves: a tree of `transforms.Leaf`: dicts and lists, as the parameters.
    generation: what it says of how to generate.
    raw: the decoded config.json.
    left_out: a line, for people, that says what is not converted; mostly ''.
    lost: what rounding lost, once it is converted, if it is quantized here.
    adapter: the name of the LoRA adapter that is merged into it, if one is.
  """

  folder: pathlib.Path
  model: config_lib.ModelConfig
  dtype: str
  leaves: Any
  generation: generation_lib.Generation
  raw: Mapping[str, Any]
  left_out: str = ''
  lost: quantizing.Errors | None = None
  adapter: str | None = None

  def all_leaves(self) -> list[transforms.Leaf]:
    return jax.tree.leaves(self.leaves)

  @property
  def num_bytes(self) -> int:
    return sum(leaf.num_bytes for leaf in self.all_leaves())


def make_plan(
  folder: pathlib.Path,
  reader: safetensors_reader.Reader,
  dtype: str | None,
  parallelism: parallel.Parallelism = parallel.ONE_DEVICE,
  *,
  sampling_defaults: bool = True,
  quantize: str | None = None,
  quantize_group: int | None = None,
  keep_mxfp4: bool | None = None,
  adapter: lora_lib.Adapter | None = None,
) -> Plan:
  """Checks everything that can be checked without reading a tensor.

  Args:
    folder: of the checkpoint.
    reader: of its tensors.
    dtype: one of `DTYPES`; None for what most of the checkpoint is in.
    parallelism: of the mesh that it is written for.
    sampling_defaults: whether the sampling that its makers recommend is kept.
    quantize: codes to round its matrices to, of `quantization.CODES`; None:
      they stay as they are.
    quantize_group: rows that have a scale in common, if they are rounded; None:
      what `Quantization.rounding_to` says.
    keep_mxfp4: whether matrices in MXFP4 stay so; if not, they become `dtype`,
      and may be rounded. None: where there are any, and none is rounded.
    adapter: to merge into it.

  Raises:
    CheckpointError: something about the checkpoint is not known, or missing.
    ConfigError: the model can't be divided so.
  """
  if dtype is not None and dtype not in DTYPES:
    raise errors.CheckpointError(
      f'dtype={dtype!r}: must be one of {", ".join(DTYPES)}.'
    )
  if quantize_group is not None and quantize is None:
    raise errors.CheckpointError(
      f'quantize_group={quantize_group}: says how --quantize rounds, which is '
      'not asked for.'
    )
  model, rules, raw, is_nested, num_extra, scheme = hf_config.read(folder)
  parallelism.check(model)
  tensors, left_out = dict(reader.tensors), ''
  if adapter is not None:
    tensors = adapter.merged(tensors)
  if is_nested:
    tensors, left_out = nested.take_text(tensors)
  elif num_extra:
    tensors, left_out = extra_layers.drop(tensors, model.num_layers, num_extra)
  tensors = mxfp4.unpacked(tensors)
  if keep_mxfp4 is None:
    keep_mxfp4 = quantize is None and mxfp4.is_in(tensors)
  taken = _take_codes(tensors, scheme, reader, keep_mxfp4)
  tensors, left_out = taken.tensors, f'{left_out} {taken.told}'.strip()
  dtype = dtype or _main_dtype(tensors)
  generation = generation_lib.read(folder, raw, sampling=sampling_defaults)
  model, tensors = tied.settle(model, tensors, reader, rules)
  matrices = [
    name
    for name, leaf in tree.named_leaves(models.param_specs(model)).items()
    if leaf.is_factor
  ]
  lost = None
  if taken.how is not None:
    if quantize is not None:
      raise errors.CheckpointError(
        f'quantize={quantize!r}: the checkpoint is quantized already.'
      )
    model = coded.settle(model, tensors, rules, matrices, taken.how)
    tensors = packed.without_empty_biases(
      tensors, rules, models.param_specs(model), reader
    )
  elif quantize is not None:
    how = quantization_lib.Quantization.rounding_to(quantize, quantize_group)
    model, tensors, lost = quantizing.apply(
      model, tensors, rules, matrices, how
    )
  parallelism.check(model)
  leaves = rules_lib.plan(
    tensors,
    rules,
    models.param_specs(model),
    safetensors_reader.DTYPES[DTYPES[dtype]],
    parallelism,
  )
  return Plan(
    folder,
    model,
    dtype,
    leaves,
    generation,
    raw,
    left_out,
    lost,
    None if adapter is None else adapter.folder.name,
  )


def _take_codes(
  tensors: dict[str, safetensors_reader.Tensor],
  scheme: quantization_config.Scheme | quantization_config.Packing | None,
  reader: safetensors_reader.Reader,
  keep_mxfp4: bool,
) -> coded.Taken:
  """Returns the tensors with those that are in codes as ours."""
  if keep_mxfp4:
    return mxfp4.take(tensors)
  if scheme is None:
    return coded.Taken(tensors, '', None)
  if isinstance(scheme, quantization_config.Packing):
    return packed.take(tensors, scheme, reader)
  return quantized.take(tensors, scheme, reader)


def convert(
  folder: pathlib.Path,
  target: pathlib.Path,
  *,
  dtype: str | None = None,
  check: bool = False,
  parallelism: parallel.Parallelism = parallel.ONE_DEVICE,
  sampling_defaults: bool = True,
  allow_nonfinite: bool = False,
  quantize: str | None = None,
  quantize_group: int | None = None,
  keep_mxfp4: bool | None = None,
  lora: pathlib.Path | None = None,
  bar: Bar = no_bar,
) -> Plan:
  """Converts a Hugging Face checkpoint.

  Writes to a hidden folder beside the target, syncs it, and renames it. So the
  target is either whole or absent. The next conversion removes what a killed
  one left.

  Args:
    folder: of the checkpoint.
    target: the folder to make; one that holds anything is refused.
    dtype: see `make_plan`.
    check: whether to read everything back and compare.
    parallelism: of a mesh. Each file then is of one of its devices, which is
      of use where files are far away. Any mesh can load it all the same.
    sampling_defaults, quantize, quantize_group, keep_mxfp4: see `make_plan`.
    allow_nonfinite: whether weights may be NaN or infinite; those that are
      quantized here never may.
    lora: the folder of a LoRA adapter to merge into it, see `lora`.
    bar: makes progress bars.

  Returns:
    What was done.

  Raises:
    CheckpointError: the checkpoint can't be converted, or the target can't be
      written.
    BusyError: another process converts to it; see `staging`.
    ConfigError: the model can't be divided by `parallelism`.
  """
  target = pathlib.Path(os.path.abspath(target))
  _check_free(target)
  with contextlib.ExitStack() as stack:
    reader = stack.enter_context(safetensors_reader.Reader(folder))
    adapter = (
      None if lora is None else stack.enter_context(lora_lib.Adapter(lora))
    )
    plan = make_plan(
      folder,
      reader,
      dtype,
      parallelism,
      sampling_defaults=sampling_defaults,
      quantize=quantize,
      quantize_group=quantize_group,
      keep_mxfp4=keep_mxfp4,
      adapter=adapter,
    )
    with (
      _write_errors(target),
      staging_lib.staging(target, plan.num_bytes) as staging,
    ):
      tokenizer_files.write(folder, staging)  # may refuse, so it goes first
      with bar('converting', plan.num_bytes) as progress:
        nonfinite = orbax_writer.write(
          staging / checkpoint.PARAMS, plan.leaves, reader, progress
        )
      if nonfinite and not allow_nonfinite:
        raise transforms.nonfinite_error(nonfinite)
      checkpoint.write_metadata(staging, metadata_of(plan, nonfinite))
      if check:
        compare(plan, staging, reader, bar)
      staging_lib.publish(staging, target)
  return plan


def compare(
  plan: Plan, target: pathlib.Path, reader: safetensors_reader.Reader, bar: Bar
) -> None:
  """Reads every parameter back and compares it with its tensors.

  Of what was quantized before, it also compares the numbers that codes and
  scales stand for, theirs and ours.
  """
  scratch = transforms.Scratch()
  with bar('verifying', plan.num_bytes) as progress:
    for leaf in plan.all_leaves():
      folder = target / checkpoint.PARAMS / leaf.path
      for chunk in leaf.chunks():
        stored = _read_back(folder, leaf.path, chunk.index)
        rows = leaf.rows(reader, chunk, scratch)
        # NumPy's transpose, not the one that laid the chunk out.
        expected = rows.T if chunk.part.transpose else rows
        if leaf.stacked:
          expected = expected[None]
        if stored.dtype != expected.dtype or not np.array_equal(
          _bits(stored), _bits(expected)
        ):
          raise errors.CheckpointError(
            f'{leaf.path}: differs from {chunk.part.tensor.name}, rows '
            f'[{chunk.start}, {chunk.stop}).'
          )
        if isinstance(chunk.part.tensor, coded.Codes):
          _compare_numbers(plan, folder, leaf, chunk, stored, reader)
        progress(stored.nbytes)


def _compare_numbers(
  plan: Plan,
  folder: pathlib.Path,
  leaf: transforms.Leaf,
  chunk: transforms.Chunk,
  codes: np.ndarray,
  reader: safetensors_reader.Reader,
) -> None:
  """Compares what a chunk of codes stands for, bit by bit.

  Args:
    plan: the conversion.
    folder: of the codes.
    leaf: the parameter of codes.
    chunk: of it.
    codes: the chunk, as it is stored.
    reader: of the checkpoint.
  """
  how, tensor = plan.model.quantization, chunk.part.tensor
  assert how is not None and isinstance(tensor, coded.Codes)
  *front, _, columns = chunk.index

  def read(name: str, *index: slice) -> np.ndarray:
    path = leaf.path.removesuffix('values') + name
    return _read_back(folder.with_name(path), path, (*front, *index))

  node = quantized_lib.Quantized(
    codes,
    read('scale', slice(None), columns),
    how.codes,
    how.group,
    read('zero', slice(None), columns) if how.zeros else None,
    read('order', slice(None)) if how.reordered else None,
  )
  numbers = dataclasses.replace(chunk.part, tensor=tensor.numbers)
  rows = tensor.numbers.shape[-1]
  ours = quantized_lib.dequantize(node, np.float32, rows).reshape(rows, -1)
  theirs = np.empty((ours.shape[1], rows), np.float32)
  numbers.read(reader, chunk.start, theirs)
  # Where codes are taken apart to integers, -0 is 0.
  if not np.array_equal(_bits(ours + 0), _bits(theirs.T + 0)):
    raise errors.CheckpointError(
      f'{leaf.path}: stands for other numbers than {chunk.part.tensor.name}, '
      f'rows [{chunk.start}, {chunk.stop}).'
    )


def _read_back(
  folder: pathlib.Path, path: str, index: tuple[slice, ...]
) -> np.ndarray:
  try:
    return orbax_writer.read_chunk(folder, index)
  except ValueError as e:  # what tensorstore raises for everything
    raise errors.CheckpointError(f'{path}: can not be read: {e}') from e


def _bits(values: np.ndarray) -> np.ndarray:
  return values.view(f'u{values.itemsize}')


def _main_dtype(tensors: Mapping[str, safetensors_reader.Tensor]) -> str:
  """Returns the dtype of most of the bytes; config.json is sometimes wrong."""
  sizes: dict[str, int] = {}
  for tensor in tensors.values():
    if isinstance(tensor, coded.Made):
      continue
    name = {stored: name for name, stored in DTYPES.items()}.get(tensor.dtype)
    if name is None:
      _ = tensor.numpy_dtype  # raises, by name
    sizes[str(name)] = sizes.get(str(name), 0) + tensor.num_bytes
  if not sizes:
    raise errors.CheckpointError('the checkpoint holds no tensors.')
  return max(sizes, key=lambda name: sizes[name])


def metadata_of(
  plan: Plan,
  nonfinite: Mapping[str, int] | None = None,
) -> checkpoint.CheckpointMetadata:
  """Returns the metadata for a checkpoint's sarathi.json.

  Args:
    plan: its conversion.
    nonfinite: see `orbax_writer.write`.
  """
  generation = plan.generation
  return checkpoint.CheckpointMetadata(
    model=plan.model,
    dtype=plan.dtype,
    eos_token_ids=generation.eos_token_ids,
    bos_token_id=generation.bos_token_id,
    pad_token_id=generation.pad_token_id,
    generation=generation.sampling,
    source={
      'format': 'huggingface',
      'name': plan.folder.name,
      'architecture': (plan.raw.get('architectures') or [None])[0],
      'converter': changes.VERSION,
      **({'lora': plan.adapter} if plan.adapter else {}),
      **({'nonfinite': dict(nonfinite)} if nonfinite else {}),
    },
  )


def _check_free(target: pathlib.Path) -> None:
  if target.is_dir() and not any(target.iterdir()):
    return
  if target.exists() or target.is_symlink():
    raise errors.CheckpointError(
      f'target={str(target)!r}: exists; remove it or name another.'
    )


@contextlib.contextmanager
def _write_errors(target: pathlib.Path) -> Iterator[None]:
  """Names the target in errors about writing it."""
  try:
    yield
  except errors.CheckpointError:
    raise
  except (OSError, ValueError) as e:  # tensorstore raises ValueError
    raise errors.CheckpointError(
      f'target={str(target)!r}: can not be written: {e}'
    ) from e
