# SPDX-License-Identifier: Apache-2.0
"""A converted checkpoint: its metadata and its parameters.

A folder with

  sarathi.json   the `CheckpointMetadata`; written last
  params/        the parameters, an orbax checkpoint
  tokenizer.json, tokenizer_config.json ...   where the model has a tokenizer

`load_metadata` needs no JAX; `restore_params` puts the arrays on devices.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import itertools
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax import params_reader
from sarathi_jax import sampling_params
from sarathi_jax.models import config as config_lib

FORMAT_VERSION = 1
METADATA = 'sarathi.json'
PARAMS = 'params'

DTYPE_BYTES: Mapping[str, int] = {'bfloat16': 2, 'float16': 2, 'float32': 4}
_ZARR_DTYPES: Mapping[str, str] = {
  'bfloat16': 'bfloat16',
  'float16': '<f2',
  'float32': '<f4',
}

# The names kept of generation_config.json: fields of SamplingParams, and
# do_sample, without which transformers ignores them.
GENERATION_FIELDS = (
  'do_sample',
  *(
    name
    for name, field in sampling_params.FIELDS.items()
    if field.is_recommended
  ),
)

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMetadata:
  """The content of sarathi.json.

  Attributes:
    model: the model.
    dtype: of the parameters: one of `DTYPE_BYTES`.
    eos_token_ids: the tokens that end an output.
    bos_token_id: the token that a text starts with, if the model has one.
    pad_token_id: the token for padding, if the model has one.
    generation: the sampling that its makers recommend: `GENERATION_FIELDS`.
    source: where it came from.
  """

  model: config_lib.ModelConfig
  dtype: str
  eos_token_ids: tuple[int, ...] = ()
  bos_token_id: int | None = None
  pad_token_id: int | None = None
  generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def default_sampling(self) -> dict[str, Any]:
    """Returns what the makers recommend, as fields of SamplingParams.

    They are for requests that don't set their own. Returns nothing if the
    makers don't sample: transformers then ignores the rest, too.
    """
    return default_sampling(self.generation)

  def __post_init__(self) -> None:
    _check(
      self.dtype in DTYPE_BYTES,
      'dtype',
      self.dtype,
      f'must be one of {", ".join(DTYPE_BYTES)}',
    )
    object.__setattr__(self, 'eos_token_ids', tuple(self.eos_token_ids))
    _check(
      all(_is_id(token) for token in self.eos_token_ids),
      'eos_token_ids',
      self.eos_token_ids,
      'must be token ids',
    )
    for name in ('bos_token_id', 'pad_token_id'):
      value = getattr(self, name)
      _check(
        value is None or _is_id(value),
        name,
        value,
        'must be a token id or null',
      )
    for name in ('generation', 'source'):
      value = getattr(self, name)
      _check(isinstance(value, Mapping), name, value, 'must be an object')
    unknown = sorted(self.generation.keys() - set(GENERATION_FIELDS))
    _check(not unknown, 'generation', unknown, 'unknown')
    try:
      sampling_params.SamplingParams.from_dict(self.default_sampling)
    except errors.InvalidRequestError as e:
      raise errors.CheckpointError(f'generation: {e}') from e


def default_sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `CheckpointMetadata.default_sampling` of a `generation`."""
  return {
    name: value
    for name, value in generation.items()
    if name != 'do_sample' and generation.get('do_sample')
  }


def _check(ok: bool, field: str, value: object, rule: str) -> None:
  if not ok:
    raise errors.CheckpointError(f'{field}={value!r}: {rule}.')


