# SPDX-License-Identifier: Apache-2.0
"""What sarathi.json says of a converted checkpoint. Loads no JAX."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import json_file
from sarathi_jax import sampling_params
from sarathi_jax.models import config as model_config_lib

FORMAT_VERSION = 1
METADATA = 'sarathi.json'

DTYPES = 'bfloat16', 'float16', 'float32'

# The names kept of generation_config.json: fields of SamplingParams, and
# do_sample, which may say that they are for nothing.
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
    dtype: of the parameters that are not quantized: one of `DTYPES`.
    eos_token_ids: the tokens that end an output.
    bos_token_id: the token that a text starts with, if the model has one.
    pad_token_id: the token for padding, if the model has one.
    generation: the sampling that its makers recommend: `GENERATION_FIELDS`.
    source: where it came from.
  """

  model: model_config_lib.ModelConfig
  dtype: str
  eos_token_ids: tuple[int, ...] = ()
  bos_token_id: int | None = None
  pad_token_id: int | None = None
  generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def default_sampling(self) -> dict[str, Any]:
    """Returns what the makers recommend, as fields of SamplingParams.

    They are for requests that don't set their own. Returns penalties alone if
    the makers say that they don't sample, as transformers does. If they don't
    say, what they recommend counts, as in vLLM.
    """
    return default_sampling(self.generation)

  def __post_init__(self) -> None:
    holds, rule = config_lib.one_of(DTYPES)
    _check(holds(self.dtype), 'dtype', self.dtype, rule)
    object.__setattr__(self, 'eos_token_ids', tuple(self.eos_token_ids))
    size = self.model.vocab_size
    _check(
      all(
        config_lib.is_int(token) and 0 <= token < size
        for token in self.eos_token_ids
      ),
      'eos_token_ids',
      self.eos_token_ids,
      f"must be token ids of the model's vocabulary, in [0, {size})",
    )
    for name in ('bos_token_id', 'pad_token_id'):
      value = getattr(self, name)
      _check(
        value is None or config_lib.is_int(value),
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
  is_sampled = generation.get('do_sample') is not False
  return {
    name: value
    for name, value in generation.items()
    if name != 'do_sample'
    and (is_sampled or sampling_params.FIELDS[name].adjusts)
  }


def _check(ok: bool, field: str, value: object, rule: str) -> None:
  if not ok:
    raise errors.CheckpointError(f'{field}={value!r}: {rule}.')


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
  if not path.is_file():
    raise errors.CheckpointError(
      f'{directory}: not a converted checkpoint: it holds no {METADATA}. '
      'Convert it with python -m checkpoints_convert.'
    )
  fields = json_file.read(path)
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
  model = model_config_lib.from_dict(fields.pop('model'))
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
    'format_version': FORMAT_VERSION,
    **dataclasses.asdict(metadata),
    'model': metadata.model.to_dict(),
  }
  path = pathlib.Path(directory, METADATA)
  path.write_text(json.dumps(fields, indent=2) + '\n')
