"""Builds the optional C++ kernel, and says where the project lives; the rest about the package is in pyproject.toml.

The kernel is a plain C library, loaded with ctypes: it is named without Python's version, and a wheel with it serves
every Python 3. Without a compiler the installation succeeds, and the package says that it has no C++ kernel.

The repository's address is written nowhere: GitHub Actions, which build what is published, state it, and it becomes the
project's links on the index and the start of the README's relative links, which would lead nowhere there.
"""

import os
import platform
import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = Path("nnunet_deform/ops/backends/cpu")
KERNEL = Extension(
    "nnunet_deform.ops.backends.cpu._kernel",
    [str(FOLDER / name) for name in ("kernel.cpp", "library.cpp")],
    depends=[str(FOLDER / name) for name in ("deform_conv.h", "samples.h", "vectors.h")],
    optional=True,
)

INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        *("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ],
}


class BuildKernel(build_ext):
    """Compiles the kernel once for each instruction set and links the objects into one library."""

    def build_extension(self, ext: Extension) -> None:
        kernel, library = ext.sources
        msvc = self.compiler.compiler_type == "msvc"
        x86 = not msvc and platform.machine().lower() in ("x86_64", "amd64")
        if msvc:
            flags = ["/std:c++17", "/O2", "/EHsc"]
        else:
            # None of these lets the compiler assume that a number is finite.
            flags = [
                "-std=c++17",
                "-O3",
                "-ffp-contract=fast",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
            ]
        openmp = self._openmp(library, flags)
        objects = []
        for name, isa_flags in INSTRUCTION_SETS.items():
            if name == "baseline" or x86:
                objects += self.compiler.compile(
                    [kernel],
                    output_dir=str(Path(self.build_temp, name)),
                    macros=[("NNUNET_DEFORM_SUFFIX", name)],
                    extra_postargs=[*flags, *openmp, *isa_flags],
                    depends=ext.depends,
                )
        objects += self.compiler.compile(
            [library],
            output_dir=self.build_temp,
            macros=[("NNUNET_DEFORM_X86", None)] if x86 else [],
            extra_postargs=flags,
            depends=ext.depends,
        )
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(path), extra_postargs=[] if msvc else openmp, target_lang="c++", build_temp=self.build_temp
        )

    def _openmp(self, source: str, flags: list[str]) -> list[str]:
        """The flag for threads where the compiler has them: Apple's needs a library of its own."""
        flag = "/openmp" if self.compiler.compiler_type == "msvc" else "-fopenmp"
        try:
            self.compiler.compile(
                [source], output_dir=str(Path(self.build_temp, "openmp")), extra_postargs=[*flags, flag]
            )
        except CompileError:
            return []
        return [flag]

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + (".dll" if sys.platform == "win32" else ".so")


class AnyPythonWheel(bdist_wheel):
    """A wheel for this platform and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def repository() -> str | None:
    """The address of the repository whose workflow builds this."""
    server, name = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    return f"{server}/{name}" if server and name else None


def project_urls(address: str) -> dict[str, str]:
    return {
        "Repository": address,
        "Documentation": f"{address}/tree/main/docs",
        "Changelog": f"{address}/blob/main/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }


def with_absolute_links(text: str, address: str, ref: str) -> str:
    """Markdown whose relative links and images lead into the repository at a tag or branch."""

    def absolute(match: re.Match) -> str:
        start, target = match.groups()
        kind = "raw" if re.search(r"\.(png|jpe?g|gif|svg)$", target) else "blob"
        return f"{start}{address}/{kind}/{ref}/{target}"

    relative = r"(?!#|[a-z]+:)([^)\s\"]+)"
    return re.sub(rf"(\]\(|(?:src|href)=\"){relative}", absolute, text)


readme = Path("README.md").read_text(encoding="utf-8")
address = repository()
if address is not None:
    readme = with_absolute_links(readme, address, os.environ.get("GITHUB_REF_NAME", "main"))
setup(
    ext_modules=[KERNEL],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": AnyPythonWheel},
    long_description=readme,
    long_description_content_type="text/markdown",
    project_urls={} if address is None else project_urls(address),
)
