# SPDX-License-Identifier: Apache-2.0
"""Compares a converted checkpoint with what it was made from, bit by bit."""

from __future__ import annotations

import pathlib

from checkpoints_convert import convert
from checkpoints_convert import safetensors_reader
from sarathi_jax import checkpoint


def verify(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Raises CheckpointError if a parameter of `target` differs, by name."""
  metadata = checkpoint.load_metadata(target)
  with safetensors_reader.Reader(folder) as reader:
    plan = convert.make_plan(
      folder, reader, metadata.dtype, sampling_defaults=False
    )
    assert plan.model == metadata.model
    convert.compare(plan, target, reader, convert.no_bar)
