"""The runtime: a model from any file or run as a denoiser on devices, ternary weights at 2 bits in their memory.

File formats belong to `interop`; the work between two denoising steps belongs to `sampling`.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
from functools import lru_cache, partial
import threading
from typing import Any

from etils import epath
import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
import numpy as np

from terdit_jax.choices import DTYPES, NUM_TIMESTEPS
from terdit_jax.config_sections import DiffusionConfig, SampleConfig
from terdit_jax.diffusion.objective import make_objective
from terdit_jax.errors import UserError
from terdit_jax.fast.inference_pass import bind_schedule, inference_forward, make_inference_operands
from terdit_jax.fast.modes import Numerics, choose_numerics, compiler_options
from terdit_jax.fast.plan import choose_plan
from terdit_jax.inference.decoding import VAE, check_vae, to_images
from terdit_jax.inference.sampling import Draw, compile_draw, draw_all, make_draw
from terdit_jax.interop.description import Description
from terdit_jax.interop.published import Leaves, params_tree
from terdit_jax.interop.weights import open_weights, packed_leaves
from terdit_jax.labels import check_labels, find_classes
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.plan import Plan
from terdit_jax.model.transformer import abstract_params, forward, packed_operands
from terdit_jax.parallel.mesh import single_device_mesh
from terdit_jax.parallel.sharding import abstract_sharded, check_heads, place, tree_shardings
from terdit_jax.reproducible import pinned

# So few layers run unrolled on CPUs, 1.5 times faster: a loop's body gets fewer threads there.
_UNROLLED_ON_CPU = 8


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A model ready to run. Attributes:

    config: the architecture and how it is computed.
    description: what the model's file or run says of it.
    mesh: the devices.
    plan: how it is run where `numerics` is None.
    numerics: of its mode (`fast.modes.choose_numerics`), or None for the forward pass of training.
    operands: what the forward pass reads, on the devices; where `numerics` is None, ternary matrices are packed, four
      codes a byte.
    """

    config: DiTConfig
    description: Description
    mesh: Mesh
    plan: Plan
    numerics: Numerics | None
    operands: dict

    @property
    def predict(self) -> Callable[[dict, Array, Array, Array], Array]:
        """The forward pass as a function of (operands, x_t, t, y), for the program of a caller."""
        return partial(_denoise, self.config, self.plan, self.numerics, self.mesh)

    def __repr__(self) -> str:
        devices = self.mesh.devices.flat
        return (
            f"Denoiser({self.description.name}, {self.config.num_params / 1e6:,.1f}M parameters, {self.config.dtype}, "
            f"samples of {self.config.sample_shape}, on {len(devices)} x {devices[0].device_kind})"
        )

    @pinned()
    def __call__(self, x_t: Array, t: Array, y: Array) -> Array:
        """Predicts the noise and the variance interpolation, or the velocity (`description.diffusion.objective`).

        Args:
          x_t: (B, H, W, C) float noisy latents; on a mesh, B is a multiple of its data and fsdp axes.
          t: (B,) int timesteps in [0, 1000); of a flow model float in [0, 1], 0 noise and 1 data.
          y: (B,) int labels; num_classes is the null class.

        Returns:
          (B, H, W, 2C) float32: eps, then the variance interpolation v. Of a flow model (B, H, W, C), the velocity.

        Raises:
          UserError: labels that are not whole numbers, not B, or of no class; t that are not B, or lie beyond their
            range. Inside a jit values are not seen.
        """
        flow = self.description.diffusion.objective == "flow"
        y = self._check_call(x_t, y)
        _check_times(t, len(x_t), flow)
        within = any(isinstance(array, jax.core.Tracer) for array in (x_t, t, y))  # of a program with its own options
        denoise, x_t = _compiled(None if within else self.numerics), jnp.asarray(x_t, jnp.float32)
        t, y = jnp.asarray(t, jnp.float32 if flow else jnp.int32), jnp.asarray(y, jnp.int32)
        out = denoise(self.config, self.plan, self.numerics, self.mesh, self.operands, x_t, t, y)
        return out[..., : x_t.shape[-1]] if flow else out

    @pinned()
    def draw(
        self,
        labels: np.ndarray,
        *,
        seed: int = 0,
        num_steps: int | None = None,
        cfg_scale: float | None = None,
        method: str | None = None,
        spacing: str | None = None,
        cfg_t_min: int | None = None,
        cfg_t_max: int | None = None,
        first: int = 0,
        vae: VAE | None = None,
        batch_size: int = 256,
        whole_batches: bool = False,
        report: Callable[[int], None] = lambda done: None,
    ) -> np.ndarray:
        """Draws an image for each label; what is left out is as the model's description has it.

        Args:
          labels: (N,) int, N above 0.
          seed: of all noise; image i depends on (seed, i) alone.
          num_steps, cfg_scale, method, spacing, cfg_t_min, cfg_t_max: as `config.sample` has them.
          first: index of the first image.
          vae: of `interop.vae_weights.load_vae`, to decode the latents that the model draws.
          batch_size: images drawn at once.
          whole_batches: draw as many also for fewer labels, and drop the rest: one program for any number of labels.
          report: called with the number of images done so far.

        Returns:
          (N, H, W, C) float32, in [-1, 1] up to what sampling overshoots. Without a VAE, latents become a preview.

        Raises:
          UserError: labels the model does not have, settings the sampler does not know, a VAE of other latents.
        """
        labels = check_labels(labels, self.config.num_classes)
        if vae:
            check_vae(vae, self.config.in_channels)
        draw = self._draw_with(
            num_steps=num_steps, cfg_scale=cfg_scale, method=method, spacing=spacing, cfg_t_min=cfg_t_min,
            cfg_t_max=cfg_t_max,
        )  # fmt: skip
        latents = draw_all(
            draw, self.operands, labels, self.mesh, seed, batch_size=batch_size, report=report, first=first,
            whole_batches=whole_batches,
        )  # fmt: skip
        return to_images(latents, self.description.latent_scale, vae, self.config.activation_dtype, self.mesh)

    @pinned()
    def compile_draw(self, count: int, *, batch_size: int = 256, **settings: Any) -> None:
        """Compiles what `draw` runs for `count` labels and these settings of it; the model needs no weights yet."""
        operands = abstract_operands(self.config, self.numerics, self.mesh)
        compile_draw(self._draw_with(**settings), operands, count, self.mesh, batch_size)

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels; empty if they are not known."""
        return self.description.class_names

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The labels of the classes with these names, as diffusers' DiTPipeline has them.

        Raises:
          UserError: a name that no class has, or several (`labels.find_classes`).
        """
        return find_classes([label] if isinstance(label, str) else label, self.class_names)

    def settings_with(self, **given: Any) -> SampleConfig:
        """The description's settings with those given that are not None."""
        changes = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self.description.sample, **changes)

    def _draw_with(self, **given: Any) -> Draw:
        settings = self.settings_with(**given)
        return _cached_draw(self.config, self.description.diffusion, self.plan, self.numerics, settings)

    def _check_call(self, x_t: Array, y: Array) -> Array:
        # Of what is unseen, kind and number are checked alone.
        values = np.zeros(y.shape, y.dtype) if _is_unseen(y) else y
        labels = check_labels(values, self.config.num_classes + 1, owner="the model, with the null class,")
        if len(labels) != len(x_t):
            raise UserError(f"{len(x_t)} images with {len(labels)} labels: give one number an image")
        return y if isinstance(y, Array) else labels


