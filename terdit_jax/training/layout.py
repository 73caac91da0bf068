"""Names and forms of what a run leaves in its workdir beside its checkpoints, for those who write and who read it.

Nothing here needs JAX. What the figures in a line mean belongs to `actions`.
"""

import json
import re
from typing import Any

from terdit_jax.untrusted import is_count

CONFIG_FILE, METRICS_FILE = "config.json", "metrics.jsonl"
GOODPUT_FILE, HEARTBEAT_FILE = "goodput.json", "heartbeat.json"
GRIDS = "samples"  # a folder


def grid_name(step: int) -> str:
    """The name of the grid drawn after a step."""
    return f"step_{step:08d}.png"


def grid_step(name: str) -> int | None:
    """The step that a grid's name tells, or None for another file's."""
    match = re.fullmatch(r"step_([0-9]{8,12})\.png", name)
    return int(match[1]) if match else None


def decode_line(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, or None for one that no run wrote, or that a kill cut short."""
    try:
        content = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and is_count(content.get("step"), 0, 2**53) else None
