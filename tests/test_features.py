"""Features of all images in order over a mesh, whatever the portions, with moments of each; over processes too."""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.evaluation import features as features_module
from terdit_jax.evaluation.features import FeatureNetwork, collect_features
from terdit_jax.evaluation.image_source import ImageSource
from terdit_jax.evaluation.statistics import statistics
from terdit_jax.parallel.mesh import local_mesh, single_device_mesh
from tests.runs import ROOT, free_port

IMAGES = np.random.default_rng(0).integers(0, 256, (53, 4, 3, 3), np.uint8)


def source():
    def stream(first, stop, size):
        for start in range(first, stop, size):
            yield IMAGES[start : min(start + size, stop)]

    return ImageSource("set", len(IMAGES), (4, 3, 3), stream)


def extract(params, images):
    x = images.astype(jnp.float32).reshape(len(images), -1)
    return {"pool": x[:, :5] * params["gain"], "spatial": jnp.sqrt(x[:, 5:12])}


NETWORK = FeatureNetwork({"gain": np.float32(0.5)}, extract, "nowhere", "0")


def expected():
    flat = IMAGES.reshape(53, -1).astype(np.float32)
    return flat[:, :5] * 0.5, np.sqrt(flat[:, 5:12])


def assert_features(found):
    pool, spatial = expected()
    np.testing.assert_array_equal(found.pool, pool)
    for moments, rows in ((found.moments["pool"], pool), (found.moments["spatial"], spatial)):
        wanted = statistics(rows)
        assert moments.count == 53
        np.testing.assert_allclose(moments.mean, wanted.mean, rtol=1e-6)
        np.testing.assert_allclose(moments.statistics().covariance, wanted.covariance, rtol=0, atol=1e-6 * 1e4)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_every_image_is_taken_once_over_a_mesh(batch_size, monkeypatch):
    """8 devices: portions of 8, 24 and 400, the last of which is filled up; and the fill counts nowhere."""
    monkeypatch.setattr(features_module, "CHUNK", 20)
    mesh = local_mesh()
    assert mesh.size == 8
    assert_features(collect_features(NETWORK, source(), mesh, batch_size))
    assert_features(collect_features(NETWORK, source(), single_device_mesh(), batch_size))


def test_sets_of_one_size_share_a_program():
    """Inception takes long to compile, and there are samples and a reference."""
    traced = []

    def counted(params, images):
        traced.append(images.shape)
        return extract(params, images)

    for _ in range(2):
        collect_features(NETWORK._replace(extract=counted), source(), single_device_mesh(), 10)
    assert traced == [(10, 4, 3, 3)]


def test_progress_is_told():
    lines = []
    collect_features(NETWORK, source(), single_device_mesh(), 10, lines.append)
    assert lines[-1].startswith("set: features of 53/53 images")


def test_fewer_images_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(features_module.jax, "process_count", lambda: 54)
    with pytest.raises(UserError, match="set: 53 images for 54 processes"):
        collect_features(NETWORK, source(), single_device_mesh())


def test_features_that_are_not_finite_are_refused():
    broken = NETWORK._replace(params={"gain": np.float32(np.nan)})
    with pytest.raises(UserError, match="265 of 265 feature values are not finite"):
        collect_features(broken, source(), single_device_mesh())


def test_two_processes_have_the_features_of_one():
    code = """
from terdit_jax.parallel.mesh import local_mesh
from terdit_jax.parallel.processes import initialize_processes
initialize_processes()
import jax
from tests import test_features
assert jax.process_count() == 2
found = test_features.collect_features(test_features.NETWORK, test_features.source(), local_mesh(), 4)
test_features.assert_features(found)
print("sound")
"""
    address = f"localhost:{free_port()}"
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    common = {"PYTHONPATH": str(ROOT), "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=inherited | common | {"JAX_PROCESS_ID": str(process)}, **options
        )
        for process in range(2)
    ]
    for process in both:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "sound" in out, out
