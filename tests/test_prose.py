"""Docstrings, comments and pages avoid openings and words that readers stumble over."""

import ast
from collections.abc import Iterator
import io
from pathlib import Path
import re
import tokenize

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("terdit_jax", "benchmarks", "configs", "launch", "tests", "docs")
FILES = sorted(path for folder in FOLDERS for kind in ("py", "sh") for path in (ROOT / folder).rglob(f"*.{kind}"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPENINGS = re.compile(r"\s*(What|Of|As)\b")
WORDS = re.compile(
    r"\b(behind|so\s+many|of\s+no\s+use|at\s+need)\b"
    r"|\b(is|are|stays?)\s+((the|an?|its|this)\s+)?`?\w+`?'s(?=[.,;:)])",  # a possessive as the predicate
    re.IGNORECASE,
)


def _words(text: str, start: int) -> Iterator[tuple[int, str]]:
    for found in WORDS.finditer(text):
        yield start + text.count("\n", 0, found.start()), found[0]


def faults(text: str, suffix: str) -> Iterator[tuple[int, str]]:
    """Yields the line of each fault in a file of Python, shell or Markdown, and the words to replace."""
    if suffix == ".md":
        yield from _words(text, 1)
    elif suffix == ".sh":
        yield from _words("\n".join(line.partition("#")[2] for line in text.splitlines()), 1)
    else:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                if found := OPENINGS.match(docstring):
                    yield node.body[0].lineno, f'docstring opens with "{found[1]}"'
                yield from _words(docstring, node.body[0].lineno if docstring else 0)
        if WORDS.search(text):  # tokens take most of the time
            for token in tokenize.generate_tokens(io.StringIO(text).readline):
                if token.type == tokenize.COMMENT:
                    yield from _words(token.string, token.start[0])


def test_words_are_plain():
    found = [
        f"{path.relative_to(ROOT).as_posix()}:{line}: {words}"
        for path in (*FILES, *PAGES)
        for line, words in faults(path.read_text("utf-8"), path.suffix)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "suffix", "line"),
    [
        ('x = 1\ndef f():\n    """Of a run."""\n', ".py", 3),
        ('"""What it says."""\n', ".py", 1),
        ('"""A title.\n\nTakes so\nmany steps."""\n', ".py", 3),
        ("x = 1\ny = 2  # left behind\n", ".py", 2),
        ('"""The rest is `loop`\'s."""\n', ".py", 1),
        ("echo\n#   behind --  options\n", ".sh", 2),
        ("# Title\n\nIt is of no\nuse.\n", ".md", 3),
    ],
)
def test_faults_are_found(text, suffix, line):
    assert [number for number, _ in faults(text, suffix)] == [line]


def test_other_words_pass():
    assert not list(faults('"""Often of its own, as is the model\'s norm."""\nx = "behind"  # whose it is\n', ".py"))
