# SPDX-License-Identifier: Apache-2.0
"""Every field of EngineConfig can be told by a flag, and by --config."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import os
import pathlib
import subprocess
import sys

from absl import flags as absl
import pytest

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax.cli import flags
from sarathi_jax.cli import sampling_flags
from tests import absl_flags

FIELDS = {f.name: f for f in dataclasses.fields(config_lib.EngineConfig)}
# Another value than the default for each; they fit together.
VALUES = dict(
  policy='vllm',
  token_budget=256,
  max_num_seqs=64,
  max_adjusted_seqs=9,
  grammars=False,
  max_model_len=100,
  page_size=16,
  num_pages=99,
  kv_cache_gib=0.5,
  memory_utilization=0.5,
  look_ahead=False,
  prefix_cache=False,
  prefix_cache_misses=True,
  cache_aware_window=8,
  max_loras=3,
  max_lora_rank=24,
  max_cpu_loras=5,
  short_prompt_share=0.5,
  tbt_slo_ms=50.0,
  ttft_slo_ms=700.0,
  batch_tbt_slo_ms=500.0,
  attention='xla',
  tp=2,
  expert_parallel=True,
  pp=4,
  seed=9,
  dtype='bfloat16',
  kv_cache_dtype='int8',
  quantized_activations='fp8',
  tool_parser='hermes',
  reasoning_parser='none',
)
APART = dict(deterministic=True)  # fits no target for the time between tokens


@pytest.fixture(scope='module', autouse=True)
def _flags() -> Iterator[None]:
  with absl_flags.defined(flags.define_engine_flags):
    yield


def config_of(*args: str) -> config_lib.EngineConfig:
  absl_flags.parse('--cache_dir=', *args)
  config = flags.engine_config_from_flags()
  assert config.compilation_cache_dir is None
  return dataclasses.replace(config, compilation_cache_dir='auto')


def write(folder: pathlib.Path, text: str) -> str:
  path = folder / 'deployment.py'
  path.write_text(text)
  return str(path)


def test_every_field_has_a_flag():
  # The cache of compiled steps is in --cache_dir, with what else is kept.
  assert {*VALUES, *APART} == set(FIELDS) - {'compilation_cache_dir'}
  for name in (*VALUES, *APART):
    assert absl.FLAGS[name].help


def test_defaults_are_those_of_the_config():
  assert config_of() == config_lib.EngineConfig()
  for name, value in (VALUES | APART).items():
    assert value != FIELDS[name].default, name


def test_flags_set_fields():
  for values in (VALUES, APART):
    args = [f'--{name}={value}' for name, value in values.items()]
    assert config_of(*args) == config_lib.EngineConfig(**values)


def test_flags_override_the_config_file(tmp_path):
  path = write(
    tmp_path,
    """
from sarathi_jax import config
def get_config():
  return config.EngineConfig(policy='orca', token_budget=300, seed=5)
""",
  )
  assert config_of(f'--config={path}') == config_lib.EngineConfig(
    policy='orca', token_budget=300, seed=5
  )
  # A flag at a default's value is a flag given.
  assert config_of(f'--config={path}', '--policy=sarathi', '--seed=0') == (
    config_lib.EngineConfig(token_budget=300)
  )


def test_compiled_steps_are_kept_in_the_cache_dir(tmp_path):
  absl_flags.parse(f'--cache_dir={tmp_path}')
  config = flags.engine_config_from_flags()
  assert config.compilation_cache_dir == str(tmp_path / 'compiled')
  absl_flags.parse('--cache_dir=~/kept')
  config = flags.engine_config_from_flags()
  assert config.compilation_cache_dir == os.path.expanduser('~/kept/compiled')


def test_a_config_files_own_cache_is_left_to_it(tmp_path):
  path = write(
    tmp_path,
    """
from sarathi_jax import config
def get_config():
  return config.EngineConfig(compilation_cache_dir='/elsewhere')
""",
  )
  absl_flags.parse(f'--config={path}', f'--cache_dir={tmp_path}')
  config = flags.engine_config_from_flags()
  assert config.compilation_cache_dir == '/elsewhere'


@pytest.mark.parametrize(
  'name', ['quickstart', 'quickstart.py', 'configs/quickstart.py']
)
def test_a_config_of_the_package_is_found_from_anywhere(
  name, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  assert config_of(f'--config={name}').max_num_seqs == 16
  with pytest.raises(
    errors.ConfigError,
    match=r'no such file, nor one of the '
    r'package: .*yi_34b_a100_tp2',
  ):
    config_of('--config=elsewhere/quickstart.py')


@pytest.mark.parametrize(
  'args,words',
  [
    (['--policy=fifo'], ["policy='fifo'", 'sarathi, vllm, orca']),
    (
      ['--token_budget=8', '--max_num_seqs=9'],
      ['token_budget=8', 'max_num_seqs=9'],
    ),
    (['--page_size=0'], ['page_size=0', '>= 1']),
    (['--kv_cache_gib=nan'], ['kv_cache_gib=nan']),
    (['--memory_utilization=1.5'], ['memory_utilization=1.5', '(0, 1]']),
    (['--config=/no/such/file.py'], ['/no/such/file.py', 'no such file']),
  ],
)
def test_what_cant_work_is_refused(args, words):
  with pytest.raises(errors.ConfigError) as caught:
    config_of(*args)
  for word in words:
    assert word in str(caught.value)


@pytest.mark.parametrize(
  'text,words',
  [
    ('', ['must define get_config()']),
    ('get_config = 3', ['must define get_config()']),
    (
      """
