# SPDX-License-Identifier: Apache-2.0
"""What the configs of all families have; see `config`. No JAX."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax.models import fields as fields_lib
from sarathi_jax.models import kinds
from sarathi_jax.models import quantization as quantization_lib
from sarathi_jax.models import rope_config

_check, _check_types = config_lib.check, config_lib.check_fields
SIZE_OR_NONE = config_lib.or_none(
  fields_lib.SIZE, f'{fields_lib.SIZE[1]}, or null for none'
)
FACTOR_OR_NONE = config_lib.or_none(
  fields_lib.POSITIVE, f'{fields_lib.POSITIVE[1]}, or null for none'
)

ACTIVATIONS = ('silu', 'gelu', 'gelu_tanh', 'relu', 'quick_gelu')


class Mlp(NamedTuple):
  """The shape of an MLP.

  Attributes:
    size: width inside; of one expert.
    is_gated: whether another matrix gates the output of its first one.
    num_experts: the number of experts; 1 where there is no mixture.
    experts_per_token: how many of them each token goes through.
    are_whole: whether devices that share a layer have whole experts, and not
      columns of each.
    shared_size: width inside one more expert, of all tokens; 0: there is none.
    shared_gate: whether a matrix of one column gates what it gives.
  """

  size: int
  is_gated: bool = True
  num_experts: int = 1
  experts_per_token: int = 1
  are_whole: bool = False
  shared_size: int = 0
  shared_gate: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
  """The fields that all families have; to be subclassed, not made.

  Attributes:
    family: the name in `config.CONFIGS`.
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
    embed_scale: multiplies embeddings, rounded to the dtype of these (Gemma).
    attention_scale: multiplies q . k; None: 1 / sqrt(head_dim).
    attention_soft_cap: see `kinds.AttentionOptions`.
    attention_sinks: whether each query head has a score of its own, of no key,
      which weighs among the others (gpt-oss).
    query_growth: multiplies a query at p by
      1 + this * ln(1 + floor(p / rope.original_max_position)) (Ministral-3);
      None: by 1.
    logit_scale: multiplies logits.
    logit_soft_cap: caps them then, as attention_soft_cap does scores.
    overflows_float16: whether what layers give may be too large for float16.
    quantization: of its matrices; None: they are in the model's dtype.
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
  rope: rope_config.RopeConfig = rope_config.DEFAULT
  sliding_window: int | None = None
  tie_word_embeddings: bool = False
  embed_scale: float = 1.0
  attention_scale: float | None = None
  attention_soft_cap: float | None = None
  attention_sinks: bool = False
  query_growth: float | None = None
  logit_scale: float = 1.0
  logit_soft_cap: float | None = None
  overflows_float16: bool = False
  quantization: quantization_lib.Quantization | None = None

  def __post_init__(self) -> None:
    _check_types(
      self,
      {
        'vocab_size': fields_lib.SIZE,
        'hidden_size': fields_lib.SIZE,
        'intermediate_size': fields_lib.SIZE,
        'num_layers': fields_lib.COUNT,
        'num_heads': fields_lib.SIZE,
        'num_kv_heads': fields_lib.SIZE,
        'head_dim': fields_lib.SIZE,
        'max_position_embeddings': fields_lib.SIZE,
        'norm_eps': fields_lib.POSITIVE,
        'sliding_window': SIZE_OR_NONE,
        'tie_word_embeddings': config_lib.FLAG,
        'embed_scale': fields_lib.POSITIVE,
        'logit_scale': fields_lib.POSITIVE,
        'attention_scale': FACTOR_OR_NONE,
        'attention_soft_cap': FACTOR_OR_NONE,
        'attention_sinks': config_lib.FLAG,
        'query_growth': FACTOR_OR_NONE,
        'logit_soft_cap': FACTOR_OR_NONE,
        'overflows_float16': config_lib.FLAG,
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
      isinstance(self.quantization, quantization_lib.Quantization | None),
      'quantization',
      self.quantization,
      'must be a Quantization or None',
    )
    self.check_rope('rope', self.rope)
    _check(
      self.query_growth is None or self.rope.original_max_position is not None,
      'query_growth',
      self.query_growth,
      'needs rope.original_max_position',
    )
    _check(
      self._scaled_len <= fields_lib.MOST,
      'rope.factor',
      self.rope.factor,
      f'makes a context of more than {fields_lib.MOST} tokens',
    )

  def check_rope(self, name: str, rope: Any) -> None:
    _check(
      isinstance(rope, rope_config.RopeConfig),
      name,
      rope,
      'must be a RopeConfig',
    )
    rotary_dim = rope.rotary_dim or self.head_dim
    _check(
      rotary_dim <= self.head_dim and rotary_dim % 2 == 0,
      f'{name}.rotary_dim',
      rotary_dim,
      f'must be even and at most head_dim={self.head_dim}',
    )
    _check(
      rope.kind != 'dynamic' or rotary_dim > 2,
      f'{name}.rotary_dim',
      rotary_dim,
      "must be > 2 with kind='dynamic'",
    )
    for which in ('short_factors', 'long_factors'):
      factors = getattr(rope, which)
      _check(
        factors is None or len(factors) == rotary_dim // 2,
        f'{name}.{which}',
        factors,
        f'must be {rotary_dim // 2} numbers, one a frequency',
      )

  @property
  def context_len(self) -> int:
    """The most tokens of a sequence, with scaled rotary embeddings."""
    return max(self.max_position_embeddings, int(self._scaled_len))

  @property
  def _scaled_len(self) -> float:
    rope = self.rope
    if rope.kind not in ('dynamic', 'yarn'):
      return self.max_position_embeddings
    return (rope.original_max_position or 1) * (rope.factor or 1)

  def layer_mlp(self, layer: int) -> Mlp:
    """Returns the shape of the MLP of a layer in [0, L)."""
    del layer
    return Mlp(self.intermediate_size)

  @property
  def num_dense(self) -> int:
    """The number of first layers without what makes the others alike.

    0 where others are without it, too.
    """
    return 0

  @property
  def mlp_widths(self) -> tuple[tuple[str, int], ...]:
    """Widths that devices which share a layer have columns of, by field."""
    return (('intermediate_size', self.intermediate_size),)

  def divided(self, config: config_lib.EngineConfig) -> Self:
    """Returns the model as it is computed in a deployment.

    Raises:
      ConfigError: it has nothing that could be shared so, or that rounds so
        what it multiplies.
    """
    _check(
      not config.expert_parallel,
      'expert_parallel',
      config.expert_parallel,
      'this model is dense: it has no experts',
    )
    return self.rounding(config.quantized_activations)

  def rounding(self, activations: str | None) -> Self:
    """Returns the model that rounds what matrices multiply.

    Args:
      activations: see `Quantization`; None: as the model is.

    Raises:
      ConfigError: its matrices are not of codes that multiply such rows.
    """
    if activations is None:
      return self
    how = self.quantization
    if how is None or not how.multiplies(activations):
      found = 'not quantized'
      if how is not None:
        group = f', each {how.group} inputs' if how.group else ''
        found = f'{how.codes} with a scale for each output{group}'
      raise errors.ConfigError(
        f'quantized_activations={activations!r}: needs weights of '
        f'{activations} with one scale for each output or tensor; the '
        f"model's are {found}."
      )
    how = dataclasses.replace(how, activations=activations)
    return dataclasses.replace(self, quantization=how)

  @property
  def sums_per_layer(self) -> int:
    """The number of sums over devices that a layer takes, if they share it."""
    return 2

  @property
  def norms_per_layer(self) -> int:
    """The number of norms over D that a layer has."""
    return 2

  @property
  def statistics_per_layer(self) -> int:
    """Numbers a token that devices which share a layer sum beside, at once."""
    return 0

  def layer_kind(self, layer: int) -> kinds.LayerKind:
    """Returns what a layer in [0, L) has in common with others of its kind."""
    del layer
    return kinds.LayerKind(
      kinds.AttentionOptions(
        scale=self.attention_scale or self.head_dim**-0.5,
        window=self.sliding_window,
        soft_cap=self.attention_soft_cap,
      ),
      self.rope,
    )

  def check_dtype(self, name: str) -> None:
    """Raises ConfigError if the model can't be computed in a dtype."""
    _check(
      name != 'float16' or not self.overflows_float16,
      'dtype',
      name,
      'what layers of this model give is too large for it; take bfloat16 or '
      'float32',
    )

  def layer_window(self, layer: int) -> int | None:
    """Returns the sliding window of a layer in [0, L), or None."""
    return self.layer_kind(layer).attention.window

  def to_dict(self) -> dict[str, Any]:
    """Returns all fields, as JSON can hold them; `family` names the class."""
    return {'family': self.family, **dataclasses.asdict(self)}
