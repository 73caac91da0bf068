"""The description of a run in its checkpoints, and which changes of configuration may continue it.

The rate, its drop and the length of a run are decided in mid-run, so they may change; whatever would silently make it
another run (model, data, order, batch) may not.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from terdit_jax.config import FIELDS, RunConfig
from terdit_jax.config_rules import flatten
from terdit_jax.data.schema import Metadata
from terdit_jax.errors import UserError
from terdit_jax.labels import can_be_kept
from terdit_jax.parallel.sharding import path_name
from terdit_jax.training.state import State
from terdit_jax.training.teacher import Teacher
from terdit_jax.untrusted import printable, reading, short, short_json


def describe_run(config: RunConfig, step: int, data: Metadata, teacher: str = "") -> dict[str, Any]:
    """The JSON saved beside a state: its step, seed, whole configuration, the fingerprint of a teacher it has or had,
    and what sampling must know of the data."""
    return ({"teacher": teacher} if teacher else {}) | {
        "step": step,
        "seed": config.seed,
        "data_fingerprint": data.fingerprint,
        "latent_scale": data.latent_scale,
        "codec": data.codec,
        "class_names": list(data.class_names) if can_be_kept(data.class_names) else [],
        "config": config.to_dict(),
    }


def check_resumable(
    run: dict[str, Any], config: RunConfig, fingerprint: str, workdir: str, teacher: Teacher | None = None
) -> list[str]:
    """The allowed changes, one line each, between a saved run and the configuration that is to continue it.

    Raises:
      UserError: another data set, another teacher, a field that must not change, or JSON that describes no run.
    """
    with reading(f"{workdir}: its newest checkpoint does not describe a run"):
        if teacher and (before := run.get("teacher", teacher.fingerprint)) != teacher.fingerprint:
            raise UserError(
                f"{workdir} was taught by weights {printable(before[:24])}, config.train.teacher="
                f"{config.train.teacher} now holds {teacher.fingerprint[:24]}: give those weights (an export of a run "
                "that goes on does not change) or another --workdir"
            )
        return _compare(run, config, fingerprint, workdir)


def data_dir(run: Mapping[str, Any], workdir: str) -> str:
    """Where the data set of a saved run lies. Raises UserError for JSON that describes no run."""
    with reading(f"{workdir}: its newest checkpoint does not describe a run"):
        path = run["config"]["data"]["dir"]
        if not isinstance(path, str) or not path:
            raise ValueError(f"its data set is {short(path)}")
        return path


def _compare(run: dict[str, Any], config: RunConfig, fingerprint: str, workdir: str) -> list[str]:
    if run["data_fingerprint"] != fingerprint:
        raise UserError(
            f"{workdir} was trained on data set {printable(run['data_fingerprint'][:24])}, config.data.dir now holds "
            f"{fingerprint[:24]}: give that data set or another --workdir"
        )
    # Fields that an older run knew nothing of had their defaults. The model's may be missing only if they came later
    # (`added`): with another default it would be another model.
    unsaid = {name: field.default for name, field in FIELDS.items() if field.added or not name.startswith("model.")}
    before, after = unsaid | dict(flatten(run["config"])), dict(flatten(config.to_dict()))
    changes = []
    for field in sorted(before.keys() | after.keys()):
        old, new = before.get(field), after.get(field)
        if old == new:
            continue
        # A state has a teacher's sum in its window, or has not: a teacher may move, but neither come nor go.
        may_change = _may_change(field) and (field != "train.teacher" or bool(old and new))
        old, new, name = short_json(old), short_json(new), printable(field[:80])
        if not may_change:
            raise UserError(f"{workdir} holds a run with {name}={old}, not {new}: give that value or another --workdir")
        changes.append(f"config.{name}: {old} -> {new}")
    return changes


def _may_change(name: str) -> bool:
    """By the field's own word; a field that is no longer there may if its whole section may."""
    if name in FIELDS:
        return FIELDS[name].free
    beside = [field.free for other, field in FIELDS.items() if other.startswith(f"{name.partition('.')[0]}.")]
    return bool(beside) and all(beside)


def check_finite(state: State, what: str, advice: str) -> None:
    """Raises UserError if parameters, averages or moments hold a number that is not finite; one pass over them."""
    finite = jax.device_get(_are_finite({name: state[name] for name in ("params", "ema_params", "opt_state")}))
    bad = [path_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(finite) if not leaf]
    if bad:
        raise UserError(f"{what} holds values that are not finite, in {bad[0]} and {len(bad) - 1} others: {advice}")


@jax.jit
def _are_finite(tree: dict) -> dict:
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)
