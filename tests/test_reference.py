"""Reference files: what is written is read, and statistics that cannot be Inception's are refused."""

import numpy as np
import pytest

from terdit_jax.errors import UserError
from terdit_jax.evaluation import reference as reference_module
from terdit_jax.evaluation.reference import read_statistics, save_reference, stored_indices, stored_keys
from terdit_jax.evaluation.statistics import statistics

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Features of 4 and 3 in place of 2,048 and 2,023."""
    monkeypatch.setattr(reference_module, "KEYS", {"pool": ("mu", "sigma", 4), "spatial": ("mu_s", "sigma_s", 3)})


def arrays(**changes):
    pool, spatial = statistics(RNG.normal(size=(9, 4))), statistics(RNG.normal(size=(9, 3)))
    whole = {"mu": pool.mean, "sigma": pool.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
    return {name: array for name, array in (whole | changes).items() if array is not None}


def test_what_is_written_is_read(tmp_path):
    written = {"pool": statistics(RNG.normal(size=(9, 4))), "spatial": statistics(RNG.normal(size=(9, 3)))}
    images = RNG.integers(0, 256, (5, 2, 2, 3), np.uint8)
    save_reference(tmp_path / "new" / "a.npz", written, images)
    assert stored_keys(tmp_path / "new" / "a.npz") == {"arr_0", "mu", "sigma", "mu_s", "sigma_s"}
    found = read_statistics(tmp_path / "new" / "a.npz")
    for name in written:
        np.testing.assert_array_equal(found[name].mean, written[name].mean)
        np.testing.assert_array_equal(found[name].covariance, written[name].covariance)
    with np.load(tmp_path / "new" / "a.npz") as stored:
        np.testing.assert_array_equal(stored["arr_0"], images)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.npz"]


def test_float32_files_are_read_and_may_lack_a_pair(tmp_path):
    both = {name: array.astype(np.float32) for name, array in arrays(mu_s=None, sigma_s=None).items()}
    np.savez(tmp_path / "a.npz", **both)
    found = read_statistics(tmp_path / "a.npz")
    assert set(found) == {"pool"} and found["pool"].covariance.dtype == np.float64
    np.savez(tmp_path / "b.npz", arr_0=np.zeros(3))
    assert read_statistics(tmp_path / "b.npz") == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": None}, "has mu but not its pair: mu and sigma"),
        ({"mu_s": None}, "has sigma_s but not its pair"),
        ({"mu": np.zeros(5)}, r"mu is float64 \(5,\), Inception's is floats \(4,\)"),
        ({"sigma": np.eye(3)}, r"sigma is float64 \(3, 3\)"),
        ({"mu": np.zeros(4, int)}, "int64"),
        ({"mu": np.array([0, 1, np.nan, 2])}, "mu holds values that are not finite"),
        ({"sigma": np.eye(4) + np.eye(4, k=1)}, "sigma is no covariance"),
        ({"sigma_s": -np.eye(3)}, "sigma_s is no covariance"),
        ({"mu": np.array([{}], object)}, "not a reference"),
    ],
)
def test_mismatched_statistics_are_refused(tmp_path, changes, message):
    np.savez(tmp_path / "a.npz", **arrays(**changes))
    with pytest.raises(UserError, match=message):
        read_statistics(tmp_path / "a.npz")


def test_what_is_no_npz_is_refused(tmp_path):
    (tmp_path / "a.npz").write_text("text")
    with pytest.raises(UserError, match="a.npz: not an npz"):
        stored_keys(tmp_path / "a.npz")


def test_ten_thousand_images_are_kept_at_equal_distances():
    np.testing.assert_array_equal(stored_indices(7), np.arange(7))
    np.testing.assert_array_equal(stored_indices(50_000), np.arange(0, 50_000, 5))
    kept = stored_indices(1_281_167)
    assert len(np.unique(kept)) == 10_000 and kept[-1] < 1_281_167
