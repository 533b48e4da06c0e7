# SPDX-License-Identifier: Apache-2.0
"""python -m sarathi_jax.server"""

from sarathi_jax.server import main

main.run()
