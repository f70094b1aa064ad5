"""The operators can be registered by every torch that pyproject.toml allows, whichever one is installed here."""

import subprocess
import sys

import torch

import nnunet_deform.ops  # noqa: F401  (registers the operators)

SCHEMA = (
    "(Tensor input, Tensor offset, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, bool[] needs)"
)

# As the oldest torch infers a schema: from the annotations of every argument, looked up in a table of types that has
# typing's generics and not the builtin ones.
OLD_REGISTRATION = """
import inspect, typing
import torch

PARAMETERS = {torch.Tensor, torch.Tensor | None, typing.List[int], typing.List[bool]}
RESULTS = {torch.Tensor, typing.Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]}

def known(annotation, types):
    # list[int] and typing.List[int] are written differently, and only one of them is in the table.
    return any(annotation == type and repr(annotation) == repr(type) for type in types)

def check(function):
    signature = inspect.signature(function)
    for name, parameter in signature.parameters.items():
        assert known(parameter.annotation, PARAMETERS), (function.__name__, name, parameter.annotation)
    assert known(signature.return_annotation, RESULTS), (function.__name__, signature.return_annotation)

registered = []

def old(register, takes_schema):
    def replaced(name, fn=None, /, *, mutates_args, schema=None, **options):
        if not name.startswith("nnunet_deform::"):
            return register(name, *filter(None, [fn]), mutates_args=mutates_args, schema=schema, **options)
        assert takes_schema or schema is None, f"{name}: no schema before torch 2.14"
        def decorate(function):
            if schema is None:
                check(function)
            registered.append(name)
            return register(name, mutates_args=mutates_args, schema=schema, **options)(function)
        return decorate if fn is None else decorate(fn)
    return replaced

torch.library.triton_op = old(torch.library.triton_op, takes_schema=False)
torch.library.custom_op = old(torch.library.custom_op, takes_schema=True)
import nnunet_deform.ops
print(*sorted(registered))
"""


def test_the_operators_are_registered_without_a_schema_that_old_versions_ignore():
    result = subprocess.run([sys.executable, "-c", OLD_REGISTRATION], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    names = (
        *("concatenate_channels", "deform_conv", "deform_conv_backward"),
        *("deform_conv_opaque", "deform_conv_opaque_backward", "few_channel_conv", "few_channel_conv_backward"),
        *("ghost_features", "ghost_features_backward", "group_norm", "group_norm_backward"),
        *("layer_norm", "layer_norm_backward", "mixture", "mixture_backward", "mlp", "mlp_backward"),
        *("resample_linear", "resample_linear_backward", "split_channels"),
        *("squeeze_excite", "squeeze_excite_backward"),
    )
    assert result.stdout.split() == [f"nnunet_deform::{name}" for name in names]


def test_the_schemas_that_torch_infers():
    operators = torch.ops.nnunet_deform
    for name, schema in (
        ("deform_conv", f"{SCHEMA} -> Tensor"),
        ("deform_conv_opaque", f"{SCHEMA} -> Tensor"),
        ("deform_conv_backward", f"{BACKWARD_SCHEMA} -> (Tensor, Tensor, Tensor, Tensor)"),
        ("deform_conv_opaque_backward", f"{BACKWARD_SCHEMA} -> (Tensor, Tensor, Tensor, Tensor)"),
    ):
        assert str(getattr(operators, name).default._schema) == f"nnunet_deform::{name}{schema}"
