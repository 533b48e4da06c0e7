# SPDX-License-Identifier: Apache-2.0
"""How many of a CPU's cores share a model, where nobody says."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import numpy as np
import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax.in_process import building
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import quantization
from sarathi_jax.runner import mesh as mesh_lib

LARGE = model_config_lib.LlamaConfig(
  vocab_size=8192,
  hidden_size=512,
  intermediate_size=1380,
  num_layers=12,
  num_heads=12,
  num_kv_heads=6,
  head_dim=64,
  max_position_embeddings=64,
)
SMALL = dataclasses.replace(LARGE, num_layers=1, vocab_size=300)
CONFIG = config_lib.EngineConfig()


def test_sums_of_many_devices_are_not_deterministic() -> None:
  """Only those of one process's CPU are in an order that is always the same."""
  config = dataclasses.replace(CONFIG, deterministic=True, tp=6)
  mesh = building.make_mesh(LARGE, config)
  assert mesh.shape['tp'] == 6
  shape = {'pp': 1, 'tp': 6}
  for kinds in (['gpu'] * 6, ['cpu'] * 6):
    devices = np.array(
      [
        types.SimpleNamespace(platform=kind, process_index=i // 3)
        for i, kind in enumerate(kinds)
      ]
    )
    absent: Any = types.SimpleNamespace(devices=devices, shape=shape)
    with pytest.raises(errors.ConfigError, match='tp=6: must be at most 2'):
      mesh_lib.check_deterministic(absent)
  shape['tp'] = 2
  mesh_lib.check_deterministic(absent)


def test_gpus_without_matrix_units_of_fp8_refuse_to_round_to_it() -> None:
  how = quantization.Quantization(codes='fp8', activations='fp8')
  model = dataclasses.replace(SMALL, quantization=how)

  def check(capability: str) -> None:
    device = types.SimpleNamespace(
      platform='gpu', device_kind='X', compute_capability=capability
    )
    absent: Any = types.SimpleNamespace(devices=np.array([device]))
    mesh_lib.check_activations(absent, model)

  check('9.0')
  for other in ('8.0', '8.6'):
    with pytest.raises(
      errors.ConfigError, match=f"quantized_activations='fp8': X .*{other}"
    ):
      check(other)
  mesh_lib.check_activations(mesh_lib.make(), model)


def test_live_weights_stay_where_they_are() -> None:
  home = jax.devices()[3]
  mesh = building.make_mesh(LARGE, CONFIG, home=[home])
  assert mesh.devices.ravel().tolist() == [home]
