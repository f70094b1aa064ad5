"""Whether the plugin is active and the versions are right. Imports neither torch nor nnU-Net."""

import importlib.metadata
import os
import shutil
import sysconfig

from packaging.requirements import Requirement
from packaging.version import Version

from nnunet_deform import __version__, activation

_MODULE = "nnunet_deform_ext_trainers.py"


def activation_problems() -> list[str]:
    """What keeps nnU-Net from finding our trainers in this process, one sentence each; empty when nothing does."""
    variable, ours = activation.VARIABLE, activation.extension_folder()
    paths = activation.configured_paths()
    found = [
        f"{variable} names {path!r}, which is not a folder, so nnU-Net passes over it; remove or correct it."
        for path in paths
        if not os.path.isdir(path)
    ]
    if not activation.names_ours(paths):
        found.append(
            f"{variable} does not name our folder {ours}, so nnU-Net cannot find our trainers. Run nnunet-deform "
            'enable once, or put eval "$(nnunet-deform env)" into your shell or job script.'
        )
    found += [
        f"{variable} names {path!r}, the folder of another copy of nnunet-deform than this one ({ours}); look for a "
        "line that sets it in your shell's start-up files and job scripts, and remove it."
        for path in paths
        if os.path.isfile(os.path.join(path, _MODULE)) and not activation.names_ours([path])
    ]
    path = activation.pth_path()
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            if file.read() != activation.PTH_LINE:
                found.append(f"{path} was written by another version of nnunet-deform; run nnunet-deform enable again.")
    return found


def version_problems() -> list[str]:
    """Installed packages that do not meet what this package requires, and a foreign nnU-Net on the PATH."""
    found = []
    for requirement in map(Requirement, importlib.metadata.requires("nnunet-deform") or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{requirement.name} is not installed; run: pip install '{wanted}'")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(
                f"{requirement.name} {installed} is installed, but nnunet-deform {__version__} needs "
                f"{requirement.specifier}{_still_works(wanted, installed)}; run: pip install '{wanted}'"
            )
    installed = importlib.metadata.version("nnunet-deform")
    if installed != __version__:
        found.append(f"nnunet-deform was installed as {installed}, but its files are of {__version__}; reinstall it.")
    command = shutil.which("nnUNetv2_train")
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    folders = [os.path.realpath(sysconfig.get_path("scripts", scheme)) for scheme in schemes]
    if command is not None and os.path.realpath(os.path.dirname(command)) not in folders:
        found.append(
            f"nnUNetv2_train on your PATH is {command}, but this nnunet-deform belongs to the environment with "
            f"{folders[0]}; activate that one, or install nnunet-deform into the other."
        )
    return found


def _still_works(wanted: str, installed: str) -> str:
    """What a version of torch that is not wanted can do all the same."""
    requirement = Requirement(wanted)
    if requirement.name != "torch":
        return ""
    oldest = min(Version(s.version) for s in requirement.specifier if s.operator == ">=")
    if Version(installed) < oldest:
        return " (its operators are computed without Triton, and torch.compile and the rest were not tried with it)"
    return " (everything runs, but nnU-Net excludes it for its slow 3D convolutions)"
