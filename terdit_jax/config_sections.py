"""The sections of a run's configuration, one frozen dataclass each: a field is its default, meaning and rule.

`config` puts them together; it says what else is made of them.
"""

import dataclasses

from terdit_jax.choices import ALL_METHODS, MODES, NUM_TIMESTEPS, SPACINGS, TRACKERS
from terdit_jax.config_rules import (
    AXIS,
    FINITE,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    SHARE,
    SHIFT,
    TEXT,
    THRESHOLD,
    any_of,
    one_of,
    setting,
    whole,
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture."""

    ternary: bool = setting(
        True,
        "The blocks' matrices are ternary (TerDiT). `False`: full precision (Large-DiT, DiT, SiT), without the RMSNorm "
        "after adaLN.",
    )
    family: str = setting(
        "large_dit",
        "Kind of block. `large_dit`: RMSNorm, SwiGLU, RoPE, no biases (TerDiT and Large-DiT). `dit`: LayerNorm without "
        'parameters, GELU, biases (DiT and SiT); it takes `positions="sincos_2d"` and `qk_norm=False` '
        "([families.md](families.md)).",
        one_of("large_dit", "dit"),
        added=True,
    )
    input_size: int = setting(32, "Height and width of the input; 32 for 256 px, 64 for 512 px.", whole(1, 2**13))
    in_channels: int = setting(4, "Channels of the input: 4 for latents, 3 or 1 for images.", whole(1, 2**12))
    learn_sigma: bool = setting(
        True,
        "The output has a second half of channels, the variance that `ddpm` needs; flows have no use for it, published "
        "SiT checkpoints have it all the same.",
        added=True,
    )
    patch_size: int = setting(
        2, "Side of a patch; divides `input_size`. The model sees (input_size / patch_size)^2 tokens.", whole(1, 2**13)
    )
    hidden_size: int = setting(
        1536, "Width D of the residual stream; a multiple of 4 and of `num_heads`.", whole(1, 2**17)
    )
    depth: int = setting(16, "Blocks.", whole(1, 2**10))
    num_heads: int = setting(32, "Query heads; with RoPE D / num_heads is even.", whole(1, 2**12))
    num_kv_heads: int = setting(
        0, "Key and value heads; divides `num_heads`. 0: as many as `num_heads`, always in `dit`.", whole(0, 2**12)
    )
    ffn_multiple_of: int = setting(
        256,
        "The feed-forward's width is 8 D / 3, rounded up to a multiple of this; in `dit` it is 4 D.",
        whole(1, 2**20),
    )
    num_classes: int = setting(1000, "Classes, without the null class. Must be the data set's.", whole(1, 2**24))
    class_dropout_prob: float = setting(
        0.1, "Chance that a training example's label becomes the null class, which guidance needs.", SHARE
    )
    qk_norm: bool = setting(
        True, "LayerNorm over the whole width of queries and keys, before heads are split and rotated."
    )
    positions: str = setting(
        "rope_1d",
        "`rope_1d`: 1-D RoPE over the row-major token index, as published. `rope_1d_sincos_2d`: also absolute 2-D "
        "positions; for small images. `sincos_2d`: those alone, in `dit`.",
        one_of("rope_1d", "rope_1d_sincos_2d", "sincos_2d"),
    )
    adaln_rms_norm: bool = setting(
        True, "RMSNorm after the block's adaLN map, the paper's addition. Read only where `ternary` is on."
    )
    alpha_init: str = setting(
        "normal",
        "Start of each matrix's scale alpha. `normal`: N(0, 1), as in the public code. `least_squares`: the scale "
        "that brings alpha T closest to W.",
        one_of("normal", "least_squares"),
    )
    alpha_per: str = setting(
        "matrix",
        "What shares a scale alpha. `matrix`: all of it, as published. `channel`: each of its outputs, a row, has its "
        "own ([training.md](training.md#the-quantiser)).",
        one_of("matrix", "channel"),
        added=True,
        omitted=True,
    )
    gamma_per: str = setting(
        "matrix",
        "Weights that share a gamma, the mean of abs(W). `matrix`: all of a matrix, as published. `channel`: each row.",
        one_of("matrix", "channel"),
        added=True,
        omitted=True,
    )
    threshold: float = setting(
        0.5,
        "Codes are not 0 where abs(W) / gamma exceeds this: 0.5 as published, which is rounding; 0.7 in ternary weight "
        "networks.",
        THRESHOLD,
        added=True,
        omitted=True,
    )


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The target that the network learns to predict, and the levels of noise it is trained at."""

    objective: str = setting(
        "ddpm",
        "`ddpm`: the noise of 1,000 steps and a learned variance (DiT, TerDiT). `flow`: the velocity from noise to "
        "data (SiT), trained by its squared error alone; `sample.method` must be one of its own "
        "([training.md](training.md#objective)).",
        one_of("ddpm", "flow"),
    )
    path: str = setting(
        "linear",
        "How `flow` mixes data and noise at t, from 0 (noise) to 1 (data). `linear`: t and 1 - t. `gvp`: sin(pi t / 2) "
        "and cos(pi t / 2), of constant variance.",
        one_of("linear", "gvp"),
    )
    timesteps: str = setting(
        "uniform",
        "How `flow` draws the t of an example. `uniform`: over [0, 1). `logit_normal`: log(t / (1 - t)) is normal "
        "(Stable Diffusion 3), which prefers the middle.",
        one_of("uniform", "logit_normal"),
    )
    logit_mean: float = setting(
        0.0, "Mean of that normal; above 0 prefers little noise. Read only by `logit_normal`.", FINITE
    )
    logit_std: float = setting(1.0, "Its standard deviation. Read only by `logit_normal`.", POSITIVE)
    shift: float = setting(
        1.0,
        "Moves the noise level u = 1 - t of `flow` to s u / (1 + (s - 1) u), in training and in the steps of a "
        "sampler (Stable Diffusion 3). Above 1: more noise, for larger images. 1: as it is.",
        SHIFT,
    )


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How it is calculated."""

    dtype: str = setting(
        "bfloat16",
        "Of activations and of what matmuls read: `float32` or `bfloat16`. Parameters, moments and EMA are float32.",
        one_of("float32", "bfloat16"),
    )
    grad_dtype: str = setting(
        "bfloat16",
        "Of ternary matrices' gradients as formed and sent over the mesh: `float32` or `bfloat16`; others `dtype`.",
        one_of("float32", "bfloat16"),
    )
    matmul_dtype: str = setting(
        "same",
        "In which attention and feed-forward multiply by ternary matrices, forward and for the gradient of their "
        "input: `same` as `compute.dtype`, or 8 bits, `float8_e4m3fn` on Hopper GPUs and `int8` on TPUs and older "
        "GPUs. 8 bits round activations and gradients, each token on a scale of its own: on CIFAR-10 the loss stays "
        "within 1% without the RMSNorm after adaLN, and is 4 to 5% higher with it ([ablations.md]"
        "(ablations.md#8-bits)).",
        one_of("same", "float8_e4m3fn", "int8"),
    )
    remat: str = setting(
        "none",
        "What the backward pass computes again. `none`: nothing. `dots`: all but the results of matmuls and of "
        "cuDNN's attention. `block`: whole blocks. Saves memory in this order.",
        one_of("none", "block", "dots"),
    )
    attention: str = setting(
        "auto",
        "`cudnn`, `xla`, or `auto`: cuDNN on GPUs in bfloat16 with heads of up to 128 features, a multiple of 8; XLA "
        "elsewhere.",
        one_of("auto", "xla", "cudnn"),
    )
    passes: str = setting(
        "auto",
        "What runs between a block's matmuls in training. `auto`: kernels on Hopper GPUs in bfloat16 (with `qk_norm`, "
        "as many key heads as query heads and widths that are multiples of 256, or in DiT of 128, and "
        "`mesh.tensor=1`), XLA's fusions elsewhere. `xla`: always those.",
        one_of("auto", "xla"),
    )
    layers: str = setting(
        "auto",
        "`scanned`: one compiled block, scanned over the depth. `unrolled`: longer to compile; a tenth faster on GPUs, "
        "where a scan copies gradients and residuals. `auto` unrolls on GPUs.",
        one_of("auto", "scanned", "unrolled"),
    )
    plan: str = setting(
        "auto",
        "`auto`: whatever is quickest on the devices at hand; the run prints what it chose. `plain`: nothing of "
        "`terdit_jax.fast`, the code that the fast one is compared with.",
        one_of("auto", "plain"),
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged."""

    data: int = setting(-1, "Cuts the batch; parameters are copied along it.", AXIS)
    fsdp: int = setting(1, "Cuts the batch and, by rows or columns, every matrix with its moments and EMA.", AXIS)
    tensor: int = setting(1, "Cuts heads and the feed-forward's width.", AXIS)
    slices: int = setting(
        1,
        "TPU slices, or groups of GPU nodes, that only a slower network joins. They divide `data`; the other axes "
        "stay within one ([parallelism.md](parallelism.md#several-slices)).",
        whole(1, 2**20),
    )
    gather: str = setting(
        "codes",
        "How a ternary matrix that `fsdp` cuts travels to where it is used. `codes`: 2 bits a parameter. `bfloat16`: "
        "16, to measure against; the numbers are the same.",
        one_of("codes", "bfloat16"),
    )
    overlap: bool = setting(
        True,
        "Compiles the step with XLA's options that overlap communication with arithmetic, on GPUs and TPUs "
        "([parallelism.md](parallelism.md#communication-under-arithmetic)).",
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which examples a run sees, and how they are read."""

    dir: str = setting("", "A data set written by `python -m terdit_jax.prepare`.", PATH, free=True)
    synthetic: bool = setting(
        False, "Random latents of the model's shape instead of `dir`, for bring-up and benchmarks."
    )
    horizontal_flip: bool = setting(
        True, "Mirrors half of the examples. Latents need a data set prepared with `--mirror`."
    )
    in_memory: bool = setting(False, "Reads the training split once and keeps it; the batches are the same.", free=True)
    read_threads: int = setting(
        16, "Threads that assemble batches; at most `prefetch` are busy.", whole(1, 1024), free=True
    )
    prefetch: int = setting(4, "Batches kept ready on the host.", whole(1, 1024), free=True)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW after a global-norm clip; the rate is constant and drops once."""

    learning_rate: float = setting(5e-4, "Until the drop.", POSITIVE)
    drop_step: int = setting(0, "The first step at `drop_learning_rate`. 0: no drop.", whole(0))
    drop_learning_rate: float = setting(
        1e-4, "From the drop on. Recalled for TerDiT, not confirmed by the paper's tables.", POSITIVE
    )
    b1: float = setting(0.9, "Adam's decay of the first moment.", SHARE)
    b2: float = setting(0.999, "Adam's decay of the second moment.", SHARE)
    eps: float = setting(1e-8, "Adam's, added to the root of the second moment.", POSITIVE)
    weight_decay: float = setting(0.0, "AdamW's.", NOT_NEGATIVE)
    clip_norm: float = setting(2.0, "Gradients with a larger global norm are scaled down to it.", POSITIVE)
    ema_decay: float = setting(0.9999, "Decay, a step, of the averaged weights, which samples are drawn from.", SHARE)
    ema_ramp: bool = setting(
        False, "Decay min(ema_decay, (1 + step) / (10 + step)), so that short runs forget their start."
    )
    spike_sigma: float = setting(
        0.0,
        "Skips and counts a loss this many running standard deviations above its running mean "
        "([training.md](training.md)). 0: never.",
        NOT_NEGATIVE,
    )
    spike_window: int = setting(
        200, "Steps that running mean and deviation reach back; a run's first ones are never skipped.", whole(1)
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long a run is, and what its step is made of."""

    num_steps: int = setting(1_750_000, "Where the run is complete.", whole(1), free=True)
    batch_size: int = setting(
        256,
        "Examples a step over all devices; a multiple of `accumulation_steps` times the devices along `data` and "
        "`fsdp`.",
        whole(1),
    )
    init_from: str = setting(
        "",
        "Weights that a new run starts from: another workdir, an artifact, a published checkpoint, safetensors "
        "or a name on the [Hub](hub.md#names) ([format.md](format.md)); full-precision ones for a ternary model too "
        "([fine_tuning.md](fine_tuning.md)). Empty: a fresh start.",
        PATH,
    )
    init_labels: bool = setting(
        True,
        "Keeps the label table of `init_from` where it has as many classes. `False`, or another number of classes: its "
        "rows begin afresh, but for that of the null class.",
    )
    soft_start_steps: int = setting(
        0,
        "Steps over which the weight in use moves from the master weight W to the ternary alpha T, in equal parts "
        "([training.md](training.md#a-soft-start)). 0: ternary from the first step, as published.",
        whole(0),
    )
    teacher: str = setting(
        "",
        "A trained model, ternary or not, whose predictions a run learns beside its data: whatever `sample --model` "
        "opens without further flags, of the same data and objective ([training.md](training.md#a-teacher)). On resume "
        "the file may have moved, its weights must be the same. Empty: none.",
        PATH,
        free=True,
    )
    teacher_weight: float = setting(
        1.0,
        "Weight of the squared distance to the teacher's predictions, beside the loss on the data. Free, as a rate is: "
        "BitsFusion's second stage goes on without a teacher. 0: it is not read.",
        NOT_NEGATIVE,
        free=True,
    )
    teacher_mode: str = setting(
        "auto",
        "In which dtypes the teacher predicts: a mode of [deployment.md](deployment.md#modes), with `compute.dtype` "
        "for activations. `fast`: 8 bits, of ternary teachers alone.",
        one_of(*MODES),
        free=True,
    )
    accumulation_steps: int = setting(
        1, "Microbatches that a step is made of. Changes memory, not the examples.", whole(1), free=True
    )
    max_nonfinite_steps: int = setting(
        10,
        "Non-finite updates in a row at which the run is aborted; checked whenever figures are logged.",
        whole(1),
        free=True,
    )
    compilation_cache: str = setting(
        "",
        "A folder or `gs://` that keeps compiled programs, so that a restart does not compile again; `off`: none. "
        "Empty: the user's cache folder ([deployment.md](deployment.md#compiled-programs)).",
        PATH,
        free=True,
    )
    compiler_options: str = setting(
        "",
        'Options of XLA that the step is compiled with, as `"--xla_gpu_all_gather_combine_threshold_bytes=33554432 '
        '--xla_dump_to=dump"`; they override those of `mesh.overlap` and the ones that GPUs always get '
        "([parallelism.md](parallelism.md#communication-under-arithmetic)). An unknown one is refused before anything "
        "is read.",
        TEXT,
        free=True,
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When states are saved, and which stay."""

    every: int = setting(5000, "Steps between checkpoints. One is also saved at the end and on SIGTERM.", whole(1))
    # The newest checkpoint counts only once its checksums stand beside it: until then the one before it must stay.
    keep: int = setting(3, "How many of the newest stay.", whole(2))
    keep_every: int = setting(0, "Checkpoints at multiples of this stay for good. 0: none.", whole(0))


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """The reports of a run, and when they are due."""

    every: int = setting(100, "Steps between lines of `metrics.jsonl`, each over the steps since the last.", whole(1))
    heldout_every: int = setting(5000, "Steps between held-out losses. 0: never.", whole(0))
    heldout_batches: int = setting(8, "Batches of `batch_size` that a held-out loss is the mean of.", whole(1))
    samples_every: int = setting(10_000, "Steps between sample grids. 0: never.", whole(0))
    score_every: int = setting(
        0,
        "Steps between scores of samples of the averaged weights; the best are kept in `WORKDIR/best`. 0: never. Needs "
        "a data set of images.",
        whole(0),
    )
    score_samples: int = setting(500, "Images drawn for a score.", whole(1))
    writers: str = setting(
        "tensorboard",
        "What follows `metrics.jsonl`: any of `tensorboard`, `wandb` and `mlflow`, separated by commas "
        "([training.md](training.md#trackers)).",
        any_of(*TRACKERS),
    )
    tensorboard: bool = setting(True, "`False`: `log.writers` without `tensorboard`, as older files say it.")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The grids drawn during training, and the defaults of `terdit_jax.sample`."""

    method: str = setting(
        "ddpm",
        "`ddpm`: ancestral, with the learned variance. `ddim`: deterministic. `dpmpp_2m`, `dpmpp_2m_sde`, `unipc`: "
        "solvers for 10 to 25 steps. Of flow models: `euler`, `heun`, `sde` and those solvers "
        "([sampling.md](sampling.md#samplers)).",
        one_of(*ALL_METHODS),
    )
    num_steps: int = setting(
        250,
        "Denoising steps, of 1,000 for `ddpm` models. A step of `heun` calls the network twice.",
        whole(1, NUM_TIMESTEPS),
    )
    spacing: str = setting(
        "auto",
        "Where the steps lie: `uniform`, `quadratic`, `power`, `logsnr`. `auto`: `uniform` for `ddpm` and `ddim`, as "
        "published, `power` for the solvers. Flow models take `auto` or `uniform`; `diffusion.shift` moves their "
        "steps.",
        one_of("auto", *SPACINGS),
    )
    cfg_scale: float = setting(
        4.0, "Classifier-free guidance; 1 is none. The paper's images use 4.0, its FIDs 1.5.", NOT_NEGATIVE
    )
    cfg_channels: int = setting(
        3,
        "Guidance mixes the first min(this, in_channels) channels of the noise or velocity, 3 in the public code; 0: "
        "all.",
        whole(0),
    )
    cfg_t_min: int = setting(
        0,
        "The lowest timestep with guidance. A flow model at t counts as timestep 1000 (1 - t).",
        whole(0, NUM_TIMESTEPS - 1),
    )
    cfg_t_max: int = setting(
        1000,
        "The first timestep without guidance again; outside the interval a step costs half.",
        whole(1, NUM_TIMESTEPS),
    )
    num_images: int = setting(16, "Images of a grid.", whole(1))
