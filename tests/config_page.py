"""The tables of docs/configs.md, from the fields of terdit_jax.config; run as a program, writes them into the page.

python -m tests.config_page
"""

from itertools import groupby
from pathlib import Path
import re

from terdit_jax.config import FIELDS
from terdit_jax.config_rules import Field

PAGE = Path(__file__).parents[1] / "docs" / "configs.md"
HEAD = "| Field | Default | On resume | Meaning |\n|---|---|---|---|\n"


def with_tables(page: str) -> str:
    """The page with each of its tables replaced: that of the run's own fields, then one a section, in their order."""
    sections = groupby(FIELDS.items(), lambda item: item[0].rpartition(".")[0])
    tables = [HEAD + "".join(_row(name, field) for name, field in fields) for _, fields in sections]
    parts = re.split(r"(?:^\|.*\n)+", page, flags=re.MULTILINE)
    assert len(parts) == len(tables) + 1, f"{PAGE} has {len(parts) - 1} tables, there are {len(tables)}"
    return "".join(part + table for part, table in zip(parts, [*tables, ""], strict=True))


def _row(name: str, field: Field) -> str:
    default = str(field.default) or '""'
    return f"| `{name}` | `{default}` | {'free' if field.free else 'fixed'} | {field.meaning} |\n"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
