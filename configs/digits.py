"""Handwritten digits in pixel space: the embedded first run, minutes on a laptop.

python -m terdit_jax.prepare --source=digits --output=data/digits
python -m terdit_jax.main --config=configs/digits.py --workdir=runs/digits

Hardware: two CPU cores. Hours: 0.03.
Expected: 491 to 497 of 500 guided samples read as the label asked for, Frechet ratio 2.40 to 2.82
(python -m terdit_jax.evaluate, seeds 0 to 5).
"""

from ml_collections import ConfigDict

from terdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.name = "digits"

    model = config.model
    model.input_size = 8
    model.in_channels = 1
    model.patch_size = 4
    model.hidden_size = 96
    model.depth = 4
    model.num_heads = 4
    model.num_classes = 10
    model.positions = "rope_1d_sincos_2d"  # four tokens: 1-D RoPE alone cannot place strokes
    model.alpha_init = "least_squares"

    config.compute.dtype = "float32"
    config.compute.grad_dtype = "float32"
    config.compute.layers = "unrolled"  # XLA on CPUs runs a loop's body on fewer threads: 1.5 times slower

    config.data.dir = "data/digits"
    config.data.horizontal_flip = False
    config.data.in_memory = True

    optimizer = config.optimizer
    optimizer.learning_rate = 4e-3
    optimizer.drop_step = 1700
    optimizer.drop_learning_rate = 4e-4
    optimizer.ema_decay = 0.995
    optimizer.ema_ramp = True

    config.train.num_steps = 2250
    config.train.batch_size = 96

    config.checkpoint.every = 750
    config.log.every = 100
    config.log.heldout_every = 750
    config.log.heldout_batches = 3
    config.log.samples_every = 750

    sample = config.sample
    sample.method = "ddpm"
    sample.num_steps = 50
    sample.spacing = "quadratic"
    sample.cfg_scale = 1.2
    sample.cfg_channels = 0
    sample.num_images = 20
    return config
