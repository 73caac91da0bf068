"""The configuration's schema: every field of a run with its type, default and meaning, and the checks on their values.

Files in `configs/` start from `base_config()` and set what their model needs; `ml_collections` refuses unknown
fields and wrong types, `validate` refuses values that cannot work before anything is allocated.
"""

from collections.abc import Callable
import math
import os

from absl import flags
from ml_collections import ConfigDict, config_flags

from terdit_jax.errors import UserError
from terdit_jax.paths import as_path


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


def read_flag(flag: flags.FlagHolder) -> ConfigDict | None:
    """The configuration of a command's --config; None without it. ml_collections reports a file that does not load only
    when it is first read.

    Args:
      flag: of `config_flags.DEFINE_config_file`.

    Raises:
      UserError: a file that cannot be loaded.
    """
    try:
        config = flag.value and flag.value.copy_and_resolve_references()
        for field in _PATHS if config else ():
            section, _, name = field.rpartition(".")
            if value := config[section][name]:
                config[section][name] = os.fspath(as_path(value, f"config.{field}"))
        return config
    except OSError as error:
        path = config_flags.get_config_filename(flags.FLAGS[flag.name])
        raise UserError(f"--config={path} cannot be loaded: {str(error).strip().splitlines()[-1].strip()}") from error


_POSITIVE = (
    "train.num_steps", "train.batch_size", "train.accumulation_steps", "train.max_nonfinite_steps",
    "optimizer.learning_rate", "optimizer.drop_learning_rate", "optimizer.clip_norm", "optimizer.eps",
    "optimizer.spike_window", "checkpoint.every", "log.every", "log.heldout_batches", "log.score_samples",
    "sample.cfg_t_max", "sample.num_steps", "sample.num_images", "data.read_threads", "data.prefetch",
)  # fmt: skip
_NOT_NEGATIVE = (
    "optimizer.drop_step", "optimizer.spike_sigma", "optimizer.weight_decay", "checkpoint.keep_every",
    "log.heldout_every", "log.samples_every", "log.score_every", "sample.cfg_scale",
    "sample.cfg_channels", "sample.cfg_t_min",
)  # fmt: skip
_PATHS = ("data.dir", "train.init_from", "train.compilation_cache")
_SHARES = ("optimizer.b1", "optimizer.b2", "optimizer.ema_decay")


def validate(config: ConfigDict) -> None:
    """Refuses values that cannot work. What concerns the architecture alone is checked by `DiTConfig.from_config`.

    Raises:
      UserError: naming the first offending field and its value.
    """
    for field in _POSITIVE:
        _check(config, field, lambda value: 0 < value < math.inf, "must be positive and finite")
    for field in _NOT_NEGATIVE:
        _check(config, field, lambda value: 0 <= value < math.inf, "must be finite and not negative")
    for field in _SHARES:
        _check(config, field, lambda value: 0 <= value < 1, "must be in [0, 1)")
    _check(config, "seed", lambda value: 0 <= value < 2**32, "must lie in [0, 2**32)")
    # The newest checkpoint counts only once its checksums stand beside it: until then the one before it must stay.
    _check(config, "checkpoint.keep", lambda value: value >= 2, "must be at least 2")


def _check(config: ConfigDict, field: str, accept: Callable[[float], bool], rule: str) -> None:
    section, _, name = field.rpartition(".")
    value = config[section][name] if section else config[name]
    if not accept(value):
        raise UserError(f"config.{field}={value}: {rule}")
