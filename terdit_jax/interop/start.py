"""The parameters that a training starts with when they come from another model: what it keeps, what it begins afresh.

`weights` opens the source, `training.state` makes a state of the parameters.
"""

from collections.abc import Iterator
import dataclasses
from functools import partial

from etils import epath
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from terdit_jax.diffusion.objective import Objective, make_objective
from terdit_jax.errors import UserError
from terdit_jax.interop.known import Told
from terdit_jax.interop.published import Leaves, model_leaves, params_leaves, params_tree
from terdit_jax.interop.weights import Weights, open_told
from terdit_jax.model.config import QUANTISER, DiTConfig
from terdit_jax.model.embedders import condition
from terdit_jax.model.layers import linear, rms_norm
from terdit_jax.model.transformer import init_params
from terdit_jax.reproducible import make_key
from terdit_jax.ternary.packing import CODES_PER_BYTE, unpack
from terdit_jax.ternary.quantize import Rounding, absmean_codes, least_squares_alpha, spread
from terdit_jax.training.examples import example_keys

# What weights must have in common with the model that starts from them: all that shapes or moves their numbers, but
# not the size of the images (512 px may start from 256 px), the classes, nor what training alone reads.
_MUST_AGREE = (
    "family", "in_channels", "learn_sigma", "patch_size", "hidden_size", "depth", "num_heads", "num_kv_heads",
    "mlp_width", "qk_norm", "positions",
)  # fmt: skip
_LABELS = "y_embedder/embedding_table"
_ADALN = "blocks/adaLN_modulation"
_GAIN = f"{_ADALN}/norm/scale"
_CONDITIONS = 1024  # that a gain is fitted over


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that a model may start from. Attributes:

    weights: opened.
    model: that is to start.
    keep_labels: whether the classes' rows of the label table are kept, where there are as many.
    """

    weights: Weights
    model: DiTConfig
    keep_labels: bool = True

    def params(self, seed: int) -> dict:
        """The float32 parameters to start with, whole in memory; `seed` draws label rows that begin afresh.

        Raises:
          UserError: weights that cannot be read.
        """
        source, description = self.weights.model, self.weights.description
        params = master_params(source, self.weights.leaves())
        if self.ternarises:
            objective = make_objective(description.diffusion, source.learn_sigma)
            params = ternarised_params(self.model, source.num_classes, objective, params)
        elif self.model.alpha_per != source.alpha_per:
            params = params_tree(_spread_alphas(self.model, params))
        if self._fresh_labels:
            params["y_embedder"]["embedding_table"] = _fresh_labels(self.model, seed, params)
        return params

    def __str__(self) -> str:
        """One line: where the weights come from and what is begun afresh beside the optimizer."""
        description, fresh = self.weights.description, []
        if self.model.ternary and not self.ternarises and not self.weights.masters:
            fresh.append("master weights, of the codes")
        if self.ternarises:
            fresh.append("alpha, by least squares")
            fresh += ["the gain after adaLN, by least squares"] if self.model.adaln_rms_norm else []
        if self._fresh_labels:
            fresh.append(f"the label table of {self.model.num_classes} classes, but for the null class")
        step = "" if description.step is None else f", step {description.step:,}"
        which = "averaged" if description.ema else "raw"
        return f"weights from {self.weights.source}{step}, {which}; begun afresh: {'; '.join(fresh) or 'nothing'}"

    @property
    def ternarises(self) -> bool:
        """Whether full-precision weights become a ternary model's."""
        return self.model.ternary and not self.weights.model.ternary

    @property
    def _fresh_labels(self) -> bool:
        return not self.keep_labels or self.model.num_classes != self.weights.model.num_classes


def open_source(path: epath.PathLike, model: DiTConfig, objective: str = "flow", *, keep_labels: bool = True) -> Source:
    """Opens the weights at a path, averaged ones if there are both, and checks that a training of `model` may start so.

    Args:
      path: as of `open_weights`.
      model: the architecture.
      objective: of the run; taken for the weights' own where a file of DiT or SiT does not tell.
      keep_labels: as of `Source`.

    Raises:
      UserError: as `open_weights`; the weights of another architecture.
    """
    # What such a file does not tell is as the run has it; which objective it was trained with is free.
    weights = open_told(path, Told(model.num_heads, objective))
    given = weights.model
    for field in ("ternary", "adaln_rms_norm", *QUANTISER) if given.ternary else ():
        # Full precision has no norm after adaLN, and three values a matrix are no start that it could use. A matrix's
        # alpha may become that of each of its outputs.
        if field != "alpha_per" or model.alpha_per == "matrix":
            _check(path, field, given, model)
    for field in _MUST_AGREE:
        _check(path, field, given, model)
    return Source(weights, model, keep_labels)


