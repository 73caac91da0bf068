"""The configuration's schema: every field of a run with its type, default and meaning, and the rule for its values.

Files in `configs/` start from `base_config()` and set what their model needs; `config_file` loads them. `validate`
refuses values that cannot work before anything is allocated.
"""

from collections.abc import Callable, Collection, Iterator
import difflib
from typing import Any, NamedTuple

from ml_collections import ConfigDict
import numpy as np

from terdit_jax.errors import UserError


def base_config() -> ConfigDict:
    """Every field with its default: TerDiT-600M at 256 px as published. Sizes are in latent pixels, rates per step."""
    config = ConfigDict()
    config.name = "terdit_600m"
    config.seed = 0  # parameters, data order, noise, timesteps, label dropout, posterior samples, flips

    config.model = ConfigDict(
        {
            "ternary": True,  # False: Large-DiT, the full-precision twin without the adaLN RMSNorm
            "input_size": 32,  # height and width of the latent (256 px / 8)
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 1536,
            "depth": 16,
            "num_heads": 32,
            "num_kv_heads": 0,  # 0: as many as num_heads
            "ffn_multiple_of": 256,  # the feed-forward width is 8/3 of hidden_size, rounded up to this
            "num_classes": 1000,
            "class_dropout_prob": 0.1,
            "qk_norm": True,
            "positions": "rope_1d",  # rope_1d (published) | rope_1d_sincos_2d (adds absolute 2-D positions)
            "adaln_rms_norm": True,  # RMSNorm behind the block's adaLN linear; ternary models only
            "alpha_init": "normal",  # normal (published: N(0, 1)) | least_squares
        }
    )
    config.compute = ConfigDict(
        {
            "dtype": "bfloat16",  # activations and matmul operands; parameters stay float32
            "grad_dtype": "bfloat16",  # gradients of ternary matrices as they cross the mesh; the others' have `dtype`
            # Of matmuls with ternary matrices, but for the matrices' own gradient: same (as dtype) | float8_e4m3fn
            # (Hopper GPUs) | int8 (TPUs, older GPUs). 8 bits round activations, token by token. In docs/ablations.md
            # the loss stays within 1% without the RMSNorm behind adaLN, and is 4 to 5% higher with it.
            "matmul_dtype": "same",
            "remat": "none",  # none | block | dots
            "attention": "auto",  # auto (cudnn on GPUs, xla elsewhere) | xla | cudnn
            "passes": "auto",  # between matmuls: auto (kernels on Hopper GPUs, xla elsewhere) | xla
            "layers": "auto",  # auto (unrolled on GPUs, scanned elsewhere) | scanned | unrolled
            "plan": "auto",  # auto (whatever is quickest here) | plain (nothing of terdit_jax.fast)
        }
    )
    config.mesh = ConfigDict(
        {
            "data": -1,  # -1: what the other axes leave
            "fsdp": 1,
            "tensor": 1,
            "slices": 1,  # TPU slices, or groups of GPU nodes, joined by a slower network; data spans them
            "gather": "codes",  # codes | bfloat16: what of a ternary matrix that fsdp cuts travels, 2 bits or 16
            "overlap": True,  # compile the step with the platform's options that hide communication behind arithmetic
        }
    )

    config.data = ConfigDict(
        {
            "dir": "",  # a data set written by `python -m terdit_jax.prepare`
            "synthetic": False,  # random latents of the model's shape instead; for bring-up and benchmarks
            "horizontal_flip": True,
            "in_memory": False,  # read the whole split once; for small data sets
            "read_threads": 16,
            "prefetch": 4,  # batches
        }
    )
    config.optimizer = ConfigDict(
        {
            "learning_rate": 5e-4,
            "drop_step": 0,  # first step at drop_learning_rate; 0: no drop
            "drop_learning_rate": 1e-4,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "clip_norm": 2.0,
            "ema_decay": 0.9999,
            "ema_ramp": False,  # decay min(ema_decay, (1 + step) / (10 + step)): for short runs
            "spike_sigma": 0.0,  # skip losses so many running deviations above their running mean; 0: never
            "spike_window": 200,  # steps that mean and deviation reach back
        }
    )
    config.train = ConfigDict(
        {
            "num_steps": 1_750_000,
            "batch_size": 256,  # over all devices and processes
            "accumulation_steps": 1,  # microbatches an optimizer step
            "max_nonfinite_steps": 10,  # skipped in a row before the run is aborted
            "init_from": "",  # weights to start from: a workdir, an artifact, a published checkpoint, safetensors
            "compilation_cache": "",  # a folder or gs:// that compiled programs are kept in for restarts; none if empty
            "compiler_options": "",  # of XLA, for the step: "--xla_name=value --xla_other=value"
        }
    )
    config.checkpoint = ConfigDict({"every": 5000, "keep": 3, "keep_every": 0})  # keep_every 0: none for good
    config.log = ConfigDict(
        {
            "every": 100,
            "heldout_every": 5000,  # 0: never
            "heldout_batches": 8,
            "samples_every": 10_000,  # 0: never
            "score_every": 0,  # samples of the EMA weights judged, the best weights kept; 0: never
            "score_samples": 500,
            "tensorboard": True,
        }
    )
    config.sample = ConfigDict(  # the grids drawn during training, and the defaults of terdit_jax.sample
        {
            "method": "ddpm",  # ddpm | ddim | dpmpp_2m | dpmpp_2m_sde | unipc
            "num_steps": 250,
            "spacing": "auto",  # where the steps lie; auto: as published for ddpm and ddim, as measured for the others
            "cfg_scale": 4.0,
            "cfg_channels": 3,  # guidance mixes min(this, in_channels) channels; 0: all
            "cfg_t_min": 0,  # guidance at timesteps cfg_t_min <= t < cfg_t_max only
            "cfg_t_max": 1000,
            "num_images": 16,
        }
    )
    return config.lock()


