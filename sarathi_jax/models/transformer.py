# SPDX-License-Identifier: Apache-2.0
"""The parts around the blocks, which are the same for all families.

A family's module (see `FAMILIES`) has `layer_specs`, `block`, and its norm,
`norm` and `norm_specs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import importlib
from typing import Any, TypeVar
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sarathi_jax import models
from sarathi_jax.models import attention
from sarathi_jax.models import config as config_lib
from sarathi_jax.models import kinds as kinds_lib
from sarathi_jax.models import layers
from sarathi_jax.models import matrices
from sarathi_jax.models import quantized
from sarathi_jax.models import rope
from sarathi_jax.models import sharding
from sarathi_jax.models import spec
from sarathi_jax.models import tree

Kind = TypeVar('Kind')


def _family(config: config_lib.ModelConfig) -> Any:
  return importlib.import_module(models.FAMILIES[config.family])


def param_specs(config: config_lib.ModelConfig) -> dict[str, Any]:
  """Returns the specs of the parameters: a tree of ParamSpec.

    {'embed': [V, D],
     'layers': [{'attn_norm', 'attn': {'q': [D, H*h], ...}, ...}, ...],
     'final_norm': {'scale': [D], ...},
     'lm_head': [D, V]}   # not if the embeddings are tied

  All matrices are [in, out]. Those that are quantized are nodes of specs, see
  `quantized`.
  """
  return _where_quantized(config, quantized.specs_of, _plain_specs(config))


def _plain_specs(config: config_lib.ModelConfig) -> dict[str, Any]:
  """Returns the specs of the parameters, had none of them been quantized."""
  family = _family(config)
  vocab, width = ('vocab', config.vocab_size), ('embed', config.hidden_size)
  specs = {
    'embed': spec.matrix(vocab, width),
    'layers': [family.layer_specs(config, i) for i in range(config.num_layers)],
    'final_norm': family.norm_specs(config),
  }
  if not config.tie_word_embeddings:
    specs['lm_head'] = spec.matrix(width, ('logits', config.vocab_size))
  return specs


def _where_quantized(
  config: config_lib.ModelConfig, make: Callable[..., Any], params: Any
) -> Any:
  """Returns the tree with `make` of what is quantized, and of how it is."""
  how = config.quantization
  if how is None:
    return params

  def one(path: Any, leaf: spec.ParamSpec, param: Any) -> Any:
    covered = leaf.is_factor and how.covers(tree.joined('', path))
    return make(param, how) if covered else param

  return jax.tree.map_with_path(one, _plain_specs(config), params)


def quantize(config: config_lib.ModelConfig, params: Any) -> layers.Params:
  """Quantizes live parameters as `config.quantization` says.

  Args:
    config: the model.
    params: all in one dtype, as of a model without quantization.

  Returns:
    The parameters as `param_specs` says; those that are not quantized as they
    are.
  """
  return _where_quantized(config, quantized.of, params)


def init_params(
  config: config_lib.ModelConfig,
  key: Array,
  dtype: Any = jnp.float32,
  scale: float = 0.02,
) -> layers.Params:
  """Draws random parameters: normal, of deviation `scale`.

  Draws norms around 1 and biases around 0, and not exactly at these, so that a
  test notices where one is left out. Every leaf has its own key, from its name.
  What is to be quantized is, see `quantize`.

  Must not be jitted: it compiles a small program for each shape, while one for
  all leaves would take minutes.
  """

  def draw(path: Any, leaf: spec.ParamSpec) -> jax.Array:
    name = jax.tree_util.keystr(path)
    return _draw(
      jax.random.fold_in(key, zlib.crc32(name.encode())),
      leaf.shape,
      jnp.dtype(leaf.dtype or dtype),
      _CENTERS[leaf.init],
      scale,
    )

  return quantize(
    config, jax.tree_util.tree_map_with_path(draw, _plain_specs(config))
  )


# ParamSpec.init -> what parameters are drawn around.
_CENTERS: Mapping[str, float] = {'normal': 0.0, 'bias': 0.0, 'scale': 1.0}


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _draw(
  key: jax.Array,
  shape: tuple[int, ...],
  dtype: Any,
  center: float,
  scale: float,
) -> jax.Array:
  drawn: jax.Array = center + scale * jax.random.normal(key, shape, jnp.float32)
  return drawn.astype(dtype)


def forward(
  config: config_lib.ModelConfig,
  params: layers.Params,
  kv: Sequence[attention.LayerKv],
  tokens: Int[Array, ' T'],
  positions: Int[Array, ' T'],
  rope_lens: Int[Array, ' T'] | None,
  attend: attention.Attend,
) -> tuple[Float[Array, 'T D'], list[attention.LayerKv]]:
  """Runs tokens through all layers, on one device.

  Call it under `jax.jit`: by itself, it compiles its layers each time.

  Args:
    config: the model.
    params: as `param_specs` says; in one dtype, but for those that have their
      own. Matmuls and the residual stream use that one; norms, softmax and
      rotations are in float32. Matrices may be nodes, see `matrices`, and those
      of a group of `spec` be one.
    kv: what `attend` keeps, one a layer. `[None] * L` for `causal_attend`.
    tokens: ids.
    positions: of the tokens in their sequences.
    rope_lens: see `rope.tables`; None unless the rope is 'dynamic'.
    attend: keeps keys and values, and attends.

  Returns:
    The residual stream after the last norm, and the new `kv`.
  """
  kinds = [config.layer_kind(i) for i in range(config.num_layers)]
  rotations = {
    kind.rope: rope.tables(kind.rope, config.head_dim, positions, rope_lens)
    for kind in dict.fromkeys(kinds)
  }
  query_factors = rope.query_factors(config, positions)

  def context(
    kind: kinds_lib.LayerKind,
    rows: attention.Rows | None,
  ) -> attention.LayerContext:
    return attention.LayerContext(
      functools.partial(
        attention.turn_and_attend,
        attend,
        rotations[kind.rope],
        options=kind.attention,
        rows=rows,
      ),
      rows=rows,
      query_factors=query_factors,
    )

  x = embed(config, params, tokens)
  x, kv = run_layers(config, params['layers'], kv, x, kinds, context)
  return final_norm(config, params, x), kv


def embed(
  config: config_lib.ModelConfig,
  params: layers.Params,
  tokens: Int[Array, ' T'],
  shards: sharding.Shards = sharding.WHOLE,
) -> Float[Array, 'T D']:
  """Returns the residual stream that enters the first layer."""
  x = shards.embed(params['embed'], tokens)
  if config.embed_scale == 1:
    return x
  return x * jnp.asarray(config.embed_scale, x.dtype)


def run_layers(
  config: config_lib.ModelConfig,
  params: Sequence[layers.Params],
  kv: Sequence[attention.LayerKv],
  x: Float[Array, 'T D'],
  kinds: Sequence[Kind],
  context: Callable[[Kind, attention.Rows | None], attention.LayerContext],
  leaving: attention.Rows | None = None,
  kept_in: Sequence[int] | None = None,
) -> tuple[Float[Array, 'rows D'], list[attention.LayerKv]]:
  """Runs the residual stream through some layers: a stage's, or all.

  Args:
    config: the model.
    params: of these layers; on a shard, its part of them.
    kv: what `attend` keeps.
    x: the residual stream.
    kinds: the kinds of these layers, hashable; those of one kind are traced
      once.
    context: makes the context of a layer, from its kind and the rows of its
      output that are read.
    leaving: the rows of x that are read after the last layer; None: all. For
      the others, the last layer computes keys and values only.
    kept_in: of each layer, its number in `kv`; None: one a layer, in order.

  Returns:
    The residual stream after the layers, of the rows `leaving`, and the new
    `kv`.
  """

  @functools.partial(jax.jit, static_argnames='kind')
  def block(
    layer: layers.Params,
    layer_kv: attention.LayerKv,
    x: layers.Stream,
    kind: Kind,
    rows: attention.Rows | None,
  ) -> Any:
    return _family(config).block(
      config, layer, layer_kv, x, context(kind, rows)
    )

  kv, stream = list(kv), x
  kept_in = range(len(params)) if kept_in is None else kept_in
  rows = [None] * (len(params) - 1) + [leaving]
  for i, (layer, kind) in enumerate(zip(params, kinds, strict=True)):
    # Layers that are alike are traced and lowered once; XLA inlines them.
    at = kept_in[i]
    stream, kv[at] = block(layer, kv[at], stream, kind, rows[i])
  return layers.whole_stream(stream), kv


def final_norm(
  config: config_lib.ModelConfig,
  params: layers.Params,
  x: Float[Array, 'S D'],
) -> Float[Array, 'S D']:
  """Applies the norm between the last layer and `unembed`."""
  return _family(config).norm(params['final_norm'], x, config.norm_eps)


def unembed(
  config: config_lib.ModelConfig,
  params: layers.Params,
  hidden: Float[Array, 'S D'],
  shards: sharding.Shards = sharding.WHOLE,
) -> Float[Array, 'S V']:
  """Computes logits, in float32 whatever the params' dtype is.

  On a shard, computes those of its part of the vocabulary.
  """
  head = params['embed' if config.tie_word_embeddings else 'lm_head']
  if config.tie_word_embeddings and not isinstance(head, matrices.Table):
    head = matrices.Transposed(shards.head_rows(head))
  logits = matrices.matmul(hidden, head, jnp.float32)
  if config.logit_scale != 1:
    logits = logits * config.logit_scale
  if (cap := config.logit_soft_cap) is not None:
    logits = cap * jnp.tanh(logits / cap)
  return logits
