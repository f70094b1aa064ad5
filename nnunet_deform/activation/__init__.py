"""Making stock nnU-Net find our trainers: its variable ``nnUNet_extTrainer`` must name the folder ``_ext``.

This package is imported at the start of every interpreter of an environment where the plugin is enabled, so at import
it needs nothing but ``os``.
"""

import os

VARIABLE = "nnUNet_extTrainer"
PTH_NAME = "nnunet_deform_activate.pth"
OLDEST_NNUNETV2 = "2.8.1"

# Runs at interpreter start. It must never break an environment, not even after nnunet-deform was uninstalled.
PTH_LINE = (
    "import sys; exec('try:\\n import nnunet_deform.activation as a; a.apply()\\nexcept Exception: pass')"
    "  # written by: nnunet-deform enable\n"
)


class ActivationError(RuntimeError):
    """The environment cannot be changed, or nnU-Net is missing or too old; the message says what to do."""


def extension_folder() -> str:
    """The folder that nnU-Net must scan."""
    return os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "_ext")


def apply() -> None:
    """Append our folder to ``nnUNet_extTrainer`` in this process; the user's own paths stay first."""
    paths = configured_paths()
    if not names_ours(paths):
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
            file.write(PTH_LINE)
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


def configured_paths() -> list[str]:
    """The folders that ``nnUNet_extTrainer`` names in this process."""
    return [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path.strip()]


def names_ours(paths: list[str]) -> bool:
    """Whether the folder of this installation is among them."""
    return any(os.path.realpath(path) == os.path.realpath(extension_folder()) for path in paths)
