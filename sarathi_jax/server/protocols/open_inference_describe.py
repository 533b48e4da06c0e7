# SPDX-License-Identifier: Apache-2.0
"""What the Open Inference Protocol tells about the model that is served."""

from __future__ import annotations

from sarathi_jax import sampling_params
from sarathi_jax.engine import engine as engine_lib
from sarathi_jax.engine import metrics as metrics_lib
from sarathi_jax.server import frontend as frontend_lib
from sarathi_jax.server import open_inference_pb2 as pb

VERSION = '1'  # of the model; there is one
_Kind = sampling_params.Kind
_DATATYPES = {
  _Kind.INT: 'INT32',
  _Kind.LONG: 'INT64',
  _Kind.FLOAT: 'FP32',
  _Kind.BOOL: 'BOOL',
  _Kind.STRINGS: 'BYTES',
  _Kind.NAME: 'BYTES',
  _Kind.IDS: 'INT32',
  _Kind.BIAS: 'BYTES',  # of a JSON object
  _Kind.OUTPUTS: 'BYTES',  # likewise
}
# Name, datatype, size (-1: any).
Tensors = tuple[tuple[str, str, int], ...]
_INPUTS: Tensors = (
  ('text_input', 'BYTES', 1),
  ('input_ids', 'INT64', -1),
  ('stream', 'BOOL', 1),
  ('sampling_parameters', 'BYTES', 1),
  ('exclude_input_in_output', 'BOOL', 1),
  ('priority', 'INT32', 1),
  *(
    (name, _DATATYPES[field.kind], -1 if field.kind.is_list else 1)
    for name, field in sampling_params.FIELDS.items()
  ),
)
# Of each token several others, if a request asks: a row each, of one length.
TOLD: Tensors = (
  ('token_ids', 'INT32', -1),
  ('logprobs', 'FP32', -1),
  ('ranks', 'INT32', -1),
)
# Name -> field of RequestMetrics: tokens, in an output's last response.
USED = {
  'prompt_tokens': 'num_prompt_tokens',
  'completion_tokens': 'num_output_tokens',
  'cached_tokens': 'num_cached_tokens',
}
OUTPUTS: Tensors = (
  ('text_output', 'BYTES', 1),
  ('output_ids', 'INT64', -1),
  ('logprobs', 'FP32', -1),
  ('finish_reason', 'BYTES', 1),
  *(
    (f'{of}_{name}', datatype, size)
    for of in ('told', 'prompt_told')
    for name, datatype, size in TOLD
  ),
  ('index', 'INT32', 1),  # of the output, below n
  *((name, 'INT32', 1) for name in USED),
)
_BACKEND = 'sarathi_jax'


def metadata(info: engine_lib.EngineInfo) -> pb.ModelMetadataResponse:
  """Describes the tensors of the model."""
  tensor = pb.ModelMetadataResponse.TensorMetadata
  return pb.ModelMetadataResponse(
    name=info.model_name,
    versions=[VERSION],
    platform=_BACKEND,
    inputs=[tensor(name=n, datatype=t, shape=[s]) for n, t, s in _INPUTS],
    outputs=[tensor(name=n, datatype=t, shape=[s]) for n, t, s in OUTPUTS],
  )


def config(info: engine_lib.EngineInfo) -> pb.ModelConfig:
  """Describes them as Triton's configuration of a decoupled model."""

  def data_type(datatype: str) -> str:
    name = 'STRING' if datatype == 'BYTES' else datatype
    return f'TYPE_{name}'

  parameters = {
    name: pb.ModelParameter(string_value=str(getattr(info, name)))
    for name in (
      'family',
      'policy',
      'token_budget',
      'max_num_seqs',
      'max_model_len',
      'num_pages',
      'page_size',
    )
  }
  return pb.ModelConfig(
    name=info.model_name,
    platform=_BACKEND,
    backend=_BACKEND,
    max_batch_size=0,
    parameters=parameters,
    input=[
      pb.ModelInput(name=n, data_type=data_type(t), dims=[s], optional=True)
      for n, t, s in _INPUTS
    ],
    output=[
      pb.ModelOutput(name=n, data_type=data_type(t), dims=[s])
      for n, t, s in OUTPUTS
    ],
    model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
  )


async def statistics(frontend: frontend_lib.Frontend) -> pb.ModelStatistics:
  """Returns totals since the start."""
  totals = await frontend.engine_thread.call(
    lambda engine: engine.metrics.copy()
  )

  def duration(values: metrics_lib.Quantiles) -> pb.StatisticDuration:
    return pb.StatisticDuration(
      count=values.count, ns=round(values.total * 1e9)
    )

  return pb.ModelStatistics(
    name=frontend.engine.info.model_name,
    version=VERSION,
    last_inference=round(frontend.last_arrival * 1e3),
    inference_count=totals.num_finished,
    execution_count=totals.num_steps,
    inference_stats=pb.InferStatistics(
      success=duration(totals.e2e_s),
      fail=pb.StatisticDuration(count=totals.num_aborted),
      queue=duration(totals.scheduling_delay_s),
      compute_input=duration(totals.prefill_s),
      compute_infer=duration(totals.decode_s),
      compute_output=pb.StatisticDuration(count=totals.num_finished),
    ),
  )
