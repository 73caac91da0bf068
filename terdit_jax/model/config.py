"""The architecture as one frozen, hashable value, with everything that follows from its fields.

`terdit_jax.config` defines the fields; the model's code reads this.
"""

import dataclasses
import math

import jax.numpy as jnp

from terdit_jax.config import FIELDS, RunConfig
from terdit_jax.config_sections import ComputeConfig, ModelConfig
from terdit_jax.errors import UserError
from terdit_jax.model.traits import FAMILIES, Traits
from terdit_jax.ternary.quantize import Rounding

MAX_PARAMS = 10**13  # more than any machine trains: beyond it, not even shapes are made
QUANTISER = ("alpha_per", "gamma_per", "threshold")  # fields of ternary models alone


@dataclasses.dataclass(frozen=True)
class DiTConfig(ModelConfig, ComputeConfig):
    """An architecture, and how it is computed: the fields of both sections of a run's configuration.

    Without a run's choice, numbers are float32.
    """

    dtype: str = "float32"
    grad_dtype: str = "float32"
    gather: str = "codes"  # `config.mesh.gather`

    @classmethod
    def from_config(cls, config: RunConfig) -> "DiTConfig":
        """From a run's configuration. Raises UserError for values that make no model."""
        fields = {**vars(config.model), **vars(config.compute), "gather": config.mesh.gather}
        fields["num_kv_heads"] = fields["num_kv_heads"] or fields["num_heads"]
        model = cls(**fields)
        model._check()
        return model

    def _check(self) -> None:
        for name, field in FIELDS.items():
            section, _, short = name.rpartition(".")
            if section in ("model", "compute") or name == "mesh.gather":
                field.check(getattr(self, short), name)
        _require(
            self.input_size % self.patch_size == 0,
            f"model.input_size={self.input_size} is not divisible by model.patch_size={self.patch_size}",
        )
        _require(
            self.hidden_size % self.num_heads == 0,
            f"model.hidden_size={self.hidden_size} is not divisible by model.num_heads={self.num_heads}",
        )
        for short, values in self.traits.takes.items():
            value = getattr(self, short)
            allowed = " or ".join(map(repr, values))
            _require(value in values, f"model.{short}={value!r}: model.family={self.family!r} takes {allowed}")
        _require(
            self.traits.grouped_heads or self.num_kv_heads == self.num_heads,
            f"model.num_kv_heads={self.num_kv_heads}: model.family={self.family!r} takes 0",
        )
        _require(
            not self.traits.rope or self.head_dim % 2 == 0,
            f"model.hidden_size / model.num_heads = {self.head_dim}: RoPE needs an even width",
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} is not divisible by model.num_kv_heads={self.num_kv_heads}",
        )
        _require(
            self.hidden_size % 4 == 0, f"model.hidden_size={self.hidden_size}: must be a multiple of 4 to be packed"
        )
        _require(
            self.mlp_width % 4 == 0,
            f"model.ffn_multiple_of={self.ffn_multiple_of} makes the feed-forward {self.mlp_width} wide: "
            "must be a multiple of 4 to be packed",
        )
        _require(
            self.attention != "cudnn" or self.fits_cudnn(256),
            f"compute.attention='cudnn': takes bfloat16 and heads of at most 256 features, a multiple of 8; here it is "
            f"{self.dtype} and {self.head_dim}: give 'auto'",
        )
        _require(
            self.ternary or self.matmul_dtype == "same",
            f"compute.matmul_dtype={self.matmul_dtype!r}: is of ternary models, not of full precision; give 'same'",
        )
        for name in () if self.ternary else QUANTISER:
            value, default = getattr(self, name), FIELDS[f"model.{name}"].default
            _require(
                value == default,
                f"model.{name}={value!r}: is of ternary models, not of full precision; give {default!r}",
            )
        _require(
            self.num_params <= MAX_PARAMS,
            f"model.hidden_size={self.hidden_size}, model.depth={self.depth} and the others make {self.num_params:,} "
            f"parameters, {4 * self.num_params:,} bytes: give a smaller model",
        )

    @property
    def architecture(self) -> "DiTConfig":
        """The same model, without a choice of how it is computed."""
        return DiTConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(ModelConfig)})

    @property
    def traits(self) -> Traits:
        """The traits of the family."""
        return FAMILIES[self.family]

    @property
    def rounding(self) -> Rounding:
        """How ternary weights become codes."""
        return Rounding(self.gamma_per, self.threshold)

    @property
    def ffn_maps(self) -> int:
        """Matrices of a feed-forward."""
        return 2 if self.traits.feed_forward == "gelu" else 3

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def fits_cudnn(self, widest_head: int) -> bool:
        """Whether cuDNN's attention, on a GPU that takes heads of up to `widest_head` features, takes the model's."""
        return self.dtype == "bfloat16" and self.head_dim % 8 == 0 and self.head_dim <= widest_head

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def grid_size(self) -> int:
        """Patches along a side."""
        return self.input_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid_size**2

    @property
    def mlp_width(self) -> int:
        """Hidden width of the feed-forward: 8/3 of hidden_size, rounded up to ffn_multiple_of; in DiT 4 times it."""
        if self.traits.feed_forward == "gelu":
            return 4 * self.hidden_size
        return math.ceil(int(8 * self.hidden_size / 3) / self.ffn_multiple_of) * self.ffn_multiple_of

    @property
    def condition_width(self) -> int:
        return int(min(self.hidden_size, self.traits.max_condition_width))

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one latent."""
        return self.input_size, self.input_size, self.in_channels

    @property
    def activation_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def num_params(self) -> int:
        """Parameters, counted without making the model, or its shapes."""
        width, condition, patch = self.hidden_size, self.condition_width, self.patch_size**2
        layer = 2 * width * (width + self.kv_width) + self.ffn_maps * width * self.mlp_width
        layer += 6 * width * (condition + 1)  # adaLN
        layer += (3 * width + 2 * self.kv_width + self.mlp_width) * self.traits.biases
        layer += 2 * width * (self.traits.norm == "rms") + 2 * (width + self.kv_width) * self.qk_norm  # norms
        layer += (6 * width * self.adaln_rms_norm + self._alphas) * self.ternary  # of which the norm after adaLN
        ends = patch * self.in_channels * width + width  # patch embedder
        ends += (256 + condition + 2) * condition + (self.num_classes + 1) * condition  # timestep and label
        ends += 2 * width * (condition + 1) + patch * self.out_channels * (width + 1)  # final layer
        return self.depth * layer + ends

    @property
    def _alphas(self) -> int:
        """Scales of a layer: one a map, or one for each of their outputs."""
        if self.alpha_per == "matrix":
            return 5 + self.ffn_maps
        return 9 * self.hidden_size + 2 * self.kv_width + (self.ffn_maps - 1) * self.mlp_width

    def flops_per_image(self) -> float:
        """Multiplications and additions of one forward pass of one image: every matmul and attention, nothing else.

        A training step does three times that. Source of the counting: PaLM (arXiv 2204.02311), appendix B.
        """
        tokens, width = self.num_tokens, self.hidden_size
        per_token = width * (2 * width + 2 * self.kv_width + self.ffn_maps * self.mlp_width) + 2 * tokens * width
        per_image = self.condition_width * 6 * width
        patches = tokens * width * self.patch_size**2 * (self.in_channels + self.out_channels)
        head = self.condition_width * (256 + self.condition_width + 2 * width)
        return 2.0 * (self.depth * (tokens * per_token + per_image) + patches + head)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
