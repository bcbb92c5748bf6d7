"""README.md and CHANGELOG.md as pages of the site, and links that lead out of it.

The documents link to files of the repository (`../benchmarks/input.py`), as a reader of the repository needs; the site does not
hold these, so there the text of such a link stays alone. A link to a file that does not exist is left as it is: mkdocs, which is
strict, ends with it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_files(files, config):
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    own = {page: source for source, page in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewritten(link):
        image, text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(own), target))
        inside = PAGES.get(path, path.removeprefix("docs/"))
        if path in PAGES or path.startswith("docs/"):
            start = posixpath.dirname(page.file.src_uri)
            return f"{image}[{text}]({posixpath.relpath(inside, start or '.')}{anchor or ''})"
        return text if (ROOT / path).exists() else link[0]

    return LINK.sub(rewritten, markdown)
