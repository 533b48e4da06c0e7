# SPDX-License-Identifier: Apache-2.0
"""A model's configuration, without its weights. Standard library only: no JAX.

Every family has its own class, with the base's fields and its own; `CONFIGS`
names them. They are plain data: `to_dict` and `from_dict` go through JSON. An
unknown field is refused, so that nothing about a model is ever ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, ClassVar, Self

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax.models import base_config
from sarathi_jax.models import fields as fields_lib
from sarathi_jax.models import kinds
from sarathi_jax.models import quantization as quantization_lib
from sarathi_jax.models import rope_config
from sarathi_jax.models import router_config

Mlp = base_config.Mlp
ModelConfig = base_config.ModelConfig
RopeConfig = rope_config.RopeConfig
RouterConfig = router_config.RouterConfig

_check, _check_types = config_lib.check, config_lib.check_fields

# Where the norms of attention and of an MLP are -> what their names have.
NORMS: Mapping[str, tuple[str, ...]] = {
  'before': ('',),
  'after': ('_out',),
  'around': ('', '_out'),
}
_UNROTATED = RopeConfig(kind='none')


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
      self.check_rope('window_rope', self.window_rope)
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

  Mixtral, Qwen2-MoE, Qwen3-MoE, gpt-oss, GLM-4.5. With `mlp_bias`, each expert
  has biases, and so have the other MLPs.

  Attributes:
    num_experts: E.
    experts_per_token: how many experts each token goes through.
    router: how it chooses them.
    gate_limit: the most that an expert's gate may be before its activation;
      what it gates is within this on either side, and 1 is added to it
      (gpt-oss). None: there is no limit, and nothing is added.
    shared_size: width inside the expert that all tokens go through, beside
      those that they choose; None: there is none.
    shared_gate: whether what it gives is multiplied by a sigmoid of a number
      that each token makes of itself (Qwen2-MoE).
    dense_sizes: widths inside the MLPs of layers that have no experts; as many
      as there are of these.
    dense_layers: the layers that these are, ascending (Qwen); None: the first.
    whole_experts: see `Mlp.are_whole`; a deployment says it.
  """

  family: ClassVar[str] = 'mixtral'

  num_experts: int
  experts_per_token: int
  router: RouterConfig = router_config.DEFAULT
  gate_limit: float | None = None
  shared_size: int | None = None
  shared_gate: bool = False
  dense_sizes: tuple[int, ...] = ()
  dense_layers: tuple[int, ...] | None = None
  whole_experts: bool = False

  def __post_init__(self) -> None:
    super(MixtralConfig, self).__post_init__()
    _check_types(
      self,
      {
        'num_experts': fields_lib.COUNT,
        'experts_per_token': fields_lib.COUNT,
        'gate_limit': base_config.FACTOR_OR_NONE,
        'shared_size': base_config.SIZE_OR_NONE,
        'shared_gate': config_lib.FLAG,
        'whole_experts': config_lib.FLAG,
      },
    )
    _check(
      self.experts_per_token <= self.num_experts,
      'experts_per_token',
      self.experts_per_token,
      f'exceeds num_experts={self.num_experts}',
    )
    _check(
      isinstance(self.router, RouterConfig),
      'router',
      self.router,
      'must be a RouterConfig',
    )
    self.router.check(self.num_experts, self.experts_per_token)
    _check(
      self.shared_size is not None or not self.shared_gate,
      'shared_gate',
      self.shared_gate,
      'has no meaning without shared_size',
    )
    is_size, _ = fields_lib.SIZE
    _check(
      isinstance(self.dense_sizes, (list, tuple))
      and all(map(is_size, self.dense_sizes))
      and len(self.dense_sizes) < self.num_layers,
      'dense_sizes',
      self.dense_sizes,
      f'must be sizes of fewer than num_layers={self.num_layers} layers',
    )
    object.__setattr__(self, 'dense_sizes', tuple(self.dense_sizes))
    if self.dense_layers is not None:
      object.__setattr__(self, 'dense_layers', self._ascending('dense_layers'))
      _check(
        len(self.dense_layers) == len(self.dense_sizes),
        'dense_layers',
        self.dense_layers,
        f'must be as many as dense_sizes={self.dense_sizes}',
      )
    _check(  # Triton, which multiplies them on GPUs, has no erf.
      self.activation != 'gelu',
      'activation',
      self.activation,
      'experts must have silu, gelu_tanh, relu or quick_gelu',
    )

  def layer_mlp(self, layer: int) -> Mlp:
    if not self.has_experts(layer):
      return Mlp(self.dense_sizes[self._dense.index(layer)])
    return Mlp(
      self.intermediate_size,
      num_experts=self.num_experts,
      experts_per_token=self.experts_per_token,
      are_whole=self.whole_experts,
      shared_size=self.shared_size or 0,
      shared_gate=self.shared_gate,
    )

  def has_experts(self, layer: int) -> bool:
    """Says whether a layer in [0, L) has experts for an MLP."""
    return layer not in self._dense

  @property
  def _dense(self) -> tuple[int, ...]:
    if self.dense_layers is not None:
      return self.dense_layers
    return tuple(range(len(self.dense_sizes)))

  @property
  def num_dense(self) -> int:
    return len(self.dense_sizes) if self.dense_layers is None else 0

  @property
  def mlp_widths(self) -> tuple[tuple[str, int], ...]:
    widths = [('dense_sizes', size) for size in self.dense_sizes]
    if self.shared_size is not None:
      widths.append(('shared_size', self.shared_size))
    if not self.whole_experts:
      widths.append(('intermediate_size', self.intermediate_size))
    return tuple(widths)

  def divided(self, config: config_lib.EngineConfig) -> Self:
    shared = dataclasses.replace(self, whole_experts=config.expert_parallel)
    return shared.rounding(config.quantized_activations)


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

  def layer_mlp(self, layer: int) -> Mlp:
    del layer
    return Mlp(self.intermediate_size, is_gated=False)

  @property
  def sums_per_layer(self) -> int:
    return 1 if self.parallel else 2


CONFIGS: Mapping[str, type[ModelConfig]] = {
  cls.family: cls for cls in (LlamaConfig, MixtralConfig, FalconConfig)
}

# Fields that have fields -> what reads them.
_NESTED: Mapping[str, Callable[[Mapping[str, Any], str], Any]] = {
  'rope': RopeConfig.from_dict,
  'window_rope': RopeConfig.from_dict,
  'router': RouterConfig.from_dict,
  'quantization': quantization_lib.Quantization.from_dict,
}


def from_dict(fields: Mapping[str, Any]) -> ModelConfig:
  """Reads what `ModelConfig.to_dict` wrote.

  Raises:
    ConfigError: a family or field is unknown, a field is missing, or a value is
      bad.
  """
  if not isinstance(fields, Mapping):
    raise errors.ConfigError(f'model={fields!r}: must be an object.')
  fields = dict(fields)
  family = fields.pop('family', None)
  _check(
    isinstance(family, str) and family in CONFIGS,
    'family',
    family,
    f'must be one of {", ".join(CONFIGS)}',
  )
  for name, read in _NESTED.items():
    may_be_none = name in ('window_rope', 'quantization')
    if name in fields and not (may_be_none and fields[name] is None):
      fields[name] = read(fields[name], name)
  config: ModelConfig = fields_lib.from_dict(CONFIGS[family], fields, 'model')
  return config
