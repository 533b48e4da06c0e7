# SPDX-License-Identifier: Apache-2.0
"""Predicts how long a step takes, from the model's shape and the hardware.

A layer is four matmuls (a mixture of experts more), attention of decodes by
the bytes of their keys and values, attention of chunks by chunk times context,
elementwise work, and all-reduces. A stage is its layers; the last one has the
head as well. `hosts` has what the software around it costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
import itertools

from pallas_kernels import attention_work
from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.models import config as model_config_lib
from sarathi_jax.models import facts
from sarathi_jax.models import layer_groups
from sarathi_jax.models import parallel
from sarathi_jax.simulator import hardware as hardware_lib
from sarathi_jax.simulator import hosts
from sarathi_jax.simulator import operators

_NO_WINDOW = 1 << 60
# Bytes of a device that XLA, the CUDA context and workspaces take.
_RESERVED = 1.5e9
# EngineConfig.kv_cache_dtype -> dtype, where it has another name.
_DTYPES = {'auto': 'bfloat16', 'fp8': 'float8_e4m3fn'}


class CostModel:
  """A model on a group of devices.

  Args:
    model: the model's shape.
    hardware: what it runs on.
    tp: devices that share each layer.
    pp: pipeline stages, of tp devices each.
    host: see `hosts.Host`.
    kv_cache_dtype: see `EngineConfig`.

  Raises:
    ConfigError: tp or pp does not divide the model, or the hardware does not
      multiply what the model rounds.
  """

  def __init__(
    self,
    model: model_config_lib.ModelConfig,
    hardware: hardware_lib.Hardware,
    *,
    tp: int = 1,
    pp: int = 1,
    host: hosts.Host = hosts.HOSTS['none'],
    kv_cache_dtype: str = 'auto',
  ) -> None:
    config_lib.check(
      tp >= 1 and model.num_heads % tp == 0,
      'tp',
      tp,
      f'must divide num_heads={model.num_heads}',
    )
    config_lib.check(
      1 <= pp <= model.num_layers,
      'pp',
      pp,
      f'must be in [1, num_layers={model.num_layers}]',
    )
    rounded = model.quantization and model.quantization.activations
    config_lib.check(
      not rounded or hardware.fp8_flops is not None,
      'quantized_activations',
      rounded,
      f'{hardware.name} has no matrix units of fp8 (fp8_flops)',
    )
    # A second, of what multiplies codes.
    self._flops_of_codes = hardware.fp8_flops if rounded else None
    self.model = model
    self.hardware = hardware
    self.tp = tp
    self.pp = pp
    parallelism = parallel.Parallelism(tp=tp, pp=pp)
    # Each stage has room for these, with zeros in place of those it lacks.
    self._kept_layers = [
      next(i for i in parallelism.layers_of(model, index) if i is not None)
      for index in range(parallelism.num_layers(model))
    ]
    self.host = host
    self.kv_cache_dtype = kv_cache_dtype
    # Stages differ by a layer at most; the first ones have one more.
    self.stage_layers = [
      model.num_layers // pp + (s < model.num_layers % pp) for s in range(pp)
    ]
    self.num_heads = model.num_heads // tp
    self.num_kv_heads = -(-model.num_kv_heads // tp)
    # Bytes of a token's keys and values in a layer.
    self._token_bytes = attention_work.token_bytes(
      self.num_kv_heads,
      model.head_dim,
      _DTYPES.get(kv_cache_dtype, kv_cache_dtype),
    )
    # For each stage, the layers that attend to so many tokens and have the
    # matrices of this number.
    layers = range(model.num_layers)
    windows = [model.layer_window(i) or _NO_WINDOW for i in layers]
    of = [
      (model.layer_mlp(i), facts.layer_matrices(model, i, tp)) for i in layers
    ]
    distinct = list(dict.fromkeys(of))
    kinds = [(w, distinct.index(of[i])) for i, w in enumerate(windows)]
    ends = [0, *itertools.accumulate(self.stage_layers)]
    self._kinds = [
      Counter(kinds[start:stop]) for start, stop in itertools.pairwise(ends)
    ]
    self._all_kinds = dict.fromkeys(kinds)
    self._all_windows = set(windows)
    self._mlps = [mlp for mlp, _ in distinct]
    self._matrices = [matrices for _, matrices in distinct]
    self._tp_link = hardware.link_within(0, tp - 1)
    self._hop_links = [
      hardware.link_within((s + 1) * tp - 1, (s + 1) * tp)
      for s in range(pp - 1)
    ]
    self._num_sums = model.sums_per_layer if tp > 1 else 0
    self._launch_s = host.launch_s + self._num_sums * host.sum_s
    self._layer_s: list[dict[int, float]] = [{} for _ in distinct]
    self._head_s: dict[int, float] = {}

  def with_host(self, host: hosts.Host) -> CostModel:
    """Returns the same model with another host."""
    return self._on(self.hardware, host)

  def with_hardware(self, hardware: hardware_lib.Hardware) -> CostModel:
    """Returns the same model on other hardware."""
    return self._on(hardware, self.host)

  def _on(self, hardware: hardware_lib.Hardware, host: hosts.Host) -> CostModel:
    return CostModel(
      self.model,
      hardware,
      tp=self.tp,
      pp=self.pp,
      host=host,
      kv_cache_dtype=self.kv_cache_dtype,
    )

  def num_rows(self, num_tokens: int) -> int:
    """Returns the rows that a step computes, padding not counted."""
    return num_tokens

  def step_seconds(self, chunks: Iterable[types.Chunk]) -> list[float]:
    """Predicts what each stage takes, its send to the next included."""
    chunks = list(chunks)
    contexts = [c.start + 1 for c in chunks if c.num_tokens == 1]
    prefills = [c for c in chunks if c.num_tokens > 1]
    return self._stage_seconds(
      len(contexts) + sum(c.num_tokens for c in prefills),
      sum(c.samples for c in chunks),
      self._host_seconds(len(chunks), sum(contexts)),
      {
        window: (
          sum(map(min, contexts, itertools.repeat(window))),
          sum(
            self.chunk_seconds(c.num_tokens, min(c.start, window))
            for c in prefills
          ),
        )
        for window in self._all_windows
      },
    )

  def stage_seconds(
    self,
    tokens: int,
    rows: int,
    num_seqs: int,
    kv_tokens: int,
    prefill_s: float,
  ) -> list[float]:
    """Predicts what each stage takes, where all layers attend alike.

    Args:
      tokens: tokens of the batch.
      rows: rows that a token is sampled after.
      num_seqs: sequences of the batch.
      kv_tokens: contexts of the decodes, summed, tokens.
      prefill_s: one layer's attention of the chunks, seconds.
    """
    return self._stage_seconds(
      tokens,
      rows,
      self._host_seconds(num_seqs, kv_tokens),
      dict.fromkeys(self._all_windows, (kv_tokens, prefill_s)),
    )

  def chunk_seconds(self, tokens: int, before: int) -> float:
    """Predicts one layer's attention of a chunk after `before` tokens."""
    return float(
      operators.prefill_attention(
        self.hardware,
        tokens,
        before,
        self.num_heads,
        self.model.head_dim,
        self.host.appending,
      )
    )

  def _host_seconds(self, num_seqs: int, kv_tokens: int) -> float:
    host = self.host
    return (
      host.step_s
      + host.workers_s * (self.tp * self.pp > 1)
      + host.seq_s * num_seqs
      + host.context_s * kv_tokens
    )

  def _stage_seconds(
    self,
    tokens: int,
    rows: int,
    host_s: float,
    loads: Mapping[int, tuple[int, float]],
  ) -> list[float]:
    """Predicts as `stage_seconds`; `loads`: kv_tokens, prefill_s by window."""
    layer_s = {}
    for window, mlp in self._all_kinds:
      kv_tokens, prefill_s = loads[window]
      attention_s = operators.decode_attention(
        self.hardware, kv_tokens, self._token_bytes
      )
      calls = (kv_tokens > 0) + (prefill_s > 0)
      layer_s[window, mlp] = max(
        self.layer_seconds(tokens, mlp)
        + attention_s
        + prefill_s
        + calls * self.hardware.efficiencies.attention_s,
        self._launch_s,
      )
    seconds = [
      sum(n * layer_s[kind] for kind, n in kinds.items()) + host_s
      for kinds in self._kinds
    ]
    seconds[-1] += self.head_seconds(rows)
    for s, link in enumerate(self._hop_links):
      seconds[s] += operators.send(
        self.hardware, tokens * self.model.hidden_size * operators.BYTES, link
      )
    return seconds

  def layer_seconds(self, tokens: int, mlp: int = -1) -> float:
    """Predicts a layer without attention, for a batch of so many tokens.

    Args:
      tokens: of the batch.
      mlp: which of the model's MLPs it has, in the order of their first layers.
    """
    known = self._layer_s[mlp]
    if tokens not in known:
      known[tokens] = float(self._layer_seconds(tokens, mlp))
    return known[tokens]

  def head_seconds(self, rows: int) -> float:
    """Predicts the output matrix, for rows that a token is sampled after."""
    if rows not in self._head_s:
      self._head_s[rows] = (
        float(
          operators.matmul(
            self.hardware,
            rows,
            self.model.hidden_size,
            self.model.vocab_size / self.tp,
            self._head_bytes,
            self._flops_of(self._head_number_bytes),
          )
        )
        if rows
        else 0.0
      )
    return self._head_s[rows]

  def _layer_seconds(self, n: int, which: int = -1) -> float:
    hw, width = self.hardware, self.model.hidden_size
    seconds = 0.0
    for matrix in self._matrices[which]:
      # Of a mixture, each expert that is chosen sees its part of the tokens.
      experts = matrix.num_read(n)
      seconds += experts * operators.matmul(
        hw,
        n * matrix.used / experts,
        matrix.rows,
        matrix.columns,
        matrix.number_bytes or operators.BYTES,
        self._flops_of(matrix.number_bytes),
      )
    mlp = self._mlps[which]
    heads = (self.num_heads + self.num_kv_heads) * self.model.head_dim
    inner = (mlp.size * mlp.experts_per_token + mlp.shared_size) / self.tp
    numbers = [
      2 * heads,  # rotation
      (2 + mlp.is_gated) * inner,  # activation
      2 * 2 * self.num_kv_heads * self.model.head_dim,  # into the cache
      *[3 * width] * self.model.norms_per_layer,  # which read twice
    ]
    seconds += sum(
      operators.elementwise(hw, n * x * operators.BYTES) for x in numbers
    )
    if self._num_sums:
      seconds += self._num_sums * operators.all_reduce(
        hw, n * width * operators.BYTES, self.tp, self._tp_link
      )
      if numbers_summed := self.model.statistics_per_layer:
        seconds += operators.all_reduce(
          hw, 4 * n * numbers_summed, self.tp, self._tp_link
        )
    return float(seconds)

  @property
  def lockstep(self) -> bool:
    return self.host.lockstep

  @property
  def weight_bytes(self) -> float:
    """Bytes of weights on the device that has most of them."""
    layers = sum(
      facts.layer_bytes(self.model, i, operators.BYTES, self.tp)
      for i in self._kept_layers
    )
    vocab = self.model.vocab_size * self.model.hidden_size / self.tp
    number_bytes: float = operators.BYTES
    if self.pp == 1 and not self.model.tie_word_embeddings:
      # Else the embedding is on the first stage, the head on the last.
      number_bytes += self._head_bytes
    return layers + number_bytes * vocab

  @property
  def _head_bytes(self) -> float:
    """Bytes of a number of the output matrix."""
    return self._head_number_bytes or operators.BYTES

  @property
  def _head_number_bytes(self) -> float | None:
    """See `facts.number_bytes`."""
    if self.model.tie_word_embeddings:
      return None
    return facts.number_bytes(self.model, 'lm_head', self.model.hidden_size)

  def _flops_of(self, number_bytes: float | None) -> float | None:
    """Returns the rate of a matrix that may be quantized, if not 16 bits'."""
    return None if number_bytes is None else self._flops_of_codes

  @property
  def kv_token_bytes(self) -> int:
    """Bytes of a token's keys and values on the device that has most."""
    return len(self._kept_layers) * self._token_bytes

  def groups(
    self, config: config_lib.EngineConfig, max_model_len: int
  ) -> layer_groups.LayerGroups:
    """Returns the groups of layers of a deployment."""
    return layer_groups.of(
      self.model,
      parallel.Parallelism(tp=self.tp, pp=self.pp),
      max_model_len=max_model_len,
      page_size=config.page_size,
    )

  def num_pages(
    self,
    config: config_lib.EngineConfig,
    max_step_tokens: int,
    num_layers: int | None = None,
  ) -> int:
    """Returns how many pages of KV cache fit beside the weights.

    Args:
      config: of the engine.
      max_step_tokens: the most tokens of a step.
      num_layers: the layers of a group; None for all of a stage.

    Raises:
      ConfigError: not one page fits.
    """
    page = self._token_bytes * config.page_size
    page *= num_layers or len(self._kept_layers)
    room = config.cache_bytes(page)
    if room is None:
      # For one layer at a time: its input, its output and what is inside.
      inner = max(
        m.size * m.experts_per_token + m.shared_size for m in self._mlps
      )
      width = 4 * self.model.hidden_size + 2 * inner // self.tp
      room = int(
        self.hardware.memory_bytes * config.memory_utilization
        - self.weight_bytes
        - _RESERVED
        - max_step_tokens * width * operators.BYTES
      )
    left = self.hardware.memory_bytes - self.weight_bytes
    if room < page or room > left:
      raise errors.ConfigError(
        f'config: {self.weight_bytes / 1e9:.1f} GB of weights on each of '
        f'{self.tp * self.pp} {self.hardware.name} with '
        f'{self.hardware.memory_bytes / 1e9:.1f} GB leave no room for '
        f'{max(room, page) / 1e9:.3g} GB of KV cache; raise tp or pp, or '
        'take a larger device.'
      )
    return int(room // page)
