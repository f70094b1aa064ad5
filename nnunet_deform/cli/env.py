"""nnunet-deform env."""

from nnunet_deform import activation


def env() -> None:
    """Print the shell line that makes nnU-Net find our trainers, for one shell or job script.

    Example: eval "$(nnunet-deform env)"
    """
    print(activation.export_line())
