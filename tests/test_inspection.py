import numpy as np
import pytest

from terdit_jax.data import builder
from terdit_jax.data.inspection import format_report, inspect
from terdit_jax.data.reader import open_dataset
from tests.test_builder import ToyCodec, make_source


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspected") / "d"
    builder.build(make_source(num_train=30), path, codec=ToyCodec(), mirror=True)
    return open_dataset(path)


def test_records_are_spread_over_the_split_and_named(dataset):
    items = make_source(num_train=30).splits["train"]
    inspected = inspect(dataset, 4)
    chosen = [items[0], items[9], items[19], items[29]]
    assert inspected.captions == tuple(f"{item.label} {item.label}: {item.source_id}" for item in chosen)
    assert inspected.labels.tolist() == [item.label for item in chosen]
    assert [view.shape for view in inspected.views] == [(4, 4, 4, 2)] * 2
    image = make_source().load(chosen[1])[0][None]
    for view, pixels in zip(inspected.views, (image, image[:, :, ::-1]), strict=True):
        np.testing.assert_array_equal(view[1], ToyCodec().encode(pixels)[0][0].astype(np.float16))
    assert len(inspect(dataset, 1000).labels) == 30


def test_of_all_records_the_samples_numbers_are_the_metadatas(dataset):
    lines = format_report(dataset.metadata, inspect(dataset, 30)).splitlines()
    assert "30 training and 10 held-out records of 4x4x2, 10 classes, codec toy, scale 0.5" in lines[0]
    for channel, line in enumerate(lines[3:5]):
        number, mean, std, scaled, sample_mean, sample_std = map(float, line.split()[:6])
        assert number == channel and mean == sample_mean and std == sample_std
        assert scaled == pytest.approx(std / 2, abs=1e-4)
    assert lines[5].startswith("latents of mirrored images differ from mirrored latents by ")
