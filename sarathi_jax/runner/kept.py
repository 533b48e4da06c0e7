# SPDX-License-Identifier: Apache-2.0
"""Steps that were compiled, found again without being traced.

JAX's own cache finds a program by its text, so each start has to trace and
lower every step to look for it: half a second of Python a size. Here a step is
found by all that its text follows from: what it is of, our code, JAX, XLA's
flags, and the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import pickle
import sys
import tempfile
import types
from typing import Any
import zlib

from absl import logging
import jax
from jax._src.lib import xla_client  # JAX's cache asks it, too.
from jax.experimental import serialize_executable

from sarathi_jax import source_hash

# Now: a file that is edited later is not what runs here.
_SOURCE = source_hash.source_hash()
_VERSIONS = ('jax', 'jaxlib')
_TRACED = ('sarathi_jax.models', 'sarathi_jax.runner', 'pallas_kernels')
# Parts of the names of JAX's settings that change no program.
_UNRELATED = ('cache', 'log')


@dataclasses.dataclass(frozen=True)
class Place:
  """Where one step is kept.

  What is wrong with a file is no error: the step is compiled.

  Attributes:
    path: None for nowhere.
    devices: what it runs on.
    is_writable: whether it is kept, or only found.
  """

  path: pathlib.Path | None
  devices: Sequence[jax.Device]
  is_writable: bool

  def load(self) -> jax.stages.Compiled | None:
    """The step, ready to run, if it is there; any thread.

    As with JAX's cache, who can write to the folder can run code here.
    """
    if self.path is None or not self.path.exists():
      return None
    try:
      payload, in_tree, out_tree = pickle.loads(
        zlib.decompress(self.path.read_bytes()))
      return serialize_executable.deserialize_and_load(
        payload, in_tree, out_tree, backend=self.devices[0].client,
        execution_devices=self.devices)
    except Exception as error:  # Neither pickle's nor XLA's have a type.
      logging.warning('%s: can\'t be loaded, so it is compiled anew: %s',
                      self.path, error)
      return None

  def save(self, step: jax.stages.Compiled) -> None:
    """Keeps a step for the next start; any thread."""
    if self.path is None or not self.is_writable:
      return
    try:
      whole = pickle.dumps(serialize_executable.serialize(step))
      _write(self.path, zlib.compress(whole, level=1))
    except Exception as error:  # A full disk, or what XLA can't serialize.
      logging.warning('%s: can\'t be kept: %s', self.path, error)


@dataclasses.dataclass(frozen=True)
class Kept:
  """Compiled steps in a folder.

  Attributes:
    folder: None: none are kept.
    is_writable: whether steps are kept, or only found.
  """

  folder: pathlib.Path | None
  is_writable: bool

  def place(self, facts: Any, devices: Sequence[jax.Device]) -> Place:
    """Where a step is; to be asked on the thread that would trace it.

    Args:
      facts: what it is made of; others have another `repr`.
      devices: what it runs on.
    """
    if self.folder is None or _is_patched():
      return Place(None, devices, False)
    text = repr((facts, _surroundings(), _machine(devices)))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Place(
      self.folder / f'step-{digest[:32]}', devices, self.is_writable)


NOWHERE = Kept(None, False)


def _write(path: pathlib.Path, data: bytes) -> None:
  """Writes a file as a whole, or not at all."""
  handle, name = tempfile.mkstemp(prefix='.step-', dir=path.parent)
  try:
    with open(handle, 'wb') as file:
      file.write(data)
    os.replace(name, path)
  except BaseException:
    os.unlink(name)
    raise


def _surroundings() -> list[Any]:
  """What decides how a step is traced and compiled, beside what it is of."""
  return [
    _SOURCE, os.environ.get('XLA_FLAGS', ''),
    *(importlib.metadata.version(name) for name in _VERSIONS),
    *(item for item in sorted(jax.config.values.items())
      if not any(part in item[0] for part in _UNRELATED))]


def _is_patched() -> bool:
  """Whether somebody replaced a function: our files don't tell what runs."""
  ours = (*source_hash.PACKAGES, 'typing')
  return any(
    isinstance(value, types.FunctionType)
    and value.__module__.partition('.')[0] not in ours
    for name, module in list(sys.modules.items()) if name.startswith(_TRACED)
    for value in list(vars(module).values()))


def _machine(devices: Sequence[jax.Device]) -> list[Any]:
  """The devices, and, of a processor, what instructions it has."""
  topology = xla_client.get_topology_for_devices(list(devices))
  return [topology.fingerprint(), devices[0].client.platform_version,
          *((device.id, device.device_kind) for device in devices)]
