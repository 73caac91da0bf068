"""CIFAR-10 in pixel space: 45,932,056 parameters, 15.6 MB packed, 13.4 MB compressed, for one GPU and half an hour.

python -m terdit_jax.prepare --source=folder --input=cifar10 --image_size=32 --output=data/cifar10
python -m terdit_jax.main --config=configs/cifar10.py --workdir=runs/cifar10

Data: `cifar10/` holds train/CLASS/*.png and test/CLASS/*.png, which becomes the held-out split. Reading CIFAR-10
from TFDS: not yet.
Hardware: one H200.
Hours: half a one; 16,000 steps ran at 6,890 images/s (35% MFU) on one H200, 10.6 minutes with start and saves.
Expected: the whole run not yet run. 16,000 steps, dropped at 12,800: a held-out loss of 0.0277 (docs/ablations.md); the
model they gave is in models/.
The full-precision twin: --config.model.ternary=False --config.model.{alpha,gamma}_per=matrix.
"""

from ml_collections import ConfigDict

from terdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.name = "cifar10"

    model = config.model
    model.ternary = True
    model.input_size = 32
    model.in_channels = 3
    model.patch_size = 2
    model.hidden_size = 512
    model.depth = 9
    model.num_heads = 8
    model.num_classes = 10
    model.positions = "rope_1d_sincos_2d"  # 1-D RoPE alone was too weak a position signal on small images
    model.alpha_init = "least_squares"  # N(0, 1) starts far from the weights: most first gradients are clipped
    model.alpha_per = "channel"  # as free as one a matrix, a lower loss and no spikes (docs/ablations.md)
    model.gamma_per = "channel"

    config.compute.dtype = "bfloat16"
    config.compute.grad_dtype = "bfloat16"

    config.data.dir = "data/cifar10"
    config.data.horizontal_flip = True
    config.data.in_memory = True

    optimizer = config.optimizer
    optimizer.learning_rate = 5e-4
    optimizer.drop_step = 40_000
    optimizer.drop_learning_rate = 1e-4
    optimizer.ema_decay = 0.9999
    optimizer.ema_ramp = True

    config.train.num_steps = 50_000  # 12.8M images, 256 epochs
    config.train.batch_size = 256

    config.checkpoint.every = 5000
    config.checkpoint.keep = 2
    config.log.every = 100
    config.log.heldout_every = 2500
    config.log.samples_every = 5000

    sample = config.sample
    sample.method = "dpmpp_2m"
    sample.num_steps = 20
    sample.cfg_scale = 1.5
    sample.cfg_channels = 0  # pixels: guide all three
    sample.num_images = 20
    return config
