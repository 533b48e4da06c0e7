# SPDX-License-Identifier: Apache-2.0
"""A converted checkpoint: its metadata and its parameters.

A folder with

  sarathi.json   the `CheckpointMetadata`; written last
  params/        the parameters, an orbax checkpoint
  tokenizer.json, tokenizer_config.json ...   where the model has a tokenizer

`load_metadata` needs no JAX; `restore_params` puts the arrays on devices.
"""

from sarathi_jax.checkpoint.metadata import GENERATION_FIELDS
from sarathi_jax.checkpoint.metadata import METADATA
from sarathi_jax.checkpoint.metadata import CheckpointMetadata
from sarathi_jax.checkpoint.metadata import PathLike
from sarathi_jax.checkpoint.metadata import default_sampling
from sarathi_jax.checkpoint.metadata import load_metadata
from sarathi_jax.checkpoint.metadata import write_metadata
from sarathi_jax.checkpoint.params import PARAMS
from sarathi_jax.checkpoint.params import Checkpoint
from sarathi_jax.checkpoint.params import open_converted
from sarathi_jax.checkpoint.params import restore_params

__all__ = [
  'GENERATION_FIELDS',
  'METADATA',
  'PARAMS',
  'Checkpoint',
  'CheckpointMetadata',
  'PathLike',
  'default_sampling',
  'load_metadata',
  'open_converted',
  'restore_params',
  'write_metadata',
]
