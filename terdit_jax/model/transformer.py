"""The whole network: its parameters, the operands made from them once per step, and the forward pass over operands.

Parameters are what is trained, averaged and saved; operands are what the forward pass reads (codes, packed codes, bf16
copies). Going from one to the other is a pure function whose pullback carries the straight-through gradients.

Two seams let `fast` replace a plain function: `make_linear`, which turns one map's weight into what a matmul reads,
and `run_blocks`, which runs the blocks over the depth.
"""

import functools

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from terdit_jax.model.block import Block
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.depth import RunBlocks, Watch, scan_blocks
from terdit_jax.model.embedders import (
    FinalLayer,
    LabelEmbedder,
    TimestepEmbedder,
    condition,
    embed,
    final_layer,
    patch_embedder,
    rope_table,
    unpatchify,
)
from terdit_jax.model.layers import MakeLinear, packed_linear, trained_linear
from terdit_jax.parallel.sharding import constrain, constrain_tree


class DiT(nnx.Module):
    """The parameters of a network of `config.family`: TerDiT, Large-DiT, or DiT, ternary or not."""

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

    def operands(self, make_linear: MakeLinear = trained_linear) -> dict:
        """The forward pass's operands (see `make_operands`)."""
        return {
            "x_embedder": self.x_embedder.operands(),
            "t_embedder": {name: getattr(self.t_embedder, name).operands() for name in ("mlp_in", "mlp_out")},
            "y_embedder": {"embedding_table": self.y_embedder.embedding_table[...]},
            "blocks": self.blocks.operands(self.config, make_linear),
            "final_layer": {
                name: getattr(self.final_layer, name).operands() for name in ("adaLN_modulation", "linear")
            },
        }

    def __call__(self, x_t: Array, t: Array, y: Array) -> Array:
        """Calls `forward`, making the operands anew every time."""
        return forward(self.config, self.operands(), x_t, t, y)


@functools.lru_cache(maxsize=64)
def abstract_model(architecture: DiTConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's graph, and its state with shapes in place of arrays; a run asks for it a dozen times.

    Neither depends on how the model is computed: give `config.architecture`, and it is traced once.
    """
    return nnx.split(nnx.eval_shape(lambda: DiT(architecture, rngs=nnx.Rngs(params=0))))


def abstract_params(config: DiTConfig) -> dict:
    """The parameter tree with shapes in place of arrays; nothing is allocated."""
    return nnx.to_pure_dict(abstract_model(config.architecture)[1])


def init_params(config: DiTConfig, key: Array) -> dict:
    """Fresh float32 parameters as a nested dict, layers stacked on axis 0. Initialisers follow the paper's code
    (xavier-uniform, N(0, 0.02) for timestep MLP and labels, zeros for adaLN, final layer and biases)."""
    return nnx.to_pure_dict(nnx.state(DiT(config, rngs=nnx.Rngs(params=key))))


def make_operands(config: DiTConfig, params: dict, make_linear: MakeLinear = trained_linear) -> dict:
    """The forward pass's operands from parameters: ternary codes or bf16 copies, groups stacked.

    Call it once per optimizer step, outside the microbatch loop and outside rematerialised blocks. `jax.vjp` of it
    turns gradients with respect to operands into gradients with respect to parameters.

    Args:
      config: the architecture and dtypes.
      params: nested dict of `init_params`.
      make_linear: makes what matmuls read of each map of the blocks.

    Returns:
      A nested dict whose leaves are arrays and the maps of `terdit_jax.ternary.linear`, constrained to their sharding
      rules if a mesh is in context.
    """
    graphdef, shapes = abstract_model(config.architecture)
    state = jax.tree.map(lambda leaf: leaf, shapes)  # a copy
    nnx.replace_by_pure_dict(state, params)
    model = nnx.merge(graphdef, state)
    model.config = config
    return constrain_tree(model.operands(make_linear))


def packed_operands(config: DiTConfig, params: dict) -> dict:
    """The operands for inference, ternary matrices as 2-bit codes without a gradient; as `make_operands` otherwise."""
    return make_operands(config, params, packed_linear)


def forward(
    config: DiTConfig, operands: dict, x_t: Array, t: Array, y: Array, run_blocks: RunBlocks = scan_blocks
) -> Array:
    """Predicts the noise and the variance interpolation (DDPM), or the velocity (flow matching).

    Args:
      config: the architecture.
      operands: of `make_operands`.
      x_t: (B, H, W, C) float noisy latents.
      t: (B,) timesteps, int in [0, 1000), or of a flow float in [0, 1].
      y: (B,) int labels; num_classes is the null class.
      run_blocks: runs the blocks over the depth.

    Returns:
      (B, H, W, out_channels) float32: the prediction, C channels, then with `learn_sigma` the interpolation v.
    """
    return _forward(config, operands, x_t, t, y, run_blocks, None)[0]


def activation_rms(
    config: DiTConfig, operands: dict, x_t: Array, t: Array, y: Array, run_blocks: RunBlocks = scan_blocks
) -> dict[str, Array]:
    """The root mean square of the activations of every layer, by name, (L,) float32 each; arguments as `forward`."""
    rms = lambda a: jnp.sqrt(jnp.mean(jnp.square(a.astype(jnp.float32))))  # noqa: E731
    return _forward(config, operands, x_t, t, y, run_blocks, lambda activations: jax.tree.map(rms, activations))[1]


def _forward(
    config: DiTConfig, operands: dict, x_t: Array, t: Array, y: Array, run_blocks: RunBlocks, watch: Watch | None
) -> tuple[Array, dict]:
    dtype = config.activation_dtype
    x = constrain(embed(config, operands["x_embedder"], x_t), "batch", "tokens", None)
    c = condition(operands, t, y)
    rope = jnp.asarray(rope_table(config.num_tokens, config.head_dim)) if config.traits.rope else None

    x, watched = run_blocks(config, operands["blocks"], x, c.astype(dtype), rope, watch)
    out = final_layer(operands["final_layer"], x, c)
    return unpatchify(out, config.grid_size, config.patch_size), watched


def count_params(config: DiTConfig) -> dict[str, int]:
    """{"total", "ternary"}: numbers of parameters, from shapes alone. Weights in the blocks are ternary in TerDiT."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    ternary = sum(leaf.size for path, leaf in leaves if path[0].key == "blocks" and path[-1].key == "weight")
    return {"total": sum(leaf.size for _, leaf in leaves), "ternary": ternary if config.ternary else 0}


def packed_bytes(config: DiTConfig) -> int:
    """Bytes of the deployed model: 2 bits a ternary parameter, float32 for the rest."""
    counts = count_params(config)
    return counts["ternary"] // 4 + 4 * (counts["total"] - counts["ternary"])
