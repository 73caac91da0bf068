"""Adds what mkdocs.yml cannot say: files outside docs/, notebooks, pages of the API, and equations without scripts.

The site keeps the repository's paths, so that a link works here as it does in a checkout.
"""

from collections.abc import Iterator
import json
from pathlib import Path

from latex2mathml.converter import convert
from markdown.extensions import Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ("*.md", "LICENSE", "CITATION.cff", "models/*.md", "configs/*.md", "configs/*.py", "benchmarks/*.py")
PACKAGES = [path.parent.name for path in sorted(ROOT.glob("terdit_jax/*/__init__.py"))]
API = {name: f"::: terdit_jax.{name}" for name in PACKAGES} | {
    "terdit_jax": "::: terdit_jax\n    options: {show_submodules: false}\n"
    + "".join(f"\n::: terdit_jax.{name}\n" for name in ("config", "errors", "memory", "reproducible"))
}


class LiteralAngles(Extension):
    """Reads <W, T> as text, as GitHub does: no page holds HTML."""

    def extendMarkdown(self, md):
        md.inlinePatterns.deregister("html")


def on_config(config: MkDocsConfig) -> None:
    config.markdown_extensions.append(LiteralAngles())
    math = {"name": "math", "class": "math", "format": lambda text, *_, **__: convert(text, display="block")}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [math]}


class Notebook(File):
    """A notebook as a page: its text, its code, and the outputs that are stored in it."""

    def is_documentation_page(self) -> bool:
        return True

    @property
    def content_string(self) -> str:
        cells = json.loads(Path(self.abs_src_path).read_text())["cells"]
        return "\n\n".join(part for cell in cells for part in _markdown(cell))


def _markdown(cell: dict) -> Iterator[str]:
    source = "".join(cell["source"])
    yield source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        if image := data.get("image/png"):
            yield f"![](data:image/png;base64,{''.join(image.split())})"
        elif text := "".join(output.get("text") or data.get("text/plain") or ""):
            yield f"```text\n{text.rstrip()}\n```"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    def at(path: str) -> File:
        kind = Notebook if path.endswith(".ipynb") else File
        return kind(path, str(ROOT), config.site_dir, config.use_directory_urls)

    moved = [at(f"docs/{file.src_uri}") if file.src_dir == config.docs_dir else file for file in files]
    added = [at(path.relative_to(ROOT).as_posix()) for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))]
    api = [File.generated(config, f"api/{name}.md", content=content) for name, content in API.items()]
    return Files([*moved, *added, *api])
