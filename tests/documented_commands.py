"""How the commands of README.md and docs/*.md are run by test_documented_commands.py: on a CPU, without a network.

A command is found by the first pattern that it matches, `*` standing for anything; comments do not count and continued
lines are one. A new command on a page needs a pattern in one of the three tables, a pattern that no command matches any
more has to go, and what a page takes for granted is in INPUTS.
"""

MODEL = (
    "--config.model.hidden_size=32 --config.model.num_heads=2 --config.model.depth=1 --config.model.ffn_multiple_of=32"
)
STEPS = (
    f"{MODEL} --config.train.num_steps=2 --config.train.batch_size=8 --config.optimizer.drop_step=1"
    " --config.checkpoint.every=2 --config.log.every=1 --config.sample.num_steps=2 --config.sample.num_images=2"
)
# The quickstart logs everything there is; the others leave out what costs compiling.
EVERYTHING = f"{STEPS} --config.log.heldout_every=2 --config.log.samples_every=2"
TRAINING = f"{STEPS} --config.log.heldout_every=0 --config.log.samples_every=0 --config.log.writers="
ARCHIVE = "--image_size=64 --heldout_share=0.5"  # of four images
GPU_RUN = "measures an accelerator, for minutes to hours"
CLOUD = "needs an account, its tools and a network"
INSTALLS = "installs from a network"
LATENTS = "--config.model.input_size=8 --config.model.num_classes=2"  # of the archive and the autoencoder in INPUTS
HEADS = "--num_heads=2"  # of the stand-ins for published checkpoints of DiT and SiT, which are of no published size

# Commands that are run, with what is added to each.
RUN = {
    "launch/quickstart.sh": EVERYTHING,
    "python -m terdit_jax.prepare --source=digits *": "",
    "python -m terdit_jax.prepare --source=folder *": "",
    "python -m terdit_jax.prepare --source=tar *": ARCHIVE,
    "python -m terdit_jax.prepare --inspect=*": "--num_samples=2",
    "python -m terdit_jax.main --config=configs/terdit_4b.py --print_config": "",
    "python -m terdit_jax.main * --config.data.synthetic=True *": f"{TRAINING} {LATENTS} --workdir=runs/bring_up",
    "python -m terdit_jax.main --config=*cifar10*": f"{TRAINING} --config.model.num_classes=2",
    "python -m terdit_jax.main --config=configs/dit_xl_2.py *": (
        f"{TRAINING} --config.model.input_size=8 --config.data.synthetic=True"
    ),
    "python -m terdit_jax.main --config=*images_small*": f"{TRAINING} --config.model.num_classes=2",
    "python -m terdit_jax.main --config=*terdit_600m*": f"{TRAINING} {LATENTS}",
    "python -m terdit_jax.main --config=*digits*": TRAINING,
    "python -m terdit_jax.sample * --num_samples=5000 --output=digits.npz": "--num_samples=20",
    "python -m terdit_jax.sample *--model=*runs/*": "--num_samples=20",
    "python -m terdit_jax.sample --model=digits.safetensors *": "",
    "python -m terdit_jax.sample --model=models/*": "--num_samples=2 --num_steps=2",
    "python -m terdit_jax.sample --model=*iT-XL-2-* --vae=*": f"{HEADS} --num_samples=2 --num_steps=2",
    "python -m terdit_jax.sample * --vae=*": "--num_samples=2 --num_steps=2",
    "python -m terdit_jax.export --model=DiT-XL-2-256x256.pt *": HEADS,
    "python -m terdit_jax.export *": "",
    "python -m terdit_jax.compile * --topology=v5p:8x8x4 *": f"{MODEL} --topology=cpu:1",
    "python -m terdit_jax.report *": "",
    "launch/* --dry-run *": "",
}

# Commands whose flags are read and nothing else, and why.
ONLY_READ = {
    "python -m benchmarks.*": GPU_RUN,
    "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python -m benchmarks.*": GPU_RUN,
    "JAX_COMPILATION_CACHE_DIR=/tmp/cache python -m benchmarks.*": GPU_RUN,
    "python -m terdit_jax.main * --config.train.compiler_options=*": "names options of XLA for GPUs",
    "python -m terdit_jax.main * --config.mesh.slices=2 *": "needs several slices",
    "python -m terdit_jax.evaluate --workdir=*": "trains a classifier for half a minute, as the quickstart does",
    "python -m terdit_jax.compile * --topology=h200:8 *": "needs the compilers of the extra `aot`",
    "python -m terdit_jax.evaluate *": "needs Inception's weights, fetched from a network",
}

# Commands that are not run at all, and why.
NOT_RUN = {
    "launch/test.sh": "runs the tests, this one among them",
    "git clone *": "needs a network",
    "python3 -m venv *": INSTALLS,
    "source .venv/bin/activate": "changes the shell it is typed into",
    ".venv/bin/pip install *": INSTALLS,
    "pip install *": INSTALLS,
    "curl *": "needs a network",
    "gcloud *": CLOUD,
    "JAX_COORDINATOR_ADDRESS=host0:1234 *": "is typed on eight hosts",
    "python -m terdit_jax.* --push_to=*": "needs a network and an account",
    "python -m terdit_jax.* --model=*lucky-lance/TerDiT*": "needs a network",
    "python -m tests.faults *": "kills runs for an hour; test_faults.py does it a few times",
}

# Python blocks that are not run: a part of each, and why.
SNIPPETS_NOT_RUN = {"from diffusers import AutoencoderKL": "needs diffusers, a GPU and published weights"}

# What pages take for granted, made by `documented_inputs.MAKERS`. The README needs no run: its quickstart makes one.
INPUTS = {
    "README.md": ("pictures", ".venv"),
    "docs/ablations.md": ("cifar10",),
    "docs/configs.md": ("data/digits",),
    "docs/data.md": ("ILSVRC2012_img_train.tar", "sd-vae-ft-ema"),
    "docs/deployment.md": ("runs/digits", "checkpoints/3B_1180000", "sd-vae-ft-ema"),
    "docs/evaluation.md": ("cifar10", "3B_1180000", "stabilityai/sd-vae-ft-ema"),
    "docs/families.md": ("DiT-XL-2-256x256.pt", "SiT-XL-2-256.pt", "0400000.pt", "sd-vae-ft-ema"),
    "docs/fine_tuning.md": ("runs/digits", "pictures"),
    "docs/hub.md": ("runs/digits", "scores.json"),
    "docs/pods.md": ("ILSVRC2012_img_train.tar", "sd-vae-ft-ema"),
    "docs/pytorch.md": ("digits.safetensors",),
    "docs/sampling.md": ("runs/digits", "terdit_4b.safetensors", "sd-vae-ft-ema"),
    "docs/training.md": ("pictures",),
}

SLOW_PAGES = ("docs/hub.md",)

# What snippets and commands need beyond the package, by what is in them: without it they are left out.
NEEDS = {
    "torch": ("terdit_jax.interop.pytorch", "--format=torch", "3B_1180000", "-XL-2-", "0400000.pt", "from diffusers"),
    "diffusers": ("from diffusers",),
}
