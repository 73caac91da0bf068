"""Your own pictures at 32 px on a CPU or a small GPU: 1,552,512 parameters, 0.8 MB packed.

python -m terdit_jax.prepare --source=folder --input=pictures --image_size=32 --output=data/pictures
python -m terdit_jax.main --config=configs/images_small.py --workdir=runs/images_small

Data: `pictures/` holds a folder a class, of a few hundred pictures each or more. `prepare` ends with this command and
the fields that the pictures decide, --config.model.num_classes above all.
Hardware: two CPU cores and 1.8 GB of memory, or any GPU, which has room for more:
--config.model.hidden_size=256 --config.model.depth=8 --config.model.patch_size=2.
Hours: 0.32 on two idle cores, at the 116 pictures a second measured there over 250 steps (2026-12-01, Python 3.12);
0.54 on cores that others shared.
Expected: held-out loss of the averaged weights 0.035, on 1,800 pictures of cats and ships from CIFAR-10: skies, seas
and coats, hardly a shape. For those take more pictures and, on a GPU, the fields above.
"""

from ml_collections import ConfigDict

from terdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.name = "images_small"

    model = config.model
    model.input_size = 32
    model.in_channels = 3
    model.patch_size = 4  # 64 tokens: a quarter of the work of 2
    model.hidden_size = 128
    model.depth = 4
    model.num_heads = 4
    model.num_classes = 2
    model.positions = "rope_1d_sincos_2d"
    model.alpha_init = "least_squares"

    config.compute.dtype = "float32"
    config.compute.grad_dtype = "float32"
    config.compute.layers = "unrolled"  # XLA on CPUs runs a loop's body on fewer threads: 1.5 times slower

    config.data.dir = "data/pictures"
    config.data.horizontal_flip = True
    config.data.in_memory = True

    optimizer = config.optimizer
    optimizer.learning_rate = 2e-3
    optimizer.drop_step = 1600
    optimizer.drop_learning_rate = 2e-4
    optimizer.ema_decay = 0.995
    optimizer.ema_ramp = True

    config.train.num_steps = 2000
    config.train.batch_size = 64

    config.checkpoint.every = 250
    config.log.every = 50
    config.log.heldout_every = 500
    config.log.heldout_batches = 2
    config.log.samples_every = 500

    sample = config.sample
    sample.method = "ddim"
    sample.num_steps = 50
    sample.cfg_scale = 2.0
    sample.cfg_channels = 0
    sample.num_images = 16
    return config
