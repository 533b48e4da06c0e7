# SPDX-License-Identifier: Apache-2.0
"""Runs the server: `python -m sarathi_jax.server --helpshort`."""

from sarathi_jax.server import main

main.run()
