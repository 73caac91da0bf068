"""The forward pass arranged for inference; equals `model.transformer.forward`.

One matmul makes q, k and v, one w1 x and w3 x (TerDiT), and the modulations of all layers are made before the first.
Scales are applied after the sums. `xla_passes` or `hopper.forward` compute between matmuls, in the dtypes that `modes`
chooses.
"""

from functools import partial
from types import ModuleType
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
import numpy as np

from terdit_jax.diffusion.guidance import ConditionalDenoise
from terdit_jax.fast import cpu_attention, xla_passes
from terdit_jax.fast.expand import expand
from terdit_jax.fast.hopper import forward as hopper_passes
from terdit_jax.fast.hopper import swiglu_matmul
from terdit_jax.fast.linear import alphas_of
from terdit_jax.fast.modes import Numerics
from terdit_jax.model.block import modulation
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.embedders import condition, embed, final_layer, rope_table, unpatchify
from terdit_jax.parallel.sharding import LOGICAL_TO_MESH
from terdit_jax.ternary.linear import FullLinear, PackedLinear

SCHEDULE_BYTES = 2**30  # of device memory for the modulations of a whole sampling run


def make_inference_operands(config: DiTConfig, numerics: Numerics, operands: dict) -> dict:
    """Arranges operands for `inference_forward`.

    Args:
      config: the architecture.
      numerics: of the mode.
      operands: of `packed_operands(...)`, whole on each device.

    Returns:
      The embedders and the final layer as they are; "modulation" with the depth in front, its matrix packed; "layers",
      a tuple with a dict a layer, whose matrices are (out, in) in `numerics.weights` or (out, in / 4) uint8.
    """
    blocks = operands["blocks"]
    make = jax.jit(partial(_make_layer, config, numerics))
    layers = tuple(
        make(*(jax.tree.map(lambda leaf: leaf[index], blocks[name]) for name in ("attention", "feed_forward")))  # noqa: B023
        for index in range(config.depth)
    )
    modulation_operands = {
        "linear": blocks["adaLN_modulation"],
        "attention": _site(blocks, "attention_norm", blocks["attention"], "out"),
        "ffn": _site(blocks, "ffn_norm", blocks["feed_forward"], "down"),
    }
    rest = {name: value for name, value in operands.items() if name != "blocks"}
    return rest | {"modulation": modulation_operands, "layers": layers}


def _site(blocks: dict, norm: str, branch: dict, last: str) -> dict:
    """In all layers: the scale of a norm, alpha of the last map of its branch and that map's bias, if it has one."""
    alpha = alphas_of(branch[last])[:, 0]
    site = {"norm": blocks[norm]["scale"] if norm in blocks else jnp.ones(len(alpha)), "alpha": alpha}
    return site | ({"bias": branch[f"{last}_bias"][:, 0]} if f"{last}_bias" in branch else {})


def _make_layer(config: DiTConfig, numerics: Numerics, attention: dict, feed_forward: dict) -> dict:
    """One layer's matrices, each (out, in), with the vectors of `_blocks`' passes."""
    first = "up" if config.traits.feed_forward == "gelu" else "w13"
    parts = {"out": attention["out"], first: feed_forward[first], "down": feed_forward["down"]}
    weights = {name: _codes(linear).reshape(-1, _codes(linear).shape[-1]) for name, linear in parts.items()}
    vectors: dict[str, Any] = {"alphas_hidden": alphas_of(feed_forward[first])}
    if not config.traits.rope:
        weights["qkv"] = _codes(attention["qkv"]).reshape(3 * config.hidden_size, -1)
        vectors |= {
            "alphas_qkv": alphas_of(attention["qkv"]),
            "bias_qkv": attention["qkv_bias"].ravel(),
            "bias_hidden": feed_forward["up_bias"].ravel(),
        }
    else:
        weights["qkv"], of_qkv = _rotary_qkv(config, numerics, attention)
        vectors |= of_qkv
    if numerics.weights != "packed":
        weights = {n: expand(w, numerics.weights) if w.dtype == jnp.uint8 else w for n, w in weights.items()}
    return {"hidden": weights.pop(first), **weights, **vectors}


def _codes(linear: PackedLinear | FullLinear) -> Array:
    return linear.weight if isinstance(linear, FullLinear) else linear.packed


def _rotary_qkv(config: DiTConfig, numerics: Numerics, attention: dict) -> tuple[Array, dict]:
    """The matrix of q, k and v with features ordered for RoPE, and its alphas and norms."""
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    repeats = heads // kv_heads
    # Kernels take features as they are published, XLA turns pairs best that lie half a head apart.
    orders = [
        slice(None) if numerics.kernels else xla_passes.rotary_order(count, head_dim) for count in (heads, kv_heads)
    ]
    codes, alpha = _codes(attention["qkv"]), alphas_of(attention["qkv"])  # (repeats + 2, kv_width, in or in / 4)

    def merged_queries(leaf: Array) -> Array:
        """Back to the published head order (kv head, repeat, head_dim)."""
        rest = leaf.shape[2:]
        heads_in_front = leaf[:repeats].reshape(repeats, kv_heads, head_dim, *rest).swapaxes(0, 1)
        return heads_in_front.reshape(config.hidden_size, *rest)

    norms = None
    if config.qk_norm:
        named = zip(("q_norm", "k_norm"), orders, strict=True)
        norms = tuple({key: leaf[order] for key, leaf in attention[name].items()} for name, order in named)
    ordered = lambda leaf: (merged_queries(leaf)[orders[0]], leaf[-2][orders[1]], leaf[-1])  # noqa: E731
    # Queries' parts share a matrix's one alpha.
    alphas = alpha[jnp.array([0, -2, -1])] if alpha.ndim == 1 else ordered(alpha)
    return jnp.concatenate(ordered(codes)), {"alphas_qkv": alphas, "norms": norms}