def _is_id(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def load_metadata(directory: PathLike) -> CheckpointMetadata:
  """Reads sarathi.json. Loads no JAX.

  Raises:
    CheckpointError: there is no such folder, sarathi.json is missing or
      damaged, its format version or a field is unknown, or its model is not
      valid.
  """
  directory = pathlib.Path(directory)
  path = directory / METADATA
  if not directory.is_dir():
    raise errors.CheckpointError(f'{directory}: no such folder.')
  try:
    fields = json.loads(path.read_bytes())
  except FileNotFoundError as e:
    raise errors.CheckpointError(
      f'{directory}: not a converted checkpoint: it holds no {METADATA}. '
      'Convert it with python -m checkpoints_convert.'
    ) from e
  except (OSError, ValueError) as e:
    raise errors.CheckpointError(f'{path}: can not be read: {e}.') from e
  if not isinstance(fields, dict):
    raise errors.CheckpointError(f'{path}: is not a JSON object.')
  version = fields.pop('format_version', None)
  if version != FORMAT_VERSION:
    raise errors.CheckpointError(
      f'{path}: format_version={version!r}: must be {FORMAT_VERSION}; convert '
      'the checkpoint again.'
    )
  try:
    return _parse(fields)
  except errors.ConfigError as e:
    raise errors.CheckpointError(f'{path}: {e}') from e


def _parse(fields: dict[str, Any]) -> CheckpointMetadata:
  known = {field.name for field in dataclasses.fields(CheckpointMetadata)}
  _check(
    known >= fields.keys(), 'fields', sorted(fields.keys() - known), 'unknown'
  )
  for name in ('model', 'dtype'):
    _check(name in fields, name, None, 'missing')
  model = config_lib.ModelConfig.from_dict(fields.pop('model'))
  _check(
    isinstance(fields.get('eos_token_ids', []), list),
    'eos_token_ids',
    fields.get('eos_token_ids'),
    'must be a list',
  )
  return CheckpointMetadata(model=model, **fields)


def write_metadata(directory: PathLike, metadata: CheckpointMetadata) -> None:
  """Writes sarathi.json, which makes the folder a checkpoint."""
  fields = {
    field.name: getattr(metadata, field.name)
    for field in dataclasses.fields(metadata)
  }
  fields = {
    'format_version': FORMAT_VERSION,
    **fields,
    'model': metadata.model.to_dict(),
  }
  path = pathlib.Path(directory, METADATA)
  path.write_text(json.dumps(fields, indent=2) + '\n')


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
  metadata = load_metadata(directory)
  import jax  # Here, so that metadata can be read without JAX.
  import orbax.checkpoint as ocp

  specs = models.param_specs(metadata.model)
  folder = pathlib.Path(os.path.abspath(directory)) / PARAMS
  _check_arrays(folder, specs, metadata.dtype)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  if isinstance(sharding, jax.sharding.Sharding):
    one = sharding
    sharding = jax.tree.map(lambda _: one, specs)
  args = jax.tree.map(
    lambda leaf, where: ocp.ArrayRestoreArgs(
      restore_type=jax.Array,
      dtype=metadata.dtype,
      sharding=where,
      global_shape=leaf.shape,
      strict=True,
    ),
    specs,
    sharding,
  )
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    try:
      return checkpointer.restore(
        folder, args=ocp.args.PyTreeRestore(item=specs, restore_args=args)
      )
    except (OSError, ValueError, KeyError) as e:
      raise errors.CheckpointError(f'{folder}: can not be read: {e}') from e


def _check_arrays(folder: pathlib.Path, specs: Any, dtype: str) -> None:
  """Finds missing and truncated files, by their names and sizes alone.

  Leaves OCDBT checkpoints, which our converter does not write, to orbax.
  """
  if not folder.is_dir():
    raise errors.CheckpointError(f'{folder}: no such folder.')
  if (folder / 'manifest.ocdbt').exists():
    return
  import jax

  for path, leaf in jax.tree_util.tree_leaves_with_path(specs):
    name = '.'.join(
      str(getattr(key, 'key', getattr(key, 'idx', None))) for key in path
    )
    _check_array(folder / name, name, leaf.shape, dtype)


def _check_array(
  folder: pathlib.Path, name: str, shape: tuple[int, ...], dtype: str
) -> None:
  try:
    stored = json.loads((folder / '.zarray').read_bytes())
    chunks = tuple(stored['chunks'])
    stored_shape = tuple(stored['shape'])
  except FileNotFoundError as e:
    raise errors.CheckpointError(f'{folder.parent}: lacks {name}.') from e
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise errors.CheckpointError(f'{folder / ".zarray"}: damaged: {e}.') from e
  if stored_shape != shape:
    raise errors.CheckpointError(
      f'{folder.parent}: {name} has shape {stored_shape}; the model wants '
      f'{shape}.'
    )
  if stored.get('dtype') != _ZARR_DTYPES[dtype]:
    raise errors.CheckpointError(
      f'{folder.parent}: {name} is stored as {stored.get("dtype")}, and not '
      f'as {dtype}.'
    )
  if stored.get('compressor') is not None:
    return
  num_bytes = math.prod(chunks) * DTYPE_BYTES[dtype]
  grid = [
    range(-(-size // chunk)) for size, chunk in zip(shape, chunks, strict=True)
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

  metadata: CheckpointMetadata
  read: params_reader.Read
  folder: pathlib.Path


def open_converted(directory: PathLike) -> Checkpoint:
  """Opens a converted checkpoint, without reading any parameters yet.

  Raises:
    CheckpointError: as `restore_params`.
  """
  metadata = load_metadata(directory)
  params = pathlib.Path(os.path.abspath(directory)) / PARAMS
  _check_arrays(params, models.param_specs(metadata.model), metadata.dtype)
  return Checkpoint(
    metadata, params_reader.open_params(params), pathlib.Path(directory)
  )
