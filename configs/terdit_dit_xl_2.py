"""DiT-XL/2 with ternary weights on ImageNet 256 px: 675,028,452 parameters (668,860,416 ternary), 191.9 MB packed.

python -m terdit_jax.main --config=configs/terdit_dit_xl_2.py --workdir=runs/terdit_dit_xl_2

The network of dit_xl_2.py (arXiv 2212.09748) with the quantiser of TerDiT (arXiv 2405.14854): the matrices of the
blocks are ternary, biases full precision, and an RMSNorm follows adaLN. Rates and batch are those of TerDiT-600M. S, B
and L are the same file with other sizes, as said there.
Data: latents of the Stable Diffusion VAE in data/imagenet256, made from ImageNet's archive (docs/data.md) by
python -m terdit_jax.prepare --source=tar --input=ILSVRC2012_img_train.tar --vae=sd-vae-ft-ema --output=data/imagenet256
--config.data.synthetic=True trains on random latents instead, for bring-up and for speed.
Hardware: state (float32 weights, two moments, EMA) 10.8 GB, whole on each chip; --config.mesh.fsdp=8 cuts it.
Hours: not yet run.
Expected: not yet run; nobody has published this network at TerDiT's recipe.
"""

from ml_collections import ConfigDict

from terdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.name = "terdit_dit_xl_2"

    model = config.model
    model.family = "dit"
    model.ternary = True
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
    optimizer.learning_rate = 5e-4
    optimizer.drop_step = 1_550_000  # TerDiT-600M's: recalled, not confirmed by the paper's tables
    optimizer.drop_learning_rate = 1e-4
    optimizer.ema_decay = 0.9999

    config.train.num_steps = 1_750_000
    config.train.batch_size = 256

    config.checkpoint.every = 10_000
    config.checkpoint.keep = 3
    config.checkpoint.keep_every = 250_000
    config.log.every = 100
    config.log.heldout_every = 10_000
    config.log.samples_every = 50_000
    return config
