"""The one place that chooses how a model runs on the devices at hand; each choice equals `model.plan.PLAIN`."""

import dataclasses

import jax
from jax import Array
from jax.sharding import Mesh

from terdit_jax.errors import UserError
from terdit_jax.fast.eight_bit import SAME, SCALE
from terdit_jax.fast.fused_block import EIGHT_BIT, fused_activations, fused_block
from terdit_jax.fast.hopper import warpgroup
from terdit_jax.fast.linear import make_fast, trained_by_layer
from terdit_jax.fast.unrolled import gradient_norm_by_layer, unrolled_blocks
from terdit_jax.model.attention import Implementation
from terdit_jax.model.block import block, modulation
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.depth import KEEP_DOTS, Watch, rematerialise
from terdit_jax.model.layers import MakeLinear, trained_linear
from terdit_jax.model.plan import PLAIN, Plan
from terdit_jax.model.transformer import make_operands
from terdit_jax.parallel.mesh import fsdp_rings
from terdit_jax.parallel.sharding import constrain_tree
from terdit_jax.ternary.linear import PackedLinear


@dataclasses.dataclass(frozen=True)
class FastPlan(Plan):
    """The choices of a run. Attributes, beside `Plan`'s:

    fused: whether the passes between a block's matmuls are kernels (`fused_block`).
    matmul_dtype: "same" as the activations, or one of 8 bits.
    gather: in what form codes travel that the mesh cuts over `fsdp`; None where it cuts none.
    rings: physical rings of that axis.
    """

    fused: bool = False
    matmul_dtype: str = SAME
    gather: str | None = None
    rings: tuple[int, ...] = ()

    def make_operands(self, config: DiTConfig, params: dict, make_linear: MakeLinear | None = None) -> dict:
        own = trained_by_layer if self.layers == "unrolled" else trained_linear
        operands = make_operands(config, params, make_linear or own)
        if self.gather is None and self.matmul_dtype == SAME:
            return operands
        return constrain_tree(make_fast(operands, self.matmul_dtype, self.gather or "codes", self.rings))

    def run_blocks(
        self, config: DiTConfig, operands: dict, x: Array, c: Array, rope: Array | None, watch: Watch | None = None
    ) -> tuple[Array, dict[str, Array]]:
        fused = self.fused and not isinstance(operands["attention"]["qkv"], PackedLinear)

        def layer(x: Array, one: dict, m: Array) -> tuple[Array, dict[str, Array]]:
            if not fused:
                x, activations = block(config, one, x, m, rope, self.attention)
                return x, watch(activations) if watch else {}
            if watch:
                x, activations = fused_activations(config, self.matmul_dtype, self.attention, one, x, m, rope)
                return x, watch(activations | {"adaLN_modulation": m})
            return fused_block(config, self.matmul_dtype, self.attention, one, x, m, rope), {}

        if self.layers == "unrolled":
            return unrolled_blocks(self._rematerialised(layer, config, fused), operands, x, c)
        scanned = lambda x, one: layer(x, one, modulation(one["adaLN_modulation"], c))  # noqa: E731
        return jax.lax.scan(self._rematerialised(scanned, config, fused), x, operands)

    def gradient_norm(self, grads: dict) -> Array:
        return gradient_norm_by_layer(grads) if self.layers == "unrolled" else super().gradient_norm(grads)

    def _rematerialised(self, layer, config: DiTConfig, fused: bool):
        # A fused block keeps by itself what "dots" says.
        return rematerialise(layer, "none" if fused and config.remat == "dots" else config.remat, _keep)

    def __str__(self) -> str:
        parts = [f"{self.layers} blocks", f"{self.attention} attention"]
        parts += ["kernels between matmuls"] if self.fused else []
        parts.append(
            "matmuls in the activations' dtype" if self.matmul_dtype == SAME else f"matmuls in {self.matmul_dtype}"
        )
        parts += [f"ternary weights gathered as {self.gather}"] if self.gather else []
        return ", ".join(parts)


def choose_plan(config: DiTConfig, mesh: Mesh) -> Plan:
    """The plan of a run: what `config` asks for, and where it says "auto" what is quickest on the mesh's devices.

    Raises:
      UserError: 8 bits or cuDNN's attention under the plain plan, which has neither.
    """
    if config.plan == "plain":
        for field, plain in (("matmul_dtype", (SAME,)), ("attention", ("auto", "xla"))):
            if getattr(config, field) not in plain:
                raise UserError(
                    f"config.compute.{field}={getattr(config, field)!r}: takes no part in compute.plan='plain'; give "
                    f"{plain[0]!r}, or compute.plan='auto'"
                )
        return PLAIN
    device = mesh.devices.flat[0]
    cut = config.ternary and mesh.shape["fsdp"] > 1
    return FastPlan(
        attention=choose_attention(config, device),
        layers=layers_on(device.platform) if config.layers == "auto" else config.layers,
        fused=_fits_fused(config, mesh),
        matmul_dtype=config.matmul_dtype,
        gather=config.gather if cut else None,
        rings=fsdp_rings(mesh) if cut else (),
    )


def choose_soft_plan(config: DiTConfig, mesh: Mesh) -> Plan:
    """The plan of the steps of a soft start (`ternary.quantize.soften`): that of the same model in full precision, for
    matmuls read weights, which travel and are multiplied by as they are."""
    return choose_plan(dataclasses.replace(config, ternary=False, matmul_dtype=SAME), mesh)


def layers_on(platform: str) -> str:
    """The meaning of `config.layers` "auto" on a platform."""
    return "unrolled" if platform == "gpu" else "scanned"


def choose_attention(config: DiTConfig, device: jax.Device) -> Implementation:
    """The implementation of attention: cuDNN's on GPUs for 16-bit inputs and heads that it knows, XLA's elsewhere."""
    fits = device.platform == "gpu" and config.fits_cudnn(128)
    return "cudnn" if config.attention == "cudnn" or config.attention == "auto" and fits else "xla"


def _fits_fused(config: DiTConfig, mesh: Mesh) -> bool:
    """Whether blocks run as `fused_block`: on Hopper GPUs in bfloat16, each device with whole rows."""
    if config.passes == "xla" or config.dtype != "bfloat16" or not warpgroup.run_on(mesh.devices.flat[0]):
        return False
    rope = config.traits.rope
    if mesh.shape["tensor"] > 1 or rope and not config.qk_norm or config.num_kv_heads != config.num_heads:
        return False
    widths = config.hidden_size, config.mlp_width
    return config.matmul_dtype in (SAME, EIGHT_BIT) and warpgroup.supports(*widths, pairs=rope)


def _keep(primitive, *arguments, **parameters) -> bool:
    """The policy of remat "dots": keeps what matmuls and cuDNN's attention return, and the scales of matmuls in 8
    bits."""
    if primitive.name == "name":
        return parameters["name"] == SCALE
    if primitive.name.startswith("dot_product_attention_fwd"):
        return True
    return KEEP_DOTS(primitive, *arguments, **parameters)