from sarathi_jax import config
def get_config(): return config.EngineConfig()
def get_model(): return 7
""",
      ['get_model() must return ModelConfig, not 7'],
    ),
    (
      """
from sarathi_jax import config
DEVICE = 7
def get_config(): return config.EngineConfig()
""",
      ['DEVICE must be a name', 'not 7'],
    ),
    ('def get_config(): return {}', ['must return EngineConfig, not {}']),
    ('def get_config(:', ['SyntaxError', 'line 1']),
    ('import no_such_module', ['ModuleNotFoundError', 'line 1']),
    (
      'x = 1\ndef get_config():\n  return {}["key"]',
      ['KeyError', "'key'", 'line 3'],
    ),
    (
      """
from sarathi_jax import config
def get_config(): return config.EngineConfig(token_budget=1)
""",
      ['token_budget=1', 'max_num_seqs=128'],
    ),
  ],
)
def test_a_wrong_config_file_is_refused(tmp_path, text, words):
  path = write(tmp_path, text)
  with pytest.raises(errors.ConfigError) as caught:
    config_of(f'--config={path}')
  for word in words:
    assert word in str(caught.value)
  assert '\n' not in str(caught.value)


def test_flags_load_no_jax():
  """So a wrong one is told at once."""
  code = (
    'import sys; from sarathi_jax.cli import flags; '
    'assert "jax" not in sys.modules'
  )
  root = pathlib.Path(__file__).parents[2]
  subprocess.run([sys.executable, '-c', code], check=True, cwd=root)


def processes_of(*args):
  absl_flags.parse(*args)
  return flags.processes_from_flags()


def test_a_single_process_joins_nothing():
  assert processes_of() is None


def test_what_several_processes_are_told():
  assert processes_of('--distributed', '--join_timeout_s=5') == dict(
    coordinator_address=None,
    num_processes=None,
    process_id=None,
    join_timeout_s=5.0,
  )
  assert processes_of(
    '--coordinator_address=a:1',
    '--num_processes=2',
    '--process_id=1',
    '--join_key_file=key',
  ) == dict(
    coordinator_address='a:1',
    num_processes=2,
    process_id=1,
    join_key_file='key',
  )


@pytest.mark.parametrize(
  'args,words',
  [
    (['--join_timeout_s=5'], ['join_timeout_s=5.0', 'several processes']),
    (['--join_key_file=x'], ['join_key_file=', 'several processes']),
    (['--distributed', '--join_timeout_s=0'], ['join_timeout_s=0.0', '> 0']),
    (['--distributed', '--join_timeout_s=nan'], ['join_timeout_s=nan']),
    (['--num_processes=2', '--process_id=2'], ['process_id=2', 'below']),
  ],
)
def test_processes_that_cant_be_are_refused(args, words):
  with pytest.raises(errors.ConfigError) as caught:
    processes_of(*args)
  for word in words:
    assert word in str(caught.value)


@pytest.mark.parametrize('value', ['', '{', '[' * 200_000, '[]', '\udcff'])
def test_a_flag_that_is_an_object(value: str) -> None:
  parser = sampling_flags._JsonParser()
  assert parser.parse('{"regex": "a"}') == {'regex': 'a'}
  with pytest.raises(ValueError):  # absl names the flag.
    parser.parse(value)


def test_adapters_have_names():
  with absl_flags.defined(flags.define_adapter_flags):
    absl_flags.parse('--cache_dir=')
    assert flags.adapters_from_flags() == {}
    absl_flags.parse('--cache_dir=', '--lora_modules=a=/x=y,b=org/name')
    assert flags.adapters_from_flags() == {'a': '/x=y', 'b': 'org/name'}
    for text in ('a', 'a=', '=x', 'a=x,a=y'):
      absl_flags.parse('--cache_dir=', f'--lora_modules={text}')
      with pytest.raises(errors.ConfigError, match=r'lora_modules=.*NAME=PATH'):
        flags.adapters_from_flags()
    absl_flags.parse('--cache_dir=', '--lora_modules=a=x', '--distributed')
    with pytest.raises(errors.ConfigError, match='max_loras=None: must be sa'):
      flags.adapters_from_flags()
