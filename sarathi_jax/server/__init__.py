# SPDX-License-Identifier: Apache-2.0
"""The gRPC server: `python -m sarathi_jax.server`. Loads no JAX by itself.

The life of a request:
  1. `service.SarathiService.Generate` turns the message into plain values;
  2. `frontend.Frontend.open` tokenizes, checks and submits them;
  3. `engine_thread.EngineThread` adds the request to the engine it owns, steps
     the engine, and hands what each step gained to the event loop at once;
  4. the service reads the request's `Stream` and writes messages;
  5. leaving `open`, by whatever way, aborts what has not finished.

Another protocol is another adapter like `service`, over the same frontend.
"""
