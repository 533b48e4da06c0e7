# SPDX-License-Identifier: Apache-2.0
"""Drives a server with Triton's client: PORT. Prints JSON of what it got.

In a process of its own: its messages have the names of ours.
"""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def _input(text: str) -> Any:
  tensor = triton.InferInput('text_input', [1], 'BYTES')
  tensor.set_data_from_numpy(np.array([text.encode()], dtype=object))
  return tensor


def _scalar(name: str, value: Any, dtype: str) -> Any:
  array = np.array([value])
  tensor = triton.InferInput(name, [1], dtype)
  tensor.set_data_from_numpy(array)
  return tensor


def main() -> None:
  client = triton.InferenceServerClient(f'127.0.0.1:{sys.argv[1]}')
  got: dict[str, Any] = {
    'live': client.is_server_live(),
    'ready': client.is_server_ready(),
    'model_ready': client.is_model_ready('counting'),
    'metadata': client.get_model_metadata('counting', as_json=True),
    'config': client.get_model_config('counting', as_json=True),
    'statistics': client.get_inference_statistics('counting', as_json=True),
    'index': client.get_model_repository_index(as_json=True),
  }
  result = client.infer(
    'counting',
    [_input('t1 t2'), _scalar('max_tokens', np.int32(3), 'INT32')],
    outputs=[
      triton.InferRequestedOutput('text_output'),
      triton.InferRequestedOutput('output_ids'),
    ],
  )
  got['text'] = result.as_numpy('text_output')[0].decode()
  got['ids'] = result.as_numpy('output_ids').tolist()

  responses: queue.Queue[Any] = queue.Queue()
  client.start_stream(lambda result, error: responses.put((result, error)))
  client.async_stream_infer(
    'counting',
    [_input('t5'), _scalar('stream', True, 'BOOL')],
    request_id='7',
    enable_empty_final_response=True,
    parameters={'max_tokens': 6},
  )
  streamed, is_final = '', False
  while not is_final:
    result, error = responses.get(timeout=20)
    assert error is None, error
    response = result.get_response()
    assert response.id == '7'
    streamed += result.as_numpy('text_output')[0].decode()
    is_final = response.parameters['triton_final_response'].bool_param
  got['streamed'] = streamed
  client.async_stream_infer(
    'counting', [_input('t5')], parameters={'temperature': -1.0}
  )
  _, error = responses.get(timeout=20)
  got['stream_error'] = str(error)
  client.stop_stream()
  try:
    client.infer('nothing', [_input('t1')])
  except InferenceServerException as error:
    got['unknown_model'] = error.status()
  print(json.dumps(got))


main()
