# SPDX-License-Identifier: Apache-2.0
"""Shows the paper's experiments side by side with ours, on a Markdown page.

  python -m sarathi_jax.simulator.report --output=DIR

Each experiment's rows are kept as JSON beside report.md, so that an
interrupted run goes on; --again simulates anew.
"""

from __future__ import annotations

from collections.abc import Sequence
import inspect
import json
import os
import pathlib
from typing import Any

from absl import app
from absl import flags
import rich.console

from sarathi_jax import json_file
from sarathi_jax.cli import mains
from sarathi_jax.simulator import experiments as experiments_lib
from sarathi_jax.simulator import hosts

FLAGS = flags.FLAGS

_HEAD = """\
# The experiments of Sarathi-Serve, simulated

Our scheduler and engine on a virtual clock, steps as long as the cost model
says, against what the paper measured (arXiv 2403.02310v3, read off its
figures). Rates are the paper's nominal ones: of 1.05 requests that came, it
counts 1. Capacities of few requests are a little too high: a queue takes time
to grow.
"""
_NOT_MODELLED = """\
## What is the software's

The device files have what hardware does. These are costs of the software that
the paper measured, and no hardware's (`hosts.HOSTS`):

- Steps wait for Python: 1.2 ms and 47 us for each sequence, and where several
  processes serve 6.8 ms for Ray's messages. Measured, by Vidur's tables of
  that engine's CPU time.
- Launches, one by one: 0.43 ms a layer, and 0.05 ms for each all-reduce. They
  bound steps of few decodes, which vLLM's and Orca's capacities come from.
- Each thread block of its attention (FlashAttention-2 with a paged cache)
  writes its chunk's keys and values to the cache, all blocks the same ones: a
  prompt of 4,096 tokens at once takes 3.4 times its arithmetic. Measured, by
  Vidur's table of that kernel. So does chunking cost less than it should.
- Decodes take 0.09 us longer for each token of their contexts than the kernel
  of Vidur's table. This one is fitted, to the chats of figure 10. That it goes
  by contexts is measured: steps of 32 sequences in figure 1 (prompts of arXiv)
  take 293 ms, those of figure 2 in the same artifact (1,024 tokens) 88 ms; ten
  times as much a token there as the paper's capacities allow. A cost of each
  sequence instead, fitted to chats, hid it: prompts of arXiv are three times
  as long, and Sarathi's batches of them came out too fast.

## What is not modelled

- What arXiv's prompts cost Sarathi beyond that. Capacities of Mistral-7B are
  too high there, where vLLM's and Orca's are not. It is not a sliding window:
  v0.2 has none, and that software's attention asks for none. It is not the
  cache's size: nothing is preempted, and the strict rows do not fill it. The
  artifact's figure 1 shows 128 of these prompts served at once. Its steps
  tell their number of tokens: some 9,000 a prompt, by the steps that prompts
  take, by the seconds of vLLM's prefills, and by how many fill the memory. The
  quantiles of the paper's table 2, which we draw lengths by, make 7,490 in the
  mean. We kept the table's. With prompts 1.2 times as long Sarathi has 0.65 and
  0.76 QPS there (paper: 0.62, 0.77), and vLLM 0.36 and 0.42 (0.44, 0.47).
- Its networks: Ethernet's latency is chosen to match figure 13's TP8. Traffic
  of others, congestion and retries are not there.
- The lengths of arXiv's trace, which is not public: they are drawn from a
  distribution with its quantiles. With --chat_trace, chats are the artifact's
  own requests, in their order; else drawn, too.
- Table 4 for arXiv: its rate, by the artifact's script, leaves 1.9 s to a
  request, of which a prompt of 7,490 tokens, the mean here, takes 1.6 s by the
  artifact's own table of prefills, before any decode. The paper's TTFT are
  those of a lower load, or of other prompts; we kept the script's.
- The A40s of LLaMA2-70B are pairs by NVLink, as the paper says: all-reduces
  among four reach 40 GB/s in Vidur's tables of 2023. Its table of May 2024
  shows 5 GB/s, without peer access, which the paper's capacities rule out: at
  0.82 QPS all-reduces and matmuls would take 1.3 times the time there was.
- Kernels of 2024 (cuBLAS, FlashAttention-2), not ours: what our kernels take
  is measured by scripts/gpu_check.
- Memory: blocks, fragmentation and activations by formula; no swapping.
- Its time limit, 30 minutes a run, after which requests do not count.
- Speculation, preemption by anything but recompute. No two prompts begin
  alike.
"""


