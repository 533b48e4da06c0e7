# SPDX-License-Identifier: Apache-2.0
"""How others' models lie: a table for each layout, of who has which matrices.

  LLM(model, nnx.state(module, nnx.Param), layout='nnx', ...)
  LLM(model, params, layout=[Leaf('embed', 'wte.weight', 'vd'), ...], ...)

Boxes, such as nnx.Param's and those of flax's metadata, are opened, and outer
keys that a tree may have (`Layout.outer`) are left out. A leaf that a table
doesn't know is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
from typing import Any, NamedTuple

from sarathi_jax import errors
from sarathi_jax import models
from sarathi_jax.in_process import trees
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import tree as tree_lib

Leaf = trees.Leaf
ModelConfig = model_config_lib.ModelConfig
Rows = tuple[Leaf, ...]

_BOX = '.value'  # How the name of an array in a box ends.


def _unchanged(model: ModelConfig) -> ModelConfig:
  return model


class Layout(NamedTuple):
  """How a kind of trees lies.

  Attributes:
    rows: returns the table of a model.
    outer: outer keys to leave out, where the tree has them.
    model: returns the model that is computed of such a tree, whose leaves may
      have what others have in the configuration.
  """

  rows: Callable[[ModelConfig], Rows]
  outer: tuple[str, ...] = ('params',)
  model: Callable[[ModelConfig], ModelConfig] = _unchanged


def layout_of(layout: Any) -> Layout:
  """Returns the layout that a caller names or describes.

  Args:
    layout: a name in `LAYOUTS`, a Layout, or the rows of a table.

  Raises:
    ConfigError: it is none of these.
  """
  if isinstance(layout, str) and layout in LAYOUTS:
    return LAYOUTS[layout]
  if isinstance(layout, Layout):
    return layout
  if isinstance(layout, (list, tuple)) and all(
    isinstance(leaf, trees.Leaf) for leaf in layout
  ):
    rows = tuple(layout)
    return Layout(lambda model: rows)
  raise errors.ConfigError(
    f'layout={errors.shown(layout)}: must be one of {", ".join(LAYOUTS)}, a '
    'Layout, or a list of Leaf.'
  )


def named(layout: Layout, params: Any) -> dict[str, Any]:
  """Returns the leaves of a trainer's tree by their names in a table.

  Raises:
    ConfigError: two have the same name there.
  """
  found: dict[str, Any] = {}
  for whole, leaf in tree_lib.named_leaves(params).items():
    name = whole.removesuffix(_BOX)
    for key in layout.outer * 2:  # 'params' may be there twice (MaxText).
      name = name.removeprefix(f'{key}.')
    if name in found:
      raise errors.ConfigError(
        f'params.{whole}: there are two of {name}, inside and outside of '
        f'{" or ".join(layout.outer)}.'
      )
    found[name] = leaf
  return found


def _rows(
  ours: str, theirs: str, of: Mapping[str, str], axes: str = ''
) -> Iterable[Leaf]:
  """Yields rows of parameters whose names have something in common.

  Args:
    ours, theirs: their names, with * for what differs.
    of: what that is in ours, and in theirs; behind it, after a space, the
      axes.
    axes: the axes, where they are the same for all.
  """
  for mine, theirs_and_axes in of.items():
    other, _, own = theirs_and_axes.partition(' ')
    yield Leaf(ours.replace('*', mine), theirs.replace('*', other), own or axes)


_MATRICES = {  # Hugging Face's names, which many have; [in, out].
  'attn.q': 'self_attn.q_proj dq',
  'attn.k': 'self_attn.k_proj dr',
  'attn.v': 'self_attn.v_proj dr',
  'attn.o': 'self_attn.o_proj qd',
  'mlp.gate': 'mlp.gate_proj df',
  'mlp.up': 'mlp.up_proj df',
  'mlp.down': 'mlp.down_proj fd',
}
_BIASES = {
  'attn.q': 'self_attn.q_proj q',
  'attn.k': 'self_attn.k_proj r',
  'attn.v': 'self_attn.v_proj r',
  'attn.o': 'self_attn.o_proj d',
  'mlp.gate': 'mlp.gate_proj f',
  'mlp.up': 'mlp.up_proj f',
  'mlp.down': 'mlp.down_proj d',
}
_HEAD_NORMS = {
  'attn.q_norm': 'self_attn.q_norm h',
  'attn.k_norm': 'self_attn.k_norm h',
}
_NORMS_BEFORE = {
  'attn_norm': 'input_layernorm d',
  'mlp_norm': 'post_attention_layernorm d',
}
_NORMS_AROUND = {  # Gemma's
  'attn_norm': 'input_layernorm d',
  'attn_out_norm': 'post_attention_layernorm d',
  'mlp_norm': 'pre_feedforward_layernorm d',
  'mlp_out_norm': 'post_feedforward_layernorm d',
}


def _hugging_face(
  layers: str, matrix: str, norm: str, embedding: str, *, is_out_in: bool
) -> Layout:
  """Returns the layout of modules that have Hugging Face's names.

  Args:
    layers: the name of a layer, with {} for its number.
    matrix, norm, embedding: names of the arrays of these modules.
    is_out_in: whether matrices are [out, in].
  """

  def one(axes: str) -> str:
    return f'{axes[::-1]}->{" ".join(axes)}' if is_out_in else axes

  matrices = {
    ours: f'{name} {one(axes)}'
    for ours, (name, axes) in (
      (ours, theirs.split()) for ours, theirs in _MATRICES.items()
    )
  }
  here, layer = 'layers.{}.*', f'{layers}.*'

  def rows(model: ModelConfig) -> Rows:
    is_around = getattr(model, 'norms', '') == 'around'
    scale = 'offset' if getattr(model, 'norm_from_one', False) else 'scale'
    norms = _NORMS_AROUND if is_around else _NORMS_BEFORE
    return (
      Leaf('embed', f'embed_tokens.{embedding}', 'vd'),
      Leaf(f'final_norm.{scale}', f'norm.{norm}', 'd'),
      Leaf('lm_head', f'lm_head.{matrix}', one('dv')),
      *_rows(here, f'{layer}.{matrix}', matrices),
      *_rows(f'{here}_bias', f'{layer}.bias', _BIASES),
      *_rows(f'{here}.{scale}', f'{layer}.{norm}', norms | _HEAD_NORMS),
    )

  return Layout(rows, ('params', 'model'))


# -- Ours --


def _ours(model: ModelConfig) -> Rows:
  """Returns the table of our own tree, for what has boxes and outer keys."""
  specs = tree_lib.named_leaves(models.param_specs(model))
  return tuple(
    Leaf(name, name, 'xyz'[: len(leaf.shape)]) for name, leaf in specs.items()
  )


def _stacked(model: ModelConfig) -> Rows:
  """Returns the table of our own tree, its layers stacked on a first axis.

  As of jax.vmap, or of a scan over layers: `layers.attn.q` is [L, D, H * h].
  """
  found = {}
  for leaf in _ours(model):
    stacked = leaf
    first, _, rest = leaf.ours.partition('.')
    if first == 'layers':
      name = rest.partition('.')[2]
      stacked = Leaf(f'layers.{{}}.{name}', f'layers.{name}', f'l{leaf.axes}')
    found[stacked.ours] = stacked
  return tuple(found.values())


# -- MaxText's decoders, with scan_layers and param_scan_axis=1 --


def _maxtext(model: ModelConfig) -> Rows:
  """Returns the table of a dense decoder whose norms are before each branch.

  Where positions are scaled as Llama-3's, MaxText rotates numbers that are
  beside one another, and ours are those half a head apart.
  """
  head = 'pc' if model.rope.kind == 'llama3' else 'h'
  ours = head[::-1]
  layer = 'decoder.layers.*'
  return (
    Leaf('embed', 'token_embedder.embedding', 'vd'),
    Leaf('final_norm.scale', 'decoder.decoder_norm.scale', 'd'),
    Leaf('lm_head', 'decoder.logits_dense.kernel', 'dv'),
    *_rows(
      'layers.{}.*',
      f'{layer}.kernel',
      {
        'attn.q': f'self_attention.query d l n {head}->d n{ours}',
        'attn.k': f'self_attention.key d l k {head}->d k{ours}',
        'attn.v': 'self_attention.value dlkh->d kh',
        'attn.o': 'self_attention.out nlhd->nh d',
        'mlp.gate': 'mlp.wi_0 dlf',
        'mlp.up': 'mlp.wi_1 dlf',
        'mlp.down': 'mlp.wo fld',
      },
    ),
    *_rows(
      'layers.{}.*_bias',
      f'{layer}.bias',
      {
        'attn.q': f'self_attention.query n l {head}->n{ours}',
        'attn.k': f'self_attention.key k l {head}->k{ours}',
        'attn.v': 'self_attention.value klh->kh',
      },
    ),
    *_rows(
      'layers.{}.*.scale',
      f'{layer}.scale',
      {
        'attn_norm': 'pre_self_attention_layer_norm dl',
        'mlp_norm': 'post_self_attention_layer_norm dl',
        'attn.q_norm': 'self_attention.query_norm hl',
        'attn.k_norm': 'self_attention.key_norm hl',
      },
    ),
  )


def _maxtext_model(model: ModelConfig) -> ModelConfig:
  """Returns the model without 1 / sqrt(h), which MaxText's queries have.

  They have it from their initial values on, but for those that are normalized.
  """
  if getattr(model, 'qk_norm', False) or model.attention_scale is not None:
    return model
  return dataclasses.replace(model, attention_scale=1.0)


# -- tunix's models; `integrations.tunix_models` reads their configs --

_TUNIX_MLP = tuple(
  _rows(
    'layers.{}.mlp.*',
    'layers.{}.mlp.*_proj.kernel',
    {'gate': 'gate df', 'up': 'up df', 'down': 'down fd'},
  )
)
_TUNIX = (  # Llama3, Qwen2, Qwen3
  Leaf('embed', 'embedder.input_embedding', 'vd'),
  Leaf('final_norm.scale', 'final_norm.w', 'd'),
  Leaf('lm_head', 'lm_head.w', 'dv'),
  *_rows(
    'layers.{}.*',
    'layers.{}.*.w',
    {
      'attn_norm.scale': 'input_layernorm d',
      'mlp_norm.scale': 'post_attention_layernorm d',
      'attn.q': 'attn.q_proj dnh->d nh',
      'attn.k': 'attn.k_proj dkh->d kh',
      'attn.v': 'attn.v_proj dkh->d kh',
      'attn.o': 'attn.o_proj nhd->nh d',
      'attn.q_norm.scale': 'attn.q_norm h',
      'attn.k_norm.scale': 'attn.k_norm h',
    },
  ),
  *_TUNIX_MLP,
  *_rows(
    'layers.{}.attn.*_bias',
    'layers.{}.attn.*_bias',
    {'q': 'q q', 'k': 'k r', 'v': 'v r'},
  ),
  Leaf('layers.{}.moe.router', 'layers.{}.mlp.router.kernel', 'de'),
  *_rows(
    'layers.{}.moe.*',
    'layers.{}.mlp.*_proj',
    {'gate': 'gate edf', 'up': 'up edf', 'down': 'down efd'},
  ),
)
_TUNIX_GEMMA3 = (
  Leaf('embed', 'embedder.input_embedding', 'vd'),
  Leaf('final_norm.offset', 'final_norm.scale', 'd'),
  *_rows(
    'layers.{}.*.offset',
    'layers.{}.*.scale',
    {
      'attn_norm': 'pre_attention_norm d',
      'attn_out_norm': 'post_attention_norm d',
      'mlp_norm': 'pre_ffw_norm d',
      'mlp_out_norm': 'post_ffw_norm d',
      'attn.q_norm': 'attn._query_norm h',
      'attn.k_norm': 'attn._key_norm h',
    },
  ),
  Leaf('layers.{}.attn.o', 'layers.{}.attn.attn_vec_einsum.w', 'nhd->nh d'),
  *_TUNIX_MLP,
)
_TUNIX_GEMMA3_ATTN = {  # Whether all heads have keys and values of their own.
  False: {
    'q': 'q_einsum ndh->d nh',
    'k': 'kv_einsum 0kdh->d kh',
    'v': 'kv_einsum 1kdh->d kh',
  },
  True: {
    'q': 'qkv_einsum 0ndh->d nh',
    'k': 'qkv_einsum 1ndh->d nh',
    'v': 'qkv_einsum 2ndh->d nh',
  },
}


def _tunix(model: ModelConfig) -> Rows:
  if not getattr(model, 'norm_from_one', False):
    return _TUNIX
  attn = _TUNIX_GEMMA3_ATTN[model.num_heads == model.num_kv_heads]
  return (
    *_TUNIX_GEMMA3,
    *_rows('layers.{}.attn.*', 'layers.{}.attn.*.w', attn),
  )


LAYOUTS: Mapping[str, Layout] = {
  # Our own names (`models.param_specs`), in whatever boxes.
  'plain': Layout(_ours),
  # The same, with layers stacked on a first axis.
  'stacked': Layout(_stacked),
  # Modules of Hugging Face's names, of nnx.Linear, nnx.RMSNorm, nnx.Embed.
  'nnx': _hugging_face(
    'layers.{}', 'kernel', 'scale', 'embedding', is_out_in=False
  ),
  # The same of Linen's layers, where a layer is named layers_0.
  'linen': _hugging_face(
    'layers_{}', 'kernel', 'scale', 'embedding', is_out_in=False
  ),
  # The same of eqx.nn's: all is called weight, and matrices are [out, in].
  'equinox': _hugging_face(
    'layers.{}', 'weight', 'weight', 'weight', is_out_in=True
  ),
  'maxtext': Layout(_maxtext, model=_maxtext_model),
  'tunix': Layout(_tunix),
}
