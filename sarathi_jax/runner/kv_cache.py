# SPDX-License-Identifier: Apache-2.0
"""The size and the arrays of the paged KV cache."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import ragged_paged_attention as rpa
from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax.models import config as model_config_lib

GIB = 2**30
CPU_DEFAULT_GIB = 1.0

LayerKv = tuple[jax.Array, jax.Array]  # pages of keys, pages of values


def dtype_on(device: Any, dtype: Any) -> Any:
  """The cache's dtype for weights of `dtype`.

  XLA's CPU backend has no 16-bit floats: to move a few numbers of the cache,
  each step would convert all of it to float32 and back.
  """
  return jnp.dtype(jnp.float32 if device.platform == 'cpu' else dtype)


def page_bytes(model: model_config_lib.ModelConfig, page_size: int,
               dtype: Any) -> int:
  """Bytes of one page: keys and values of all layers."""
  per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim
  return per_token * page_size * jnp.dtype(dtype).itemsize


def init(model: model_config_lib.ModelConfig, num_pages: int, page_size: int,
         dtype: Any, attention: str | None = None) -> list[LayerKv]:
  """Zeros, an array of keys and one of values a layer, laid out for attention.

  Zeros and not garbage: a kernel may multiply what it masks by 0.
  """
  return [
    rpa.init_pages(
      num_pages, page_size, model.num_kv_heads, model.head_dim, dtype,
      attention)
    for _ in range(model.num_layers)]


def choose_num_pages(
    model: model_config_lib.ModelConfig, config: config_lib.EngineConfig,
    max_model_len: int, dtype: Any, device: Any, temp_bytes: int) -> int:
  """Pages for the cache: as configured, or as many as there is memory for.

  Args:
    model: what is cached.
    config: `num_pages`, else `kv_cache_gib`, else `memory_utilization` rule.
    max_model_len: the most tokens of a sequence.
    dtype: of the cache.
    device: where it will be; its weights are loaded already.
    temp_bytes: what the largest compiled step needs beside its arguments.

  Raises:
    ConfigError: there is no room, for one sequence of `config.max_model_len`
      if that is given, else for a single page.
  """
  size = page_bytes(model, config.page_size, dtype)
  stats = device.memory_stats()
  free: float
  if config.num_pages is not None:
    free, source = config.num_pages * size, 'num_pages'
  elif config.kv_cache_gib is not None:
    free, source = config.kv_cache_gib * GIB, 'kv_cache_gib'
  elif stats and 'bytes_limit' in stats:
    free = (stats['bytes_limit'] * config.memory_utilization
            - stats['bytes_in_use'] - temp_bytes)
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
