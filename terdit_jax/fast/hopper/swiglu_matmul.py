"""A matmul on Hopper's tensor cores with SwiGLU on its sums, equal to w1, w3 and SwiGLU of `model.feed_forward.swiglu`.

After `jax.experimental.pallas.ops.gpu.hopper_matmul_mgpu`: one warpgroup fetches tiles, two multiply, and each holds
the sums of the same columns of both matrices. It pays where rows are many; elsewhere XLA multiplies, and `forward` has
SwiGLU.
"""

from functools import partial

from etils import epy
import jax
from jax import Array, lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.typing import DTypeLike

with epy.lazy_imports():  # most of a second, for those who run the kernels
    from jax.experimental.pallas import mosaic_gpu as plgpu

_CORES = 132  # of H100 and H200: blocks that stay, each taking tile after tile
_ROWS, _COLUMNS = 128, 128  # of a block's tile of each product
_FETCHED_BYTES = 128  # of each row of both operands at once
_STEPS = 4  # fetches under way
_GROUP = 8  # tiles of rows that share columns of the weights while these are in cache
_STRIPE = 64  # columns stored at once, as many as are swizzled together
_WORTH_ROWS = 4096


def pays(rows: int, width: int, hidden: int) -> bool:
    """Whether this kernel takes (rows, width) by (2 hidden, width): it fits, and XLA is no faster."""
    return rows >= _WORTH_ROWS and rows % _ROWS == 0 and width % _FETCHED_BYTES == 0 and hidden % _COLUMNS == 0


@jax.jit
def swiglu_matmul(x: Array, x_scale: Array | None, weight: Array, alphas: Array) -> Array:
    """silu(alpha_0 a) alpha_1 b with (a, b) = x W^T: sums are float32 to the end.

    Args:
      x: (M, K) bfloat16 or fp8.
      x_scale: (M,) float32, what each row's numbers stand for, or None.
      weight: (2 F, K) in x's dtype, the rows of a, then of b.
      alphas: (2,) float32.

    Returns:
      (M, F) bfloat16.
    """
    (M, K), hidden = x.shape, len(weight) // 2
    tiles = (M // _ROWS, hidden // _COLUMNS)
    half = _ROWS // 2  # rows of a warpgroup
    depth = _FETCHED_BYTES // x.dtype.itemsize

    def kernel(x_ref, weight_ref, alphas_ref, *refs):
        *scales, out_ref = refs

        def pipeline(body, context):
            tiling = _transforms(depth, x.dtype)
            spec = partial(plgpu.BlockSpec, transforms=tiling, memory_space=plgpu.SMEM, delay_release=1)
            blocks = [spec((size, depth), lambda k: (0, k)) for size in (_ROWS, _COLUMNS, _COLUMNS)]
            return plgpu.emit_pipeline_warp_specialized(
                body,
                grid=(K // depth,),
                in_specs=blocks,
                memory_registers=40,
                max_concurrent_steps=_STEPS,
                wg_axis="warpgroup",
                num_compute_wgs=2,
                compute_context=context,
            )

        def multiply(_, x_tile, a_tile, b_tile, sums):
            for total, tile in zip(sums, (a_tile, b_tile), strict=True):
                plgpu.wgmma(total, x_tile.at[mine()], plgpu.transpose_ref(tile, (1, 0)))
            plgpu.wgmma_wait(2)  # the step before is done with its tiles, which are fetched into next
            return sums

        def mine():
            return pl.ds(lax.axis_index("warpgroup") * half, half)

        def each_tile(buffers, stripes):
            @plgpu.nd_loop((tiles[0] * tiles[1],), collective_axes="core")
            def _(loop):
                row, column = plgpu.planar_snake(loop.index[0], tiles, 1, _GROUP)
                rows = pl.ds(row * _ROWS, _ROWS)

                def context(run):
                    sums = {name: plgpu.ACC((half, _COLUMNS), jnp.float32) for name in "ab"}
                    pl.run_scoped(lambda a, b: finish(run, a, b), **sums)

                def finish(run, a, b):
                    run((a, b))
                    a, b = a[...] * alphas_ref[0], b[...] * alphas_ref[1]
                    for ref in scales:
                        layout = plgpu.Layout.WGMMA.reduce(1)
                        scale = plgpu.load(ref.at[rows], (mine(),), layout=layout, optimized=False)
                        scale = lax.broadcast_in_dim(scale, a.shape, (0,))
                        a, b = a * scale, b * scale
                    out = (a * (1 / (1 + jnp.exp(-a))) * b).astype(jnp.bfloat16)
                    for stripe in range(_COLUMNS // _STRIPE):
                        buffer = stripes.at[lax.axis_index("warpgroup"), stripe % 2]
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # this buffer's last copy has been read
                        buffer[...] = out[:, stripe * _STRIPE : (stripe + 1) * _STRIPE]
                        plgpu.commit_smem()
                        columns = pl.ds(column * _COLUMNS + stripe * _STRIPE, _STRIPE)
                        plgpu.copy_smem_to_gmem(buffer, out_ref.at[rows, columns].at[mine()])

                weights = [weight_ref.at[pl.ds(side + column * _COLUMNS, _COLUMNS)] for side in (0, hidden)]
                pipeline(multiply, context)(x_ref.at[rows], *weights, allocations=buffers)

        nothing = lambda *_, **__: None  # noqa: E731
        pl.run_scoped(
            each_tile,
            pipeline(nothing, nothing).get_allocations(x_ref, weight_ref, weight_ref),
            plgpu.SMEM((2, 2, half, _STRIPE), jnp.bfloat16, transforms=_transforms(_STRIPE, jnp.bfloat16)),
            collective_axes="warpgroup",
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, hidden), jnp.bfloat16),
        grid=(_CORES,),
        grid_names=("core",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, weight, alphas, *([] if x_scale is None else [x_scale]))


def _transforms(width: int, dtype: DTypeLike) -> tuple:
    """How (rows, width) lies in shared memory for the tensor cores."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(8 * width * itemsize)
    # JAX 0.11 leaves a method of theirs without a body, so that mypy takes them for abstract.
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
