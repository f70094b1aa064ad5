"""What the site does to the pages, which are written to be read in the repository as well.

- A link to a file outside of docs, or to a folder, leads to the repository where its address is known (GitHub's own
  variables say it), and is plain text elsewhere.
- ``<!-- include FILE -->`` puts a Markdown file of the repository in its place, without its first heading.
- The API reference reads the package as it is installed: trainers and plans lie inside of it.
- In docstrings, references such as ``:class:`name``` and equations become code.
"""

import atexit
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import griffe
from mkdocs.plugins import event_priority

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
INCLUDE = re.compile(r"^<!-- include (\S+) -->$", re.MULTILINE)
MATH = re.compile(r"^( *)\.\. math:: ?(.*)$", re.MULTILINE)
ROLE = re.compile(r":(?:class|func|mod|meth|attr|math):`~?\.?([^`]+)`")


def repository() -> str | None:
    """The address of the files of this commit."""
    server, name = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    return f"{server}/{name}/blob/{os.environ.get('GITHUB_SHA', 'main')}" if server and name else None


def rewritten(text: str, folder: Path, page_folder: Path) -> str:
    """The links of a text that lies in ``folder``, for a page in ``page_folder``."""

    def link(match: re.Match[str]) -> str:
        image, label, target, anchor = match.groups(default="")
        path = (folder / target).resolve()
        if path.is_relative_to(DOCS) and not path.is_dir():
            return f"{image}[{label}]({os.path.relpath(path, page_folder)}{anchor})"
        address = repository()
        return label if address is None else f"[{label}]({address}/{path.relative_to(ROOT).as_posix()}{anchor})"

    # Links in code are no links.
    parts = re.split(r"(^```.*?^```$|`[^`\n]+`(?!\]))", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("`") else LINK.sub(link, part) for part in parts)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    folder = Path(page.file.abs_src_path).parent

    def included(match: re.Match[str]) -> str:
        file = (folder / match.group(1)).resolve()
        _, _, body = file.read_text(encoding="utf-8").partition("\n")
        return rewritten(body, file.parent, folder)

    return INCLUDE.sub(included, rewritten(markdown, folder, folder))


@event_priority(100)  # before mkdocstrings reads it
def on_config(config: Any) -> Any:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = Path(folder, "nnunet_deform")
    package.mkdir()
    for path in (*(ROOT / "nnunet_deform").iterdir(), ROOT / "trainers", ROOT / "plans"):
        (package / path.name).symlink_to(path)
    python = config.plugins["mkdocstrings"].config.handlers["python"]
    python["paths"] = [str(package.parent)]
    python["options"]["extensions"] = [f"{Path(__file__)}:Roles"]
    return config


class Roles(griffe.Extension):
    """``:class:`name``` as code, which is what Markdown knows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(lambda m: f"`{m.group(1).rsplit('.', 1)[-1]}`", obj.docstring.value)
            obj.docstring.value = MATH.sub(r"\1    \2", text)
