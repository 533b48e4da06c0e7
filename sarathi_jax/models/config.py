# SPDX-License-Identifier: Apache-2.0
"""A model's configuration, without its weights. Standard library only: no JAX.

Every family has its own class, with the base's fields and its own; `CONFIGS`
names them. They are plain data: `to_dict` and `from_dict` go through JSON. An
unknown field is refused, so that nothing about a model is ever ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax.models import kinds

# What is calculated with must fit: positions and sizes into int32, and into
# memory what is made for each layer, or expert, before any weights are read.
MOST = 2**31 - 1
MOST_LAYERS = 10_000

ACTIVATIONS = ('silu', 'gelu', 'gelu_tanh', 'relu')

# Kind of rotary embedding -> the fields that it takes beside theta.
ROPE_FIELDS: Mapping[str, tuple[str, ...]] = {
  'default': (),
  'linear': ('factor',),
  'dynamic': ('factor', 'original_max_position'),
  'llama3': (
    'factor',
    'original_max_position',
    'low_freq_factor',
    'high_freq_factor',
  ),
  'yarn': (
    'factor',
    'original_max_position',
    'attention_factor',
    'beta_fast',
    'beta_slow',
    'truncate',
  ),
}


_check, _check_types = config_lib.check, config_lib.check_fields
_FLAG = config_lib.FLAG


def _up_to(most: int) -> config_lib.Rule:
  return (
    lambda value: config_lib.is_int(value) and 1 <= value <= most,
    f'must be an integer in [1, {most}]',
  )


_SIZE = _up_to(MOST)
_COUNT = _up_to(MOST_LAYERS)
_POSITIVE = (
  lambda value: config_lib.is_real(value) and 2.0**-126 <= value < 2.0**128,
  'must be a number > 0 that float32 can hold',
)
_WINDOW = config_lib.or_none(_SIZE, f'{_SIZE[1]}, or null for none')
_is_int, _is_size, _is_positive = config_lib.is_int, _SIZE[0], _POSITIVE[0]


def _from_dict(cls: Any, fields: Mapping[str, Any], what: str) -> Any:
  """Calls `cls`, after refusing unknown and missing fields by name."""
  if not isinstance(fields, Mapping):
    raise errors.ConfigError(f'{what}={fields!r}: must be an object.')
  known = {f.name: f for f in dataclasses.fields(cls)}
  for name in fields:
    if name not in known:
      raise errors.ConfigError(
        f'{what}.{name}: unknown field; known: {", ".join(sorted(known))}.'
      )
  for name, field in known.items():
    required = (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    )
    if required and name not in fields:
      raise errors.ConfigError(f'{what}.{name}: missing.')
  return cls(**fields)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
  """Rotary position embedding (https://arxiv.org/abs/2104.09864) and scalings.

  The fields that a kind does not take (see `ROPE_FIELDS`) are None.

  Attributes:
    theta: the base of the wavelengths.
    kind: one of `ROPE_FIELDS`.
    rotary_dim: how many leading numbers of a head are rotated; None for all.
    factor: how much longer the context became, > 0.
    original_max_position: tokens of context before the scaling.
    low_freq_factor: wavelengths above original / this are divided by factor.
    high_freq_factor: wavelengths below original / this are left alone.
    attention_factor: multiplies cos and sin (YaRN's temperature).
    beta_fast: rotations within the original context above which a frequency
      is left alone.
    beta_slow: rotations below which it is divided by factor.
    truncate: whether YaRN rounds its range of frequencies to whole ones.
  """

  theta: float = 10000.0
  kind: str = 'default'
  rotary_dim: int | None = None
  factor: float | None = None
  original_max_position: int | None = None
  low_freq_factor: float | None = None
  high_freq_factor: float | None = None
  attention_factor: float | None = None
  beta_fast: float | None = None
  beta_slow: float | None = None
  truncate: bool | None = None

  def __post_init__(self) -> None:
    _check(_is_positive(self.theta), 'rope.theta', self.theta, _POSITIVE[1])
    holds, rule = config_lib.one_of(ROPE_FIELDS)
    _check(holds(self.kind), 'rope.kind', self.kind, rule)
    _check(
      self.kind != 'yarn' or self.theta > 1,
      'rope.theta',
      self.theta,
      "must be > 1 with kind='yarn', which divides by its logarithm",
    )
    _check(
      self.rotary_dim is None
      or (_is_size(self.rotary_dim) and self.rotary_dim % 2 == 0),
      'rope.rotary_dim',
      self.rotary_dim,
      'must be even and >= 2, or null',
    )
    takes = ROPE_FIELDS[self.kind]
    special = {'original_max_position': _SIZE, 'truncate': _FLAG}
    for name in sorted(
      {name for names in ROPE_FIELDS.values() for name in names}
    ):
      value = getattr(self, name)
      if name in takes:
        holds, rule = special.get(name, _POSITIVE)
        _check(
          holds(value), f'rope.{name}', value, f'{rule} with kind={self.kind!r}'
        )
      else:
        _check(
          value is None,
          f'rope.{name}',
          value,
          f'has no meaning with kind={self.kind!r}',
        )
    if self.low_freq_factor is not None and self.high_freq_factor is not None:
      _check(
        self.high_freq_factor > self.low_freq_factor,
        'rope.high_freq_factor',
        self.high_freq_factor,
        f'must exceed low_freq_factor={self.low_freq_factor}',
      )

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> RopeConfig:
    """Reads what `dataclasses.asdict` wrote; refuses unknown fields."""
    config: RopeConfig = _from_dict(cls, fields, 'rope')
    return config


class Mlp(NamedTuple):
  """The shape of an MLP.

  Attributes:
    is_gated: whether another matrix gates the output of its first one.
    num_experts: the number of experts; 1 where there is no mixture.
    experts_per_token: how many of them each token goes through.
  """

  is_gated: bool = True
  num_experts: int = 1
  experts_per_token: int = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
  """The fields that all families have; to be subclassed, not made.

  Attributes:
    family: the name in `CONFIGS`.
    vocab_size: V, rows of the embedding.
    hidden_size: D, width of the residual stream.
    intermediate_size: F, width inside the MLP (of one expert).
    num_layers: L.
    num_heads: H, query heads.
    num_kv_heads: K, a divisor of H.
    head_dim: h, numbers a head.
    max_position_embeddings: tokens of context, prompt and output together.
    norm_eps: added to the variance.
    activation: one of `ACTIVATIONS`.
    rope: the rotary position embedding.
    sliding_window: a token at p attends to (p - sliding_window, p]; None: to
      [0, p]. See `layer_window`.
    tie_word_embeddings: whether the embedding is the output matrix, too.
  """

  family: ClassVar[str] = ''

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_position_embeddings: int
  norm_eps: float = 1e-5
  activation: str = 'silu'
  rope: RopeConfig = RopeConfig()
  sliding_window: int | None = None
  tie_word_embeddings: bool = False

  def __post_init__(self) -> None:
    _check_types(
      self,
      {
        'vocab_size': _SIZE,
        'hidden_size': _SIZE,
        'intermediate_size': _SIZE,
        'num_layers': _COUNT,
        'num_heads': _SIZE,
        'num_kv_heads': _SIZE,
        'head_dim': _SIZE,
        'max_position_embeddings': _SIZE,
        'norm_eps': _POSITIVE,
        'sliding_window': _WINDOW,
        'tie_word_embeddings': _FLAG,
      },
    )
    _check(
      self.num_heads % self.num_kv_heads == 0,
      'num_kv_heads',
      self.num_kv_heads,
      f'must divide num_heads={self.num_heads}',
    )
    _check(
      self.activation in ACTIVATIONS,
      'activation',
      self.activation,
      f'must be one of {", ".join(ACTIVATIONS)}',
    )
    _check(
      isinstance(self.rope, RopeConfig),
      'rope',
      self.rope,
      'must be a RopeConfig',
    )
    rotary_dim = self.rope.rotary_dim or self.head_dim
    _check(
      rotary_dim <= self.head_dim and rotary_dim % 2 == 0,
      'rope.rotary_dim',
      rotary_dim,
      f'must be even and at most head_dim={self.head_dim}',
    )
    _check(
      self.rope.kind != 'dynamic' or rotary_dim > 2,
      'rope.rotary_dim',
      rotary_dim,
      "must be > 2 with kind='dynamic'",
    )
    _check(
      self._scaled_len <= MOST,
      'rope.factor',
      self.rope.factor,
      f'makes a context of more than {MOST} tokens',
    )

  @property
  def context_len(self) -> int:
    """The most tokens of a sequence, with scaled rotary embeddings."""
    return max(self.max_position_embeddings, int(self._scaled_len))

  @property
  def _scaled_len(self) -> float:
    rope = self.rope
    if rope.kind not in ('linear', 'dynamic', 'yarn'):
      return self.max_position_embeddings
    original = rope.original_max_position or self.max_position_embeddings
    return original * (rope.factor or 1)

  @property
  def mlp(self) -> Mlp:
    """The shape of the model's MLPs."""
    return Mlp()

  @property
  def sums_per_layer(self) -> int:
    """The number of sums over devices that a layer takes, if they share it."""
    return 2

  def layer_kind(self, layer: int) -> kinds.LayerKind:
    """Returns what a layer in [0, L) has in common with others of its kind."""
    del layer
    return kinds.LayerKind(
      kinds.AttentionOptions(
        scale=self.head_dim**-0.5, window=self.sliding_window
      ),
      self.rope,
    )

  def layer_window(self, layer: int) -> int | None:
    """Returns the sliding window of a layer in [0, L), or None."""
    return self.layer_kind(layer).attention.window

  def to_dict(self) -> dict[str, Any]:
    """Returns all fields, as JSON can hold them; `family` names the class."""
    return {'family': self.family, **dataclasses.asdict(self)}

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> Self:
    """Reads what `to_dict` wrote.

    Raises:
      ConfigError: a family or field is unknown, a field is missing, a value is
        bad, or the family is not a subclass of the class this is called on.
    """
    if not isinstance(fields, Mapping):
      raise errors.ConfigError(f'model={fields!r}: must be an object.')
    fields = dict(fields)
    family = fields.pop('family', None)
    _check(
      isinstance(family, str)
      and family in CONFIGS
      and issubclass(CONFIGS[family], cls),
      'family',
      family,
      f'must be one of {", ".join(CONFIGS)}',
    )
    if 'rope' in fields:
      fields['rope'] = RopeConfig.from_dict(fields['rope'])
    config: Self = _from_dict(CONFIGS[family], fields, 'model')
    return config


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(ModelConfig):
  """Llama, Mistral, Yi, Qwen2 and Qwen3: one block, a few switches.

  Attributes:
    qkv_bias: whether q, k and v add a bias (Qwen2).
    o_bias: whether o adds a bias.
    mlp_bias: whether gate, up and down add a bias.
    qk_norm: whether heads of q and k are RMS-normalized (Qwen3).
    window_layers: the layers that `sliding_window` holds for, ascending
      (Qwen); None for all.
  """

  family: ClassVar[str] = 'llama'

  qkv_bias: bool = False
  o_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  window_layers: tuple[int, ...] | None = None

  def __post_init__(self) -> None:
    # Without arguments, super() does not survive slots=True.
    super(LlamaConfig, self).__post_init__()
    _check_types(
      self, dict.fromkeys(('qkv_bias', 'o_bias', 'mlp_bias', 'qk_norm'), _FLAG)
    )
    if self.window_layers is not None:
      layers = self.window_layers
      _check(
        isinstance(layers, (list, tuple))
        and all(_is_int(layer) and layer < self.num_layers for layer in layers)
        and min(layers, default=0) >= 0
        and list(layers) == sorted(set(layers)),
        'window_layers',
        layers,
        f'must be layers in [0, {self.num_layers}), ascending',
      )
      object.__setattr__(self, 'window_layers', tuple(layers))

  def layer_kind(self, layer: int) -> kinds.LayerKind:
    kind = super(LlamaConfig, self).layer_kind(layer)
    if self.window_layers is None or layer in self.window_layers:
      return kind
    return dataclasses.replace(
      kind, attention=dataclasses.replace(kind.attention, window=None)
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MixtralConfig(ModelConfig):
  """Mixtral: Mistral with a mixture of experts for an MLP.

  Attributes:
    num_experts: E.
    experts_per_token: how many experts each token goes through.
  """

  family: ClassVar[str] = 'mixtral'

  num_experts: int
  experts_per_token: int

  def __post_init__(self) -> None:
    super(MixtralConfig, self).__post_init__()
    _check_types(self, {'num_experts': _COUNT, 'experts_per_token': _COUNT})
    _check(
      self.experts_per_token <= self.num_experts,
      'experts_per_token',
      self.experts_per_token,
      f'exceeds num_experts={self.num_experts}',
    )

  @property
  def mlp(self) -> Mlp:
    return Mlp(
      num_experts=self.num_experts, experts_per_token=self.experts_per_token
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FalconConfig(ModelConfig):
  """Falcon: LayerNorm, an MLP without a gate, attention beside the MLP.

  Attributes:
    parallel: whether attention and MLP both read the block's input (all the
      published models with rotary embeddings), or one after the other.
    num_norms: norms a block has: 1 (7B, 11B) or 2 (40B, 180B, and all
      sequential ones), for attention and MLP.
    bias: whether the projections add biases.
  """

  family: ClassVar[str] = 'falcon'

  parallel: bool = True
  num_norms: int = 1
  bias: bool = False

  def __post_init__(self) -> None:
    super(FalconConfig, self).__post_init__()
    _check_types(self, {'parallel': _FLAG, 'bias': _FLAG})
    _check(
      self.num_norms in (1, 2), 'num_norms', self.num_norms, 'must be 1 or 2'
    )
    _check(
      self.parallel or self.num_norms == 2,
      'num_norms',
      self.num_norms,
      'must be 2 where attention and MLP follow one another',
    )

  @property
  def mlp(self) -> Mlp:
    return Mlp(is_gated=False)

  @property
  def sums_per_layer(self) -> int:
    return 1 if self.parallel else 2


CONFIGS: Mapping[str, type[ModelConfig]] = {
  cls.family: cls for cls in (LlamaConfig, MixtralConfig, FalconConfig)
}