class Rule(NamedTuple):
    """What a field accepts, as a predicate on values of the field's type and in words."""

    accepts: Callable[[Any], bool]
    words: str


def _whole(low: int, high: int = 2**31 - 1) -> Rule:
    """Steps, counts and sizes; they meet int32 arithmetic on devices, so that is the limit where no lower one is."""
    return Rule(lambda value: low <= value <= high, f"must lie in [{low}, {high}]")


def _one_of(*choices: str) -> Rule:
    return Rule(lambda value: value in choices, f"choose one of {', '.join(choices)}")


def _in_float32(value: float) -> float:
    """As devices hold it: numbers above float32's range are infinite there, and those below its normal range are 0."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(np.float32(value))
    return rounded if abs(rounded) >= np.finfo(np.float32).tiny else 0.0


_POSITIVE = Rule(lambda value: 0 < _in_float32(value) < np.inf, "must be positive and finite in float32")
_NOT_NEGATIVE = Rule(lambda value: 0 <= value and _in_float32(value) < np.inf, "must be finite and not negative")
_SHARE = Rule(lambda value: 0 <= value and _in_float32(value) < 1, "must be in [0, 1), in float32 too")
_AXIS = Rule(lambda value: value == -1 or 1 <= value <= 2**20, "must be -1 (what the others leave) or in [1, 1048576]")
_NAME = Rule(lambda value: 0 < len(value) <= 100 and value.isprintable() and value.strip() == value != "",
             "must be 1 to 100 printable characters, without spaces around them")  # fmt: skip
_TEXT = Rule(lambda value: len(value) <= 10_000 and value.isprintable(), "must be at most 10000 printable characters")
_PATH = Rule(lambda value: value == value.strip(), "must not begin or end with a space")

# Of every field but booleans, whose type says it all. Limits above are far beyond any sensible value: they keep a
# mistyped digit from asking for memory or hours that nobody has.
RULES = {
    "name": _NAME,
    "seed": _whole(0, 2**32 - 1),
    "model.input_size": _whole(1, 2**13),
    "model.in_channels": _whole(1, 2**12),
    "model.patch_size": _whole(1, 2**13),
    "model.hidden_size": _whole(1, 2**17),
    "model.depth": _whole(1, 2**10),
    "model.num_heads": _whole(1, 2**12),
    "model.num_kv_heads": _whole(0, 2**12),
    "model.ffn_multiple_of": _whole(1, 2**20),
    "model.num_classes": _whole(1, 2**24),
    "model.class_dropout_prob": _SHARE,
    "model.positions": _one_of("rope_1d", "rope_1d_sincos_2d"),
    "model.alpha_init": _one_of("normal", "least_squares"),
    "compute.dtype": _one_of("float32", "bfloat16"),
    "compute.grad_dtype": _one_of("float32", "bfloat16"),
    "compute.matmul_dtype": _one_of("same", "float8_e4m3fn", "int8"),
    "compute.remat": _one_of("none", "block", "dots"),
    "compute.attention": _one_of("auto", "xla", "cudnn"),
    "compute.passes": _one_of("auto", "xla"),
    "compute.layers": _one_of("auto", "scanned", "unrolled"),
    "compute.plan": _one_of("auto", "plain"),
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
    "mesh.slices": _whole(1, 2**20),
    "mesh.gather": _one_of("codes", "bfloat16"),
    "data.dir": _PATH,
    "data.read_threads": _whole(1, 1024),
    "data.prefetch": _whole(1, 1024),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.drop_step": _whole(0),
    "optimizer.drop_learning_rate": _POSITIVE,
    "optimizer.b1": _SHARE,
    "optimizer.b2": _SHARE,
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.clip_norm": _POSITIVE,
    "optimizer.ema_decay": _SHARE,
    "optimizer.spike_sigma": _NOT_NEGATIVE,
    "optimizer.spike_window": _whole(1),
    "train.num_steps": _whole(1),
    "train.batch_size": _whole(1),
    "train.accumulation_steps": _whole(1),
    "train.max_nonfinite_steps": _whole(1),
    "train.init_from": _PATH,
    "train.compilation_cache": _PATH,
    "train.compiler_options": _TEXT,
    "checkpoint.every": _whole(1),
    # The newest checkpoint counts only once its checksums stand beside it: until then the one before it must stay.
    "checkpoint.keep": _whole(2),
    "checkpoint.keep_every": _whole(0),
    "log.every": _whole(1),
    "log.heldout_every": _whole(0),
    "log.heldout_batches": _whole(1),
    "log.samples_every": _whole(0),
    "log.score_every": _whole(0),
    "log.score_samples": _whole(1),
    "sample.method": _one_of("ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc"),
    "sample.num_steps": _whole(1, 1000),
    "sample.spacing": _one_of("auto", "uniform", "quadratic", "power", "logsnr"),
    "sample.cfg_scale": _NOT_NEGATIVE,
    "sample.cfg_channels": _whole(0),
    "sample.cfg_t_min": _whole(0, 999),
    "sample.cfg_t_max": _whole(1, 1000),
    "sample.num_images": _whole(1),
}
PATHS = ("data.dir", "train.init_from", "train.compilation_cache")


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a nested mapping as (dotted name, value)."""
    for name, value in tree.items():
        if isinstance(value, (dict, ConfigDict)):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def validate(config: ConfigDict) -> None:
    """Refuses fields of another type and values that cannot work, each for itself. How they go together is checked
    where that is known: `DiTConfig`, `parallel.mesh`, `inference.sampling`, `training.setup`.

    Raises:
      UserError: naming the first offending field and its value.
    """
    fields = dict(flatten(config))
    for field, default in flatten(base_config()):
        if field not in fields:
            raise UserError(f"config.{field} is missing: start from terdit_jax.config.base_config()")
        check_type(field, fields[field], type(default))
        check(field, fields[field], "config.")


