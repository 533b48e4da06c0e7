# SPDX-License-Identifier: Apache-2.0
"""Offline runs, from the lines of the input to those of the output."""

from __future__ import annotations

import re

from sarathi_jax.in_process import progress
from tests import tokenizer_fixture
from tests.offline import runs

VOCAB, GOOD = runs.VOCAB, runs.GOOD


def test_the_format_of_results(run):
  run.write(
    {'prompt': 'The quick'},
    {
      'request_id': 'ids',
      'prompt_token_ids': [5, 6, 7],
      'sampling': {
        'max_tokens': 2,
        'temperature': 0.5,
        'top_k': 2,
        'logprobs': 3,
        'logprobs_mode': 'processed',
        'prompt_logprobs': 1,
      },
    },
    {'request_id': 'chat', 'messages': [{'role': 'user', 'content': 'Hi'}]},
    b'  ',
    {'prompt': 'Unic\u00f6de', 'sampling': None},
  )
  code, seen = run()
  assert code == 0
  results = {r['request_id']: r for r in run.results()}
  assert set(results) == {'line-1', 'ids', 'chat', 'line-5'}
  ids = results['ids']
  assert set(ids) == {
    'request_id',
    'prompt_token_ids',
    'token_ids',
    'logprobs',
    'text',
    'finish_reason',
    'stop_reason',
    'metrics',
    'told',
    'prompt_logprobs',
  }
  assert ids['prompt_token_ids'] == [5, 6, 7]
  assert len(ids['token_ids']) == len(ids['logprobs']) == 2
  assert all(x < 0 for x in ids['logprobs'])
  for at, token, logprob in zip(
    ids['told'], ids['token_ids'], ids['logprobs'], strict=True
  ):
    assert at['token_ids'][0] == token and at['logprobs'][0] == logprob
    assert at['logprobs'][3] == -9999  # of the third, which top_k drops
    assert at['rank'] in (1, 2)
  assert [at['token_ids'][0] for at in ids['prompt_logprobs']] == [6, 7]
  assert 'told' not in results['line-1']
  assert ids['finish_reason'] == 'length' and ids['stop_reason'] is None
  assert results['line-1']['prompt_token_ids'] == list(
    tokenizer_fixture.make().encode('The quick').ids
  )
  assert len(results['line-1']['token_ids']) == 5
  times = ids['metrics']
  assert times['num_prompt_tokens'] == 3
  assert times['num_output_tokens'] == 2
  assert 0 <= times['scheduling_delay_s'] <= times['ttft_s']
  assert times['ttft_s'] <= times['e2e_s']
  assert times['tpot_s'] > 0
  for words in ('4 in ', '17 tokens', 'TTFT', 'TBT', 'padding', 'preemptions'):
    assert words in seen
  assert 'errors' not in seen


def test_results_do_not_depend_on_order(run):
  """Though they are sampled, without a seed."""
  lines = [
    {'request_id': f'r{i}', 'prompt_token_ids': [i + 3] * (i + 1)}
    for i in range(9)
  ]
  run.write(*lines)
  assert run()[0] == 0
  first = runs.by_id(run.results())
  assert len({tuple(r['token_ids']) for r in first.values()}) == 9
  run.output.unlink()
  run.write(*reversed(lines))
  assert run()[0] == 0
  assert runs.by_id(run.results()) == first
  run.output.unlink()
  assert run('--seed=1')[0] == 0
  assert runs.by_id(run.results()) != first


def test_several_outputs_of_a_line_are_in_its_result(run):
  """And are found again, as one, by --resume."""
  lines = [
    {'request_id': 'n', 'prompt_token_ids': [5, 6], 'sampling': {'n': 3}},
    {'request_id': 'one', 'prompt_token_ids': [5, 6]},
  ]
  run.write(*lines)
  assert run()[0] == 0
  results = {r['request_id']: r for r in run.results()}
  several = results['n']
  assert set(several) == {'request_id', 'prompt_token_ids', 'outputs'}
  assert len(several['outputs']) == 3
  assert len({tuple(o['token_ids']) for o in several['outputs']}) == 3
  assert set(several['outputs'][0]) == (
    set(results['one']) - {'request_id', 'prompt_token_ids'}
  )
  before = run.output.read_bytes()
  assert run('--resume')[0] == 0
  assert run.output.read_bytes() == before
  run.output.unlink()
  run.write(lines[1])
  assert run('--n=2')[0] == 0
  (result,) = run.results()
  assert len(result['outputs']) == 2


