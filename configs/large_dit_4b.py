"""Large-DiT-4.2B on ImageNet 256 px, the full-precision twin of terdit_4b.py: 4,237,824,032 parameters.

python -m terdit_jax.main --config=configs/large_dit_4b.py --workdir=runs/large_dit_4b

The twins share a recipe, so the two runs differ in the weights and the RMSNorm after adaLN alone; that Large-DiT itself
was trained at these rates is not confirmed.
Data: latents of the Stable Diffusion VAE in data/imagenet256, made from ImageNet's archive (docs/data.md) by
python -m terdit_jax.prepare --source=tar --input=ILSVRC2012_img_train.tar --vae=sd-vae-ft-ema --output=data/imagenet256
--config.data.synthetic=True trains on random latents instead, for bring-up and for speed.
Hardware: state (float32 weights, two moments, EMA) 68 GB, cut over all chips. Beyond 256 chips add
--config.mesh.data=2 or more: the narrowest matrix has 256 columns to cut.
Hours: not yet run. 604M images are 2,030 H200-hours at the 82.7 images/s that the same model reaches in PyTorch on one
H200 (torch.compile, bf16, batch 32; docs/benchmarks.md).
Expected: not yet run. The paper's FID for Large-DiT-4.2B is 2.10 with guidance (50,000 samples).
"""

from ml_collections import ConfigDict

from terdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.name = "large_dit_4b"

    model = config.model
    model.ternary = False
    model.input_size = 32
    model.in_channels = 4
    model.patch_size = 2
    model.hidden_size = 3072
    model.depth = 32
    model.num_heads = 32
    model.num_classes = 1000
    model.positions = "rope_1d"

    config.compute.dtype = "bfloat16"
    config.compute.grad_dtype = "bfloat16"
    config.compute.remat = "block"

    config.mesh.data = 1
    config.mesh.fsdp = -1

    config.data.dir = "data/imagenet256"
    config.data.horizontal_flip = True

    optimizer = config.optimizer
    optimizer.learning_rate = 5e-4  # its twin's
    optimizer.drop_step = 550_000  # its twin's: recalled, not confirmed by the paper's tables
    optimizer.drop_learning_rate = 1e-4  # its twin's: recalled, not confirmed by the paper's tables
    optimizer.ema_decay = 0.9999

    config.train.num_steps = 1_180_000  # 604M images
    config.train.batch_size = 512

    config.checkpoint.every = 5000  # eight minutes on 64 H200s at the rate above
    config.checkpoint.keep = 2
    config.checkpoint.keep_every = 200_000
    config.log.every = 100
    config.log.heldout_every = 5000
    config.log.samples_every = 20_000
    return config
