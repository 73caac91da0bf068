"""Large-DiT-600M on ImageNet 256 px, the full-precision twin of terdit_600m.py: 609,836,576 parameters.

python -m terdit_jax.main --config=configs/large_dit_600m.py --workdir=runs/large_dit_600m

The twins share a recipe, so the two runs differ in the weights and the RMSNorm after adaLN alone; that Large-DiT itself
was trained at these rates is not confirmed.
Data: latents of the Stable Diffusion VAE in data/imagenet256, made from ImageNet's archive (docs/data.md) by
python -m terdit_jax.prepare --source=tar --input=ILSVRC2012_img_train.tar --vae=sd-vae-ft-ema --output=data/imagenet256
--config.data.synthetic=True trains on random latents instead, for bring-up and for speed.
Hardware: state (float32 weights, two moments, EMA) 9.8 GB, whole on each chip; --config.mesh.fsdp=8 cuts it for chips
with 16 GB.
Hours: not yet run. 448M images are 215 H200-hours at the 579 images/s that the same model reaches in PyTorch on one
H200 (torch.compile, bf16, batch 64; docs/benchmarks.md).
Expected: not yet run; the paper reports no result for this size.
"""

from ml_collections import ConfigDict

from terdit_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.name = "large_dit_600m"

    model = config.model
    model.ternary = False
    model.input_size = 32
    model.in_channels = 4
    model.patch_size = 2
    model.hidden_size = 1536
    model.depth = 16
    model.num_heads = 32
    model.num_classes = 1000
    model.positions = "rope_1d"

    config.compute.dtype = "bfloat16"
    config.compute.grad_dtype = "bfloat16"
    config.compute.remat = "dots"

    config.mesh.data = -1
    config.mesh.fsdp = 1

    config.data.dir = "data/imagenet256"
    config.data.horizontal_flip = True

    optimizer = config.optimizer
    optimizer.learning_rate = 5e-4  # its twin's
    optimizer.drop_step = 1_550_000  # its twin's: recalled, not confirmed by the paper's tables
    optimizer.drop_learning_rate = 1e-4  # its twin's: recalled, not confirmed by the paper's tables
    optimizer.ema_decay = 0.9999

    config.train.num_steps = 1_750_000  # 448M images
    config.train.batch_size = 256

    config.checkpoint.every = 10_000  # nine minutes on eight H200s at the rate above
    config.checkpoint.keep = 3
    config.checkpoint.keep_every = 250_000
    config.log.every = 100
    config.log.heldout_every = 10_000
    config.log.samples_every = 50_000
    return config
