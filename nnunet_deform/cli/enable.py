"""nnunet-deform enable."""

from nnunet_deform import activation
from nnunet_deform.cli.messages import fail


def enable() -> None:
    """Make nnU-Net find our trainers in this Python environment, in every shell.

    Writes one line into the environment's site-packages; nnunet-deform disable removes it.

    Example: nnunet-deform enable
    """
    try:
        path = activation.enable()
    except activation.ActivationError as error:
        raise fail(str(error)) from None
    print(f"Enabled: wrote {path}\nnnunet-deform disable removes it; do that before you uninstall nnunet-deform.")
