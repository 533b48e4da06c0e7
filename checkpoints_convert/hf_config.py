# SPDX-License-Identifier: Apache-2.0
"""Reads config.json as a closed world.

Every attribute is taken by a family, or known to change nothing (`harmless`);
anything else is refused by name, so that no new variant of a model is ever
converted to something else. Defaults are those of transformers' config
classes, which leave out what equals them. null is as good as absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import pathlib
from typing import Any, NamedTuple

from checkpoints_convert import attributes as attributes_lib
from checkpoints_convert import families
from checkpoints_convert import hf_rope
from checkpoints_convert import nested
from checkpoints_convert import quantization_config
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
_MOST_EXTRA = 100  # layers behind the last one


class Config(NamedTuple):
  """What config.json says.

  Attributes:
    model: the model.
    rules: of its family.
    raw: the decoded file; of a model that takes images, too, as if the text
      part were alone.
    is_nested: whether it is of such a model; see `nested`.
    num_extra: how many layers are behind the model's last one; see
      `families.Family`.
    scheme: how weights are quantized; None: they are not.
  """

  model: config_lib.ModelConfig
  rules: Sequence[Any]
  raw: dict[str, Any]
  is_nested: bool
  num_extra: int
  scheme: quantization_config.Scheme | quantization_config.Packing | None


def read(folder: pathlib.Path) -> Config:
  """Reads the config of a Hugging Face checkpoint.

  Args:
    folder: holds config.json.

  Raises:
    CheckpointError: no or damaged config.json, an architecture that is not
      supported, or an attribute that is not, each by name.
  """
  path = folder / 'config.json'
  raw = json_file.read(path)
  raw = quantization_config.with_own_file(raw, folder)
  architecture = _architecture(raw, path)
  family = families.find(architecture)
  _, _, is_nested, extra_layers = families.ARCHITECTURES[architecture]
  if is_nested:
    raw = nested.flatten(raw, str(path))
  attributes = Attributes(raw, str(path))
  num_extra = _num_extra(attributes, extra_layers)
  try:
    model = family.read_config(attributes)
    scheme = quantization_config.read(attributes)
  except errors.CheckpointError:
    raise
  except errors.ConfigError as e:
    raise attributes.error(str(e).rstrip('.')) from e
  except (ArithmeticError, AttributeError, TypeError, ValueError) as e:
    raise attributes.error(
      f'an attribute is of the wrong type, or out of range: {e}'
    ) from e
  attributes.finish()
  return Config(model, family.rules(model), raw, is_nested, num_extra, scheme)


def _num_extra(attributes: Attributes, names: Sequence[str]) -> int:
  """Takes how many layers are behind the last, by whichever name."""
  known: int | None = None
  for name in names:
    if (value := attributes.take(name)) is None:
      continue
    if type(value) is not int or not 0 <= value <= _MOST_EXTRA:
      raise attributes.refuse(
        name, value, f'must be an integer in [0, {_MOST_EXTRA}]'
      )
    if known not in (None, value):
      raise attributes.refuse(name, value, f'must be {known}, as {names[0]}')
    known = value
  return known or 0


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
  activation_name: str = 'hidden_act',
  rope_options: Mapping[str, Any] | None = None,
  **defaults: Any,
) -> dict[str, Any]:
  """Takes the attributes that Llama-like families share; returns the fields.

  Args:
    attributes: to take from.
    kv_heads: the default of num_key_value_heads; None for num_attention_heads.
    theta: the default of rope_theta; or, where layers differ by their type,
      what `hf_rope.read_by_type` takes.
    eps: the default of rms_norm_eps.
    positions: the default of max_position_embeddings.
    activation_name: of the attribute with the activation function.
    rope_options: further arguments of `hf_rope.read`.
    **defaults: of the other attributes. Without one, head_dim is hidden_size
      divided by the heads, the activation is silu, nothing is tied, and other
      attributes must be there.
  """
  positions = attributes.size('max_position_embeddings', positions)
  num_heads = attributes.size(
    'num_attention_heads', defaults.get('num_attention_heads')
  )
  hidden_size = attributes.size('hidden_size', defaults.get('hidden_size'))
  vocab_size, intermediate_size = (
    attributes.require(name, defaults.get(name))
    for name in ('vocab_size', 'intermediate_size')
  )
  head_dim = attributes.take(
    'head_dim', defaults.get('head_dim', hidden_size // num_heads)
  )
  return dict(
    vocab_size=vocab_size,
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_layers=attributes.size(
      'num_hidden_layers',
      defaults.get('num_hidden_layers'),
      fields_lib.MOST_LAYERS,
    ),
    num_heads=num_heads,
    num_kv_heads=attributes.take('num_key_value_heads', kv_heads or num_heads),
    head_dim=head_dim,
    norm_eps=attributes.take('rms_norm_eps', eps),
    activation=activation(
      attributes, activation_name, defaults.get(activation_name, 'silu')
    ),
    tie_word_embeddings=attributes.flag(
      'tie_word_embeddings', defaults.get('tie_word_embeddings', False)
    ),
    **(
      hf_rope.read_by_type(attributes, theta, positions)
      if isinstance(theta, Mapping)
      else hf_rope.read(
        attributes, theta, positions, head_dim=head_dim, **(rope_options or {})
      )
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


def with_windows(
  attributes: Attributes,
  fields: Mapping[str, Any],
  window: Any,
  has_window: Callable[[int], bool],
) -> dict[str, Any]:
  """Returns the config's fields, with those for the sliding window, if any.

  Args:
    attributes: to take `layer_types` from.
    fields: of `common`.
    window: the sliding window, or None.
    has_window: says whether a layer has it, if the file lists no types.
  """
  num_layers = fields['num_layers']
  types = attributes.take(
    'layer_types',
    [
      hf_rope.SLIDING if has_window(i) else hf_rope.FULL
      for i in range(num_layers)
    ],
  )
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
    return {k: v for k, v in fields.items() if k != 'window_rope'}
  if len(layers) == num_layers:
    return dict(fields, sliding_window=window)
  return dict(fields, sliding_window=window, window_layers=layers)
