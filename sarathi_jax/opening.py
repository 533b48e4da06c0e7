# SPDX-License-Identifier: Apache-2.0
"""Opens a checkpoint: a converted one, or one of Hugging Face.

The latter are converted once, and found again by the path, names, sizes and
times of their files. The converter takes seconds to import, so it is imported
only when there is something to convert.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import hashlib
import pathlib
from typing import Any
import warnings

from checkpoints_convert import changes
from sarathi_jax import checkpoint
from sarathi_jax import errors
from sarathi_jax.checkpoint import whole_folder
from sarathi_jax.models import config as config_lib

OnModel = Callable[[config_lib.ModelConfig], object]
Say = Callable[[str], object]  # A line, for people.
# Makes a progress bar of a title and a number of bytes; the block's value is
# called with the bytes just done.
Bar = Callable[
  [str, int], contextlib.AbstractContextManager[Callable[[int], Any]]
]


def _warn(line: str) -> None:
  warnings.warn(line, RuntimeWarning, stacklevel=4)


def open_checkpoint(
  path_or_hub_id: checkpoint.PathLike,
  cache_dir: checkpoint.PathLike,
  *,
  convert: bool = True,
  sampling_defaults: bool = True,
  allow_nonfinite: bool = False,
  bar: Bar | None = None,
  on_model: OnModel = lambda model: None,
) -> checkpoint.Checkpoint:
  """Opens a checkpoint, converted or Hugging Face's.

  Warns if an older version of the converter made a converted checkpoint.

  Args:
    path_or_hub_id, cache_dir, sampling_defaults, allow_nonfinite, bar,
      on_model: see `resolve`.
    convert: whether to convert one of Hugging Face once, into `cache_dir`; if
      not, parts of its tensors are read as they are needed, and only its
      tokenizer is kept.

  Raises:
    CheckpointError: there is none, it is damaged, or it is not supported.
  """
  folder = pathlib.Path(path_or_hub_id)
  if convert or (folder / checkpoint.METADATA).is_file():
    opened = checkpoint.open_converted(
      resolve(
        path_or_hub_id,
        cache_dir,
        bar,
        on_model,
        sampling_defaults=sampling_defaults,
        allow_nonfinite=allow_nonfinite,
      )
    )
    if not sampling_defaults:
      opened = opened._replace(
        metadata=dataclasses.replace(opened.metadata, generation={})
      )
    _warn_of_older(opened)
    return opened
  from checkpoints_convert import direct
  from checkpoints_convert import source
  from checkpoints_convert import tokenizer_files

  origin = source.locate(str(path_or_hub_id))
  params = direct.DirectParams(
    origin, sampling_defaults=sampling_defaults, allow_nonfinite=allow_nonfinite
  )
  if params.left_out:
    _warn(params.left_out)
  kept = _kept(pathlib.Path(cache_dir, 'tokenizers'), origin)
  if not kept.is_dir():
    whole_folder.make(kept, functools.partial(tokenizer_files.write, origin))
  return checkpoint.Checkpoint(params.metadata, params, kept)


def resolve(
  path_or_hub_id: checkpoint.PathLike,
  cache_dir: checkpoint.PathLike,
  bar: Bar | None = None,
  on_model: OnModel = lambda model: None,
  say: Say = _warn,
  *,
  sampling_defaults: bool = True,
  allow_nonfinite: bool = False,
) -> pathlib.Path:
  """Returns the folder of a converted checkpoint, converting it if need be.

  Waits while another process converts the same checkpoint, and takes over if
  that one ends before it is done.

  Args:
    path_or_hub_id: a converted checkpoint, which is returned as it is; or a
      Hugging Face folder, or hub id, which is converted once.
    cache_dir: the folder that keeps converted checkpoints.
    bar: makes a progress bar, if something is to be converted; see `Bar`.
    on_model: called with the model to convert; may raise to refuse it.
    say: called with a line for people when this waits for another process,
      when an older version's conversion is not used, or when a part of the
      model is not converted. Warns by default.
    sampling_defaults: whether to keep the sampling that its makers recommend;
      if not, none of it is refused.
    allow_nonfinite: whether weights may be NaN or infinite.

  Raises:
    CheckpointError: there is no such checkpoint, or it can't be converted.
  """
  folder = pathlib.Path(path_or_hub_id)
  if (folder / checkpoint.METADATA).is_file():
    return folder
  if folder.is_dir() and not (folder / 'config.json').is_file():
    raise errors.CheckpointError(
      f'{folder}: neither a converted checkpoint, with {checkpoint.METADATA}, '
      'nor one of Hugging Face, with config.json.'
    )
  from checkpoints_convert import source

  origin = source.locate(str(path_or_hub_id))
  target = _kept(pathlib.Path(cache_dir), origin)
  _tell_of_older(pathlib.Path(cache_dir), origin, say)
  if not sampling_defaults and not target.is_dir():
    # This conversion lacks what others may want, so it has another name.
    target = target.with_name(f'{target.name}-nosampling_defaults')
  if not (target / checkpoint.METADATA).is_file():
    _convert(
      str(path_or_hub_id),
      origin,
      target,
      on_model=on_model,
      say=say,
      bar=bar,
      sampling_defaults=sampling_defaults,
      allow_nonfinite=allow_nonfinite,
    )
  found = checkpoint.load_metadata(target).source.get('nonfinite')
  if found and not allow_nonfinite:  # An earlier caller allowed them.
    from checkpoints_convert import transforms

    raise transforms.nonfinite_error(found)
  return target


def _convert(
  name: str,
  origin: pathlib.Path,
  target: pathlib.Path,
  *,
  on_model: OnModel,
  say: Say,
  bar: Bar | None,
  **options: Any,
) -> None:
  """Converts a checkpoint, or waits for another process that does."""
  from checkpoints_convert import convert
  from checkpoints_convert import hf_config
  from checkpoints_convert import staging

  has_waited = False
  while not (target / checkpoint.METADATA).is_file():
    on_model(hf_config.read(origin)[0])
    try:
      plan = convert.convert(
        origin, target, bar=bar or convert.no_bar, **options
      )
      if plan.left_out:
        say(plan.left_out)
    except staging.BusyError:
      if not has_waited:
        has_waited = True
        say(
          f'Another process converts {name} into {target}; waiting for it ...'
        )
      staging.wait_for_other(target)
    except errors.CheckpointError:
      # Another may have made it meanwhile.
      if not (target / checkpoint.METADATA).is_file():
        raise


def _warn_of_older(opened: checkpoint.Checkpoint) -> None:
  """Warns of what a checkpoint lacks, if an older version converted it."""
  version = changes.version_of(opened.metadata.source)
  if not (changed := changes.since(version)):
    return
  from checkpoints_convert import generation

  dropped = ''
  try:
    generation.read(opened.folder, {})
  except errors.CheckpointError as error:
    dropped = f' Of it was dropped: {error}'
  _warn(
    f'{opened.folder}: was converted by version {version} of the '
    f'converter; since then, {changed}. The weights are the same. To have '
    f'the rest, convert it again.{dropped}'
  )


def _tell_of_older(
  cache_dir: pathlib.Path, origin: pathlib.Path, say: Say
) -> None:
  """Says which older conversions are not used, if one is made anew."""
  if _kept(cache_dir, origin).is_dir():
    return
  for version in range(1, changes.VERSION):
    older = _kept(cache_dir, origin, version)
    if older.is_dir():
      say(
        f'{origin} is converted anew: since {older} was made, '
        f'{changes.since(version)}. That folder is not used any more.'
      )


def _kept(
  cache_dir: pathlib.Path, origin: pathlib.Path, version: int = changes.VERSION
) -> pathlib.Path:
  """Returns the folder for a version's conversion of a checkpoint."""
  facts = [str(origin)]
  for path in sorted(origin.iterdir()):
    if path.is_file():
      status = path.stat()
      facts.append(f'{path.name} {status.st_size} {status.st_mtime_ns}')
  if version > 1:  # The first version's names had no number.
    facts.append(f'version {version}')
  key = hashlib.sha256('\n'.join(facts).encode()).hexdigest()[:16]
  return cache_dir / f'{origin.name}-{key}'
