# SPDX-License-Identifier: Apache-2.0
"""The server: `python -m sarathi_jax.server`. Loads no JAX by itself.

The life of a request:
  1. `auth.Interceptor` looks for a token, if that is asked;
  2. `sarathi_v1.SarathiService.Generate`, or another protocol's method, turns
     the message into plain values;
  3. `frontend.Frontend.open` tokenizes, checks and submits them;
  4. `admission.Queue` refuses the request, or has it wait for its turn;
  5. `engine_thread.EngineThread` adds it to the engine it owns, steps the
     engine, and hands what each step gained to the event loop at once;
  6. the service reads the request's `outbox.Stream` and writes messages;
  7. leaving `open`, by whatever way, aborts what has not finished, and tells
     the observers (`telemetry`) how it ended.

Another protocol is another adapter, over the same frontend; OpenAI's HTTP is
one, `http`.
"""