def modulations(config: DiTConfig, operands: dict, c: Array) -> Array:
    """Shift, scale and gate of attention, then of the feed-forward, of all layers: c (R, C') -> (L, R, 6, D)."""
    layer = lambda _, layer: (None, modulation(layer, c.astype(config.activation_dtype)))  # noqa: E731
    return jax.lax.scan(layer, None, operands["modulation"]["linear"])[1]


def _make_vectors(operands: dict, m: Array) -> Array:
    """Vectors for `xla_passes.add_norm_modulate` at each of its sites, (2 L, 3 or 4, R, D) float32, from modulations.

    Site 2 l leads from attention to feed-forward, site 2 l + 1 from there to the next layer's attention; after the
    last layer gain and shift are those of the first layer, which its start needs.
    """
    parts = (m[:, :, part].astype(jnp.float32) for part in range(6))  # (L, R, D) each
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts
    attention, ffn = (
        {name: leaf.reshape(len(m), 1, -1) for name, leaf in operands["modulation"][site].items()}
        for site in ("attention", "ffn")
    )
    to_ffn = [gate * attention["alpha"], ffn["norm"] * (1 + ffn_scale), ffn_shift]
    following = (jnp.roll(a, -1, axis=0) for a in (attention["norm"] * (1 + scale), shift))
    to_attention = [ffn_gate * ffn["alpha"], *following]
    if "bias" in attention:
        to_ffn.append(gate * attention["bias"])
        to_attention.append(ffn_gate * ffn["bias"])
    vectors = jnp.stack([jnp.stack(to_ffn, axis=1), jnp.stack(to_attention, axis=1)], axis=1)
    return vectors.reshape(-1, *vectors.shape[2:])


def inference_forward(config: DiTConfig, numerics: Numerics, operands: dict, x_t: Array, t: Array, y: Array) -> Array:
    """Computes `model.transformer.forward` from operands of `make_inference_operands`."""
    c = condition(operands, t, y)
    return inference_blocks(config, numerics, operands, x_t, c, modulations(config, operands, c))


