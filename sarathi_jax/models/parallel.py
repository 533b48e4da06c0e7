# SPDX-License-Identifier: Apache-2.0
"""Divides a model over a mesh of tp x pp devices. Arithmetic only; no JAX.

`tp` devices share each layer: whole heads, MLP columns or whole experts, rows
of the embedding. `pp` stages hold consecutive layers, the same number each:
where pp does not divide L, the last stage has layers of zeros, which change
nothing. So have all but the first stage in place of the first layers, if these
are dense and the others are not: layers of one number are alike in all stages.
The output matrix is split over all devices.
"""

from __future__ import annotations

import dataclasses

from sarathi_jax import config as config_lib
from sarathi_jax.models import config as model_config_lib

# A width of `mlp_widths` -> the MLP that has it.
_BRANCHES = {
  'intermediate_size': 'mlp',
  'dense_sizes': 'mlp',
  'shared_size': 'moe.shared',
}


@dataclasses.dataclass(frozen=True, slots=True)
class Parallelism:
  """Degrees of parallelism, and the sizes of one device's part of a model.

  Attributes:
    tp: devices that share each layer.
    pp: pipeline stages.
  """

  tp: int = 1
  pp: int = 1

  @property
  def num_devices(self) -> int:
    return self.tp * self.pp

  def check(self, model: model_config_lib.ModelConfig) -> None:
    """Raises ConfigError, with the numbers, if a model can't be so divided."""
    num_alike = model.num_layers - model.num_dense
    config_lib.check(
      self.pp <= num_alike,
      'pp',
      self.pp,
      f'more stages than the model has layers, {num_alike}'
      + ' with experts' * (model.num_dense > 0),
    )
    config_lib.check(
      model.num_heads % self.tp == 0,
      'tp',
      self.tp,
      f"must divide the model's num_heads={model.num_heads}",
    )
    # With more devices than key and value heads, each has a copy of one.
    many, few = sorted((model.num_kv_heads, self.tp))[::-1]
    config_lib.check(
      many % few == 0,
      'tp',
      self.tp,
      "must divide the model's num_kv_heads="
      f'{model.num_kv_heads}, or be a multiple of it',
    )
    for mlp in {model.layer_mlp(i) for i in range(model.num_layers)}:
      config_lib.check(
        not mlp.are_whole or mlp.num_experts % self.tp == 0,
        'tp',
        self.tp,
        "must, with expert_parallel, divide the model's "
        f'num_experts={mlp.num_experts}',
      )
    for index in range(self.num_layers(model)):
      layers = [i for i in self.layers_of(model, index) if i is not None]
      config_lib.check(
        len({model.layer_mlp(i) for i in layers}) == 1,
        'pp',
        self.pp,
        f'puts layers {", ".join(map(str, layers))} at the same place of their '
        'stages, which takes MLPs of the same shape',
      )
    for name, width in model.mlp_widths:
      config_lib.check(
        width % self.tp == 0,
        'tp',
        self.tp,
        f"must divide the model's {name}={width}",
      )
    self._check_groups(model)
    # Each device of a stage hands on its part of the hidden states.
    config_lib.check(
      self.pp == 1 or model.hidden_size % self.tp == 0,
      'tp',
      self.tp,
      f"must divide the model's hidden_size={model.hidden_size}",
    )

  def _check_groups(self, model: model_config_lib.ModelConfig) -> None:
    """Raises ConfigError if devices would share rows that lie together."""
    how = model.quantization
    if how is None or self.tp == 1:
      return
    if (together := how.rows_together) == 1:
      return
    layers = range(model.num_layers)
    has_experts = any(model.layer_mlp(i).num_experts > 1 for i in layers)
    heads = 'attn.o', 'num_heads * head_dim', model.num_heads * model.head_dim
    shared = [(*heads, '')]
    for name, width in model.mlp_widths:
      branch, remedy = _BRANCHES[name], ''
      if name == 'intermediate_size' and has_experts:
        branch = 'moe'
        remedy = '; or let devices have whole experts (expert_parallel)'
      shared.append((f'{branch}.down', name, width, remedy))
    for matrix, name, size, remedy in shared:
      is_quantized = any(how.covers(f'layers.{i}.{matrix}') for i in layers)
      config_lib.check(
        not is_quantized or size // self.tp % together == 0,
        'tp',
        self.tp,
        f'leaves {size // self.tp} rows of {matrix}, of {name}={size}, to each '
        f'device; must be a multiple of {together}, which lie together or have '
        f'scales in common (quantization.group){remedy}',
      )

  def num_layers(self, model: model_config_lib.ModelConfig) -> int:
    """Returns the layers of a stage, those of zeros counted in."""
    alike = model.num_layers - model.num_dense
    return model.num_dense + -(-alike // self.pp)

  def num_kv_heads(self, model: model_config_lib.ModelConfig) -> int:
    """Returns the key and value heads of a whole stage, copies counted in."""
    return max(model.num_kv_heads, self.tp)

  def vocab_size(self, model: model_config_lib.ModelConfig) -> int:
    """Returns V, padded to a multiple of the number of devices."""
    return -(-model.vocab_size // self.num_devices) * self.num_devices

  def part_len(self, axis: str | None, size: int) -> int:
    """Returns the length of one device's part of an axis, with padding.

    Args:
      axis: the axis's name, see `spec.ParamSpec`.
      size: the axis's length, without padding and copies of heads.
    """
    parts = {
      'vocab': self.tp,
      'heads': self.tp,
      'kv_heads': self.tp,
      'mlp': self.tp,
      'whole_experts': self.tp,
      'logits': self.num_devices,
    }.get(axis or '', 1)
    multiple = self.num_devices if axis == 'vocab' else parts
    return -(-size // multiple) * multiple // parts

  def layers_of(
    self, model: model_config_lib.ModelConfig, index: int
  ) -> tuple[int | None, ...]:
    """Returns each stage's layer number `index`; None for one of zeros.

    Worked example, 5 layers in 2 stages: index 0 -> (0, 3), 2 -> (2, None). If
    the first is dense: index 0 -> (0, None), 1 -> (1, 3), 2 -> (2, 4).
    """
    if index < model.num_dense:
      return (index, *[None] * (self.pp - 1))
    per_stage = self.num_layers(model) - model.num_dense
    layers = range(index, index + per_stage * self.pp, per_stage)
    return tuple(n if n < model.num_layers else None for n in layers)


ONE_DEVICE = Parallelism()
