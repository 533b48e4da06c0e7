# SPDX-License-Identifier: Apache-2.0
"""One table of what goes wrong and the status it has, over every protocol.

Where vLLM's gRPC server has a status for it, ours is the same; where it has
none (a hint when to try again), ours says more. `overload` is
RESOURCE_EXHAUSTED, which its gateway tries again and then answers with 429.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
from typing import Any

import grpc
import numpy as np
import pytest
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc

from sarathi_jax.server import open_inference_pb2 as oip
from sarathi_jax.server import sarathi_pb2 as pb
from sarathi_jax.server.protocols import open_inference
from sarathi_jax.server.queue import admission
from tests.server import fake

_CODE = grpc.StatusCode


def _sarathi(
  running: fake.RunningServer, ids: list[int], **sampling: Any
) -> Any:
  return running.stub.Generate(
    pb.GenerateRequest(
      token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingParams(**sampling)
    ),
    timeout=fake.TIMEOUT_S,
  )


def _vllm(running: fake.RunningServer, ids: list[int], **sampling: Any) -> Any:
  stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(running.channel)
  return stub.Generate(
    vllm.GenerateRequest(
      tokenized=vllm.TokenizedInput(input_ids=ids),
      sampling_params=vllm.SamplingParams(**sampling),
    ),
    timeout=fake.TIMEOUT_S,
  )


def _open_inference(
  running: fake.RunningServer, ids: list[int], **sampling: Any
) -> Any:
  request = oip.ModelInferRequest(model_name='counting')
  request.inputs.add(
    name='input_ids',
    datatype='INT64',
    shape=[len(ids)],
    contents=oip.InferTensorContents(int64_contents=ids),
  )
  for name, value in sampling.items():
    if name == 'stop':
      request.inputs.add(
        name='stop',
        datatype='BYTES',
        shape=[len(value)],
        contents=oip.InferTensorContents(
          bytes_contents=[s.encode() for s in value]
        ),
      )
    else:
      kind = 'int64_param' if isinstance(value, int) else 'double_param'
      setattr(request.parameters[name], kind, value)
  # A stream of one response, so that all protocols are read alike.
  return running.channel.unary_stream(
    f'/{open_inference.NAME}/ModelInfer',
    oip.ModelInferRequest.SerializeToString,
    oip.ModelInferResponse.FromString,
  )(request, timeout=fake.TIMEOUT_S)


PROTOCOLS = (_sarathi, _vllm, _open_inference)


def _end(call: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
  with contextlib.suppress(grpc.RpcError):
    list(call)
  return call.code(), call.details(), dict(call.trailing_metadata())


# What is asked -> what the message must name.
BAD = (
  ([1], {'temperature': -1.0}, 'temperature'),
  ([1], {'temperature': float('nan')}, 'temperature'),
  ([1], {'temperature': float('inf')}, 'temperature'),
  ([1], {'top_p': -0.5}, 'top_p'),
  ([1], {'top_p': 1.5}, 'top_p'),
  ([1], {'min_p': 1.5}, 'min_p'),
  ([1], {'max_tokens': 0}, 'max_tokens'),
  ([1], {'stop': ['']}, 'stop'),
  ([1], {'logprobs': 21}, 'logprobs=21'),
  ([], {}, 'empty'),
  ([64], {}, '64'),
  ([2**31 - 1], {}, str(2**31 - 1)),
  ([1] * 128, {}, 'max_model_len=128'),
  ([1] * 5000, {}, 'max_model_len=128'),
)


@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize('ids, sampling, says', BAD)
def test_a_bad_request(
  server: fake.RunningServer,
  protocol: Any,
  ids: list[int],
  sampling: dict[str, Any],
  says: str,
) -> None:
  code, details, _ = _end(protocol(server, ids, **sampling))
  assert code is _CODE.INVALID_ARGUMENT and says in details


def _logprobs(response: Any) -> list[float]:
  match response:
    case pb.GenerateResponse():
      return list(response.logprobs)
    case vllm.GenerateResponse():
      return list(response.complete.output_logprobs.token_logprobs)
  output = [o.name for o in response.outputs].index('logprobs')
  return np.frombuffer(
    response.raw_output_contents[output], np.float32
  ).tolist()


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_the_sampled_tokens_log_probabilities(
  gated: Callable[..., Any], protocol: Any
) -> None:
  running, runner = gated()
  sampled = runner.fetch
  runner.open()
  runner.fetch = lambda pending: sampled(pending)._replace(
    logprobs=[(-0.5 * token,) for (token,) in pending.tokens]
  )
  call = protocol(running, [1], max_tokens=3, logprobs=0)
  assert [p for r in call for p in _logprobs(r)] == [-1.0, -1.5, -2.0]


@pytest.mark.parametrize(
  'protocol, seed',
  [
    (_sarathi, 2**63 - 1),
    (_sarathi, -(2**63)),
    (_open_inference, 2**63 - 1),
    (_vllm, 1 - 2**31),
    (_sarathi, -1),
    (_vllm, -1),
    (_open_inference, -1),
  ],
)
def test_a_seed_reaches_the_device_whole(
  gated: Callable[..., Any], protocol: Any, seed: int
) -> None:
  running, runner = gated()
  seeds: list[int] = []
  launch = runner.launch

  def spy(batch: Any) -> Any:
    seeds.extend(chunk.seed for chunk in batch.chunks)
    return launch(batch)

  runner.launch = spy
  runner.open()
  call = protocol(running, [1], max_tokens=1, seed=seed)
  assert _end(call)[0] is _CODE.OK
  if seed == -1:  # as in vLLM: one is drawn
    assert seeds[0] >= 0
  else:
    assert seeds == [seed]


def _reason(response: Any) -> str:
  """Why it ended; '' before."""
  match response:
    case pb.GenerateResponse():
      if not response.HasField('finished'):
        return ''
      reason = pb.FinishReason.Name(response.finished.finish_reason)
      return reason.removeprefix('FINISH_REASON_').lower()
    case vllm.GenerateResponse():
      return str(response.complete.finish_reason)
  output = [o.name for o in response.outputs].index('finish_reason')
  return bytes(response.raw_output_contents[output][4:]).decode()


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_logits_that_are_not_finite(
  gated: Callable[..., Any], protocol: Any
) -> None:
  """An end with a reason, after the tokens until there; others go on."""
  running, runner = gated()
  sampled = runner.fetch
  runner.open()
  runner.fetch = lambda pending: sampled(pending)._replace(
    logprobs=[
      (float('nan') if token == 4 else -1.0,) for (token,) in pending.tokens
    ]
  )
  bad, good = (
    protocol(running, [i], max_tokens=3, logprobs=0) for i in (1, 10)
  )
  for call, num_tokens, reason in ((bad, 2, 'error'), (good, 3, 'length')):
    responses = list(call)
    assert [p for r in responses for p in _logprobs(r)] == [-1.0] * num_tokens
    assert [r for r in map(_reason, responses) if r] == [reason]
  runner.fetch = sampled
  running.assert_nothing_is_left()


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_beyond_the_context_is_cut_there(
  server: fake.RunningServer, protocol: Any
) -> None:
  call = protocol(server, [1] * 120, max_tokens=1000)
  assert _end(call)[0] is _CODE.OK


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_overload(gated: Callable[..., Any], protocol: Any) -> None:
  running, runner = gated(
    max_num_seqs=1, config={'limits': admission.Limits(max_waiting=1)}
  )
  calls = []
  for i in range(2):
    calls.append(protocol(running, [1], max_tokens=2))
    running.wait_until_open(i + 1)
    if not i:
      runner.let(1)
      fake.wait_until(
        lambda: not running.server.frontend.engine_thread.num_queued
      )
  code, details, trailing = _end(protocol(running, [1], max_tokens=2))
  assert code is _CODE.RESOURCE_EXHAUSTED and 'max_waiting=1' in details
  assert int(trailing['grpc-retry-pushback-ms']) > 0
  runner.open()
  assert [_end(call)[0] for call in calls] == [_CODE.OK] * 2


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_a_failed_step(gated: Callable[..., Any], protocol: Any) -> None:
  running, runner = gated()
  runner.fault = RuntimeError('a step failed')
  runner.open()
  code, details, _ = _end(protocol(running, [1], max_tokens=2))
  assert code is _CODE.INTERNAL and 'RuntimeError' in details
  assert running.is_alive()


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_a_dead_engine(gated: Callable[..., Any], protocol: Any) -> None:
  running, runner = gated()
  runner.fault, runner.is_gone = RuntimeError('a step failed'), True
  runner.open()
  for _ in range(2):
    code, details, _ = _end(protocol(running, [1], max_tokens=2))
    assert code is _CODE.UNAVAILABLE and 'engine stopped' in details


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_a_server_that_drains(gated: Callable[..., Any], protocol: Any) -> None:
  running, runner = gated()
  runner.open()
  running.run(running.server.drain())
  assert _end(protocol(running, [1]))[0] is _CODE.UNAVAILABLE


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_a_deadline(
  gated: Callable[..., Any], protocol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
  running, runner = gated()
  monkeypatch.setattr(fake, 'TIMEOUT_S', 0.1)
  code, _, _ = _end(protocol(running, [1], max_tokens=100))
  assert code is _CODE.DEADLINE_EXCEEDED
  monkeypatch.undo()
  runner.open()
  fake.wait_until(running.all_pages_are_free)
