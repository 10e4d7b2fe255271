"""What pyproject.toml cannot say: the long description is README.md with those links that hold on a package index."""

import re
from pathlib import Path

from setuptools import setup

# First blocks and spans of code, where no link is looked for; then an image or a link whose target has no scheme; its
# text may hold code.
CODE_OR_LOCAL_LINK = re.compile(
    r"^```.*?^```|`[^`\n]+`|!?\[(?P<text>(?:`[^`\n]*`|[^]`])*)\]\((?![a-z]+:)[^)]*\)", re.DOTALL | re.MULTILINE
)


def without_local_links(markdown: str) -> str:
    """README's text with links to files of the repository as their text alone: an index shows README without the files.

    Links with a scheme, such as https, and whatever stands in code stay as they are.
    """
    return CODE_OR_LOCAL_LINK.sub(lambda found: found[0] if found["text"] is None else found["text"], markdown)


# Build backends run this file under that name; a test imports it.
if __name__ == "__main__":
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    setup(long_description=without_local_links(readme), long_description_content_type="text/markdown")
