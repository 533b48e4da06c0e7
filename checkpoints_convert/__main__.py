# SPDX-License-Identifier: Apache-2.0
"""python -m checkpoints_convert"""

from checkpoints_convert import main

if __name__ == '__main__':
  main.run()
