# SPDX-License-Identifier: Apache-2.0
"""A converted checkpoint's parameters: checks their files, and reads them."""

from __future__ import annotations

from collections.abc import Mapping
import itertools
import math
import os
import pathlib
from typing import Any, NamedTuple

from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.checkpoint import metadata as metadata_lib
from sarathi_jax.checkpoint import params_reader
from sarathi_jax.checkpoint.metadata import PathLike

PARAMS = 'params'

# dtype -> zarr's name, and the bytes of a number.
_DTYPES: Mapping[str, tuple[str, int]] = {
  'bfloat16': ('bfloat16', 2),
  'float16': ('<f2', 2),
  'float32': ('<f4', 4),
  'float8_e4m3fn': ('float8_e4m3fn', 1),
  'int8': ('|i1', 1),
  'int32': ('<i4', 4),
  'uint8': ('|u1', 1),
}


def restore_params(directory: PathLike, sharding: Any = None) -> Any:
  """Reads the parameters straight onto devices.

  Args:
    directory: a converted checkpoint.
    sharding: a jax.sharding.Sharding for all, or a tree of them shaped as the
      parameters; None for the first device.

  Returns:
    The parameters, as `models.param_specs` describes them, jax.Arrays.

  Raises:
    CheckpointError: for `load_metadata`'s reasons, or an array is missing,
      truncated or of another shape; names it.
  """
  metadata = metadata_lib.load_metadata(directory)
  import jax  # Here, so that metadata can be read without JAX.
  import orbax.checkpoint as ocp

  from sarathi_jax.models import tree

  specs = models.param_specs(metadata.model)
  folder = pathlib.Path(os.path.abspath(directory)) / PARAMS
  _check_arrays(folder, specs, metadata.dtype)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  if isinstance(sharding, jax.sharding.Sharding):
    one = sharding
    sharding = jax.tree.map(lambda _: one, specs)
  dicts = tree.as_dicts(specs)
  args = jax.tree.map(
    lambda leaf, where: ocp.ArrayRestoreArgs(
      restore_type=jax.Array,
      dtype=leaf.dtype or metadata.dtype,
      sharding=where,
      global_shape=leaf.shape,
      strict=True,
    ),
    dicts,
    tree.as_dicts(sharding),
  )
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    try:
      restored = checkpointer.restore(
        folder, args=ocp.args.PyTreeRestore(item=dicts, restore_args=args)
      )
    except Exception as e:  # What orbax raises has no common type.
      raise errors.CheckpointError(f'{folder}: can not be read: {e}') from e
  return tree.with_leaves(specs, tree.named_leaves(restored))


def _check_arrays(folder: pathlib.Path, specs: Any, dtype: str) -> None:
  """Finds missing and truncated files, by their names and sizes alone.

  Leaves OCDBT checkpoints, which our converter does not write, to orbax.
  """
  if not folder.is_dir():
    raise errors.CheckpointError(f'{folder}: no such folder.')
  if (folder / 'manifest.ocdbt').exists():
    return
  from sarathi_jax.models import tree  # Here, as it loads JAX.

  for name, leaf in tree.named_leaves(specs).items():
    _check_array(folder / name, name, leaf.shape, leaf.dtype or dtype)


def _check_array(
  folder: pathlib.Path, name: str, shape: tuple[int, ...], dtype: str
) -> None:
  if not folder.is_dir():
    raise errors.CheckpointError(f'{folder.parent}: lacks {name}.')
  stored = params_reader.Stored.of(folder)
  if stored.shape != shape:
    raise errors.CheckpointError(
      f'{folder.parent}: {name} has shape {stored.shape}; the model wants '
      f'{shape}.'
    )
  wanted, number_bytes = _DTYPES[dtype]
  if stored.dtype != wanted:
    raise errors.CheckpointError(
      f'{folder.parent}: {name} is stored as {stored.dtype}, and not as '
      f'{dtype}.'
    )
  if not stored.is_plain:
    return
  num_bytes = math.prod(stored.chunks) * number_bytes
  grid = [
    range(-(-size // chunk))
    for size, chunk in zip(shape, stored.chunks, strict=True)
  ]
  for index in itertools.product(*grid):
    path = folder / '.'.join(map(str, index))
    size = path.stat().st_size if path.exists() else None
    if size != num_bytes:
      problem = 'missing' if size is None else f'{size} bytes'
      raise errors.CheckpointError(
        f'{path}: {problem}, so {name} is truncated; it must be {num_bytes} '
        'bytes.'
      )


class Checkpoint(NamedTuple):
  """An open checkpoint, to load a model from.

  Attributes:
    metadata: what sarathi.json says, or would say.
    read: reads parts of the parameters.
    folder: holds the files of the tokenizer.
  """

  metadata: metadata_lib.CheckpointMetadata
  read: params_reader.Read
  folder: pathlib.Path


def open_converted(directory: PathLike) -> Checkpoint:
  """Opens a converted checkpoint, without reading any parameters yet.

  Raises:
    CheckpointError: as `restore_params`.
  """
  metadata = metadata_lib.load_metadata(directory)
  params = pathlib.Path(os.path.abspath(directory)) / PARAMS
  _check_arrays(params, models.param_specs(metadata.model), metadata.dtype)
  return Checkpoint(
    metadata, params_reader.open_params(params), pathlib.Path(directory)
  )
