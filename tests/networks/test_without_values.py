import torch
from network_cases import ANISOTROPIC, every_case
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_deform.networks.without_values import without_values


class Recorded(TorchDispatchMode):
    """The names of operations that change their first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@every_case
def test_a_network_is_the_same_but_for_its_values(name: str):
    with Recorded() as drawn:
        whole = ANISOTROPIC.network(name)
    assert "aten::uniform_" in drawn.names
    with without_values(), Recorded() as drawn:
        network = ANISOTROPIC.network(name)
    # These are of buffers.
    assert drawn.names <= {"aten::fill_", "aten::zero_"}

    def described(module: torch.nn.Module) -> list[tuple]:
        return [(key, value.shape, value.dtype, value.requires_grad) for key, value in module.named_parameters()] + [
            (key, value.shape, value.dtype) for key, value in module.named_buffers()
        ]

    assert described(network) == described(whole)
    assert all(parameter.is_meta for parameter in network.parameters())
