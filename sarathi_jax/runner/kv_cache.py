# SPDX-License-Identifier: Apache-2.0
"""The size and the arrays of the paged KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels import ragged_paged_attention as rpa
from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import parallel
from sarathi_jax.runner import mesh as mesh_lib

GIB = 2**30
CPU_DEFAULT_GIB = 1.0

LayerKv = tuple[Any, Any]  # trees of arrays: pages of keys, of values


def dtype_on(device: Any, dtype: Any) -> Any:
  """The cache's dtype for weights of `dtype`.

  XLA's CPU backend has no 16-bit floats: to move a few numbers of the cache,
  each step would convert all of it to float32 and back.
  """
  return jnp.dtype(jnp.float32 if device.platform == 'cpu' else dtype)


def page_bytes(
    model: model_config_lib.ModelConfig, page_size: int, dtype: Any,
    parallelism: parallel.Parallelism = parallel.ONE_DEVICE) -> int:
  """Bytes that one page takes of a device: keys and values of its layers."""
  num_heads = parallelism.num_kv_heads(model) // parallelism.tp
  per_token = 2 * parallelism.num_layers(model) * num_heads * model.head_dim
  return per_token * page_size * jnp.dtype(dtype).itemsize


def shapes(
    model: model_config_lib.ModelConfig, mesh: Mesh, num_pages: int,
    page_size: int, dtype: Any, attention: str | None) -> list[LayerKv]:
  """The keys and the values of each layer of a stage.

  As ShapeDtypeStruct, laid out for attention: pages stage after stage along
  the first axis, heads along the second.

  Raises:
    NotImplementedError: the implementation can't have such pages.
  """
  parallelism = mesh_lib.parallelism_of(mesh)
  num_heads = parallelism.num_kv_heads(model)
  sharding = mesh_lib.on(mesh, mesh_lib.PP, mesh_lib.TP)
  one_device = jax.eval_shape(lambda: rpa.init_pages(
    num_pages, page_size, num_heads // parallelism.tp, model.head_dim, dtype,
    attention))
  layer = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      (parallelism.pp * num_pages, num_heads, *leaf.shape[2:]), leaf.dtype,
      sharding=sharding), one_device)
  return [layer] * parallelism.num_layers(model)


def init(shapes: list[LayerKv]) -> list[LayerKv]:
  """Zeros, and not garbage: a kernel may multiply what it masks by 0."""
  return jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
    shapes)


def choose_num_pages(
    model: model_config_lib.ModelConfig, config: config_lib.EngineConfig,
    max_model_len: int, dtype: Any,
    stats: Sequence[Mapping[str, int] | None], temp_bytes: int,
    parallelism: parallel.Parallelism = parallel.ONE_DEVICE) -> int:
  """Pages for the cache: as configured, or as many as there is memory for.

  Args:
    model: what is cached.
    config: `num_pages`, else `kv_cache_gib`, else `memory_utilization` rule.
    max_model_len: the most tokens of a sequence.
    dtype: of the cache.
    stats: `jax.Device.memory_stats()` of where it will be, weights loaded.
    temp_bytes: what the largest compiled step needs beside its arguments, of
      each device.
    parallelism: how the devices share the model.

  Raises:
    ConfigError: there is no room, for one sequence of `config.max_model_len`
      if that is given, else for a single page.
  """
  size = page_bytes(model, config.page_size, dtype, parallelism)
  free: float
  if config.num_pages is not None:
    free, source = config.num_pages * size, 'num_pages'
  elif config.kv_cache_gib is not None:
    free, source = config.kv_cache_gib * GIB, 'kv_cache_gib'
  elif known := [s for s in stats if s and 'bytes_limit' in s]:
    free = min(s['bytes_limit'] * config.memory_utilization
               - s['bytes_in_use'] for s in known) - temp_bytes
    source = 'what is free on the device'
  else:
    free, source = CPU_DEFAULT_GIB * GIB, 'the default for a CPU'
  per_seq = math.ceil(max_model_len / config.page_size)
  most = config.num_pages or per_seq * config.max_num_seqs
  num_pages = int(min(free, most * size) // size)
  needed = 1 if config.max_model_len is None else per_seq
  if num_pages < needed:
    what = 'a page' if config.max_model_len is None else 'a sequence'
    raise errors.ConfigError(
      f'max_model_len={config.max_model_len}: {what} needs '
      f'{needed * size / GIB:.3g} GiB of KV cache, {needed} pages, but there '
      f'are {max(free, 0) / GIB:.3g} GiB ({source}); lower max_model_len or '
      'set kv_cache_gib.')
  return num_pages
