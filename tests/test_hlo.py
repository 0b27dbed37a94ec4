"""Collectives of a whole step, from a program's text."""

import pytest

from ftjax import hlo

pytestmark = pytest.mark.fast

TEXT = """HloModule jit_step, is_scheduled=true

%inner.cond (p: (u32[], bf16[8])) -> pred[] {
  %p = (u32[], bf16[8]{0}) parameter(0)
  %c8 = u32[]{:T(128)} constant(8)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c8), direction=LT
}

%inner.body (p: (u32[], bf16[8])) -> (u32[], bf16[8]) {
  %p = (u32[], bf16[8]{0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two), metadata={op_name="x"}
  %x = bf16[8]{0} get-tuple-element(%p), index=1
  %cp = (bf16[8]{0}, bf16[8]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=9, PAIRS
  %y = bf16[8]{0} collective-permute-done(%cp)
  ROOT %t = (u32[], bf16[8]{0}) tuple(%next, %y)
}

%fused (q: bf16[4]) -> bf16[16] {
  %q = bf16[4]{0} parameter(0)
  ROOT %ag.1 = bf16[16]{0} all-gather(%q), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="3"}
}

%fused.again (q: bf16[4]) -> bf16[16] {
  %q = bf16[4]{0} parameter(0)
  ROOT %ag.2 = bf16[16]{0} all-gather(%q), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="3"}
}

%layers.cond (p: (s32[], bf16[8])) -> pred[] {
  %p = (s32[], bf16[8]{0}) parameter(0)
  %c32 = s32[]{:T(128)} constant(32)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c32), direction=LT
}

%layers.body (p: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %p = (s32[], bf16[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %kernel = bf16[8]{0} custom-call(%i), backend_config={"text":"{
}"}
  %f.1 = bf16[16]{0} fusion(%kernel), kind=kLoop, calls=%fused
  %f.2 = bf16[16]{0} fusion(%kernel), kind=kLoop, calls=%fused.again
  %w = (u32[], bf16[8]{0}) while(%start), condition=%inner.cond, body=%inner.body
  ROOT %t = (s32[], bf16[8]{0}) tuple(%i, %kernel)
}

%loss.cond (p: (s32[], s32[])) -> pred[] {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%loss.body (p: (s32[], s32[])) -> (s32[], s32[]) {
  %p = (s32[], s32[]) parameter(0)
  ROOT %ar = (f32[4]{0}, f32[2]{0}) all-reduce(%p), channel_id=3, replica_groups=GROUPS, to_apply=%sum
}

ENTRY %main (a: bf16[4]) -> bf16[8] {
  %a = bf16[4]{0} parameter(0)
  %w = (s32[], bf16[8]{0}) while(%t), condition=%layers.cond, body=%layers.body
  %l = (s32[], s32[]) while(%t2), condition=%loss.cond, body=%loss.body
  %near = f32[1,256]{1,0:T(8,128)S(1)} all-reduce(%c), channel_id=5, NEAR, to_apply=%sum
  %far = (f32[1,256]{1,0:T(8,128)}, u32[], token[]) recv(%near), channel_id=6, SLICES
  ROOT %rs = f32[2]{0} reduce-scatter(%b), channel_id=4, replica_groups=MESH
}
"""
for name, text in {
    "PAIRS": "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
    "GROUPS": "{{0,4},{1,5},{2,6},{3,7}}",
    "NEAR": "replica_groups={{0,1,2,3}}",
    "SLICES": 'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}',
    "MESH": "mesh['x'=2,'y'=4] {'y'}",
}.items():
    TEXT = TEXT.replace(name, text)


def test_loops_are_multiplied_out():
    """Layers 32 times, in each a loop that counts to 8 by twos; a gather spread over two fusions is one; the
    loop whose end is not known runs as often as is said. A brace in a kernel's text ends nothing."""
    found = {(one.kind, one.count, one.bytes, one.group, one.first) for one in hlo.of_step(TEXT, 5)}
    assert found == {
        ("all-gather", 32, 32, 4, (0, 1, 2, 3)),
        ("collective-permute", 32 * 4, 16, 4, (0, 1)),
        ("all-reduce", 5, 24, 2, (0, 4)),
        ("reduce-scatter", 1, 8, 4, (0, 1, 2, 3)),
        ("all-reduce", 1, 1024, 4, (0, 1, 2, 3)),
        ("recv", 1, 1024, 0, ()),
    }
    assert hlo.collectives(TEXT)["all-gather"] == {"count": 1, "bytes": 32}  # a loop is not multiplied


def test_bytes_received():
    one = {x.kind: x for x in hlo.of_step(TEXT) if x.bytes != 1024 or x.kind == "recv"}
    assert one["recv"].received == 1024
    assert one["all-gather"].received == pytest.approx(32 * 32 * 3 / 4)
    assert one["all-reduce"].received == pytest.approx(24 * 2 * 1 / 2)
    assert one["reduce-scatter"].received == pytest.approx(8 * 3)
    assert one["collective-permute"].received == pytest.approx(128 * 16)


def test_groups_in_the_short_form():
    line = "%a = f32[4]{0} all-reduce(%b), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%sum"
    assert hlo._group(line) == (2, (0, 4))


def test_a_sum_fused_with_its_slice_is_a_reduce_scatter():
    """As TPUs' compiler writes it: the sum's type is whole, what a device has of it a part."""
    text = """%all-reduce-scatter.7 (input: f32[256,512]) -> f32[32,512] {
  %input = f32[256,512]{1,0:T(8,128)} parameter(0)
  %sum = f32[256,512]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %part = f32[32,512]{1,0:T(8,128)} dynamic-slice(%sum, %i, %zero), dynamic_slice_sizes={32,512}
}

ENTRY %main (a: f32[256,512]) -> f32[32,512] {
  ROOT %f = f32[32,512]{1,0:T(8,128)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.7
}
"""
    (one,) = hlo.of_step(text)
    assert (one.kind, one.bytes, one.group) == ("reduce-scatter", 32 * 512 * 4, 8)
    assert one.received == 7 * 32 * 512 * 4
    assert hlo.collectives(text) == {"reduce-scatter": {"count": 1, "bytes": 32 * 512 * 4}}
