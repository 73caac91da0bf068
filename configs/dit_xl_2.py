"""DiT-XL/2 on ImageNet 256 px as published, full precision: 674,834,720 parameters and the fixed table of positions.

python -m terdit_jax.main --config=configs/dit_xl_2.py --workdir=runs/dit_xl_2

The baseline in the main table of TerDiT (arXiv 2405.14854); its source is arXiv 2212.09748. Other sizes are the same
file with --config.model.hidden_size=384 --config.model.depth=12 --config.model.num_heads=6 for S; 768, 12 and 12 for B;
1024, 24 and 16 for L.
With --config.diffusion.objective=flow --config.sample.method=sde it is SiT-XL/2 (arXiv 2401.08740).
Data: latents of the Stable Diffusion VAE in data/imagenet256, made from ImageNet's archive (docs/data.md) by
python -m terdit_jax.prepare --source=tar --input=ILSVRC2012_img_train.tar --vae=sd-vae-ft-ema --output=data/imagenet256
--config.data.synthetic=True trains on random latents instead, for bring-up and for speed.
Hardware: state (float32 weights, two moments, EMA) 10.8 GB, whole on each chip; --config.mesh.fsdp=8 cuts it.
Hours: not yet run. 7M steps are 1,792M images.
Expected: not yet run; recalled for the published checkpoint, not confirmed: FID 9.62, with guidance 1.5 2.27.
"""

from ml_collections import ConfigDict

from terdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.name = "dit_xl_2"

    model = config.model
    model.family = "dit"
    model.ternary = False
    model.input_size = 32
    model.in_channels = 4
    model.patch_size = 2
    model.hidden_size = 1152
    model.depth = 28
    model.num_heads = 16
    model.num_classes = 1000
    model.positions = "sincos_2d"
    model.qk_norm = False

    config.compute.dtype = "bfloat16"
    config.compute.grad_dtype = "bfloat16"

    config.mesh.data = -1
    config.mesh.fsdp = 1

    config.data.dir = "data/imagenet256"
    config.data.horizontal_flip = True

    optimizer = config.optimizer
    optimizer.learning_rate = 1e-4
    optimizer.drop_step = 0  # DiT keeps its rate
    optimizer.ema_decay = 0.9999

    config.train.num_steps = 7_000_000
    config.train.batch_size = 256

    config.checkpoint.every = 10_000
    config.checkpoint.keep = 3
    config.checkpoint.keep_every = 400_000
    config.log.every = 100
    config.log.heldout_every = 10_000
    config.log.samples_every = 50_000
    return config
