"""The whole network: its parameters, the operands made from them once per step, and the forward pass over operands.

Parameters are what is trained, averaged and saved; operands are what matmuls read (codes, packed codes, bf16
copies). Going from one to the other is a pure function whose pullback carries the straight-through gradients.
"""

from collections.abc import Callable
import functools

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from terdit_jax.model.block import Block, block, modulation
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.embedders import (
    FinalLayer,
    LabelEmbedder,
    TimestepEmbedder,
    condition,
    final_layer,
    patch_embedder,
    patchify,
    rope_table,
    sincos_2d_table,
    unpatchify,
)
from terdit_jax.model.implementations import scans_layers
from terdit_jax.model.layers import linear
from terdit_jax.parallel.gather import gather_operands
from terdit_jax.parallel.sharding import constrain, constrain_tree
from terdit_jax.ternary.linear import SCALE, Linear


class DiT(nnx.Module):
    """TerDiT, or Large-DiT where `config.ternary` is off. Calling it makes the operands anew every time: training and
    sampling make them once with `make_operands` and call `forward`."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.x_embedder = patch_embedder(config, rngs=rngs)
        self.t_embedder = TimestepEmbedder(config.condition_width, rngs=rngs)
        self.y_embedder = LabelEmbedder(config.num_classes, config.condition_width, rngs=rngs)
        # One block's worth of structure, every parameter with the depth in front.
        layers = jax.vmap(lambda key: nnx.state(Block(config, rngs=nnx.Rngs(params=key))))(
            jax.random.split(rngs.params(), config.depth)
        )
        one = nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(params=0)))
        self.blocks = nnx.merge(nnx.graphdef(one), layers)
        self.final_layer = FinalLayer(config, rngs=rngs)

    def operands(self, packed: bool = False) -> dict:
        """The forward pass's operands (see `make_operands`)."""
        return {
            "x_embedder": self.x_embedder.operands(),
            "t_embedder": {name: getattr(self.t_embedder, name).operands() for name in ("mlp_in", "mlp_out")},
            "y_embedder": {"embedding_table": self.y_embedder.embedding_table[...]},
            "blocks": self.blocks.operands(self.config, packed),
            "final_layer": {
                name: getattr(self.final_layer, name).operands() for name in ("adaLN_modulation", "linear")
            },
        }

    def __call__(self, x_t: Array, t: Array, y: Array) -> Array:
        """As `forward`."""
        return forward(self.config, self.operands(), x_t, t, y)


@functools.lru_cache(maxsize=64)
def abstract_model(config: DiTConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's graph, and its state with shapes in place of arrays; a run asks for it a dozen times."""
    return nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(params=0))))


def abstract_params(config: DiTConfig) -> dict:
    """The parameter tree with shapes in place of arrays; nothing is allocated."""
    return nnx.to_pure_dict(abstract_model(config)[1])


def init_params(config: DiTConfig, key: Array) -> dict:
    """Fresh float32 parameters as a nested dict, layers stacked on axis 0. Starts of each kind: facts of the paper's
    code (xavier-uniform, N(0, 0.02) for timestep MLP and labels, zeros for adaLN, final layer and biases)."""
    return nnx.to_pure_dict(nnx.state(DiT(config, rngs=nnx.Rngs(params=key))))


def make_operands(config: DiTConfig, params: dict, *, packed: bool = False) -> dict:
    """The forward pass's operands from parameters: ternary codes (or packed codes, or bf16 copies), groups stacked.

    Call it once per optimizer step, outside the microbatch loop and outside rematerialised blocks. `jax.vjp` of it
    turns gradients with respect to operands into gradients with respect to parameters.

    Args:
      config: the architecture and dtypes.
      params: nested dict of `init_params`.
      packed: 2-bit codes for inference, without gradients.

    Returns:
      A nested dict whose leaves are arrays and `terdit_jax.ternary.linear` operands, constrained to their sharding
      rules if a mesh is in context; where it cuts ternary maps over `fsdp`, `terdit_jax.parallel.gather`'s.
    """
    graphdef, shapes = abstract_model(config)
    state = jax.tree.map(lambda leaf: leaf, shapes)  # a copy
    nnx.replace_by_pure_dict(state, params)
    operands = constrain_tree(nnx.merge(graphdef, state).operands(packed))
    return operands if packed else constrain_tree(gather_operands(operands, config.gather, config.fsdp_rings))


def forward(config: DiTConfig, operands: dict, x_t: Array, t: Array, y: Array) -> Array:
    """Predicts the noise and the variance interpolation.

    Args:
      config: the architecture.
      operands: of `make_operands`.
      x_t: (B, H, W, C) float noisy latents.
      t: (B,) int timesteps in [0, 1000).
      y: (B,) int labels; num_classes is the null class.

    Returns:
      (B, H, W, 2C) float32: eps, then the variance interpolation v.
    """
    return _forward(config, operands, x_t, t, y, lambda kinds: None)[0]


def activation_rms(config: DiTConfig, operands: dict, x_t: Array, t: Array, y: Array) -> dict[str, Array]:
    """The root mean square of each kind of activation in every layer, (L,) float32 each; arguments as `forward`."""

    def rms(kinds: dict[str, Array]) -> dict[str, Array]:
        return {kind: jnp.sqrt(jnp.mean(jnp.square(a.astype(jnp.float32)))) for kind, a in kinds.items()}

    return _forward(config, operands, x_t, t, y, rms)[1]


