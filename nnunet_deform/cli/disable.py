"""nnunet-deform disable."""

from nnunet_deform import activation
from nnunet_deform.cli.messages import fail


def disable() -> None:
    """Undo enable. Do this before you uninstall nnunet-deform.

    Example: nnunet-deform disable
    """
    try:
        path = activation.disable()
    except activation.ActivationError as error:
        raise fail(str(error)) from None
    print(f"Disabled: removed {path}" if path else f"Nothing to do: {activation.pth_path()} does not exist.")
