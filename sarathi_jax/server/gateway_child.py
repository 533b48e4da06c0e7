# SPDX-License-Identifier: Apache-2.0
"""Becomes the gateway, smg, as a line of JSON on standard input says.

  parent    who starts it, and whose end it does not outlive
  args      the arguments of `smg launch`
  key       the secret that alone opens smg's control plane

Nothing is on the command line, where every user of the machine could read it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1
# A request to /v1/responses may name any URL as one of its tools, and smg would
# connect to it, from where we are: of a proxy that can't be, nothing comes.
_NO_TOOLS = {
  'MCP_HTTP_PROXY': 'http://127.0.0.1:0',
  'MCP_HTTPS_PROXY': 'http://127.0.0.1:0',
  'MCP_NO_PROXY': '',
}
# It has the tokenizer from the servers; but of each chat it asks the hub for
# the model's config, too. That tells the hub which model is served, and how
# often; and where a network swallows such questions, each takes a minute.
_NO_HUB = {'HF_ENDPOINT': 'http://127.0.0.1:0'}


def main(told: dict[str, Any]) -> None:
  _end_with_parent(told['parent'])
  from smg import launch_router

  args = launch_router.parse_router_args(told['args'])
  if args.mcp_config_path is None:
    os.environ.update(_NO_TOOLS)
  if args.model_path is None and args.tokenizer_path is None:
    os.environ.update(_NO_HUB)
  args.control_plane_api_keys = [
    *args.control_plane_api_keys,
    ('sarathi', 'sarathi', told['key'], 'admin'),
  ]
  launch_router.launch_router(args)


def _end_with_parent(parent: int) -> None:
  if sys.platform == 'linux':  # SIGKILL: one that is stopped ends, too
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:
    sys.exit('the server that started this gateway is gone')


if __name__ == '__main__':
  main(json.loads(sys.stdin.readline()))
