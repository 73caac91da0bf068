"""The suite's benchmark runs, with a network that takes no time in Inception's place."""

import jax.numpy as jnp
import numpy as np

from terdit_jax.evaluation.features import FeatureNetwork
from terdit_jax.evaluation.inception import kernels
from terdit_jax.parallel.mesh import local_mesh
from tests.commands import no_flags

with no_flags():
    from benchmarks.evaluation import Size, measure, random_params


def extract(params, pictures):
    flat = pictures.astype(jnp.float32).reshape(len(pictures), -1) / 64
    return {"pool": flat[:, :9], "spatial": flat[:, 9:14]}


def test_every_part_is_measured():
    network = FeatureNetwork({"fc": {"weight": np.ones((7, 9), np.float32)}}, extract, "", "")
    rows = measure(network, Size(pictures=100, side=8, batch_sizes=(1, 4), trial=24), local_mesh())
    expected = ["trial", "trial", "features", "fid, sfid, inception_score", "precision, recall"]
    assert [row["what"] for row in rows] == expected
    assert [row["pictures"] for row in rows[:3]] == [24, 24, 100]
    assert all(row["pictures_per_second"] > 0 for row in rows[:3]) and all(row["seconds"] > 0 for row in rows[2:])
    assert all(0 <= row["host_peak_gb_above_start"] < 4 for row in rows[2:])
    assert rows[2]["batch_size"] in (1, 4) and 0 < rows[4]["recall"] <= 1


def test_its_weights_are_those_of_the_network():
    params = random_params()
    assert params["Mixed_7c"]["branch3x3_2a"]["weight"].shape == (384, 1, 3, 384)
    assert params["fc"]["weight"].shape == (1008, 2048) and len(kernels()) == 94
