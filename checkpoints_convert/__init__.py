# SPDX-License-Identifier: Apache-2.0
"""Converts a Hugging Face checkpoint to one that sarathi_jax reads.

python -m checkpoints_convert --source=DIR_OR_HUB_ID --target=DIR

1. `source.locate` finds the folder, `safetensors_reader` reads the headers.
2. `hf_config.read` turns config.json into a ModelConfig. It is a closed
   world: every attribute is used, ignored by name, or refused by name.
3. `rules.plan` matches tensors to parameters by a table per family: every
   tensor once, every parameter once, every shape checked.
4. `orbax_writer.write` streams the parameters, a few chunks at a time, into
   a folder beside the target, which gets its name when all is done.
"""
