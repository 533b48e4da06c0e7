# SPDX-License-Identifier: Apache-2.0
"""python -m pallas_kernels.aot"""

from pallas_kernels.aot import main

if __name__ == '__main__':
  main.run()
