"""The files of a release, and the workflows that make them."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import nnunet_deform

ROOT = Path(__file__).parents[1]
ADDRESS = "https://example.org/somebody/nnunet-deform"


def loaded(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checks = loaded(ROOT / ".github" / "check_distributions.py")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution as the release workflow builds it, from a copy."""
    source = tmp_path_factory.mktemp("source") / "copy"
    left_out = shutil.ignore_patterns(
        ".git", ".work", "*.egg-info", "build", "dist", "__pycache__", "*.so", ".nox", ".venv*"
    )
    shutil.copytree(ROOT, source, ignore=left_out)
    (source / "tests" / "left.pyc").touch()
    output = tmp_path_factory.mktemp("sdist")
    server, owner, name = ADDRESS.rsplit("/", 2)
    environment = {"GITHUB_SERVER_URL": server, "GITHUB_REPOSITORY": f"{owner}/{name}", "GITHUB_REF_NAME": "v1.2.3"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", output],
        cwd=source,
        env=os.environ | environment,
        check=True,
        capture_output=True,
    )
    (made,) = output.iterdir()
    return made


def metadata_of(sdist: Path) -> str:
    with tarfile.open(sdist) as archive:
        return archive.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/PKG-INFO").read().decode()


def test_the_source_distribution_is_complete(sdist):
    assert list(checks.faults(sdist, tag=None)) == []
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("tests", "docs", "benchmarks", "trainers", "plans"):
        here = {
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and path.suffix != ".pyc" and ".work" not in path.parts
        }
        assert here <= names


def test_the_version_is_in_one_place(sdist):
    assert sdist.name == f"nnunet_deform-{nnunet_deform.__version__}.tar.gz"
    for name in ("pyproject.toml", "CITATION.cff", "setup.py"):
        assert not re.search(r"^version\s*[:=]\s*\"?\d", (ROOT / name).read_text(), re.M), name


def test_links_lead_into_the_repository_that_built_it(sdist):
    metadata = metadata_of(sdist)
    assert f"Project-URL: Issues, {ADDRESS}/issues" in metadata
    assert f"]({ADDRESS}/blob/v1.2.3/docs/" in metadata
    assert list(checks.faults(sdist, tag="v1.2.3")) == [
        f"its version is {nnunet_deform.__version__}, but the tag is v1.2.3; "
        "set __version__ in nnunet_deform/__init__.py"
    ]


METADATA = """Metadata-Version: 2.4
Name: nnunet-deform
Version: 0.2.0
Summary: networks
Author: contributors
License-Expression: Apache-2.0
Requires-Python: >=3.10
Description-Content-Type: text/markdown
{links}
[all](#here) of [it](docs/it.md)
"""


def wheel(folder: Path, tags: str, files: dict[str, bytes], links: str = "") -> Path:
    path = folder / f"nnunet_deform-0.2.0-{tags}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("nnunet_deform-0.2.0.dist-info/METADATA", METADATA.format(links=links))
    return path


def test_a_wheel_that_must_not_be_published_is_told_so(tmp_path):
    made = wheel(tmp_path, "cp312-cp312-linux_x86_64", {"nnunet_deform.libs/libgomp-1.so": b""})
    assert list(checks.faults(made, tag="v0.2.0")) == [
        "it is for cp312-cp312, but the kernel serves every Python 3: py3-none",
        "the index refuses linux_x86_64; repair it with auditwheel",
        "it brings nnunet_deform.libs/libgomp-1.so, a second OpenMP beside torch's; repair it with "
        "--exclude libgomp.so.1",
        "it has no C++ kernel: the compiler failed, and the build went on without it",
        *(
            f"its metadata has no link {name}; build it with GITHUB_SERVER_URL and GITHUB_REPOSITORY set"
            for name in ("Repository", "Issues", "Changelog")
        ),
        "its README has the relative link docs/it.md, which leads nowhere on the index",
    ]


def test_a_kernel_that_does_not_load_is_found(tmp_path, capsys):
    kernel = "nnunet_deform/ops/backends/cpu/_kernel.so"
    here = wheel(tmp_path, f"py3-none-{platform_tag()}", {kernel: b"no library"})
    assert checks.main([str(here)]) == 1
    assert "its C++ kernel does not load" in capsys.readouterr().out
    # Another machine's cannot be tried here.
    assert checks.main([str(wheel(tmp_path, "py3-none-manylinux_2_28_riscv64", {kernel: b"no library"}))]) == 0


def platform_tag() -> str:
    import sysconfig

    return sysconfig.get_platform().replace("-", "_").replace(".", "_").replace("linux", "manylinux_2_28")


def test_the_workflow_lints_with_the_version_that_is_required_here():
    (required,) = set(re.findall(r'"(ruff[^"]*)",', (ROOT / "pyproject.toml").read_text()))
    assert f'"{required}"' in (ROOT / ".github" / "workflows" / "tests.yml").read_text()


def test_the_workflow_runs_every_session_of_the_noxfile():
    yaml = pytest.importorskip("yaml", reason="needs the extra 'compare'")
    noxfile = (ROOT / "noxfile.py").read_text()
    values = {name: eval(re.search(rf"^{name} = (.+)$", noxfile, re.M)[1]) for name in ("TORCHES", "PYTHONS")}
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    sessions = [entry["session"] for entry in workflow["jobs"]["versions"]["strategy"]["matrix"]["include"]]
    assert sessions == [
        *(f"torch({version})" for version in values["TORCHES"]),
        *(f"python-{version}" for version in values["PYTHONS"]),
    ]
