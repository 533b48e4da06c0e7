# SPDX-License-Identifier: Apache-2.0
"""Runs lm_eval on local tasks: MODEL MODEL_ARGS FOLDER TASK... [--chat].

Prints JSON: task -> the responses to each of its documents, and its numbers.
Runs in lm_eval's own environment.
"""

import json
import sys

import lm_eval
from lm_eval import tasks

model, args, folder, *names = sys.argv[1:]
is_chat = '--chat' in names
got = lm_eval.simple_evaluate(
  model=model,
  model_args=json.loads(args),
  tasks=[name for name in names if name != '--chat'],
  task_manager=tasks.TaskManager(include_path=folder),
  batch_size=2,
  device='cpu',
  bootstrap_iters=0,
  log_samples=True,
  apply_chat_template=is_chat,
)
print(
  json.dumps(
    {
      name: {
        'responses': [
          sample['filtered_resps']
          for sample in sorted(samples, key=lambda sample: sample['doc_id'])
        ],
        'numbers': {
          metric: value
          for metric, value in got['results'][name].items()
          if isinstance(value, float)
        },
      }
      for name, samples in got['samples'].items()
    }
  )
)
