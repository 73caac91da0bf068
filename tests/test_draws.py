"""Orders are fair permutations, views are fair coins, and neither knows of the other."""

import threading

import numpy as np
import pytest

from terdit_jax.data.draws import ShuffledStream, draw_mirrored, draw_order, splitmix64


def test_the_generator_is_splitmix64():
    """Against the outputs of Vigna's C code for seed 1234567."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    np.testing.assert_array_equal(splitmix64(np.uint64(1234567), np.arange(5, dtype=np.uint64)), expected)


def test_draws_stay_what_they_were():
    """A run that is resumed with a later version of this code goes on in the same order."""
    assert draw_order(0, 0, 10).tolist() == [0, 7, 8, 2, 5, 9, 4, 6, 3, 1]
    assert draw_order(7, 3, 10).tolist() == [9, 0, 8, 2, 5, 1, 3, 4, 7, 6]
    assert draw_mirrored(0, np.arange(12)).astype(int).tolist() == [0, 1, 0, 1, 0, 1, 1, 0, 0, 0, 1, 1]
    late = 2**50 + np.arange(12)
    assert draw_mirrored(2**32 - 1, late).astype(int).tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("size", [1, 2, 3, 37, 64, 1000, 1_281_167])
def test_an_order_holds_every_record_once(size):
    order = draw_order(5, 2, size)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.bincount(order, minlength=size), 1)


def test_every_record_lies_at_every_place_equally_often():
    size, draws = 12, 6000
    for orders in (
        [draw_order(0, epoch, size) for epoch in range(draws)],
        [draw_order(s, 0, size) for s in range(draws)],
    ):
        counts = np.zeros((size, size))
        for order in orders:
            counts[np.arange(size), order] += 1
        expected = draws / size
        # Chi-square of 11 * 11 degrees: 121 +- 15.6.
        assert np.sum((counts - expected) ** 2 / expected) < 121 + 5 * 15.6


def test_all_orders_of_few_records_are_equally_likely():
    orders, counts = np.unique([draw_order(1, epoch, 4) for epoch in range(4800)], axis=0, return_counts=True)
    assert len(orders) == 24
    assert np.sum((counts - 200.0) ** 2 / 200) < 23 + 5 * 6.8  # chi-square of 23 degrees


def test_epochs_and_seeds_have_unrelated_orders():
    orders = np.stack([draw_order(seed, epoch, 20_000) for seed in (0, 1, 2**32 - 1) for epoch in (0, 1, 2, 1000)])
    correlation = np.corrcoef(np.vstack([orders, np.arange(20_000)])) - np.eye(13)
    assert np.abs(correlation).max() < 5 / np.sqrt(20_000)


def test_a_stream_is_one_order_after_the_other():
    stream = ShuffledStream(3, 37)
    expected = np.concatenate([draw_order(3, epoch, 37) for epoch in range(10)])
    for positions in (
        np.arange(370),
        np.arange(369, -1, -1),
        np.array([5, 300, 5, 36, 37, 74]),
        np.array([], np.int64),
    ):
        np.testing.assert_array_equal(stream.indices(positions), expected[positions])
    np.testing.assert_array_equal(stream.indices(10**12 * 37 + np.arange(37)), draw_order(3, 10**12, 37))


def test_threads_share_a_stream():
    stream, failures = ShuffledStream(0, 501), []
    expected = np.concatenate([draw_order(0, epoch, 501) for epoch in range(8)])

    def walk(start):
        for _ in range(20):
            positions = np.arange(start, start + 1000)
            failures.extend(np.flatnonzero(stream.indices(positions) != expected[positions]))

    threads = [threading.Thread(target=walk, args=(400 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_views_are_fair_coins():
    draws = np.stack([draw_mirrored(seed, np.arange(200_000)) for seed in (0, 1, 2, 2**32 - 1)])
    assert np.abs(draws.mean(axis=1) - 0.5).max() < 5 * 0.5 / np.sqrt(200_000)
    for lag in (1, 2, 64, 256, 501):  # neighbours, batches, processes
        equal = draws[:, lag:] == draws[:, :-lag]
        assert np.abs(equal.mean(axis=1) - 0.5).max() < 5 * 0.5 / np.sqrt(200_000 - lag)
    correlation = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(200_000), "seeds have unrelated draws"


def test_a_records_view_depends_neither_on_the_record_nor_on_its_last_view():
    size, num_epochs = 500, 400
    position = np.arange(size * num_epochs)
    mirrored, record = draw_mirrored(0, position), ShuffledStream(0, size).indices(position)
    by_record = np.empty((num_epochs, size))
    by_record[position // size, record] = mirrored
    # Chi-square of 500 degrees: 500 +- 31.6.
    assert np.sum((by_record.sum(axis=0) - num_epochs / 2) ** 2) / (num_epochs / 4) < 500 + 5 * 31.6
    agree = (by_record[1:] == by_record[:-1]).mean()
    assert abs(agree - 0.5) < 5 * 0.5 / np.sqrt(size * (num_epochs - 1))
    assert abs(np.corrcoef(mirrored, record)[0, 1]) < 5 / np.sqrt(len(position))


def test_the_view_follows_from_the_place_alone():
    positions = np.random.default_rng(0).permutation(5000)
    np.testing.assert_array_equal(draw_mirrored(9, positions), draw_mirrored(9, np.arange(5000))[positions])
