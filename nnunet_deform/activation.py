"""Making stock nnU-Net find our trainers: its variable ``nnUNet_extTrainer`` must name the folder ``_ext``.

This module is imported at the start of every interpreter of an environment where the plugin is enabled, so at import
it needs nothing but ``os``.
"""

import os

VARIABLE = "nnUNet_extTrainer"
PTH_NAME = "nnunet_deform_activate.pth"
OLDEST_NNUNETV2 = "2.8.1"
_MODULE = "nnunet_deform_ext_trainers.py"

# Runs at interpreter start. It must never break an environment, not even after nnunet-deform was uninstalled.
_PTH_LINE = (
    "import sys; exec('try:\\n import nnunet_deform.activation as a; a.apply()\\nexcept Exception: pass')"
    "  # written by: nnunet-deform enable\n"
)


class ActivationError(RuntimeError):
    """The environment cannot be changed, or nnU-Net is missing or too old; the message says what to do."""


def extension_folder() -> str:
    """The folder that nnU-Net must scan."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "_ext")


def apply() -> None:
    """Append our folder to ``nnUNet_extTrainer`` in this process; the user's own paths stay first."""
    paths = configured_paths()
    if not _contains_ours(paths):
        os.environ[VARIABLE] = os.pathsep.join([*paths, extension_folder()])


def export_line() -> str:
    """The shell line that activates the plugin, for ``eval`` or a job script."""
    folder = extension_folder()
    return f'export {VARIABLE}="${{{VARIABLE}:+${VARIABLE}{os.pathsep}}}{folder}"'


def pth_path() -> str:
    """Where ``enable`` writes the line that runs at each interpreter start."""
    import sysconfig

    return os.path.join(sysconfig.get_paths()["purelib"], PTH_NAME)


def enable() -> str:
    """Activate the plugin for this Python environment until ``disable``; returns the file written.

    Raises:
        ActivationError: nnU-Net is missing or too old, or the environment is not writable.
    """
    check_nnunetv2()
    path = pth_path()
    partial = f"{path}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(_PTH_LINE)
        os.replace(partial, path)
    except OSError as error:
        raise ActivationError(
            f'cannot write {path} ({error.strerror}); put eval "$(nnunet-deform env)" into your shell or job script '
            "instead."
        ) from error
    return path


def disable() -> str | None:
    """Undo ``enable``; returns the file removed, or None if there was none.

    Raises:
        ActivationError: the file cannot be removed.
    """
    path = pth_path()
    try:
        os.remove(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ActivationError(f"cannot remove {path} ({error.strerror}).") from error
    return path


def check_nnunetv2() -> str:
    """The version of nnU-Net.

    Raises:
        ActivationError: it is not installed, or too old to look for trainers outside its own folder.
    """
    from importlib.metadata import PackageNotFoundError, version

    from packaging.version import Version

    try:
        installed = version("nnunetv2")
    except PackageNotFoundError:
        raise ActivationError(
            f"nnunetv2 is not installed in this environment; run: pip install 'nnunetv2>={OLDEST_NNUNETV2},<3'"
        ) from None
    if Version(installed) < Version(OLDEST_NNUNETV2):
        raise ActivationError(
            f"nnunetv2 {installed} is too old to find trainers of other packages; "
            f"run: pip install 'nnunetv2>={OLDEST_NNUNETV2},<3'"
        )
    return installed


def problems() -> list[str]:
    """What keeps nnU-Net from finding our trainers in this process, one sentence each; empty when nothing does."""
    paths = configured_paths()
    found = [
        f"{VARIABLE} names {path!r}, which is not a folder, so nnU-Net passes over it; remove or correct it."
        for path in paths
        if not os.path.isdir(path)
    ]
    if not _contains_ours(paths):
        found.append(
            f"{VARIABLE} does not name our folder {extension_folder()}, so nnU-Net cannot find our trainers. Run "
            'nnunet-deform enable once, or put eval "$(nnunet-deform env)" into your shell or job script.'
        )
    found += [
        f"{VARIABLE} names {path!r}, the folder of another copy of nnunet-deform than this one ({extension_folder()}); "
        "look for a line that sets it in your shell's start-up files and job scripts, and remove it."
        for path in paths
        if os.path.isfile(os.path.join(path, _MODULE)) and not _contains_ours([path])
    ]
    path = pth_path()
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            if file.read() != _PTH_LINE:
                found.append(f"{path} was written by another version of nnunet-deform; run nnunet-deform enable again.")
    return found


def version_problems() -> list[str]:
    """Installed packages that do not meet what this package requires, and a foreign nnU-Net on the PATH."""
    import importlib.metadata
    import shutil
    import sysconfig

    from packaging.requirements import Requirement

    from nnunet_deform import __version__

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
    from packaging.requirements import Requirement
    from packaging.version import Version

    requirement = Requirement(wanted)
    if requirement.name != "torch":
        return ""
    oldest = min(Version(s.version) for s in requirement.specifier if s.operator == ">=")
    if Version(installed) < oldest:
        return " (its operators are computed without Triton, and torch.compile and the rest were not tried with it)"
    return " (everything runs, but nnU-Net excludes it for its slow 3D convolutions)"


def configured_paths() -> list[str]:
    """The folders that ``nnUNet_extTrainer`` names in this process."""
    return [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path.strip()]


def _contains_ours(paths: list[str]) -> bool:
    return any(os.path.realpath(path) == os.path.realpath(extension_folder()) for path in paths)
