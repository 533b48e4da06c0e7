# SPDX-License-Identifier: Apache-2.0
"""A layer's launches, and their bytes, of a step as XLA writes it."""

from __future__ import annotations

from pallas_kernels.aot import launches
from sarathi_jax.launch import layers

# Cut short: two layers that have one matrix of weights and split products.
_KV = 'bf16[16,2,64,128]'
_STEP = """\
HloModule jit_run, is_scheduled=true, entry_computation_layout={...}

%fused_write (p.0: bf16[16,2,64,128], p.1: f32[4,8,512], p.2: s32[100]) -> x {
  %p.0 = bf16[16,2,64,128]{3,2,1,0} parameter(0)
  %p.1 = f32[4,8,512]{2,1,0} parameter(1)
  %bitcast.1 = f32[32,512]{1,0} bitcast(%p.1)
  %keys = f32[8,256]{1,0} slice(%bitcast.1), slice={[0:8], [0:256]}
  %new = bf16[8,2,1,128]{3,2,1,0} fusion(%keys), kind=kLoop, calls=%other
  %p.2 = s32[100]{0} parameter(2)
  %slots = s32[8,1]{1,0} slice(%p.2), slice={[0:8]}
  ROOT %put = bf16[16,2,64,128]{3,2,1,0} scatter(%p.0, %slots, %new), to_apply=%t
}

%fused_product (p.3: bf16[8,256], p.4: bf16[256,512]) -> f32[4,8,512] {
  %p.3 = bf16[8,256]{1,0} parameter(0)
  %p.4 = bf16[256,512]{1,0} parameter(1)
  ROOT %dot = f32[4,8,512]{2,1,0} dot(%p.3, %p.4), lhs_contracting_dims={1}
}

ENTRY %main (w: bf16[256,512]) -> bf16[8,256] {
  %w.0 = bf16[256,512]{1,0} parameter(0)
  %w.1 = bf16[256,512]{1,0} parameter(1)
  %kv.0 = bf16[16,2,64,128]{3,2,1,0} parameter(2)
  %kv.1 = bf16[16,2,64,128]{3,2,1,0} parameter(3)
  %ints = s32[100]{0} parameter(4)
  %x = bf16[8,256]{1,0} parameter(5)
  %product.0 = f32[4,8,512]{2,1,0} fusion(%x, %w.0), kind=kCustom, calls=%fused_product
  %write.0 = bf16[16,2,64,128]{3,2,1,0} fusion(%kv.0, %product.0, %ints), kind=kInput, calls=%fused_write
  %plan.0 = s32[1]{0} reduce(%ints), dimensions={0}
  %call.0 = (bf16[8,256]{1,0}, f32[9,2,16]{2,1,0}) custom-call(%x, %write.0, %ints), custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{0}: (0, {})}, metadata={op_name="jit(run)/jit(block)/attend_small/pallas_call"}
  %out.0 = bf16[8,256]{1,0} get-tuple-element(%call.0), index=0
  %partial.0 = f32[9,2,16]{2,1,0} get-tuple-element(%call.0), index=1
  %call.1 = bf16[8,256]{1,0} custom-call(%out.0, %partial.0, %plan.0), custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{}: (0, {})}, metadata={op_name="jit(run)/merge_splits/pallas_call"}
  %bitcast.2 = bf16[1,8,256]{2,1,0} bitcast(%call.1)
  %product.1 = f32[4,8,512]{2,1,0} fusion(%bitcast.2, %w.1), kind=kCustom, calls=%fused_product
  %other.0 = s32[100]{0} copy(%ints)
  %write.1 = bf16[16,2,64,128]{3,2,1,0} fusion(%kv.1, %product.1, %ints), kind=kInput, calls=%fused_write
  %call.2 = (bf16[8,256]{1,0}, f32[9,2,16]{2,1,0}) custom-call(%call.1, %write.1, %ints), custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{0}: (0, {})}, metadata={op_name="jit(run)/jit(block)/attend_small/pallas_call"}
  %out.2 = bf16[8,256]{1,0} get-tuple-element(%call.2), index=0
  %partial.2 = f32[9,2,16]{2,1,0} get-tuple-element(%call.2), index=1
  %call.3 = bf16[8,256]{1,0} custom-call(%out.2, %partial.2, %plan.0), custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{}: (0, {})}, metadata={op_name="jit(run)/merge_splits/pallas_call"}
  ROOT %sum = bf16[8]{0} reduce(%call.3, %other.0), dimensions={1}
}
"""  # noqa: E501
_WEIGHTS = 256 * 512 * 2
_SUMS = 4 * 8 * 512 * 4
_ROWS = 8 * 256 * 2
_INTS = 100 * 4


def test_a_layer_lies_between_two_attentions() -> None:
  """Without the plan, that all layers use, and what else is in between."""
  (layer,) = layers.read(_STEP, {_KV})
  assert [
    (one.name, one.result, one.read, one.written) for one in layer.launches
  ] == [
    ('product.1', 'f32[4,8,512]', _ROWS + _WEIGHTS, _SUMS),
    # Of a scatter what it writes; of what is sliced the slices.
    ('write.1', _KV, 8 * 256 * 4 + 8 * 4, _ROWS),
    # Neither the cache nor partial results.
    ('attend_small', 'bf16[8,256]', _ROWS + _INTS, _ROWS),
    ('merge_splits', 'bf16[8,256]', 4, _ROWS),
  ]
  assert layer.num_bytes == sum(
    one.read + one.written for one in layer.launches
  )
  assert layer.least_bytes == _WEIGHTS + _INTS


def test_a_kernels_result_is_counted_unless_it_is_partial() -> None:
  """What other Pallas kernels write into, or XLA's read, is whole."""
  first = launches.read(_STEP, {_KV}, {'merge_splits'})[3]
  assert (first.name, first.written) == ('attend_small', _ROWS)
  plain = _STEP.replace('output_to_operand_aliasing={{0}: (0, {})}, ', '')
  first = launches.read(plain, {_KV}, {'merge_splits'})[3]
  assert (first.name, first.written) == ('attend_small', _ROWS)


def test_a_sum_that_kernels_hand_on_is_counted() -> None:
  """As that of the residual stream: only what is merged is partial."""
  found = launches.read(_STEP, {_KV}, {'merge_splits'})
  assert [one.written for one in found[3:5]] == [_ROWS, _ROWS]
  found = launches.read(_STEP, {_KV})
  partial = 9 * 2 * 16 * 4
  assert [one.written for one in found[3:5]] == [_ROWS + partial, _ROWS]
  assert found[4].read == _ROWS + partial + 4


def test_what_is_no_kernel_is_no_launch() -> None:
  found = launches.read(_STEP, {_KV})
  assert len(found) == 11
  assert found[0].parameters == {'x': _ROWS, 'w.0': _WEIGHTS}
  assert found[0].needs == frozenset()
  assert found[-1].needs == frozenset(range(10))


def test_a_step_without_two_attentions_has_no_layer() -> None:
  first, _, _ = _STEP.partition('  %product.1 =')
  assert layers.read(first + '}\n', {_KV}) == []
