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
from sarathi_jax.models import fields as fields_lib
from sarathi_jax.models import kinds
from sarathi_jax.models import rope_config

RopeConfig = rope_config.RopeConfig

_check, _check_types = config_lib.check, config_lib.check_fields
_WINDOW = config_lib.or_none(
  fields_lib.SIZE, f'{fields_lib.SIZE[1]}, or null for none'
)
_FACTOR = config_lib.or_none(
  fields_lib.POSITIVE, f'{fields_lib.POSITIVE[1]}, or null for none'
)

ACTIVATIONS = ('silu', 'gelu', 'gelu_tanh', 'relu', 'quick_gelu')
# Where the norms of attention and of an MLP are -> what their names have.
NORMS: Mapping[str, tuple[str, ...]] = {
  'before': ('',),
  'after': ('_out',),
  'around': ('', '_out'),
}


_UNROTATED = RopeConfig(kind='none')


class Mlp(NamedTuple):
  """The shape of an MLP.

  Attributes:
    is_gated: whether another matrix gates the output of its first one.
    num_experts: the number of experts; 1 where there is no mixture.
    experts_per_token: how many of them each token goes through.
    are_whole: whether devices that share a layer have whole experts, and not
      columns of each.
  """

  is_gated: bool = True
  num_experts: int = 1
  experts_per_token: int = 1
  are_whole: bool = False


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
  rope: RopeConfig = rope_config.DEFAULT
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
        'sliding_window': _WINDOW,
        'tie_word_embeddings': config_lib.FLAG,
        'embed_scale': fields_lib.POSITIVE,
        'logit_scale': fields_lib.POSITIVE,
        'attention_scale': _FACTOR,
        'attention_soft_cap': _FACTOR,
        'attention_sinks': config_lib.FLAG,
        'query_growth': _FACTOR,
        'logit_soft_cap': _FACTOR,
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
    self._check_rope('rope', self.rope)
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

  def _check_rope(self, name: str, rope: Any) -> None:
    _check(isinstance(rope, RopeConfig), name, rope, 'must be a RopeConfig')
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

  @property
  def mlp(self) -> Mlp:
    """The shape of the model's MLPs."""
    return Mlp()

  def divided(self, config: config_lib.EngineConfig) -> Self:
    """Returns the model as devices share it in a deployment.

    Raises:
      ConfigError: it has nothing that could be shared so.
    """
    _check(
      not config.expert_parallel,
      'expert_parallel',
      config.expert_parallel,
      'this model is dense: it has no experts',
    )
    return self

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
    for name in {'rope', 'window_rope'} & fields.keys():
      if name == 'rope' or fields[name] is not None:
        fields[name] = RopeConfig.from_dict(fields[name], name)
    config: Self = fields_lib.from_dict(CONFIGS[family], fields, 'model')
    return config


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(ModelConfig):
  """Llama, and what has its layers but for a few switches.

  Attributes:
    qkv_bias: whether q, k and v add a bias (Qwen2).
    o_bias: whether o adds a bias.
    mlp_bias: whether gate, up and down add a bias.
    norms: which side of attention and of the MLP is normalized, one of `NORMS`:
      what they read, what they give (OLMo-2), or both (Gemma).
    norm_from_one: whether norms multiply by 1 + what they have (Gemma).
    qk_norm: whether heads of q and k are RMS-normalized (Qwen3).
    qk_norm_is_wide: whether that is over all heads at once (OLMo-2).
    window_layers: the layers that `sliding_window` holds for, ascending
      (Qwen); None for all.
    window_rope: the rotary embedding of those layers (OLMo-3); None: `rope`.
    unrotated_layers: the layers without rotary embedding, ascending (SmolLM3).
    residual_scale: multiplies what attention and the MLP give (Granite).
  """

  family: ClassVar[str] = 'llama'

  qkv_bias: bool = False
  o_bias: bool = False
  mlp_bias: bool = False
  norms: str = 'before'
  norm_from_one: bool = False
  qk_norm: bool = False
  qk_norm_is_wide: bool = False
  window_layers: tuple[int, ...] | None = None
  window_rope: RopeConfig | None = None
  unrotated_layers: tuple[int, ...] = ()
  residual_scale: float = 1.0

  def __post_init__(self) -> None:
    # Without arguments, super() does not survive slots=True.
    super(LlamaConfig, self).__post_init__()
    _check_types(
      self,
      {
        **dict.fromkeys(
          (
            'qkv_bias',
            'o_bias',
            'mlp_bias',
            'norm_from_one',
            'qk_norm',
            'qk_norm_is_wide',
          ),
          config_lib.FLAG,
        ),
        'norms': config_lib.one_of(tuple(NORMS)),
        'residual_scale': fields_lib.POSITIVE,
      },
    )
    _check(
      self.qk_norm or not self.qk_norm_is_wide,
      'qk_norm_is_wide',
      self.qk_norm_is_wide,
      'has no meaning without qk_norm',
    )
    for name in ('window_layers', 'unrotated_layers'):
      if name == 'unrotated_layers' or self.window_layers is not None:
        object.__setattr__(self, name, self._ascending(name))
    if self.window_rope is not None:
      self._check_rope('window_rope', self.window_rope)
      _check(
        self.sliding_window is not None,
        'window_rope',
        self.window_rope,
        'has no meaning without sliding_window',
      )
    # Stages, whose layers may differ, compute in one program.
    parts = {self.layer_kind(i).rope.rotary_dim for i in range(self.num_layers)}
    _check(
      len(parts) == 1,
      'rope.rotary_dim',
      self.rope.rotary_dim,
      'must be that of all layers',
    )
    _check(
      self.query_growth is None or not self.qk_norm or self.qk_norm_is_wide,
      'query_growth',
      self.query_growth,
      'is not supported with norms of heads, which come after it',
    )

  @property
  def norms_per_layer(self) -> int:
    return 2 * len(NORMS[self.norms])

  @property
  def statistics_per_layer(self) -> int:
    return 2 * self.qk_norm_is_wide

  def _ascending(self, name: str) -> tuple[int, ...]:
    layers = getattr(self, name)
    _check(
      isinstance(layers, (list, tuple))
      and all(
        config_lib.is_int(layer) and layer < self.num_layers for layer in layers
      )
      and min(layers, default=0) >= 0
      and list(layers) == sorted(set(layers)),
      name,
      layers,
      f'must be layers in [0, {self.num_layers}), ascending',
    )
    return tuple(layers)

  def layer_kind(self, layer: int) -> kinds.LayerKind:
    kind = super(LlamaConfig, self).layer_kind(layer)
    attention, rope = kind.attention, self.window_rope or self.rope
    if self.window_layers is not None and layer not in self.window_layers:
      attention, rope = dataclasses.replace(attention, window=None), self.rope
    if layer in self.unrotated_layers:
      rope = dataclasses.replace(_UNROTATED, rotary_dim=rope.rotary_dim)
    return kinds.LayerKind(attention, rope)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MixtralConfig(LlamaConfig):
  """Llama's layers with a mixture of experts for an MLP.

  Mixtral, Qwen3-MoE, gpt-oss. With `mlp_bias`, each expert has biases.

  Attributes:
    num_experts: E.
    experts_per_token: how many experts each token goes through.
    weights_sum_to_one: whether the weights of a token's experts are divided by
      their sum. (Then they are a softmax of these experts' scores alone.)
    router_bias: whether experts' scores add a bias.
    gate_limit: the most that a gate may be before its activation; what it gates
      is within this on either side, and 1 is added to it (gpt-oss). None: there
      is no limit, and nothing is added.
    whole_experts: see `Mlp.are_whole`; a deployment says it.
  """

  family: ClassVar[str] = 'mixtral'

  num_experts: int
  experts_per_token: int
  weights_sum_to_one: bool = True
  router_bias: bool = False
  gate_limit: float | None = None
  whole_experts: bool = False

  def __post_init__(self) -> None:
    super(MixtralConfig, self).__post_init__()
    _check_types(
      self,
      {
        'num_experts': fields_lib.COUNT,
        'experts_per_token': fields_lib.COUNT,
        'weights_sum_to_one': config_lib.FLAG,
        'router_bias': config_lib.FLAG,
        'gate_limit': _FACTOR,
        'whole_experts': config_lib.FLAG,
      },
    )
    _check(
      self.experts_per_token <= self.num_experts,
      'experts_per_token',
      self.experts_per_token,
      f'exceeds num_experts={self.num_experts}',
    )
    _check(  # Triton, which multiplies them on GPUs, has no erf.
      self.activation != 'gelu',
      'activation',
      self.activation,
      'experts must have silu, gelu_tanh, relu or quick_gelu',
    )

  @property
  def mlp(self) -> Mlp:
    return Mlp(
      num_experts=self.num_experts,
      experts_per_token=self.experts_per_token,
      are_whole=self.whole_experts,
    )

  def divided(self, config: config_lib.EngineConfig) -> Self:
    return dataclasses.replace(self, whole_experts=config.expert_parallel)


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
    _check_types(self, {'parallel': config_lib.FLAG, 'bias': config_lib.FLAG})
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
