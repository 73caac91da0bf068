"""The site builds without a warning, its links lead somewhere, its notebooks run, and generated pages are current."""

from html import unescape
import os
import re
import subprocess
import sys
from urllib.parse import unquote

import pytest

from tests import commands_page
from tests.runs import ROOT


def test_docs_list_the_flags_as_they_are_defined():
    assert commands_page.make_page() == commands_page.PAGE.read_text(), "run python -m tests.commands_page"


@pytest.mark.slow
def test_site_builds_strictly_and_has_no_broken_link(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}"],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        for link in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
            if not re.match(r"[a-z]+:|//", link) and page.name != "404.html":  # which is served from any folder
                assert (page.parent / unquote(unescape(link))).exists(), f"{page.relative_to(tmp_path)}: {link}"


@pytest.mark.slow
def test_notebooks_run():
    pytest.importorskip("nbclient")
    pytest.importorskip("matplotlib")
    from tests.notebooks import NOTEBOOKS, run

    assert NOTEBOOKS
    for path in NOTEBOOKS:
        run(path)
