"""Collectives are read from HLO as compilers write it: every notation, loops, asynchronous pairs, mesh axes, bytes."""

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import numpy as np
import pytest

from terdit_jax.aot.collectives import mesh_axes, read_collectives, sent_bytes

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def program(*lines, body=(), condition=(), other=""):
    """A module whose entry holds the lines, and a loop's body and condition if they are given."""
    parts = ["HloModule jit_step, is_scheduled=true, num_partitions=8", ""]
    if body:
        parts += ["%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {", *(f"  {line}" for line in body), "}", ""]
        parts += ["%condition (p: (s32[], f32[8])) -> pred[] {", *(f"  {line}" for line in condition), "}", ""]
    parts += [other, "ENTRY %main (p0: f32[8]) -> f32[8] {", *(f"  {line}" for line in lines), "}"]
    return "\n".join(parts)


def only(*lines, **parts):
    (collective,) = read_collectives(program(*lines, **parts))
    return collective


@pytest.mark.parametrize(
    ("groups", "expected", "axes"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", ((0, 4), (1, 5), (2, 6), (3, 7)), ("data",)),
        ("[4,2]<=[8]", ((0, 1), (2, 3), (4, 5), (6, 7)), ("tensor",)),
        ("[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7)), ("fsdp",)),
        ("[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7)), ("data", "fsdp")),
        ("{}", (tuple(range(8)),), ("data", "fsdp", "tensor")),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7)), ("fsdp", "tensor")),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7)), ("fsdp",)),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 1), (2, 3), (4, 5), (6, 7)), ("tensor",)),
    ],
)
def test_every_notation_of_groups(groups, expected, axes):
    line = f"%g = u8[2,64]{{1,0}} all-gather(%p0), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    found = only(line)
    assert sorted(found.groups) == sorted(expected)
    assert mesh_axes(found, MESH) == axes


def test_bytes_sent_by_kind():
    groups = "replica_groups=[2,4]<=[8], use_global_device_ids=true"
    gather = only(f"%a = bf16[8,3]{{1,0:T(8,128)(2,1)S(1)}} all-gather(%p), channel_id=1, {groups}, dimensions={{0}}")
    scatter = only(f"%b = bf16[2,3]{{1,0}} reduce-scatter(%p), {groups}, dimensions={{0}}, to_apply=%add")
    reduce = only(f"%c = bf16[8,3]{{1,0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add")
    permute = only("%d = s4[8,3]{1,0} collective-permute(%p), source_target_pairs={{0,0},{1,2},{2,1},{4,5},{5,4}}")
    assert [c.bytes for c in (gather, scatter, reduce, permute)] == [48, 48, 48, 12]
    assert [c.sent for c in (gather, scatter, reduce, permute)] == [36, 36, 72, 12]
    assert scatter.shape == (8, 3) and permute.groups == ((1, 2), (2, 1), (4, 5), (5, 4))
    assert mesh_axes(permute, MESH) == ("fsdp", "tensor")
    assert sent_bytes([gather, reduce]) == 108


def test_a_device_sends_itself_nothing():
    assert not read_collectives(program("%a = f32[8]{0} all-reduce(%p), replica_groups=[8,1]<=[8], to_apply=%add"))


def test_combined_and_asynchronous_collectives():
    groups = "replica_groups=[1,8]<=[8]"
    several = read_collectives(
        program(
            "%r = (f32[8]{0}, bf16[4,2]{1,0:T(8,128)(2,1)}, /*index=2*/f32[]) all-reduce(%a, %b, /*index=2*/%c), "
            f"{groups}, to_apply=%add",
            f"%s = (u8[2]{{0}}, u8[4]{{0}}, u8[16]{{0}}, u8[32]{{0}}) all-gather-start(%a, %b), {groups}, x={{0}}",
            "%d = (u8[16]{0}, u8[32]{0}) all-gather-done(%s)",
            f"%t = bf16[6]{{0}} all-reduce-start(%a), {groups}, to_apply=%add",
            "%e = bf16[6]{0} all-reduce-done(%t)",
            "%u = (f32[3]{0}, f32[3]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), "
            "source_target_pairs={{0,1},{1,0}}",
        )
    )
    assert [(c.kind, c.dtype, c.shape) for c in several] == [
        ("all-reduce", "f32", (8,)),
        ("all-reduce", "bf16", (4, 2)),
        ("all-reduce", "f32", ()),
        ("all-gather", "u8", (16,)),
        ("all-gather", "u8", (32,)),
        ("all-reduce", "bf16", (6,)),
        ("collective-permute", "f32", (3,)),
    ]


