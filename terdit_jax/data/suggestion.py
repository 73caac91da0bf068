"""The training command that fits a data set, as `prepare` prints it: it works as it stands, from the same folder.

Which fields there are belongs to the configurations in `configs/`.
"""

import math
import os

from terdit_jax.data.schema import Metadata

# Patches along a side: published models have 16, and 32 for latents of 512 px.
_GRID = 16
_MAX_LATENT_GRID = 32
_MAX_GRID = 64  # 4,096 tokens
_PATCH_SIZE = 2  # of the configurations named here, but for images_small
_FEW = 10_000  # training images, for which the model of CIFAR-10 is too large
_SMALL_GRID, _SMALL_PATCH_SIZE = 8, 4  # of images_small
_MEMORY = 4 << 30  # bytes of records that `data.in_memory` may hold without being asked


def training_command(metadata: Metadata, path: str) -> list[str]:
    """The words of a `terdit_jax.main` command that trains on the data set at `path`.

    Digits have a configuration of their own; other pixels take that of CIFAR-10, or images_small if they are few;
    latents take that of ImageNet: each with the fields that the data decides.
    """
    latents = metadata.codec != "none"
    digits = metadata.source["kind"] == "digits"
    few = _is_few(metadata)
    config = "digits" if digits else "terdit_600m" if latents else "images_small" if few else "cifar10"
    name = os.path.basename(os.path.abspath(path)) or config
    words = ["python", "-m", "terdit_jax.main", f"--config={config}", f"--workdir=runs/{name}"]
    if not digits:
        height, _, channels = metadata.shape
        words += [f"--config.model.input_size={height}", f"--config.model.in_channels={channels}"]
        words.append(f"--config.model.num_classes={metadata.num_classes}")
        patch_size = choose_patch_size(height, latents, few)
        if patch_size != (_SMALL_PATCH_SIZE if few else _PATCH_SIZE):
            words.append(f"--config.model.patch_size={patch_size}")
    if latents and not metadata.has_mirror:
        words.append("--config.data.horizontal_flip=False")
    if not latents and _bytes_in_memory(metadata) > _MEMORY:
        words.append("--config.data.in_memory=False")
    return [*words, f"--config.data.dir={path}"]


def choose_patch_size(size: int, latents: bool, few: bool = False) -> int:
    """A divisor of `size`: 2 if that makes no more tokens than published models have, else the one nearest to 16 x 16,
    or to 8 x 8 where images are few.

    Sizes whose divisors all make too many tokens, such as large primes, become one patch.
    """
    if not few and size % _PATCH_SIZE == 0 and 4 <= size // _PATCH_SIZE <= (_MAX_LATENT_GRID if latents else _GRID):
        return _PATCH_SIZE
    divisors = [patch for patch in range(1, size + 1) if size % patch == 0 and size // patch <= _MAX_GRID]
    return min(divisors, key=lambda patch: abs(math.log(size / patch / (_SMALL_GRID if few else _GRID))))


def remark(metadata: Metadata) -> str | None:
    """A line on sizes that only a few large patches make up, of which little can be learned."""
    size, step = metadata.shape[0], 32
    grid = size // choose_patch_size(size, metadata.codec != "none", _is_few(metadata))
    if size < _GRID or grid >= 4 or metadata.codec != "none":
        return None
    better = -(-size // step) * step
    return f"note: {size} pixels divide into {grid} x {grid} patches only; --image_size={better} is better"


def _is_few(metadata: Metadata) -> bool:
    return metadata.codec == "none" and metadata.splits["train"].records < _FEW


def _bytes_in_memory(metadata: Metadata) -> int:
    views = 2 if metadata.has_mirror else 1
    return metadata.splits["train"].records * math.prod(metadata.shape) * views * 2 * 2  # mean and std, float16
