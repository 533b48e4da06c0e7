# SPDX-License-Identifier: Apache-2.0
"""README's example of an embedded engine does what README says of it."""

from __future__ import annotations

import ast
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

from sarathi_jax import checkpoint
from sarathi_jax import models
from sarathi_jax.in_process import background
from sarathi_jax.in_process import trees
from tests import source_tree

SECTION = (
  (source_tree.ROOT / 'README.md')
  .read_text()
  .partition('## Embed it')[2]
  .partition('\n## ')[0]
)
EXAMPLE, TREE, TABLE, THREAD = re.findall('```python\n(.*?)```', SECTION, re.S)
SIZES = 'token_budget=128, max_num_seqs=16'


def test_it_stops_where_the_model_does_and_keeps_what_it_compiled(
  tmp_path: pathlib.Path,
) -> None:
  assert SIZES in EXAMPLE
  environ = {
    k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'
  }
  environ |= {'HOME': str(tmp_path), 'PYTHONPATH': str(source_tree.ROOT)}
  done = subprocess.run(
    # Quicker to compile by far: a step of one size, and none beside it.
    [
      sys.executable,
      '-c',
      EXAMPLE.replace(
        SIZES,
        'token_budget=8, max_num_seqs=8, max_adjusted_seqs=0, grammars=False',
      ),
    ],
    cwd=tmp_path,
    env=environ,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  greedy, *rollouts = done.stdout.splitlines()
  assert greedy.startswith(
    'Return the number of items in a container. FinishReason.STOP'
  )
  texts = [text for line in rollouts for text in ast.literal_eval(line)]
  assert len(texts) == 8 and all(len(text) < 200 for text in texts)
  kept = tmp_path / '.cache' / 'sarathi_jax' / 'compiled'
  assert any(name.startswith('jit_run-') for name in os.listdir(kept))
  model = checkpoint.load_metadata(
    next((tmp_path / 'checkpoints').glob('*/sarathi.json')).parent
  ).model
  specs: Any = models.param_specs(model)
  shapes = ast.literal_eval(TREE.replace(', ...]', ']'))
  assert shapes['layers'][0]['attn'] == {
    name: spec.shape for name, spec in specs['layers'][0]['attn'].items()
  }
  assert shapes['embed'] == specs['embed'].shape
  assert shapes.keys() == specs.keys()
  assert shapes['layers'][0].keys() == specs['layers'][0].keys()


def test_a_table_is_of_leaves_that_can_be_read() -> None:
  names: dict[str, Any] = {}
  exec(TABLE, names)
  *leaves, rest = names['layout']
  assert rest is ... and all(isinstance(leaf, trees.Leaf) for leaf in leaves)
  for leaf in leaves:
    assert set(''.join(leaf.groups)) <= set(''.join(leaf.source))


def test_a_thread_has_the_methods_that_are_called() -> None:
  called = re.findall(r'rollouts\.(\w+)', THREAD)
  assert len(called) > 3
  assert all(hasattr(background.Background, name) for name in called)
