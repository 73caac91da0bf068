"""TerDiT-600M on ImageNet 256 px: 609,984,160 parameters, 603,979,776 of them ternary, 175.0 MB packed.

python -m terdit_jax.main --config=configs/terdit_600m.py --workdir=runs/terdit_600m

Data: latents of the Stable Diffusion VAE in data/imagenet256, made from ImageNet's archive (docs/data.md) by
python -m terdit_jax.prepare --source=tar --input=ILSVRC2012_img_train.tar --vae=sd-vae-ft-ema --output=data/imagenet256
--config.data.synthetic=True trains on random latents instead, for bring-up and for speed.
Hardware: state (float32 weights, two moments, EMA) 9.8 GB, cut over all chips, which is faster too than a copy on each:
7.9 times one H200 on eight, 7.4 with --config.mesh.data=-1 --config.mesh.fsdp=1 (docs/benchmarks.md). Beyond 128 chips
add --config.mesh.data=2 or more.
Hours: not yet run. 448M images are 180 H200-hours at 690 images/s (batch 64), 24 hours on eight of them.
Expected: not yet run. The paper's FID is 4.34 with guidance (scale 1.5, 50,000 samples).
"""

from ml_collections import ConfigDict

from terdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.name = "terdit_600m"

    model = config.model
    model.ternary = True
    model.input_size = 32
    model.in_channels = 4
    model.patch_size = 2
    model.hidden_size = 1536
    model.depth = 16
    model.num_heads = 32
    model.num_classes = 1000
    model.positions = "rope_1d"
    model.adaln_rms_norm = True
    model.alpha_init = "normal"

    config.compute.dtype = "bfloat16"
    config.compute.grad_dtype = "bfloat16"
    config.compute.remat = "dots"

    config.mesh.data = 1
    config.mesh.fsdp = -1

    config.data.dir = "data/imagenet256"
    config.data.horizontal_flip = True

    optimizer = config.optimizer
    optimizer.learning_rate = 5e-4  # second-hand, not in the paper's tables
    optimizer.drop_step = 1_550_000  # recalled, not confirmed by the paper's tables
    optimizer.drop_learning_rate = 1e-4  # recalled, not confirmed by the paper's tables
    optimizer.ema_decay = 0.9999

    config.train.num_steps = 1_750_000  # 448M images
    config.train.batch_size = 256

    config.checkpoint.every = 10_000  # eight minutes on eight H200s at that rate
    config.checkpoint.keep = 3
    config.checkpoint.keep_every = 250_000
    config.log.every = 100
    config.log.heldout_every = 10_000
    config.log.samples_every = 50_000
    return config