def check(field: str, value: Any, prefix: str = "") -> None:
    """Raises UserError, with the prefix before the field's name, for a value that the field's rule does not accept."""
    rule = RULES.get(field)
    if rule and not rule.accepts(value):
        raise UserError(f"{prefix}{field}={shown(value)}: {rule.words}")


def check_type(field: str, value: Any, kind: type) -> None:
    """Raises UserError for a value of another type than a field's default has; whole numbers are floats too."""
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise UserError(f"config.{field}={value!r:.60}: must be of type {kind.__name__}, not {type(value).__name__}")


def shown(value: Any) -> str:
    """A value as it stands in errors: strings in quotes, and nothing longer than a line."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"


def nearest(field: str, known: Collection[str]) -> str:
    """The end of an error about an unknown field: the names that may have been meant, or those there are."""
    section, _, name = field.rpartition(".")
    beside = {one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == section}
    close = [one for one in known if one.rpartition(".")[2] == name]
    if section and beside:
        close += [beside[one] for one in difflib.get_close_matches(name, beside, 3, 0.6)]
    else:
        close += difflib.get_close_matches(field, known, 3, 0.6)
    if close:
        return f"did you mean {' or '.join(dict.fromkeys(close))}?"
    if section and beside:
        return f"config.{section} has {', '.join(beside)}"
    return "docs/configs.md has them all"
