# SPDX-License-Identifier: Apache-2.0
"""Adapters come and go, as over vLLM's paths of these names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sarathi_jax import errors
from sarathi_jax.server import adapters as adapters_lib
from sarathi_jax.server import frontend as frontend_lib
from sarathi_jax.server.http import exchange as exchange_lib
from sarathi_jax.server.http import fields

_LOAD: Mapping[str, fields.Kind] = {
  'load_inplace': fields.FLAG,
  'lora_name': fields.TEXT,
  'lora_path': fields.TEXT,
}
_UNLOAD: Mapping[str, fields.Kind] = {'lora_name': fields.TEXT}


async def load(
  frontend: frontend_lib.Frontend,
  loader: adapters_lib.Loader,
  exchange: exchange_lib.Exchange,
) -> None:
  """Loads what a body names.

  Raises:
    HttpError, SarathiError: it can't.
  """
  own = await _read(frontend, exchange, _LOAD)
  name = own.get('lora_name', '')
  await loader.load(
    name,
    own.get('lora_path', ''),
    replace=own.get('load_inplace', False),
    fields=('lora_name', 'lora_path'),
  )
  await exchange.reply(
    {'message': f'Success: LoRA adapter {name!r} added successfully.'}
  )


async def unload(
  frontend: frontend_lib.Frontend,
  loader: adapters_lib.Loader,
  exchange: exchange_lib.Exchange,
) -> None:
  """Unloads what a body names.

  Raises:
    HttpError, SarathiError: it can't.
  """
  own = await _read(frontend, exchange, _UNLOAD)
  name = own.get('lora_name', '')
  await loader.unload(name)
  await exchange.reply(
    {'message': f'Success: LoRA adapter {name!r} removed successfully.'}
  )


async def _read(
  frontend: frontend_lib.Frontend,
  exchange: exchange_lib.Exchange,
  known: Mapping[str, fields.Kind],
) -> dict[str, Any]:
  if not exchange.is_admin:
    raise errors.ForbiddenError("adapters: need an administrator's token.")
  body, _ = await exchange.read(frontend.limits)
  return fields.only(body, known)


# Path -> what it does.
CHANGES = {
  '/v1/load_lora_adapter': load,
  '/v1/unload_lora_adapter': unload,
}
