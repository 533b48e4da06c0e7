# SPDX-License-Identifier: Apache-2.0
"""Workloads: when requests come, and how long they are.

Lengths come from a trace, or are drawn from distributions with the quantiles
that the paper prints (table 2). Arrivals are Poisson, gamma (bursty), the
trace's own, or those of the paper's artifact: gaps are cut at three times their
mean, so that its load is 5 % above what it says. Everything comes from one
seed, so that two rates differ in nothing but the rate.

Requests may be the turns of chats (`chats`): then lengths are those of what a
turn adds, and it is chats that arrive; a turn comes some time after the answer
before it.
"""

from __future__ import annotations

from collections.abc import Mapping
import csv
import dataclasses
import math
import pathlib
import random
from typing import Any

import numpy as np
import numpy.typing as npt

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax import types
from sarathi_jax.simulator import chats as chats_lib
from sarathi_jax.simulator import lengths as lengths_lib

ARRIVALS = ('poisson', 'gamma', 'trace', 'artifact')
# Longer ones are slips of whoever made the trace.
MAX_LENGTH = 10_000_000
_COLUMNS = ('num_prefill_tokens', 'num_decode_tokens')

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


SOURCES = (
  f'Where lengths come from: {", ".join(lengths_lib.DATASETS)} (the first two '
  f"are the paper's), or a CSV with {', '.join(_COLUMNS)} and maybe arrived_at."
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadConfig:
  """What a workload is asked to be.

  Attributes:
    source: a name in `lengths.DATASETS`, or the path of a trace: a CSV with
      columns num_prefill_tokens, num_decode_tokens and maybe arrived_at
      (seconds).
    num_requests: number of requests; None for all of a trace, 2048 of a
      dataset.
    arrivals: one of `ARRIVALS`; 'artifact' with seed 42, and a trace of the
      paper's artifact, has the same requests come as there.
    qps: mean requests a second; None for a trace's own pace.
    cv: the coefficient of variation of gamma's gaps; 1 is Poisson.
    length_scale: what lengths are multiplied by, for small models.
    batch_share: the part of requests that are of the tier 'batch', in [0, 1].
    turns: the mean number of turns of a chat, which varies as that of throws
      of a die until a certain side shows; 1 for requests that have nothing to
      do with each other.
    think_s: the mean time between an answer and the next turn, seconds; varies
      as the gaps of a Poisson process.
    system_len: tokens that the prompts of all chats begin with.
    max_chat_len: the most tokens of a chat; it ends before.
    seed: the seed of everything random.
  """

  source: str = 'openchat_sharegpt4'
  num_requests: int | None = None
  arrivals: str = 'poisson'
  qps: float | None = 1.0
  cv: float = 2.0
  length_scale: float = 1.0
  batch_share: float = 0.0
  turns: float = 1.0
  think_s: float = 10.0
  system_len: int = 0
  max_chat_len: int = 8192
  seed: int = 0

  def __post_init__(self) -> None:
    config_lib.check(
      self.source in lengths_lib.DATASETS
      or pathlib.Path(self.source).is_file(),
      'workload',
      self.source,
      f'must be one of {", ".join(lengths_lib.DATASETS)}, or a CSV file',
    )
    config_lib.check_fields(self, _RULES)
    config_lib.check(
      self.qps is not None or self.arrivals == 'trace',
      'qps',
      self.qps,
      'must be given unless arrivals=trace',
    )
    config_lib.check(
      not self.has_chats or self.arrivals in ('poisson', 'gamma'),
      'arrivals',
      self.arrivals,
      'chats (turns > 1, or system_len) can arrive by poisson or gamma only',
    )
    config_lib.check(
      self.system_len < self.max_chat_len - 1,
      'system_len',
      self.system_len,
      f'leaves nothing of max_chat_len={self.max_chat_len}',
    )

  @property
  def has_chats(self) -> bool:
    return self.turns > 1 or self.system_len > 0


_RULES: Mapping[str, config_lib.Rule] = {
  'arrivals': config_lib.one_of(ARRIVALS),
  'num_requests': config_lib.or_none(
    (lambda value: value >= 1, 'must be >= 1')
  ),
  'qps': config_lib.or_none(config_lib.POSITIVE),
  'cv': config_lib.POSITIVE,
  'length_scale': config_lib.POSITIVE,
  'batch_share': (lambda value: 0 <= value <= 1, 'must be in [0, 1]'),
  'turns': (lambda value: value >= 1, 'must be >= 1'),
  'think_s': (lambda value: value >= 0, 'must be seconds >= 0'),
  'system_len': (lambda value: value >= 0, 'must be >= 0'),
  'max_chat_len': (lambda value: value >= 2, 'must be >= 2'),
  'seed': (lambda value: value >= 0, 'must be >= 0'),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
  """The requests that arrive, in order.

  Attributes:
    arrived_at: [n] seconds from the start, not decreasing; of a later turn of a
      chat, when it would come if answers took no time.
    prompt_lens: [n] tokens, at least 1; of all of a chat so far.
    output_lens: [n] tokens, at least 1.
    is_batch: [n] whether each is of the tier 'batch'.
    chats: who comes after whom; None where requests have nothing to do with
      each other.
  """

  arrived_at: Floats
  prompt_lens: Ints
  output_lens: Ints
  is_batch: npt.NDArray[np.bool_]
  chats: chats_lib.Chats | None = None

  def __len__(self) -> int:
    return len(self.arrived_at)

  @property
  def qps(self) -> float:
    """Requests a second, from the first arrival to the last.

    Of chats it is how many begin a second, by how many turns each has.
    """
    first = self._first
    span = float(first[-1] - first[0])
    per_first = len(self) / len(first)
    return (len(first) - 1) / span * per_first if span else math.inf

  @property
  def _first(self) -> Floats:
    """Arrivals of what comes after nothing."""
    if self.chats is None:
      return self.arrived_at
    return self.arrived_at[self.chats.after < 0]

  def at_rate(self, qps: float) -> Workload:
    """Returns the same requests in the same rhythm, at another mean rate.

    Nobody thinks faster: only chats begin faster or more slowly.
    """
    if not math.isfinite(self.qps):
      return self
    scale = self.qps / qps
    if self.chats is None:
      return dataclasses.replace(
        self, arrived_at=(self.arrived_at - self.arrived_at[0]) * scale
      )
    first = self._first
    arrived_at, order = self.chats.arrivals((first - first[0]) * scale)
    return dataclasses.replace(
      self,
      arrived_at=arrived_at[order],
      prompt_lens=self.prompt_lens[order],
      output_lens=self.output_lens[order],
      is_batch=self.is_batch[order],
      chats=self.chats.ordered(order),
    )

  def sampling(self, i: int) -> types.SamplingParams:
    """Returns greedy sampling of exactly the workload's output length."""
    return types.SamplingParams(
      temperature=0, ignore_eos=True, max_tokens=int(self.output_lens[i])
    )

  def tier(self, i: int) -> str:
    """Returns the tier of a request; see `types.Request`."""
    return types.TIERS[int(self.is_batch[i])]


def check_fits(workload: Workload, max_model_len: int) -> None:
  """Raises ConfigError if a server can't serve such requests."""
  longest = int((workload.prompt_lens + workload.output_lens).max())
  if longest > max_model_len:
    raise errors.ConfigError(
      f'workload: a request of {longest} tokens, prompt and output, exceeds '
      f"the server's max_model_len={max_model_len}; a --length_scale "
      f'below {max_model_len / longest:.3g} makes them shorter.'
    )


def make(config: WorkloadConfig) -> Workload:
  """Makes the workload that a configuration describes, always the same.

  Raises:
    ConfigError: a trace lacks a column, or has lengths that can't be.
  """
  # Streams of their own, so that no length depends on the arrivals.
  length_rng, arrival_rng, tier_rng = (
    np.random.default_rng([config.seed, i]) for i in range(3)
  )
  own: Floats | None = None
  if config.source in lengths_lib.DATASETS:
    n = config.num_requests or 2048
    prompt, output = lengths_lib.DATASETS[config.source].draw(length_rng, n)
  else:
    prompt, output, own = read_trace(config.source)
    n = config.num_requests or len(prompt)
    is_order_given = config.arrivals in ('trace', 'artifact')
    config_lib.check(
      n <= len(prompt) or not is_order_given,
      'num_requests',
      n,
      f'the trace has {len(prompt)} requests; arrivals={config.arrivals} can '
      'have no more',
    )
    if config.arrivals == 'artifact':  # As pandas shuffles.
      order = np.random.RandomState(config.seed).permutation(len(prompt))
      prompt, output = prompt[order], output[order]
    if n != len(prompt) and not is_order_given:
      chosen = length_rng.choice(len(prompt), n, replace=n > len(prompt))
      prompt, output = prompt[chosen], output[chosen]
    prompt, output = prompt[:n], output[:n]
  if config.length_scale != 1:
    prompt, output = (
      (x * config.length_scale).round().astype(np.int64).clip(1)
      for x in (prompt, output)
    )
  chats, num_first = None, n
  if config.has_chats:
    chats, prompt, output = chats_lib.make(
      np.random.default_rng([config.seed, 3]),
      prompt,
      output,
      turns=config.turns,
      think_s=config.think_s,
      system_len=config.system_len,
      max_len=config.max_chat_len,
    )
    num_first = int((chats.after < 0).sum())
  workload = Workload(
    arrived_at=_arrivals(config, num_first, own, arrival_rng),
    prompt_lens=prompt,
    output_lens=output,
    is_batch=tier_rng.random(n) < config.batch_share,
    chats=chats,
  )
  if chats is not None:
    # Arrivals are those of chats so far; this adds those of turns.
    assert config.qps is not None
    first = workload.arrived_at
    return dataclasses.replace(
      workload, arrived_at=chats.arrivals(first)[0]
    ).at_rate(config.qps)
  is_rescaled = config.arrivals == 'trace' and config.qps is not None
  return workload.at_rate(config.qps or 1) if is_rescaled else workload


def _arrivals(
  config: WorkloadConfig, n: int, own: Floats | None, rng: np.random.Generator
) -> Floats:
  if config.arrivals == 'trace':
    config_lib.check(
      own is not None,
      'arrivals',
      config.arrivals,
      f'workload={config.source!r} has no column arrived_at',
    )
    assert own is not None
    since: Floats = own[:n] - own[0]
    return since
  assert config.qps is not None
  if config.arrivals == 'artifact':  # To the last bit.
    draw = random.Random(config.seed).random
    return (
      np.cumsum([min(-math.log(1 - draw()), 3.0) for _ in range(n)])
      / config.qps
    )
  # The exponential is the gamma distribution of shape 1.
  shape = 1 / config.cv**2 if config.arrivals == 'gamma' else 1.0
  return np.cumsum(rng.gamma(shape, 1 / shape, n)) / config.qps


def read_trace(path: str) -> tuple[Ints, Ints, Floats | None]:
  """Reads prompt lengths, output lengths and arrivals (None without) of a CSV.

  Raises:
    ConfigError: the file is not such a trace.
  """

  def fail(where: str, value: Any, rule: str) -> None:
    config_lib.check(False, f'{path}: {where}', value, rule)

  try:
    with open(path, newline='') as file:
      reader = csv.DictReader(file)
      columns = reader.fieldnames or []
      for name in _COLUMNS:
        if name not in columns:
          fail('columns', list(columns), f'{name} is missing')
      rows = list(reader)
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise errors.ConfigError(f'workload={path!r}: {error}.') from error
  if not rows:
    fail('rows', 0, 'a trace has at least one request')
  lengths = np.empty((2, len(rows)), np.int64)
  arrived = np.empty(len(rows))
  for i, row in enumerate(rows):
    for j, name in enumerate(_COLUMNS):
      value = _number(row[name])
      if not (value.is_integer() and 1 <= value <= MAX_LENGTH):
        fail(
          f'line {i + 2}: {name}',
          row[name],
          f'must be an integer in [1, {MAX_LENGTH}]',
        )
      lengths[j, i] = int(value)
    if 'arrived_at' in columns:
      arrived[i] = _number(row['arrived_at'])
      if not math.isfinite(arrived[i]) or arrived[i] < arrived[max(i - 1, 0)]:
        fail(
          f'line {i + 2}: arrived_at',
          row['arrived_at'],
          'must be seconds, none before the line above',
        )
  return (lengths[0], lengths[1], arrived if 'arrived_at' in columns else None)


def _number(text: str | None) -> float:
  try:
    return float(text or '')
  except ValueError:
    return math.nan