def _check_times(t: Array, count: int, flow: bool) -> None:
    shape = np.shape(t)
    if shape != (count,):
        raise UserError(f"{count} images with t of shape {shape}: give one number an image")
    values = np.zeros(shape) if _is_unseen(t) else np.asarray(t)
    sound = (values >= 0) & (values <= 1) if flow else (values >= 0) & (values < NUM_TIMESTEPS) & (values % 1 == 0)
    if not sound.all():
        words = "0 (noise) to 1 (data), of a flow model" if flow else f"whole numbers from 0 to {NUM_TIMESTEPS - 1}"
        raise UserError(f"t={values[~sound][0]}: give {words}")


def _is_unseen(values: Array) -> bool:
    return isinstance(values, jax.core.Tracer) or (isinstance(values, Array) and not values.is_fully_addressable)


@lru_cache(maxsize=16)
def _cached_draw(
    config: DiTConfig,
    diffusion: DiffusionConfig,
    plan: Plan,
    numerics: Numerics | None,
    settings: SampleConfig,
) -> Draw:
    """Returns `make_draw`'s function; the same settings again are not compiled again."""
    bind = partial(bind_schedule, config, numerics) if numerics else None
    objective, options = make_objective(diffusion, config.learn_sigma), compiler_options(numerics)
    return make_draw(config, objective, settings, bind, options, plan.run_blocks)


@lru_cache(maxsize=16)
def _compiled(numerics: Numerics | None) -> Callable[..., Array]:
    return jax.jit(_denoise, static_argnums=(0, 1, 2, 3), compiler_options=compiler_options(numerics))


def _denoise(
    config: DiTConfig,
    plan: Plan,
    numerics: Numerics | None,
    mesh: Mesh,
    operands: dict,
    x_t: Array,
    t: Array,
    y: Array,
) -> Array:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # jax.set_mesh is not for callers' own jits
        if numerics:
            return inference_forward(config, numerics, operands, x_t, t, y)
        return forward(config, operands, x_t, t, y, plan.run_blocks)