GATHER = 'all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, metadata={op_name="jit(f)/scan"}'


def test_a_loop_counts_its_trips_stated_or_not():
    loop = "%w = (s32[], f32[8]) while(%t), condition=%condition, body=%body"
    stated = f'{loop}, backend_config={{"known_trip_count":{{"n":"32"}}}}'
    body = (f"%g = u8[8]{{0}} {GATHER}",)
    condition = (
        "%c = s32[]{:T(128)} constant(5)",
        "ROOT %l = pred[]{:T(512)} compare(%i, %c), direction=LT",
    )
    found = only(stated, body=body, condition=condition)
    assert (found.trips, found.sent, found.source) == (32, 32 * 7, "jit(f)/scan")
    assert only(loop, body=body, condition=condition).trips == 5
    with pytest.raises(ValueError, match="no trip count in loop condition condition"):
        only(loop, body=body, condition=("ROOT %l = pred[] compare(%i, %j), direction=LT",))


def test_a_collective_spread_over_fusions_counts_once():
    part = f'%g = u8[8]{{0}} {GATHER}, frontend_attributes={{chain_id="3"}}'
    fusions = "".join(f"%part{i} (p: u8[1]) -> u8[8] {{\n  {part}\n}}\n\n" for i in range(3))
    calls = [f"%f{i} = u8[8]{{0}} fusion(%p), kind=kCustom, calls=%part{i}" for i in range(3)]
    assert only(*calls[:2], other=fusions).trips == 1
    loop = '%w = (s32[], f32[8]) while(%t), condition=%condition, body=%body, x="known_trip_count":{"n":"4"}'
    assert only(*calls[:1], loop, body=calls[1:], condition=("%x = pred[] x()",), other=fusions).trips == 1


def test_a_sum_that_is_sliced_at_once_is_a_reduce_scatter():
    sum_and_slice = "%all-reduce-scatter.3 (p: f32[64]) -> f32[8] {\n  %a = f32[64]{0} all-reduce(%p), %s\n}\n"
    other = sum_and_slice.replace("%s", "replica_groups=[1,8]<=[8], to_apply=%add")
    found = only("%f = f32[8]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3", other=other)
    assert (found.kind, found.shape, found.sent) == ("reduce-scatter", (64,), 7 * 32)


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match="unknown notation"):
        only("%g = u8[8]{0} all-gather(%p), replica_groups=@later, dimensions={0}")


def test_a_program_compiled_here_says_what_was_written():
    mesh = jax.make_mesh((2, 2, 2), tuple(MESH), axis_types=(AxisType.Auto,) * 3)

    def part(codes, x):
        def layer(x, codes):
            whole = lax.all_gather(codes, "fsdp", axis=0, tiled=True)
            return lax.psum(x * whole.astype(jnp.float32).sum(), "data"), None

        x, _ = lax.scan(layer, x, codes)
        return lax.psum_scatter(x, ("fsdp", "tensor"), scatter_dimension=0, tiled=True)

    spec = PartitionSpec(None, "fsdp")
    mapped = jax.shard_map(
        part, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=PartitionSpec(("fsdp", "tensor")), check_vma=False
    )
    compiled = jax.jit(mapped).lower(np.zeros((6, 64), np.uint8), np.zeros((16, 4), np.float32)).compile()
    found = read_collectives(compiled.as_text())
    seen = {(c.kind, c.dtype, c.shape, c.trips, mesh_axes(c, MESH)) for c in found}
    assert ("all-gather", "u8", (64,), 6, ("fsdp",)) in seen
    assert ("all-reduce", "f32", (16, 4), 6, ("data",)) in seen
    assert ("reduce-scatter", "f32", (16, 4), 1, ("fsdp", "tensor")) in seen