def test_seeds_have_64_bits(run):
  seeds = [7, 7 + 2**32, 2**63 - 1, -(2**63), 7]
  run.write(
    *(
      {'prompt_token_ids': [5], 'sampling': {'seed': seed}}
      for seed in (*seeds, 2**63)
    )
  )
  assert run('--temperature=2')[0] == 0
  results = runs.by_id(run.results())
  tokens = [tuple(results[f'line-{i}', None]['token_ids']) for i in range(1, 6)]
  assert tokens[0] == tokens[4]
  assert len(set(tokens)) == 4
  assert 'seed=9223372036854775808: must be' in results['line-6', 6]['error']


def test_a_file_from_another_system(run):
  """A byte order mark, CRLF, no newline at the end, half a pair in an id."""
  run.prompts.write_bytes(
    b'\xef\xbb\xbf{"request_id": "\\ud800", "prompt_token_ids": [5]}\r\n'
    b'\r\n{"prompt_token_ids": [6]}'
  )
  assert run()[0] == 0
  assert {r['request_id'] for r in run.results()} == {'\ud800', 'line-3'}
  assert run('--resume')[0] == 0
  assert len(run.results()) == 2


def test_sampling_flags_are_for_lines_that_say_nothing_else(run):
  run.write(GOOD, {'sampling': {'max_tokens': 2}, **GOOD})
  assert (
    run(
      '--max_tokens=3',
      '--temperature=0',
      '--top_k=4',
      '--top_p=0.5',
      '--min_p=0.1',
      '--noignore_eos',
      '--stop=zzz',
    )[0]
    == 0
  )
  assert sorted(len(r['token_ids']) for r in run.results()) == [2, 3]


def test_an_empty_input(run):
  run.write()
  code, seen = run()
  assert code == 0 and run.results() == []
  assert '0 in ' in seen


def test_more_lines_than_the_engine_takes_at_once(run):
  run.write(*[{'prompt_token_ids': [i % VOCAB]} for i in range(60)])
  assert run('--max_tokens=2')[0] == 0
  assert len(runs.by_id(run.results())) == 60


def test_ids_may_be_integers_and_come_back_as_they_are(run):
  run.write(
    {'request_id': 7, **GOOD},
    {'request_id': '8', **GOOD},
    {'request_id': 8, **GOOD},
  )
  assert run()[0] == 0
  results = {r['request_id']: r for r in run.results() if 'error' not in r}
  assert results.keys() == {7, '8'}
  assert 'an earlier line' in next(
    r['error'] for r in run.results() if r['request_id'] == 8
  )
  assert run('--resume')[0] == 0
  assert len(run.results()) == 3
  run.output.unlink()  # They are sampled as texts of the same digits are.
  run.write({'request_id': '7', **GOOD})
  assert run()[0] == 0
  assert run.results()[0]['token_ids'] == results[7]['token_ids']


def test_null_in_sampling_is_not_said(run):
  run.write(
    {
      'sampling': {'temperature': None, 'stop': None, 'top_k': None},
      'request_id': 'a',
      **GOOD,
    }
  )
  assert run('--temperature=0', '--top_k=3')[0] == 0
  (first,) = run.results()
  run.output.unlink()
  run.write({'request_id': 'a', **GOOD})
  assert run('--temperature=0')[0] == 0
  assert run.results()[0]['token_ids'] == first['token_ids']


def test_where_there_is_no_terminal_a_line_tells_now_and_then(run, monkeypatch):
  monkeypatch.setattr(progress, 'FIRST_LINE_S', 0.0)
  monkeypatch.setattr(progress, 'LINE_S', 0.0)
  run.write(*[GOOD] * 9)
  code, seen = run()
  assert code == 0
  assert '0 of 9 lines are done' in seen
  assert re.search('[1-8] of 9 lines are done, [0-9,]+ tokens/s', seen)