def _forward(config: DiTConfig, operands: dict, x_t: Array, t: Array, y: Array, watch: Callable) -> tuple[Array, dict]:
    dtype = config.activation_dtype
    x = linear(patchify(x_t, config.patch_size), operands["x_embedder"], dtype)
    if config.positions == "rope_1d_sincos_2d":
        x = x + sincos_2d_table(config.grid_size, config.hidden_size)
    x = constrain(x.astype(dtype), "batch", "tokens", None)
    c = condition(operands, t, y)
    rope = jnp.asarray(rope_table(config.num_tokens, config.head_dim))

    if scans_layers(config):
        layers, modulate = operands["blocks"], lambda adaln: modulation(adaln, adaln["linear"](c.astype(dtype)))
    else:
        layers, modulate = _unrolled(operands["blocks"], c.astype(dtype)), lambda m: m

    def layer(x: Array, layer_operands: dict) -> tuple[Array, dict]:
        x, kinds = block(config, layer_operands, x, modulate(layer_operands["adaLN_modulation"]), rope)
        return x, watch(kinds)

    if config.remat == "block":
        layer = jax.checkpoint(layer)
    elif config.remat == "dots":
        layer = jax.checkpoint(layer, policy=_is_saved)
    x, watched = _over_layers(config, layer, x, layers)
    out = final_layer(operands["final_layer"], x, c)
    return unpatchify(out, config.grid_size, config.patch_size), watched


def _is_saved(primitive, *arguments, **parameters) -> bool:
    """What the policy `dots` keeps of a layer: what matmuls and cuDNN's attention return. The rest is cheap to redo."""
    if primitive.name == "name":
        return parameters["name"] == SCALE
    if primitive.name.startswith("dot_product_attention_fwd"):
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arguments, **parameters)


def _over_layers(config: DiTConfig, layer: Callable, x: Array, layers: dict | list[dict]) -> tuple[Array, dict]:
    if scans_layers(config):
        return jax.lax.scan(layer, x, layers)
    watched = []
    for one in layers:
        x, seen = layer(x, one)
        watched.append(seen)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *watched)


def _unrolled(blocks: dict, c: Array) -> list[dict]:
    """Each layer's operands, in whose adaLN's place its `modulation` stands. These depend on the condition alone, so
    that one matmul makes them of all layers; their weights' gradients come layer by layer, and devices of a mesh sum
    those of one layer while others are still to come."""
    leaves, structure = jax.tree.flatten(blocks)
    layers = [structure.unflatten(one) for one in zip(*(_unstack(leaf) for leaf in leaves), strict=True)]
    adalns = [layer["adaLN_modulation"] for layer in layers]
    made = _by_one_matmul(blocks["adaLN_modulation"]["linear"], [adaln["linear"] for adaln in adalns], c)
    modulations = [modulation(adaln, y) for adaln, y in zip(adalns, made, strict=True)]
    return [layer | {"adaLN_modulation": m} for layer, m in zip(layers, modulations, strict=True)]


@jax.custom_vjp
def _by_one_matmul(stacked: Linear, layers: list[Linear], c: Array) -> tuple[Array, ...]:
    """What each of the maps, given stacked and one by one, makes of c (B, C'): (B, n, out) each. The gradients of the
    maps go to the latter."""
    return tuple(jax.vmap(lambda one: one(c))(stacked))


def _by_one_matmul_bwd(residuals: tuple, dys: tuple[Array, ...]) -> tuple[None, list[Linear], Array]:
    stacked, layers, c = residuals
    dlayers = [jax.vjp(lambda one: one(c), one)[1](dy)[0] for one, dy in zip(layers, dys, strict=True)]
    (dc,) = jax.vjp(lambda c: jax.vmap(lambda one: one(c))(stacked), c)[1](jnp.stack(dys))
    return None, dlayers, dc


_by_one_matmul.defvjp(lambda *arguments: (_by_one_matmul(*arguments), arguments), _by_one_matmul_bwd)


def _unstack(leaf: Array) -> tuple[Array, ...]:
    """The layers of a leaf. Their gradients are stacked, which XLA does in what reads the stack: it would sum as many
    padded arrays as there are layers if they were slices'."""
    layers = lambda leaf: tuple(leaf[i] for i in range(leaf.shape[0]))  # noqa: E731
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return layers(leaf)
    stack = lambda _, grads: (jnp.stack(grads),)  # noqa: E731
    unstack = jax.custom_vjp(layers)
    unstack.defvjp(lambda leaf: (layers(leaf), None), stack)
    return unstack(leaf)


def count_params(config: DiTConfig) -> dict[str, int]:
    """{"total", "ternary"}: numbers of parameters, from shapes alone."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    # A weight in the blocks is ternary in TerDiT; norms hold `scale`, maps hold `alpha` and `bias` beside it.
    ternary = sum(leaf.size for path, leaf in leaves if path[0].key == "blocks" and path[-1].key == "weight")
    return {"total": sum(leaf.size for _, leaf in leaves), "ternary": ternary if config.ternary else 0}


def packed_bytes(config: DiTConfig) -> int:
    """Bytes of the deployed model: 2 bits a ternary parameter, float32 for the rest."""
    counts = count_params(config)
    return counts["ternary"] // 4 + 4 * (counts["total"] - counts["ternary"])
