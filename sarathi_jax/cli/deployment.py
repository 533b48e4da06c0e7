# SPDX-License-Identifier: Apache-2.0
"""Reads a file of configs/: what to serve, how, and on what. No JAX.

  DEVICE = 'a100'                     # optional: the GPU that it is made for

  def get_config() -> EngineConfig    # how to serve
  def get_model() -> ModelConfig      # optional: the shapes of the model

To serve, only `get_config` counts: the checkpoint says what the model is, and
the machine what its devices are. Memory plans and simulations need the rest.
"""

from __future__ import annotations

import dataclasses
import pathlib
import runpy
import traceback
from typing import Any, NoReturn

from sarathi_jax import config as config_lib
from sarathi_jax import errors
from sarathi_jax.models import config as model_config_lib

# Where they are once installed, and in a clone.
_SHIPPED = tuple(
  folder / 'configs' for folder in pathlib.Path(__file__).parents[1:3]
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
  """What a file of configs/ says.

  Attributes:
    path: the file's.
    config: the engine's.
    model: the shape of the model that it is made for, if it says.
    device: the name of the GPU that it is made for, if it says: 'a100',
      'a40', 'h100'.
  """

  path: str
  config: config_lib.EngineConfig
  model: model_config_lib.ModelConfig | None = None
  device: str | None = None

  @property
  def name(self) -> str:
    return pathlib.Path(self.path).stem

  def known_model(self) -> model_config_lib.ModelConfig:
    """Returns the model, for programs that need one.

    Raises:
      ConfigError: the file does not say.
    """
    if self.model is None:
      _fail(self.path, 'must define get_model(), for there is no checkpoint')
    return self.model


def read(path: str) -> Deployment:
  """Runs a file of configs/.

  Args:
    path: the file's, or the name of one that comes with the package.

  Raises:
    ConfigError: there is no such file, it fails, or what it says can't work.
  """
  path = _find(path)
  try:
    names = runpy.run_path(path)
  except errors.SarathiError:
    raise
  except Exception as error:  # It may raise what it likes.
    _fail_at(path, error)
  config = _call(path, names, 'get_config', config_lib.EngineConfig)
  if config is None:
    _fail(path, 'must define get_config()')
  device = names.get('DEVICE')
  if not isinstance(device, str | None):
    _fail(path, f"DEVICE must be a name such as 'a100', not {device!r}")
  return Deployment(
    path=path,
    config=config,
    device=device,
    model=_call(path, names, 'get_model', model_config_lib.ModelConfig),
  )


def _find(path: str) -> str:
  given = pathlib.Path(path)
  if given.is_file():
    return path
  shipped = {
    file.stem: file
    for folder in _SHIPPED
    for file in sorted(folder.glob('*.py'))
  }
  if (
    given.parent.name in ('', 'configs')
    and not given.is_absolute()
    and (file := shipped.get(given.name.removesuffix('.py')))
  ):
    return str(file)
  _fail(path, f'no such file, nor one of the package: {", ".join(shipped)}')


def _call(path: str, names: dict[str, Any], name: str, kind: type) -> Any:
  """Returns what a function of the file returns; None if there is none."""
  function = names.get(name)
  if function is None:
    return None
  if not callable(function):
    _fail(path, f'must define {name}()')
  try:
    value = function()
  except errors.SarathiError:
    raise
  except Exception as error:
    _fail_at(path, error)
  if not isinstance(value, kind):
    _fail(path, f'{name}() must return {kind.__name__}, not {value!r}')
  return value


def _fail_at(path: str, error: Exception) -> NoReturn:
  line = traceback.extract_tb(error.__traceback__)[-1]
  where = f' (line {line.lineno})' if line.filename == path else ''
  _fail(path, f'{type(error).__name__}: {error}{where}')


def _fail(path: str, problem: str) -> NoReturn:
  raise errors.ConfigError(f'config={path!r}: {problem}.')
