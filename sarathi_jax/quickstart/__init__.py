# SPDX-License-Identifier: Apache-2.0
"""A tiny language model that comes with the engine, and how it was trained.

`MODEL` is its folder, a Hugging Face checkpoint; `scripts/serve` serves it.
`train` makes such a folder, and samples through the engine while it trains: it
is an example of the engine inside a JAX program.
"""

import pathlib

MODEL = pathlib.Path(__file__).parent / 'model'
