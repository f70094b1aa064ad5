"""The package as it is shipped: what is in the wheel, that it imports, and that imports only go downward in it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory) -> Path:
    """The wheel built from a copy of what git tracks or would track, unpacked."""
    source = tmp_path_factory.mktemp("source")
    files = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "nnunet_deform", "trainers", "plans"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in files), str(source)], check=True)
    wheels = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), "."]
    # Without a compiler, as on many a machine: compiling the kernel takes half a minute.
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    subprocess.run(build, cwd=source, env=environment, check=True)
    (wheel,) = wheels.glob("*.whl")
    unpacked = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(unpacked)
    return unpacked


def test_every_package_of_the_tree_is_listed():
    mapped = pyproject()["tool"]["setuptools"]["package-dir"]
    in_tree = set()
    for package, folder in mapped.items():
        for module in (ROOT / folder).rglob("*.py"):
            in_tree.add(".".join([package, *module.parent.relative_to(ROOT / folder).parts]))
    assert in_tree == set(pyproject()["tool"]["setuptools"]["packages"])


def test_the_wheel_holds_every_module_and_nothing_at_top_level(unpacked_wheel):
    shipped = {path.relative_to(unpacked_wheel) for path in unpacked_wheel.rglob("*.py")}
    expected = {path.relative_to(ROOT) for path in (ROOT / "nnunet_deform").rglob("*.py")}
    for folder in ("trainers", "plans"):
        expected |= {"nnunet_deform" / path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")}
    assert shipped == expected
    assert (unpacked_wheel / "nnunet_deform" / "py.typed").exists()
    comparison = unpacked_wheel / "nnunet_deform" / "comparison"
    assert (comparison / "report" / "template.html").exists()
    assert (comparison / "template.yaml").exists()
    assert {p.name for p in (comparison / "workflow").iterdir() if p.suffix != ".py"} >= {
        *("Snakefile", "local.yaml", "slurm.yaml"),
    }
    assert {p.name for p in unpacked_wheel.iterdir() if not p.name.endswith(".dist-info")} == {"nnunet_deform"}


def test_nnunet_finds_a_trainer_of_the_wheel(unpacked_wheel, fresh_processes, tmp_path):
    code = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "import sys; print(sys.modules[find('nnUNetTrainerDeformUX').__module__].__file__)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(unpacked_wheel),
        "nnUNet_extTrainer": str(unpacked_wheel / "nnunet_deform" / "_ext"),
    }
    printed = fresh_processes.run(
        ["-c", code], output=tmp_path / "printed", environment=environment, cwd=unpacked_wheel
    )
    assert Path(printed.split()[-1]) == unpacked_wheel / "nnunet_deform" / "trainers" / "deformux.py"


def test_imports_only_go_downward(unpacked_wheel):
    # On the wheel, because only there trainers and plans lie inside the package.
    lint = [Path(sys.executable).with_name("lint-imports"), "--config", ROOT / "pyproject.toml", "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(unpacked_wheel)}
    result = subprocess.run(lint, env=environment, cwd=unpacked_wheel, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Contracts: 2 kept, 0 broken." in result.stdout
