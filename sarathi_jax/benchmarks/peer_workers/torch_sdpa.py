# SPDX-License-Identifier: Apache-2.0
"""Times torch's scaled_dot_product_attention, for `gpu.attention`.

Reads JSON lines, {"point", "rows", "q_len", "kv_len", "num_heads",
"num_kv_heads", "head_dim", "dtype"}; answers {"point", "us"} or "absent".
With the argument `gpu` it won't time on a CPU. Each sequence's keys and values
are contiguous: it knows no pages.
"""

import json
import statistics
import sys
import time
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import bias


def seconds(run: Any, device: str, at_least: float = 0.02) -> float:
  """Returns the median seconds of a call, of many that are queued."""

  def many(calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
      run()
    if device == 'cuda':
      torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls

  many(2)
  calls = max(1, round(at_least / max(many(1), 1e-6)))
  return statistics.median(many(calls) for _ in range(7))


def measure(spec: dict[str, Any], device: str) -> float:
  """Returns the seconds of one call."""
  kv_heads, kv_len = spec['num_kv_heads'], spec['kv_len']
  q, k, v = (
    torch.randn(
      spec['rows'],
      heads,
      length,
      spec['head_dim'],
      device=device,
      dtype=getattr(torch, spec['dtype']),
    )
    for heads, length in (
      (spec['num_heads'], spec['q_len']),
      (kv_heads, kv_len),
      (kv_heads, kv_len),
    )
  )
  options: dict[str, Any] = dict(
    enable_gqa=spec['num_heads'] != kv_heads,
    is_causal=1 < spec['q_len'] == kv_len,
  )
  if 1 < spec['q_len'] < kv_len:
    options['attn_mask'] = bias.causal_lower_right(spec['q_len'], kv_len)
  with torch.inference_mode():
    return seconds(
      lambda: functional.scaled_dot_product_attention(q, k, v, **options),
      device,
    )


def main() -> None:
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  if sys.argv[1:] == ['gpu'] and device == 'cpu':
    sys.exit('torch sees no GPU')
  print(json.dumps({'torch': torch.__version__, 'device': device}), flush=True)
  for line in sys.stdin:
    spec = json.loads(line)
    answer: dict[str, Any] = {'point': spec['point']}
    try:
      answer['us'] = measure(spec, device) * 1e6
    except Exception as error:  # The comparison is a guest.
      answer['absent'] = f'{type(error).__name__}: {error}'[:300]
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()
