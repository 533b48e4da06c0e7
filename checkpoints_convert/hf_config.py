# SPDX-License-Identifier: Apache-2.0
"""Reads config.json as a closed world.

Every attribute is taken by a family, or known to change nothing (`harmless`);
anything else is refused by name, so that no new variant of a model is ever
converted to something else. Defaults are those of transformers' config
classes, which leave out what equals them. null is as good as absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from checkpoints_convert import attributes as attributes_lib
from checkpoints_convert import families
from checkpoints_convert import hf_rope
from sarathi_jax import errors
from sarathi_jax import json_file
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import fields as fields_lib

Attributes = attributes_lib.Attributes

ACTIVATIONS: Mapping[str, str] = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'relu': 'relu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}


def read(
  folder: pathlib.Path,
) -> tuple[config_lib.ModelConfig, Sequence[Any], dict[str, Any]]:
  """Reads the config of a Hugging Face checkpoint.

  Args:
    folder: holds config.json.

  Returns:
    The model, its family's rules, and the decoded config.json.

  Raises:
    CheckpointError: no or damaged config.json, an architecture that is not
      supported, or an attribute that is not, each by name.
  """
  path = folder / 'config.json'
  raw = json_file.read(path)
  family = families.find(_architecture(raw, path))
  attributes = Attributes(raw, str(path))
  try:
    model = family.read_config(attributes)
  except errors.CheckpointError:
    raise
  except errors.ConfigError as e:
    raise attributes.error(str(e).rstrip('.')) from e
  except (ArithmeticError, AttributeError, TypeError, ValueError) as e:
    raise attributes.error(
      f'an attribute is of the wrong type, or out of range: {e}'
    ) from e
  attributes.finish()
  return model, family.rules(model), raw


def _architecture(raw: Mapping[str, Any], path: pathlib.Path) -> str:
  """Returns the named architecture, or that of the model type.

  Does as transformers does.
  """
  names = raw.get('architectures')
  if not names:
    kind = raw.get('model_type')
    names = [families.architecture_of(kind) or kind]
  if not isinstance(names, list) or len(names) != 1 or not names[0]:
    raise errors.CheckpointError(
      f'{path}: architectures={names!r}: must name one architecture, or '
      'model_type must.'
    )
  return str(names[0])


def common(
  attributes: Attributes,
  *,
  kv_heads: int | None,
  theta: float | Mapping[str, float],
  eps: float,
  positions: int,
) -> dict[str, Any]:
  """Takes the attributes that Llama-like families share; returns the fields.

  Args:
    attributes: to take from.
    kv_heads: the default of num_key_value_heads; None for num_attention_heads.
    theta: the default of rope_theta; or, where layers differ by their type,
      what `hf_rope.read_by_type` takes.
    eps: the default of rms_norm_eps.
    positions: the default of max_position_embeddings.
  """
  num_heads = attributes.size('num_attention_heads')
  hidden_size = attributes.size('hidden_size')
  positions = attributes.size('max_position_embeddings', positions)
  return dict(
    vocab_size=attributes.require('vocab_size'),
    hidden_size=hidden_size,
    intermediate_size=attributes.require('intermediate_size'),
    num_layers=attributes.size(
      'num_hidden_layers', most=fields_lib.MOST_LAYERS
    ),
    num_heads=num_heads,
    num_kv_heads=attributes.take('num_key_value_heads', kv_heads or num_heads),
    head_dim=attributes.take('head_dim', hidden_size // num_heads),
    norm_eps=attributes.take('rms_norm_eps', eps),
    activation=activation(attributes, 'hidden_act', 'silu'),
    tie_word_embeddings=attributes.flag('tie_word_embeddings', False),
    **(
      hf_rope.read_by_type(attributes, theta, positions)
      if isinstance(theta, Mapping)
      else hf_rope.read(attributes, theta, positions)
    ),
  )


def activation(attributes: Attributes, name: str, default: str) -> str:
  """Takes an activation function; returns our name of it."""
  value = attributes.take(name, default)
  if value not in ACTIVATIONS:
    raise attributes.refuse(
      name, value, f'must be one of {", ".join(ACTIVATIONS)}'
    )
  return ACTIVATIONS[value]


def windows(
  attributes: Attributes,
  num_layers: int,
  window: Any,
  types: Sequence[str],
) -> dict[str, Any]:
  """Returns the config's fields for the sliding window; none without one.

  Args:
    attributes: to take `layer_types` from.
    num_layers: L.
    window: the sliding window, or None.
    types: of each layer, if the file lists none: `hf_rope.FULL` or `SLIDING`.
  """
  types = attributes.take('layer_types', types)
  known = {hf_rope.FULL, hf_rope.SLIDING}
  if len(types) != num_layers or not known.issuperset(types):
    raise attributes.refuse(
      'layer_types',
      types,
      f'must be one of {sorted(known)} for each of the {num_layers} layers',
    )
  layers = tuple(i for i, kind in enumerate(types) if kind == hf_rope.SLIDING)
  if layers and window is None:
    raise attributes.refuse(
      'layer_types', types, 'has sliding_attention, but there is no window'
    )
  if not layers:
    return {}
  if len(layers) == num_layers:
    return dict(sliding_window=window)
  return dict(sliding_window=window, window_layers=layers)
