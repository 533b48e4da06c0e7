# SPDX-License-Identifier: Apache-2.0
"""The size and the arrays of the paged KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels import ragged_paged_attention as rpa
from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import page_groups
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import layer_groups
from sarathi_jax.models import parallel
from sarathi_jax.runner import mesh as mesh_lib

GIB = 2**30
CPU_DEFAULT_GIB = 1.0

LayerKv = tuple[Any, Any]  # trees of arrays: pages of keys, of values


# Implementations of attention whose blocks of keys may be several pages, the
# first of which lie before the window; they are read, if not attended to.
_READ_BEFORE_WINDOWS = ('pallas_mosaic',)

_NAMES = {'fp8': 'float8_e4m3fn'}  # others are NumPy's


def choose_dtype(name: str, dtype: Any, platform: str) -> Any:
  """Returns the cache's dtype.

  'auto' is that of the weights, except on CPUs. XLA has no 16-bit floats there:
  to move a few numbers of the cache, each step would convert all of it to
  float32 and back.

  Args:
    name: `config.kv_cache_dtype`.
    dtype: of the weights.
    platform: of the devices, such as 'cpu'.
  """
  if name == 'auto':
    name = 'float32' if platform == 'cpu' else jnp.dtype(dtype).name
  return jnp.dtype(_NAMES.get(name, name))


def groups_of(
  model: model_config_lib.ModelConfig,
  config: config_lib.EngineConfig,
  parallelism: parallel.Parallelism = parallel.ONE_DEVICE,
) -> layer_groups.LayerGroups:
  """Returns the groups of layers of a deployment."""
  return layer_groups.of(
    model,
    parallelism,
    max_model_len=config.max_model_len or model.context_len,
    page_size=config.page_size,
    keep_all=config.attention in _READ_BEFORE_WINDOWS,
  )


def page_bytes(
  model: model_config_lib.ModelConfig,
  page_size: int,
  dtype: Any,
  parallelism: parallel.Parallelism = parallel.ONE_DEVICE,
  num_layers: int | None = None,
) -> int:
  """Returns the bytes of one page on a device: its layers' keys and values.

  Args:
    model: the model.
    page_size: tokens in a page.
    dtype: of the cache.
    parallelism: how devices share the model.
    num_layers: the layers of a group; None for all of a stage.
  """
  num_heads = parallelism.num_kv_heads(model) // parallelism.tp
  pages = jax.eval_shape(
    lambda: rpa.init_pages(
      1, page_size, num_heads, model.head_dim, dtype, 'xla'
    )
  )
  return (num_layers or parallelism.num_layers(model)) * sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pages)
  )


def shapes(
  model: model_config_lib.ModelConfig,
  mesh: Mesh,
  num_pages: int,
  page_size: int,
  dtype: Any,
  attention: str | None,
  num_layers: int | None = None,
) -> list[LayerKv]:
  """Returns pages of keys and of values for each layer of a group.

  They are trees of ShapeDtypeStruct, laid out for attention: pages stage after
  stage along the first axis, heads along the second. Where `num_layers` is None
  all layers of a stage are one group.

  Raises:
    NotImplementedError: the implementation doesn't support such pages.
  """
  parallelism = mesh_lib.parallelism_of(mesh)
  num_heads = parallelism.num_kv_heads(model)
  sharding = mesh_lib.on(mesh, mesh_lib.PP, mesh_lib.TP)
  one_device = jax.eval_shape(
    lambda: rpa.init_pages(
      num_pages,
      page_size,
      num_heads // parallelism.tp,
      model.head_dim,
      dtype,
      attention,
    )
  )
  layer: LayerKv = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      (parallelism.pp * num_pages, num_heads, *leaf.shape[2:]),
      leaf.dtype,
      sharding=sharding,
    ),
    one_device,
  )
  return [layer] * (num_layers or parallelism.num_layers(model))


def choose_num_pages(
  model: model_config_lib.ModelConfig,
  config: config_lib.EngineConfig,
  max_model_len: int,
  dtype: Any,
  stats: Sequence[Mapping[str, int] | None],
  temp_bytes: int,
  parallelism: parallel.Parallelism = parallel.ONE_DEVICE,
  chunk: int = 1,
) -> int:
  """Returns the cache's pages: as configured, or as many as memory allows.

  Args:
    model: the model.
    config: its `num_pages` decides, else `kv_cache_gib`, else
      `memory_utilization`.
    max_model_len: the most tokens of a sequence.
    dtype: of the cache.
    stats: `jax.Device.memory_stats()` of its devices, with weights loaded.
    temp_bytes: bytes of each device that the largest compiled step needs
      beside its arguments.
    parallelism: how the devices share the model.
    chunk: the most tokens of a step.

  Raises:
    ConfigError: there is no room for one sequence of `config.max_model_len`,
      or, if that is not given, for a single page.
  """
  groups = groups_of(model, config, parallelism)
  size = page_bytes(
    model, config.page_size, dtype, parallelism, groups.num_arrays
  )
  free = config.cache_bytes(size)
  if free is not None:
    source = 'kv_cache_gib' if config.num_pages is None else 'num_pages'
  elif known := [s for s in stats if s and 'bytes_limit' in s]:
    free = (
      min(
        s['bytes_limit'] * config.memory_utilization - s['bytes_in_use']
        for s in known
      )
      - temp_bytes
    )
    source = 'what is free on the device'
  else:
    # Its devices share a CPU's memory.
    free, source = CPU_DEFAULT_GIB * GIB / len(stats), 'the default for a CPU'
  per_seq = page_groups.num_pages(
    groups.windows, max_model_len, config.page_size, min(chunk, max_model_len)
  )
  most = config.num_pages or per_seq * config.max_num_seqs
  limit = rpa.most_pages(
    config.page_size,
    parallelism.num_kv_heads(model) // parallelism.tp,
    model.head_dim,
    dtype,
  )
  if limit is not None:
    config_lib.check(
      (config.num_pages or 0) <= limit,
      'num_pages',
      config.num_pages,
      f'must be at most {limit} for a cache of {jnp.dtype(dtype)}: the bytes '
      "of one layer's keys are counted in int32",
    )
    most = min(most, limit)
  num_pages = int(min(free, most * size) // size)
  needed = len(groups.windows) if config.max_model_len is None else per_seq
  if num_pages < needed:
    what = 'a page' if config.max_model_len is None else 'a sequence'
    raise errors.ConfigError(
      f'max_model_len={config.max_model_len}: {what} needs '
      f'{needed * size / GIB:.3g} GiB of KV cache, {needed} pages, but there '
      f'are {max(free, 0) / GIB:.3g} GiB ({source}); lower max_model_len or '
      'set kv_cache_gib.'
    )
  return num_pages
