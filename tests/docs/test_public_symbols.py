"""Every public function and class says what it takes and gives, with shapes where these are tensors."""

import importlib
import inspect

import pytest

# Of everything on tensors; the others are checked to have a docstring.
ON_TENSORS = ("ops", "layers", "losses", "networks", "networks.rivals")
OTHERS = ("plans", "deployment.export", "deployment.exported", "deployment.scans", "processes.commands")
# Their arguments are no tensors: the name of a device, a network.
WITHOUT_SHAPES = {"autocast_as_now", "autocast_disabled", "autocast_dtype", "autocast_to", "compiled_on_cpu"}


def public(package: str) -> list[str]:
    module = importlib.import_module(f"nnunet_deform.{package}")
    own = [n for n, o in vars(module).items() if getattr(o, "__module__", "") == module.__name__ and n[0] != "_"]
    objects = {name: getattr(module, name) for name in getattr(module, "__all__", own)}
    return [name for name, o in objects.items() if inspect.isclass(o) or inspect.isfunction(o)]


SYMBOLS = [pytest.param(p, name, id=f"{p}.{name}") for p in (*ON_TENSORS, *OTHERS) for name in public(p)]


@pytest.mark.parametrize(("package", "name"), SYMBOLS)
def test_it_is_described(package, name):
    found = getattr(importlib.import_module(f"nnunet_deform.{package}"), name)
    # inspect.getdoc would take a base class's.
    text = found.__doc__
    assert text, "no docstring"
    # What dataclasses write themselves.
    assert not text.startswith(f"{name}("), "no docstring"
    if package in ON_TENSORS and name not in WITHOUT_SHAPES:
        forward = vars(found).get("forward") if inspect.isclass(found) else None
        assert "[" in text + ((forward and forward.__doc__) or ""), "no shape"