def define_flags() -> None:
  flags.DEFINE_string(
    'output', None, 'Folder to write the report to.', required=True
  )
  flags.DEFINE_list(
    'experiments',
    list(experiments_lib.EXPERIMENTS),
    'Experiments to simulate and show.',
  )
  flags.DEFINE_string('configs', 'configs', "Folder of the deployments' files.")
  flags.DEFINE_integer('num_requests', 2048, 'Requests of each simulation.')
  flags.DEFINE_integer(
    'jobs', None, 'Processes that simulate at once. Default: as many as cores.'
  )
  flags.DEFINE_float('precision', 0.02, 'Relative precision of capacities.')
  flags.DEFINE_enum(
    'host',
    'paper',
    list(hosts.HOSTS),
    'What the host costs: as in the paper (eager PyTorch), as '
    "in its artifact's tables, or none.",
  )
  flags.DEFINE_string(
    'chat_trace',
    None,
    "File with the chat lengths of the paper's artifact: "
    'data/processed_traces/sharegpt_8k_filtered_stats_llama2_tokenizer.csv of '
    'its branch niyama_asplos2026. Default: lengths are drawn by their '
    'quantiles.',
  )
  flags.DEFINE_bool(
    'again', False, 'Simulate anew, even what was simulated before.'
  )


def _cell(value: Any) -> str:
  if value is None:
    return ''
  return f'{value:.3g}' if isinstance(value, float) else str(value)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
  """Makes a table; adds the ratio of columns 'paper x' and 'ours x'."""
  lines = []
  names = list(rows[0])
  pairs = [
    (n, n.replace('paper', 'ours', 1))
    for n in names
    if n.startswith('paper') and n.replace('paper', 'ours', 1) in names
  ]
  header = [*names, *(f'{ours} / paper' for _, ours in pairs)]
  lines.append(f'| {" | ".join(header)} |')
  lines.append(f'|{"---|" * len(header)}')
  for row in rows:
    cells = [_cell(row[n]) for n in names]
    for paper, ours in pairs:
      has_both = row[paper] and row[ours] is not None
      cells.append(f'{row[ours] / row[paper]:.2f}' if has_both else '')
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def main() -> None:
  known = experiments_lib.EXPERIMENTS
  if unknown := set(FLAGS.experiments) - set(known):
    raise app.UsageError(
      f'--experiments={",".join(sorted(unknown))}: must be '
      f'of {", ".join(known)}.'
    )
  console = rich.console.Console(highlight=False)
  folder = pathlib.Path(FLAGS.output)
  folder.mkdir(parents=True, exist_ok=True)
  settings = experiments_lib.Settings(
    configs=pathlib.Path(FLAGS.configs),
    num_requests=FLAGS.num_requests,
    jobs=FLAGS.jobs or os.cpu_count() or 1,
    precision=FLAGS.precision,
    host=FLAGS.host,
    chat_trace=FLAGS.chat_trace,
  )
  parts = [_HEAD]
  for name in FLAGS.experiments:
    path = folder / f'{name}.json'
    if FLAGS.again or not path.exists():
      with console.status(f'Simulating {name}'):
        rows = known[name](settings)
      path.write_text(
        json.dumps(
          {
            'num_requests': FLAGS.num_requests,
            'host': FLAGS.host,
            'chats': 'of the artifact' if FLAGS.chat_trace else 'drawn',
            'rows': rows,
          },
          indent=1,
        )
        + '\n'
      )
    kept = json_file.read(path)
    title = name.replace('_', ' ').capitalize()
    text = inspect.getdoc(known[name])
    how = f'Host costs: {kept["host"]}. Chats: {kept["chats"]}.'
    if 'ours QPS' in kept['rows'][0]:
      how = f'{kept["num_requests"]} requests a simulation. {how}'
    parts.append(f'## {title}\n\n{text}\n\n{how}\n\n{markdown(kept["rows"])}')
  parts.append(_NOT_MODELLED)
  (folder / 'report.md').write_text('\n'.join(parts))
  console.print(f'{folder / "report.md"}')


if __name__ == '__main__':
  mains.run(main, define_flags)
