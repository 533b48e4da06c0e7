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
## What is not modelled

- Its host: that of the paper (eager PyTorch, Ray, ZMQ) is two numbers: a
  launch cost a layer, which makes decodes as slow as the SLOs say that they
  are, and a cost a sequence of each step, chosen so that Sarathi's capacities
  in figures 10 and 12 come out as a whole. Decodes of its artifact, timed one
  by one, take up to twice as long as that.
- Its networks: Ethernet's latency is chosen to match figure 13's TP8. Traffic
  of others, congestion and retries are not there.
- The lengths of arXiv's trace, which is not public: they are drawn from a
  distribution with its quantiles. With --chat_trace, chats are the artifact's
  own requests, in their order; else drawn, too.
- Table 4 for arXiv: its rate, by the artifact's script, leaves 1.9 s to a
  request, of which a prompt of 7,490 tokens, the mean here, takes 1.6 s by the
  artifact's own table of prefills, before any decode. The paper's TTFT are
  those of a lower load, or of other prompts; we kept the script's.
- The A40s of LLaMA2-70B are taken to speak through the host's memory, at
  5.3 GB/s: so did those of the only tables there are (Vidur's), though the
  paper says pairs by NVLink.
- Mistral-7B's sliding window: that of v0.2 has none.
- Kernels of 2024 (cuBLAS, FlashAttention-2), not ours: what our kernels take
  is measured by scripts/gpu_check.
- Memory: blocks, fragmentation and activations by formula; no swapping.
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
