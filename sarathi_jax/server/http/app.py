# SPDX-License-Identifier: Apache-2.0
"""The application that uvicorn serves: paths, tokens, errors in OpenAI's form.

POST /v1/chat/completions   POST /v1/completions
GET  /v1/models             GET  /v1/models/NAME
POST /tokenize              POST /detokenize
POST /v1/load_lora_adapter  POST /v1/unload_lora_adapter   administrators' own
GET  /health                the one that needs no token
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
import functools
import time
from typing import Any

from starlette import applications
from starlette import datastructures
from starlette import exceptions
from starlette import requests
from starlette import responses
from starlette import routing
from starlette import types as asgi

from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.server import adapters as adapters_lib
from sarathi_jax.server import frontend as frontend_lib
from sarathi_jax.server.guard import auth
from sarathi_jax.server.http import adapters as adapters_of_http
from sarathi_jax.server.http import chat
from sarathi_jax.server.http import completions
from sarathi_jax.server.http import errors as http_errors
from sarathi_jax.server.http import exchange as exchange_lib
from sarathi_jax.server.http import fields
from sarathi_jax.server.http import forms
from sarathi_jax.server.http import generation
from sarathi_jax.server.http import tokens as tokens_lib
from sarathi_jax.server.protocols import status

Exchange = exchange_lib.Exchange
_Answer = Callable[[Exchange], Awaitable[None]]
_OPEN = ('/health',)
_TOKEN = 'token'  # of a scope: the token that a request came with


def make(
  frontend: frontend_lib.Frontend,
  tokens: auth.Tokens | None,
  loader: adapters_lib.Loader | None = None,
) -> asgi.ASGIApp:
  """Makes the application.

  Args:
    frontend: serves.
    tokens: those that let clients in; None: everyone may.
    loader: of adapters, for administrators; None: nobody may load any.
  """

  def generate(form: forms.Form) -> _Answer:
    return lambda exchange: generation.answer(exchange, frontend, form)

  started = int(time.time())
  room = exchange_lib.Room(frontend.limits.max_bodies_mib * 2**20)
  routes: tuple[tuple[str, str, _Answer], ...] = (
    ('POST', chat.FORM.path, generate(chat.FORM)),
    ('POST', completions.FORM.path, generate(completions.FORM)),
    ('GET', '/v1/models', functools.partial(_models, frontend, started)),
    (
      'GET',
      '/v1/models/{name:path}',
      functools.partial(_model, frontend, started),
    ),
    (
      'POST',
      '/tokenize',
      functools.partial(tokens_lib.tokenize, frontend),
    ),
    (
      'POST',
      '/detokenize',
      functools.partial(tokens_lib.detokenize, frontend),
    ),
    ('GET', '/health', functools.partial(_health, frontend)),
    *(
      ('POST', path, functools.partial(change, frontend, loader))
      for path, change in adapters_of_http.CHANGES.items()
      if loader is not None
    ),
  )
  app = applications.Starlette(
    routes=[
      routing.Route(path, _Endpoint(answer, room), methods=[method])
      for method, path, answer in routes
    ],
    exception_handlers={exceptions.HTTPException: _refuse},
  )
  app.router.redirect_slashes = False
  return app if tokens is None else _Guarded(app, tokens)


class _Endpoint:
  """Answers at one path; whatever is raised becomes a response."""

  def __init__(self, answer: _Answer, room: exchange_lib.Room) -> None:
    self._answer, self._room = answer, room

  async def __call__(
    self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send
  ) -> None:
    exchange = Exchange(scope, receive, send, self._room, scope.get(_TOKEN))
    try:
      await self._answer(exchange)
    except asyncio.CancelledError:
      if not exchange.forgive():
        raise
    except Exception as error:
      if not isinstance(error, http_errors.HttpError):
        status.log_defect(error)
      told = http_errors.of(error, exchange.names)
      if exchange.has_begun:
        await exchange.write(generation.event_of_error(told.body), is_last=True)
      else:
        await exchange.reply(told.body, told.status, told.headers)


class _Guarded:
  """Lets those in who have a token; of others, nothing is read."""

  def __init__(self, app: asgi.ASGIApp, tokens: auth.Tokens) -> None:
    self._app, self._tokens = app, tokens

  async def __call__(
    self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send
  ) -> None:
    if scope['path'] not in _OPEN:
      said = datastructures.Headers(scope=scope).get('authorization', '')
      token = self._tokens.of_header(said)
      if token is None:
        room = exchange_lib.Room(0)  # nothing is read
        await Exchange(scope, receive, send, room, None).reply(
          http_errors.body_of(
            401,
            'needs a token that the server knows: "authorization: Bearer '
            'TOKEN".',
          ),
          401,
          {'www-authenticate': 'Bearer'},
        )
        return
      scope[_TOKEN] = token
    await self._app(scope, receive, send)


async def _refuse(
  request: requests.Request, error: Exception
) -> responses.Response:
  """Answers where there is no such path, or no such method."""
  assert isinstance(error, exceptions.HTTPException)
  message = (
    f'{request.method}: is not allowed at this path.'
    if error.status_code == 405
    else 'this path is not here.'
  )
  return responses.JSONResponse(
    http_errors.body_of(error.status_code, message),
    error.status_code,
    error.headers,
  )


async def _health(frontend: frontend_lib.Frontend, exchange: Exchange) -> None:
  await exchange.reply(
    {'status': frontend.state.value}, 200 if frontend.is_serving else 503
  )


def _described(
  info: engine_lib.EngineInfo, started: int, adapter: str | None = None
) -> dict[str, Any]:
  """Describes the model, or an adapter, whose parent it is; as vLLM does."""
  described = {
    'id': adapter or info.model_name,
    'object': 'model',
    'created': started,
    'owned_by': 'sarathi_jax',
    'max_model_len': info.max_model_len,
  }
  return described | ({'parent': info.model_name} if adapter else {})


async def _models(
  frontend: frontend_lib.Frontend, started: int, exchange: Exchange
) -> None:
  info = frontend.engine.info
  data = [_described(info, started, name) for name in (None, *info.adapters)]
  await exchange.reply({'object': 'list', 'data': data})


async def _model(
  frontend: frontend_lib.Frontend, started: int, exchange: Exchange
) -> None:
  info = frontend.engine.info
  exchange.names.add('model')
  adapter = fields.adapter_of(exchange.path_params['name'], info)
  await exchange.reply(_described(info, started, adapter))
