"""What must be true of the files of a release, before they are published.

    python .github/check_distributions.py [--tag v0.2.0] dist/*

Wheels: a tag that the index takes, the C++ kernel, which loads here if the wheel is for this machine, no second
libgomp. Source distribution: what is needed to build, to test and to read. Both: the tag's version, the project's
links, a README without relative links. Every fault is one line; the exit code is 1 if there are any. Needs only the
standard library, so that it runs beside a build in any environment.
"""

import argparse
import ctypes
import platform
import re
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from email.message import Message
from email.parser import Parser
from pathlib import Path

KERNEL = re.compile(r"nnunet_deform/ops/backends/cpu/_kernel\.(so|dll)$")
# Of the source distribution, below its one folder.
NEEDED = (
    *("pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"),
    *("noxfile.py", ".ci/run", ".github/check_distributions.py", "docs/versions.md", "benchmarks/deform_conv.py"),
    *("tests/conftest.py", "tests/test_packaging.py", "tests/trainers/phantoms.py"),
    *("tests/trainers/data/trained_before/README.md", "trainers/__init__.py", "plans/__init__.py"),
    *("nnunet_deform/ops/backends/cpu/kernel.cpp", "nnunet_deform/ops/backends/cpu/vectors.h"),
)
LINKS = ("Repository", "Issues", "Changelog")
MACHINES = {"x86_64": ("x86_64", "amd64"), "aarch64": ("aarch64", "arm64")}


def faults(file: Path, tag: str | None) -> Iterator[str]:
    """One sentence for everything that is wrong with a wheel or a source distribution.

    Args:
        tag: of the release, such as v0.2.0; None for no release, whose version and links may be any.
    """
    if file.name.endswith(".whl"):
        yield from _wheel_faults(file)
        with zipfile.ZipFile(file) as archive:
            (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            text = archive.read(metadata).decode()
    elif file.name.endswith(".tar.gz"):
        yield from _source_faults(file)
        with tarfile.open(file) as archive:
            root = file.name.removesuffix(".tar.gz")
            text = archive.extractfile(f"{root}/PKG-INFO").read().decode()
    else:
        yield "it is neither a wheel nor a source distribution"
        return
    yield from _metadata_faults(Parser().parsestr(text), tag)


def _wheel_faults(file: Path) -> Iterator[str]:
    *_, python, abi, tags = file.name.removesuffix(".whl").split("-")
    if (python, abi) != ("py3", "none"):
        yield f"it is for {python}-{abi}, but the kernel serves every Python 3: py3-none"
    if any(tag.startswith("linux_") for tag in tags.split(".")):
        yield f"the index refuses {tags}; repair it with auditwheel"
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        kernel = next((name for name in names if KERNEL.search(name)), None)
        for name in names:
            if "gomp" in Path(name).name:
                yield f"it brings {name}, a second OpenMP beside torch's; repair it with --exclude libgomp.so.1"
        if kernel is None:
            yield "it has no C++ kernel: the compiler failed, and the build went on without it"
        elif _is_for_this_machine(tags):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows holds a loaded library
                yield from _kernel_faults(Path(archive.extract(kernel, folder)))


def _is_for_this_machine(tags: str) -> bool:
    system = {"linux": "linux", "darwin": "macosx", "win32": "win"}.get(sys.platform, sys.platform)
    names = next((names for names in MACHINES.values() if platform.machine().lower() in names), ())
    return any(system in tag and any(tag.endswith(f"_{name}") for name in names) for tag in tags.split("."))


def _kernel_faults(library: Path) -> Iterator[str]:
    try:
        instruction_set = ctypes.CDLL(str(library)).nnunet_deform_instruction_set
    except (OSError, AttributeError) as error:
        yield f"its C++ kernel does not load ({error})"
        return
    instruction_set.restype = ctypes.c_char_p
    if instruction_set(0) is None:
        yield "its C++ kernel has no instruction set"


def _source_faults(file: Path) -> Iterator[str]:
    root = file.name.removesuffix(".tar.gz")
    with tarfile.open(file) as archive:
        names = {name.removeprefix(f"{root}/") for name in archive.getnames()}
    for name in NEEDED:
        if name not in names:
            yield f"it lacks {name}"
    for name in sorted(names):
        if re.search(r"\.(so|dll|py[cod])$|__pycache__|\.DS_Store", name):
            yield f"it brings {name}, which a build leaves behind"


def _metadata_faults(metadata: Message, tag: str | None) -> Iterator[str]:
    for key in ("Author", "License-Expression", "Requires-Python", "Summary"):
        if not metadata[key]:
            yield f"its metadata has no {key}"
    if metadata["Description-Content-Type"] != "text/markdown":
        yield "its metadata has no README in Markdown"
    if tag is None:
        return
    if metadata["Version"] != tag.removeprefix("v"):
        version = metadata["Version"]
        yield f"its version is {version}, but the tag is {tag}; set __version__ in nnunet_deform/__init__.py"
    links = {entry.partition(",")[0] for entry in metadata.get_all("Project-URL", [])}
    for name in LINKS:
        if name not in links:
            yield f"its metadata has no link {name}; build it with GITHUB_SERVER_URL and GITHUB_REPOSITORY set"
    for target in re.findall(r"\]\((?!#|[a-z]+:)([^)\s]+)", metadata.get_payload()):
        yield f"its README has the relative link {target}, which leads nowhere on the index"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tag", help="of the release; without it, version and links may be any")
    options = parser.parse_args(arguments)
    found = [f"{file.name}: {fault}." for file in options.files for fault in faults(file, options.tag)]
    print("\n".join(found) if found else f"{len(options.files)} distributions are as they should be.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