def bind_schedule(
    config: DiTConfig, numerics: Numerics, operands: dict, timesteps: np.ndarray, labels: Array
) -> ConditionalDenoise:
    """The network for the steps of one sampling run, whose modulations are worked out before its loop if they fit.

    All modulations of a run depend on its timesteps and labels alone. One matmul a layer for all of them reads each
    adaLN matrix once instead of at every step; they take 12 L D bytes a timestep and label.

    Args:
      config: the architecture.
      numerics: of the mode.
      operands: of `make_inference_operands`.
      timesteps: (S,) int, or float32 of a flow model: all that the network will be asked for, as it will be.
      labels: (B,) int, of the images.

    Returns:
      The network, called as `inference_forward` is, with one timestep for all rows and labels (n B,): for each image,
      its own or the null class, n times.
    """
    B = len(labels)
    table_bytes = 12 * config.depth * config.hidden_size * len(timesteps) * (B + 1)
    if table_bytes > SCHEDULE_BYTES:
        return partial(inference_forward, config, numerics, operands)
    rows = jnp.append(labels, config.num_classes)
    all_t, all_y = jnp.repeat(jnp.asarray(timesteps), B + 1), jnp.tile(rows, len(timesteps))
    c = condition(operands, all_t, all_y)
    m = modulations(config, operands, c)
    m = m.reshape(config.depth, len(timesteps), B + 1, *m.shape[2:])
    c = c.reshape(len(timesteps), B + 1, -1)

    def denoise(x_t: Array, t: Array, y: Array) -> Array:
        step = jnp.argmax(jnp.asarray(timesteps) == t[0])
        row = jnp.where(y == config.num_classes, B, jnp.arange(len(y)) // (len(y) // B))
        return inference_blocks(config, numerics, operands, x_t, c[step][row], m[:, step][:, row])

    return denoise


def inference_blocks(config: DiTConfig, numerics: Numerics, operands: dict, x_t: Array, c: Array, m: Array) -> Array:
    """The forward pass after its conditions.

    Args:
      config: the architecture.
      numerics: of the mode.
      operands: of `make_inference_operands`.
      x_t: (B, H, W, C) float noisy latents.
      c: (B, C') of `condition`.
      m: (L, B, 6, D) of `modulations`.

    Returns:
      (B, H, W, out_channels) float32, as of `forward`.
    """
    compute = partial(_blocks, config, numerics)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        # Each device has the whole network and its own rows; compilers cut neither kernels nor cuDNN's attention.
        batch = PartitionSpec(LOGICAL_TO_MESH["batch"])
        specs = (PartitionSpec(), batch, batch, PartitionSpec(None, *batch))
        compute = jax.shard_map(compute, in_specs=specs, out_specs=batch, check_vma=False)
    return compute(operands, x_t, c, m)


def _blocks(config: DiTConfig, numerics: Numerics, operands: dict, x_t: Array, c: Array, m: Array) -> Array:
    matmul_dtype = numerics.matmul_dtype
    passes, norm = _passes(numerics), config.traits.norm
    vectors = _make_vectors(operands, m)
    x = embed(config, operands["x_embedder"], x_t)
    h, scale = xla_passes.quantize(xla_passes.norm_modulate(x, vectors[-1, 1], vectors[-1, 2], norm), matmul_dtype)
    for index, layer in enumerate(operands["layers"]):
        q, k, v = _queries_keys_values(config, numerics, _multiply(numerics, h, layer["qkv"]), scale, layer)
        h = _attend(numerics, q, k, v, x.dtype).reshape(x.shape)
        h, scale = _quantized(numerics, h)
        y = _multiply(numerics, h, layer["out"])
        x, h, scale = passes.add_norm_modulate(x, y, scale, vectors, jnp.int32(2 * index), matmul_dtype, norm)
        h, scale = _hidden(config, numerics, h, scale, layer)
        y = _multiply(numerics, h, layer["down"])
        x, h, scale = passes.add_norm_modulate(x, y, scale, vectors, jnp.int32(2 * index + 1), matmul_dtype, norm)
    return unpatchify(final_layer(operands["final_layer"], x, c), config.grid_size, config.patch_size)


def _queries_keys_values(
    config: DiTConfig, numerics: Numerics, y: Array, scale: Array | None, layer: dict
) -> tuple[Array, Array, Array]:
    """From products y (B, T, D + 2 kv_width) and their scale (B, T) or None, (B, T, heads, head_dim) each."""
    if not config.traits.rope:
        return xla_passes.split_heads(y, scale, layer["alphas_qkv"], layer["bias_qkv"], config.num_heads)
    rope = jnp.asarray(rope_table(config.num_tokens, config.head_dim))
    passes = _passes(numerics)
    return passes.queries_keys_values(y, scale, layer["alphas_qkv"], layer["norms"], rope, config.num_heads)


def _attend(numerics: Numerics, q: Array, k: Array, v: Array, dtype: DTypeLike) -> Array:
    """Attention of q over k and v, (B, T, heads, head_dim) each; `dtype` is that of the activations."""
    if numerics.attention == "cpu":  # of products in float32
        return cpu_attention.attention(q.astype(dtype), k.astype(dtype), v.astype(dtype))
    return jax.nn.dot_product_attention(q, k, v, implementation=numerics.attention)


def _hidden(
    config: DiTConfig, numerics: Numerics, h: Array, scale: Array | None, layer: dict
) -> tuple[Array, Array | None]:
    """The feed-forward up to its last matmul: h (B, T, D) and its scale (B, T) or None -> (B, T, F) and its scale."""
    (B, T, D), weight, alphas = h.shape, _unpacked(numerics, layer["hidden"]), layer["alphas_hidden"]
    passes, dtype = _passes(numerics), numerics.matmul_dtype
    if config.traits.feed_forward == "gelu":
        return passes.gelu(_multiply(numerics, h, weight), scale, alphas, layer["bias_hidden"], dtype)
    if numerics.kernels and alphas.ndim == 1 and swiglu_matmul.pays(B * T, D, len(weight) // 2):
        scale = None if scale is None else scale.reshape(B * T)
        h = swiglu_matmul.swiglu_matmul(h.reshape(B * T, D), scale, weight, alphas)
        return _quantized(numerics, h.reshape(B, T, -1))
    return passes.swiglu(_multiply(numerics, h, weight), scale, alphas, dtype)


def _quantized(numerics: Numerics, h: Array) -> tuple[Array, Array | None]:
    """h (B, T, D) in the matmul's dtype, and its scale (B, T) or None."""
    return (h, None) if numerics.matmul_dtype == h.dtype else _passes(numerics).quantize(h, numerics.matmul_dtype)


def _passes(numerics: Numerics) -> ModuleType:
    return hopper_passes if numerics.kernels else xla_passes


def _unpacked(numerics: Numerics, weight: Array) -> Array:
    return expand(weight, numerics.matmul_dtype) if weight.dtype == jnp.uint8 else weight


def _multiply(numerics: Numerics, h: Array, weight: Array) -> Array:
    """h (B, T, in) times weight (out, in), or (out, in / 4) packed -> (B, T, out) in `numerics.product_dtype`."""
    weight = _unpacked(numerics, weight)
    return jax.lax.dot_general(h, weight, (((2,), (1,)), ((), ())), preferred_element_type=numerics.product_dtype)
