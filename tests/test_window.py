"""The figures of a log window against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from terdit_jax.diffusion.objective import Ddpm
from terdit_jax.ternary.packing import pack
from terdit_jax.training.state import code_statistics, empty_sums, means, quartile_sums


def packed_tree(codes):
    """{kind: {name: codes}} as `packed_codes` lays it out."""
    return {"blocks": {k: {n: {"packed": pack(c)} for n, c in maps.items()} for k, maps in codes.items()}}


def test_code_statistics_are_a_count_of_the_codes():
    rng = np.random.default_rng(0)
    shapes = {"attention": {"qkv": (2, 3, 16, 32), "out": (2, 8, 16)}, "feed_forward": {"down": (2, 24, 8)}}
    draw = lambda shares: {  # noqa: E731
        kind: {name: rng.choice([-1, 0, 1], shape, p=shares).astype(np.int8) for name, shape in maps.items()}
        for kind, maps in shapes.items()
    }
    before, after = draw([0.3, 0.4, 0.3]), draw([0.6, 0.3, 0.1])
    statistics = jax.jit(lambda a, b: code_statistics(packed_tree(a), packed_tree(b)))(before, after)
    assert statistics.keys() == {f"{name}_share/{kind}" for name in ("zero", "changed") for kind in shapes}
    for kind in shapes:
        old, new = (np.concatenate([c.ravel() for c in codes[kind].values()]) for codes in (before, after))
        pairs = set(zip(old.tolist(), new.tolist(), strict=True))
        assert len(pairs) == 9, "every change of a code is among them"
        np.testing.assert_allclose(statistics[f"zero_share/{kind}"], np.mean(new == 0), rtol=1e-6)
        np.testing.assert_allclose(statistics[f"changed_share/{kind}"], np.mean(old != new), rtol=1e-6)


def test_nothing_changes_between_equal_codes():
    tree = packed_tree({"attention": {"out": jnp.array([[-1, 0, 1, 0], [1, 1, -1, 1]], jnp.int8)}})
    statistics = jax.jit(code_statistics)(tree, tree)
    assert statistics["changed_share/attention"] == 0 and statistics["zero_share/attention"] == 0.25


def test_more_codes_than_float32_counts_one_by_one():
    """2^26 ones added to a float32 in turn would stop at 2^24."""
    zeros = {"blocks": {"attention": {"out": {"packed": jnp.full((2**12, 2**12), 0b01010101, jnp.uint8)}}}}
    assert jax.jit(lambda tree: code_statistics(tree, tree))(zeros)["zero_share/attention"] == 1


def test_a_full_precision_model_has_no_codes():
    assert code_statistics({}, {}) == {}


def test_quartile_sums():
    t = np.array([0, 249, 250, 499, 500, 749, 750, 999, 999, 0], np.int32)
    losses = 2.0 ** np.arange(len(t), dtype=np.float32)
    sums = jax.jit(lambda losses, t: quartile_sums(losses, Ddpm().part(t, 4)))(losses, t)
    for i in range(4):
        member = (t >= 250 * i) & (t < 250 * (i + 1))
        assert sums["quartile_loss"][i] == losses[member].sum()
        assert sums["quartile_count"][i] == member.sum()


def test_means_over_the_steps_of_a_window():
    sums = empty_sums() | {
        "steps": jnp.float32(4),
        "loss": jnp.float32(2),
        "mse": jnp.float32(1),
        "vb": jnp.float32(0.5),
        "grad_norm": jnp.float32(12),
        "quartile_loss": jnp.array([3.0, 0.0, 10.0, 1.0]),
        "quartile_count": jnp.array([6.0, 0.0, 5.0, 4.0]),
    }
    figures = {name: float(value) for name, value in jax.jit(lambda sums: means(sums, Ddpm.terms))(sums).items()}
    assert np.isnan(figures.pop("loss_t2of4")), "no example of that quartile was seen"
    assert figures == {
        "loss": 0.5, "mse": 0.25, "vb": 0.125, "grad_norm": 3.0,
        "loss_t1of4": 0.5, "loss_t3of4": 2.0, "loss_t4of4": 0.25,
    }  # fmt: skip


def test_an_empty_window_has_no_figures():
    sums = empty_sums()
    assert all(leaf.dtype == jnp.float32 and not np.any(leaf) for leaf in jax.tree.leaves(sums))
    assert all(np.isnan(value) for value in jax.jit(lambda sums: means(sums, Ddpm.terms))(sums).values())