@pinned()
def load_model(
    path: epath.PathLike,
    *,
    mesh: Mesh | None = None,
    ema: bool = True,
    step: int | None = None,
    dtype: DTypeLike | None = None,
    mode: str = "auto",
    num_heads: int | None = None,
    objective: str | None = None,
    check: Callable[["Denoiser"], object] = lambda model: None,
    meanwhile: Callable[["Denoiser"], None] = lambda model: None,
) -> Denoiser:
    """Loads a model to run it; its weights pass through host memory leaf by leaf and reach the devices packed.

    Args:
      path: a workdir, an artifact or other safetensors file, a published checkpoint, or a name on the Hugging Face Hub,
        "organisation/name" (`interop.weights`).
      mesh: devices to spread it over, of `terdit_jax.parallel.mesh`; the first device alone if left out.
      ema: the averaged weights, where there are both.
      step: which checkpoint of a workdir; the newest sound one if left out.
      dtype: of activations, float32 or bfloat16; if left out, bfloat16, but float32 on CPUs: few multiply 16 bits.
      mode: of `choices.MODES`: how weights lie in memory and what matmuls compute in.
      num_heads, objective: of a DiT's or SiT's checkpoint that does not tell (`interop.weights.open_weights`).
      check: called with the model before its weights are read, which may take long; what it raises ends the loading.
      meanwhile: called in a thread with the model while its weights are read, as for `Denoiser.compile_draw`; what it
        raises is lost.

    Raises:
      UserError: nothing at `path` that can be read, a damaged file, a model that the mesh does not divide, a mode that
        it cannot have, or an argument that is missing or that the file contradicts.
    """
    weights = open_weights(path, ema=ema, step=step, num_heads=num_heads, objective=objective)
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(dtype or ("float32" if on_cpu else "bfloat16")).name
    model = describe_denoiser(weights.description, mesh or single_device_mesh(), dtype, mode)
    check(model)

    def work() -> None:
        with contextlib.suppress(Exception):  # whoever draws with the same settings meets it again
            meanwhile(model)

    thread = threading.Thread(target=work, daemon=True)  # weights that cannot be read are said at once
    thread.start()
    loaded = load_denoiser(model, weights.leaves())
    thread.join()
    return loaded


def describe_denoiser(description: Description, mesh: Mesh, dtype: str, mode: str) -> Denoiser:
    """A model as it would run, before it has operands (`load_denoiser`, `abstract_operands`).

    Args:
      description: of the model.
      mesh: devices to spread it over, which may be absent.
      dtype: of activations, one of DTYPES.
      mode: of `choices.MODES`.

    Raises:
      UserError: another dtype, a model that the mesh does not divide, or a mode that it cannot have.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: choose one of {', '.join(DTYPES)}")
    model, on_cpu = description.model, mesh.devices.flat[0].platform == "cpu"
    layers = "unrolled" if on_cpu and model.depth <= _UNROLLED_ON_CPU else "scanned"
    config = dataclasses.replace(
        model, dtype=dtype, layers=layers, matmul_dtype="same", plan="plain" if mode == "plain" else "auto"
    )
    check_heads(config.num_kv_heads, mesh)
    numerics = choose_numerics(mode, config, mesh)
    return Denoiser(config, description, mesh, choose_plan(config, mesh), numerics, {})


def load_denoiser(model: Denoiser, leaves: Leaves) -> Denoiser:
    """The model of `describe_denoiser` with its weights, of `Weights.leaves`, on its devices."""
    operands = place_operands(model.config, leaves, model.mesh)
    if model.numerics:
        operands = make_inference_operands(model.config, model.numerics, operands)
    return dataclasses.replace(model, operands=operands)


def abstract_operands(config: DiTConfig, numerics: Numerics | None, mesh: Mesh) -> dict:
    """The operands of a model in some mode as shapes with their shardings; nothing is allocated."""
    operands = jax.eval_shape(lambda params: packed_operands(config, params), abstract_params(config))
    if numerics is None:
        return abstract_sharded(operands, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        jax.eval_shape(partial(make_inference_operands, config, numerics), operands),
    )


def place_operands(config: DiTConfig, leaves: Leaves, mesh: Mesh) -> dict:
    """The packed operands of a stream of leaves, on the mesh. They are put together in host memory, where a leaf of
    master weights lives no longer than its packing, so that devices never hold more than the model itself.

    Args:
      config: the architecture and dtypes.
      leaves: of `Weights.leaves`.
      mesh: the devices.
    """

    def narrow(path: str, leaf: np.ndarray) -> np.ndarray:
        """Matrices that a full-precision model multiplies by in `config.dtype` anyway, at half the size already."""
        matrix = path.startswith("blocks/") and path.endswith("/weight") and leaf.dtype != np.uint8
        return leaf.astype(config.activation_dtype) if matrix else leaf

    params = params_tree((path, narrow(path, leaf)) for path, leaf in packed_leaves(config, leaves))
    with jax.default_device(_host()):
        operands = packed_operands(config, params)
    return jax.tree.map(place, operands, tree_shardings(operands, mesh))


def _host() -> jax.Device | None:
    """The CPU as a device, or none where JAX_PLATFORMS leaves it out: the default device then does the work."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
