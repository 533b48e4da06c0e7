# SPDX-License-Identifier: Apache-2.0
"""Keeps compiled steps, and finds them again without tracing.

JAX's own cache finds a program by its text, so each start has to trace and
lower every step to look for it: half a second of Python a size. Here a step is
found by all that determines its text: what it is made of, our code, JAX, XLA's
flags, and the machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import pickle
import sys
import tempfile
import threading
import types
from typing import Any
import zlib

from absl import logging
import jax
from jax._src.lib import xla_client  # JAX's cache asks it, too.
from jax.experimental import serialize_executable

from sarathi_jax.runner import source_hash

# Read now: a file that is edited later is not what runs here.
_SOURCE = source_hash.source_hash()
_VERSIONS = ('jax', 'jaxlib')
_TRACED = ('sarathi_jax.models', 'sarathi_jax.runner', 'pallas_kernels')
_CACHE_HIT = '/jax/compilation_cache/cache_hits'
# Parts of the names of JAX's settings that change no program.
_UNRELATED = ('cache', 'log')


class _Hits(threading.local):
  """How many programs JAX's own cache gave this thread."""

  count = 0

  def on_event(self, event: str, **unused: Any) -> None:
    self.count += event == _CACHE_HIT


_hits = _Hits()
jax.monitoring.register_event_listener(_hits.on_event)


@dataclasses.dataclass(frozen=True)
class Place:
  """The file that keeps one step.

  A bad file is no error: the step is compiled instead.

  Attributes:
    path: the file; None if the step is not kept.
    devices: the devices that the step runs on.
    is_writable: whether it may be written, or only read.
  """

  path: pathlib.Path | None
  devices: Sequence[jax.Device]
  is_writable: bool

  def load(self) -> jax.stages.Compiled | None:
    """Returns the step, ready to run; None if it is not there.

    Any thread may call it. As with JAX's cache, whoever can write to the folder
    can run code here.
    """
    if self.path is None or not self.path.exists():
      return None
    try:
      payload, in_tree, out_tree = pickle.loads(
        zlib.decompress(self.path.read_bytes())
      )
      return serialize_executable.deserialize_and_load(
        payload,
        in_tree,
        out_tree,
        backend=self.devices[0].client,
        execution_devices=self.devices,
      )
    except Exception as error:  # pickle's and XLA's have no common type.
      logging.warning(
        "%s: can't be loaded, so it is compiled anew: %s", self.path, error
      )
      return None

  def compile(
    self, step: jax.stages.Lowered, options: Mapping[str, Any]
  ) -> jax.stages.Compiled:
    """Compiles a step, and keeps it for the next start; any thread may.

    What JAX's cache had is not kept: XLA writes a program that it has read
    without some of its functions, and a step that is made of that fails.

    Args:
      step: the step.
      options: XLA's options by name, beside those of the environment.
    """
    num_hits = _hits.count
    compiled = step.compile(dict(options))
    if _hits.count == num_hits:
      self.save(compiled)
    return compiled

  def save(self, step: jax.stages.Compiled) -> None:
    """Keeps a step for the next start; any thread may call it."""
    if self.path is None or not self.is_writable:
      return
    try:
      whole = pickle.dumps(serialize_executable.serialize(step))
      _write(self.path, zlib.compress(whole, level=1))
    except Exception as error:  # A full disk, or what XLA can't serialize.
      logging.warning("%s: can't be kept: %s", self.path, error)


@dataclasses.dataclass(frozen=True)
class Kept:
  """Compiled steps in a folder.

  Attributes:
    folder: the folder; None if none are kept.
    is_writable: whether steps may be written, or only read.
  """

  folder: pathlib.Path | None
  is_writable: bool

  def place(self, facts: Any, devices: Sequence[jax.Device]) -> Place:
    """Returns where a step is kept; call it on the thread that would trace it.

    Args:
      facts: all that the step is made of; their `repr` tells steps apart.
      devices: the devices that it runs on.
    """
    if self.folder is None or _is_patched():
      return Place(None, devices, False)
    text = repr((facts, _surroundings(), _machine(devices)))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Place(self.folder / f'step-{digest[:32]}', devices, self.is_writable)


NOWHERE = Kept(None, False)


def _write(path: pathlib.Path, data: bytes) -> None:
  """Writes a file as a whole or not at all."""
  handle, name = tempfile.mkstemp(prefix='.step-', dir=path.parent)
  try:
    with open(handle, 'wb') as file:
      file.write(data)
    os.replace(name, path)
  except BaseException:
    os.unlink(name)
    raise


def _surroundings() -> list[Any]:
  """Returns what determines a step's text and code, beside its own facts."""
  return [
    _SOURCE,
    os.environ.get('XLA_FLAGS', ''),
    *(importlib.metadata.version(name) for name in _VERSIONS),
    *(
      item
      for item in sorted(jax.config.values.items())
      if not any(part in item[0] for part in _UNRELATED)
    ),
  ]


def _is_patched() -> bool:
  """Whether somebody replaced a function: our files don't tell what runs."""
  ours = (*source_hash.PACKAGES, 'typing')
  return any(
    isinstance(value, types.FunctionType)
    and value.__module__.partition('.')[0] not in ours
    for name, module in list(sys.modules.items())
    if name.startswith(_TRACED)
    for value in list(vars(module).values())
  )


def _machine(devices: Sequence[jax.Device]) -> list[Any]:
  """Returns facts of the devices, and a CPU's set of instructions."""
  topology = xla_client.get_topology_for_devices(list(devices))
  return [
    topology.fingerprint(),
    devices[0].client.platform_version,
    *((device.id, device.device_kind) for device in devices),
  ]
