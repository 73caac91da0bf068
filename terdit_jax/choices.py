"""The names and limits that flags, fields and functions share: samplers, modes, formats.

It imports nothing, so that a command can list them without the packages that do the work.
"""

SOLVERS = ("dpmpp_2m", "dpmpp_2m_sde", "unipc")
METHODS = ("ddpm", "ddim", *SOLVERS)  # of models that predict noise
FLOW_METHODS = ("euler", "heun", "sde", *SOLVERS)
ALL_METHODS = tuple(dict.fromkeys((*METHODS, *FLOW_METHODS)))
SPACINGS = ("uniform", "quadratic", "power", "logsnr")
NUM_TIMESTEPS = 1000  # of the process that DDPM models are trained on, and of the scale of config.sample.cfg_t_*
MAX_CFG_SCALE = 1000  # a hundred times what improves images; float32 has no digits left for much more

MODES = {
    "auto": "exact where its weights fit beside the work, small_exact elsewhere",
    "exact": "weights in the activations' dtype: the trained model's function, fast",
    "fast": "weights and activations in 8 bits: another function, faster, half the memory of exact",
    "small": "weights at 2 bits, matmuls in 8: the function of fast in an eighth of the memory of exact",
    "small_exact": "weights at 2 bits: the trained model's function",
    "plain": "the forward pass of training over weights at 2 bits: what the others are compared with",
}
DTYPES = ("bfloat16", "float32")  # of activations

TRACKERS = ("tensorboard", "wandb", "mlflow")  # that follow a run
FORMATS = ("packed", "torch", "safetensors", "hub")  # that weights are exported to
LABEL_ORDERS = ("balanced", "random")
DRAW_BATCH_SIZE = 64  # images that `sample` draws at once, and `evaluate` on CPUs: the two run one program
FEATURE_BATCH_SIZE = 64  # images that a device extracts features of at once
TOPOLOGIES = "v4:4x4x4, v5e:16x16, v5p:8x8x4, v6e:16x16, h200:8 or cpu:8"  # examples
