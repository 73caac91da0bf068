"""The variants of `benchmarks.ablations`: overrides of one configuration, and the samplers of each objective."""

from collections.abc import Callable
from typing import NamedTuple


class RunOf(NamedTuple):
    """Stands for the workdir of a variant, of the same seed."""

    variant: str


class ShareOf(NamedTuple):
    """Stands for a share of the steps."""

    steps: float


TERNARISED, FULL, FLOW_FULL = "ternarised_afterwards", "full_precision", "flow_full_precision"
REFERENCE = "least_squares"  # what the others' time a step is compared with
AT_EQUAL_TIME = "@time"  # after a variant's name: trained for as long as REFERENCE, by the clock

MATRIX, CHANNELS = ({"model.alpha_per": share, "model.gamma_per": share} for share in ("matrix", "channel"))
AS_PUBLISHED, LEAST_SQUARES = (MATRIX | {"model.alpha_init": start} for start in ("normal", "least_squares"))
NO_NORM, EIGHT_BIT = {"model.adaln_rms_norm": False}, {"compute.matmul_dtype": "float8_e4m3fn"}
WARM, TEACHER = {"train.init_from": RunOf(FULL)}, {"train.teacher": RunOf(FULL)}
SOFT = {"train.soft_start_steps": ShareOf(0.25)}
FLOW_WARM, FLOW_TEACHER = {"train.init_from": RunOf(FLOW_FULL)}, {"train.teacher": RunOf(FLOW_FULL)}
FLOW = {"diffusion.objective": "flow", "model.learn_sigma": False, "sample.method": "heun", "sample.num_steps": 25}

# None: the weights of FULL ternarised as they are, judged beside it.
VARIANTS: dict[str, dict[str, object] | None] = {
    FULL: MATRIX | {"model.ternary": False},
    "ternary": AS_PUBLISHED,
    "no_adaln_norm": AS_PUBLISHED | NO_NORM,
    REFERENCE: LEAST_SQUARES,
    "eight_bit": LEAST_SQUARES | EIGHT_BIT,
    "no_drop": AS_PUBLISHED | {"optimizer.drop_step": 0},
    "least_squares_no_adaln_norm": LEAST_SQUARES | NO_NORM,
    "eight_bit_no_adaln_norm": LEAST_SQUARES | NO_NORM | EIGHT_BIT,
    "alpha_per_channel": LEAST_SQUARES | {"model.alpha_per": "channel"},
    "gamma_per_channel": LEAST_SQUARES | {"model.gamma_per": "channel"},
    "channels": LEAST_SQUARES | CHANNELS,
    "threshold_0.7": LEAST_SQUARES | {"model.threshold": 0.7},
    "soft_start": LEAST_SQUARES | SOFT,
    "teacher": LEAST_SQUARES | TEACHER,
    "warm_start": LEAST_SQUARES | WARM,
    "warm_start_soft": LEAST_SQUARES | WARM | SOFT,
    "warm_start_teacher": LEAST_SQUARES | WARM | TEACHER,
    "channels_teacher": LEAST_SQUARES | CHANNELS | TEACHER,
    "channels_soft_start": LEAST_SQUARES | CHANNELS | SOFT,
    "channels_soft_start_teacher": LEAST_SQUARES | CHANNELS | SOFT | TEACHER,
    "channels_warm_start": LEAST_SQUARES | CHANNELS | WARM,
    "channels_warm_start_teacher": LEAST_SQUARES | CHANNELS | WARM | TEACHER,
    "channels_eight_bit": LEAST_SQUARES | CHANNELS | EIGHT_BIT,
    TERNARISED: None,
    FLOW_FULL: FLOW | MATRIX | {"model.ternary": False},
    "flow_least_squares": FLOW | LEAST_SQUARES,
    "flow_channels": FLOW | LEAST_SQUARES | CHANNELS,
    "flow_channels_teacher": FLOW | LEAST_SQUARES | CHANNELS | FLOW_TEACHER,
    "flow_channels_warm_start_teacher": FLOW | LEAST_SQUARES | CHANNELS | FLOW_WARM | FLOW_TEACHER,
}

# objective: (sampler, calls of the network a step, fewest calls, most calls)
SAMPLERS = {
    "ddpm": (("dpmpp_2m", 1, 1, 100), ("ddpm", 1, 100, 1000)),
    "flow": (("euler", 1, 1, 1000), ("dpmpp_2m", 1, 1, 100), ("heun", 2, 1, 100), ("sde", 1, 100, 1000)),
}


def split_name(name: str) -> tuple[str, bool]:
    """A variant's name in VARIANTS, and whether it trains for as long as REFERENCE instead of for as many steps."""
    return name.removesuffix(AT_EQUAL_TIME), name.endswith(AT_EQUAL_TIME)


def needs(name: str) -> list[str]:
    """The variants of the same seed whose runs must have ended before this one begins."""
    variant, at_equal_time = split_name(name)
    fields = VARIANTS[variant]
    runs = [FULL] if fields is None else [value.variant for value in fields.values() if isinstance(value, RunOf)]
    return [*dict.fromkeys(runs), *[variant, REFERENCE] * at_equal_time]


def overrides(name: str, workdir: Callable[[str], str], steps: int) -> dict[str, object]:
    """The fields that a variant sets, in a run of `steps` steps; `workdir` of another variant is that of its run."""

    def resolve(value: object) -> object:
        if isinstance(value, RunOf):
            return workdir(value.variant)
        return int(value.steps * steps) if isinstance(value, ShareOf) else value

    return {field: resolve(value) for field, value in (VARIANTS[split_name(name)[0]] or {}).items()}