def _check(path: epath.PathLike, field: str, given: DiTConfig, wanted: DiTConfig) -> None:
    if getattr(given, field) != getattr(wanted, field):
        raise UserError(
            f"config.train.init_from={path} has {field}={getattr(given, field)}, config.model has "
            f"{getattr(wanted, field)}"
        )


def master_params(model: DiTConfig, leaves: Leaves) -> dict:
    """The parameter tree of a model, float32, of a stream of its leaves.

    Codes without master weights become masters of the size that xavier-uniform ones have, so that the same learning
    rate moves them as far; ternarising them gives the codes again.
    """
    ternary = {leaf.path for leaf in model_leaves(model) if leaf.ternary}
    return params_tree(
        (path, _unpack_masters(array) if path in ternary and array.dtype == np.uint8 else array)
        for path, array in leaves
    )


def _unpack_masters(packed: np.ndarray) -> np.ndarray:
    mean_abs = 0.5 * (6 / (packed.shape[1] + CODES_PER_BYTE * packed.shape[2])) ** 0.5  # of a xavier-uniform matrix
    layers = []
    for codes in map(jax.jit(unpack), packed):
        codes = np.asarray(codes, np.float32)
        share = max(np.abs(codes).mean(), 1e-3)
        layers.append(codes * np.float32(mean_abs / share))
    return np.stack(layers)


def _spread_alphas(model: DiTConfig, params: dict) -> Iterator[tuple[str, np.ndarray]]:
    """Leaves in which every output has the alpha of its matrix."""
    shapes = {leaf.path: leaf.shape for leaf in model_leaves(model)}
    for path, leaf in params_leaves(params):
        yield path, np.broadcast_to(leaf[:, None], shapes[path]) if path.endswith("/alpha") else leaf


def ternarised_params(model: DiTConfig, num_classes: int, objective: Objective, params: dict) -> dict:
    """The parameters of the ternary model that comes closest to a full-precision one, without training.

    Weights stay as they are and become masters; alpha brings alpha T closest to W. The RMSNorm after adaLN would undo
    the scale that the full-precision model has learned for its shifts, scales and gates: 1 a channel on average,
    whatever they were. Its gain g is therefore fitted channel by channel: with m(c) the full-precision modulation of a
    condition and n(c) the normalised ternary one, g = sum m n / sum n^2 over conditions. They depend on t and the class
    alone, so no image is needed.

    Args:
      model: the ternary architecture.
      num_classes: of the full-precision model.
      objective: that it was trained with, which t are drawn from.
      params: its float32 parameters, layers stacked on axis 0.
    """
    leaves = dict(params_leaves(params))
    wanted = [leaf.path for leaf in model_leaves(model)]
    for path in wanted:
        if path.endswith("/alpha"):
            weight = leaves[f"{path.removesuffix('alpha')}weight"]
            leaves[path] = np.stack([np.asarray(_alpha(layer, model.alpha_per, model.rounding)) for layer in weight])
    if _GAIN in wanted:
        c = _conditions(num_classes, objective, params)
        maps = zip(*(leaves[f"{_ADALN}/{name}"] for name in ("weight", "bias", "alpha")), strict=True)
        leaves[_GAIN] = np.stack([np.asarray(_fit_gain(model.rounding, c, *one)) for one in maps])
    return params_tree(leaves.items())


_alpha = jax.jit(least_squares_alpha, static_argnums=(1, 2))


def _conditions(num_classes: int, objective: Objective, params: dict) -> Array:
    """Conditions (N, C') of t as in training, and of every class and the null class in turn."""
    places = jnp.arange(_CONDITIONS)
    t = jax.vmap(objective.draw_t)(example_keys(0, 0, places))
    return condition(params, t, places % (num_classes + 1))


@partial(jax.jit, static_argnums=0)
def _fit_gain(rounding: Rounding, c: Array, weight: Array, bias: Array, alpha: Array) -> Array:
    """The gain (6 D,) of one layer; 1, as in a fresh model, where the normalised modulation is always zero."""
    codes = absmean_codes(weight, rounding)
    in_use = spread(alpha, codes) * codes
    target = linear(c, {"weight": weight, "bias": bias})
    normed = rms_norm(linear(c, {"weight": in_use, "bias": bias}), jnp.float32(1))
    power = jnp.sum(jnp.square(normed), axis=0)
    return jnp.where(power > 0, jnp.sum(target * normed, axis=0) / jnp.where(power > 0, power, 1), 1)


def _fresh_labels(model: DiTConfig, seed: int, params: dict) -> np.ndarray:
    """A label table (num_classes + 1, C') as a fresh run of this seed has it, the null class's row kept."""
    fresh = jax.jit(lambda: init_params(model, make_key(seed))["y_embedder"]["embedding_table"])
    table = np.array(fresh())
    table[-1] = params["y_embedder"]["embedding_table"][-1]
    return table
