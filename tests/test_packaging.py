"""What is built for a package index: a source distribution, the wheel made of it, and the page that shows README."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"
# A link's text, perhaps with code in it, and its target.
# Both may break over a line, within a paragraph.
LINK = re.compile(r"\[(?:`[^`]*`|[^]`\n]|\n(?!\n))*\]\(([^)]*)\)")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def without_local_links():
    pytest.importorskip("setuptools", reason="setup.py imports it")
    spec = importlib.util.spec_from_file_location("dora_peft_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.without_local_links


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The source distribution of this tree, and the wheel that it builds by itself."""
    pytest.importorskip("setuptools", minversion="77", reason="the lowest that pyproject.toml builds with")
    pytest.importorskip("packaging", minversion="24.2", reason="setuptools 77 needs it to read a licence")
    folder = tmp_path_factory.mktemp("packaging")

    def build(kind: str, source: Path) -> Path:
        command = [sys.executable, "-W", "ignore", "-c", BUILD, kind, str(folder)]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return folder / done.stdout.splitlines()[-1]

    # A copy, as building writes beside its source; with the folders that shall be left out.
    caches = shutil.ignore_patterns("__pycache__", "results")
    for name in ("dora_peft", "tests", "scripts", "configs"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=caches)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree" / name)
    source = build("sdist", folder / "tree")
    with tarfile.open(source) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return source, build("wheel", unpacked)


def package_files() -> set[str]:
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "dora_peft").rglob("*.py")} | {"dora_peft/py.typed"}
    assert len(files) > 50
    return files


def test_source_distribution_holds_what_the_wheel_is_built_from_and_no_tests(built):
    with tarfile.open(built[0]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in names if "egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert names - made == package_files() | {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}


def test_wheel_holds_the_package_its_marker_of_types_and_its_licence(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert {name for name in names if ".dist-info/" not in name} == package_files()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    header, _, page = metadata.partition("\n\n")
    assert "Description-Content-Type: text/markdown" in header
    links = LINK.findall(FENCED.sub("", page))
    assert page.startswith("# dora_peft")
    assert links
    assert [link for link in links if not link.startswith("https://")] == []


def test_every_link_of_readme_that_leads_into_the_repository_exists():
    links = LINK.findall(FENCED.sub("", (ROOT / "README.md").read_text(encoding="utf-8")))
    local = [link for link in links if not link.startswith("https://")]
    assert local
    assert [link for link in local if not (ROOT / link.partition("#")[0]).exists()] == []


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("see [the page](scripts/page.md).", "see the page."),
        ("[`a.py`](a.py) and [`b/`](b)", "`a.py` and `b/`"),
        ("| [price](p.md) | [all](q.md#shapes) |", "| price | all |"),
        ("[below](#limits)", "below"),
        ("see [the long\npage](scripts/page.md).", "see the long\npage."),
        ("[`a.py` and\n`b.py`](a.py)", "`a.py` and\n`b.py`"),
        ("[the long\npage](https://arxiv.org/abs/1)", None),
        ("![a curve](curve.png)", "a curve"),
        ("([arXiv](https://arxiv.org/abs/1)), [mail](mailto:a@b.org)", None),
        ("`layers[0](x)` stays", None),
        ("```python\ny = layers[0](x)\n```\n", None),
        ("```bash\npip install .[scripts]\n```\n[LICENSE](LICENSE)", "```bash\npip install .[scripts]\n```\nLICENSE"),
    ],
)
def test_links_into_the_repository_become_their_text_and_code_stays(without_local_links, written, shown):
    assert without_local_links(written) == (written if shown is None else shown)
