"""What nnU-Net, and its users, may expect of every network: a new one is tested by being listed in CASES."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from network_cases import (
    ANISOTROPIC,
    ISOTROPIC,
    LARGE_PLANS,
    SMALL_PLANS,
    TWO_DIMENSIONAL,
    TWO_LEVELS,
    Plan,
    as_list,
    crop,
    cropped_sizes,
    deep_supervision_shapes,
    every_case,
    kept_by_autograd,
    network_class,
    stir,
)
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from nnunet_deform.networks.without_values import without_values

# What autograd keeps of nnU-Net's PlainConvUNet for each element that nnU-Net counts.
STORED_PER_COUNTED = 1.85
# How far the memory estimate may be from what a CPU keeps of a network this small. LightMedSeg keeps the inputs of its
# narrowest convolutions filled up with zeros there; at the paper's widths that is 2 %.
MEMORY_TOLERANCE = {
    "DeformUXNet": 0.05,
    "LightMedSeg": 0.12,
    "MagicPlainConvUNet": 0.05,
    "MagicResidualEncoderUNet": 0.05,
    "DynamicPlainConvUNet-odconv": 0.05,
    "DynamicPlainConvUNet-dcd": 0.05,
    "DynamicPlainConvUNet-ddconv": 0.05,
    "DynamicResidualEncoderUNet-odconv": 0.05,
}

pytestmark = every_case
small_plans = pytest.mark.parametrize("plan", SMALL_PLANS, ids=str)


@pytest.mark.parametrize(
    "plan",
    [
        *(plan if plan.id == "20x320x256" else pytest.param(plan, marks=pytest.mark.slow) for plan in LARGE_PLANS),
        TWO_LEVELS,
    ],
    ids=str,
)
def test_deep_supervision_shapes_are_nnunets(name: str, plan: Plan):
    with without_values():
        network = plan.network(name, input_channels=2, num_classes=5, deep_supervision=True)
        image = plan.image(batch=2, channels=2)
        outputs = network(image)
        assert isinstance(outputs, list)
        assert [tuple(output.shape) for output in outputs] == [(2, 5, *size) for size in deep_supervision_shapes(plan)]
        network.decoder.deep_supervision = False
        assert tuple(network(image).shape) == (2, 5, *plan.patch)


@small_plans
def test_deep_supervision_is_switched_on_the_live_network(name: str, plan: Plan):
    network = stir(plan.network(name, input_channels=2, num_classes=5, deep_supervision=True)).eval()
    image = plan.image(batch=2, channels=2)
    outputs = network(image)
    assert isinstance(outputs, list)
    assert [tuple(output.shape) for output in outputs] == [(2, 5, *size) for size in deep_supervision_shapes(plan)]
    network.decoder.deep_supervision = False
    single = network(image)
    assert isinstance(single, Tensor)
    assert torch.equal(single, outputs[0])
    network.decoder.deep_supervision = True
    assert all(torch.equal(*pair) for pair in zip(network(image), outputs, strict=True))


@small_plans
@pytest.mark.parametrize("first", [True, False], ids=["on-to-off", "off-to-on"])
def test_weights_load_with_and_without_deep_supervision(name: str, plan: Plan, first: bool):
    one = stir(plan.network(name, deep_supervision=first)).eval()
    other = plan.network(name, deep_supervision=not first).eval()
    other.load_state_dict(one.state_dict(), strict=True)
    image = plan.image()
    assert torch.equal(as_list(one(image))[0], as_list(other(image))[0])
    one.decoder.deep_supervision = other.decoder.deep_supervision = True
    assert all(torch.equal(*pair) for pair in zip(one(image), other(image), strict=True))


@small_plans
@pytest.mark.parametrize("deep_supervision", [True, False], ids=["ds", "no-ds"])
def test_every_trained_parameter_gets_a_gradient(name: str, plan: Plan, deep_supervision: bool):
    """Distributed training stops at a parameter without one. A ReLU may be dead at one draw of the weights."""
    reached: set[str] = set()
    for _ in range(30):
        network = plan.network(name, deep_supervision=deep_supervision)
        loss = sum((output * torch.randn_like(output)).mean() for output in as_list(network(plan.image(batch=2))))
        loss.backward()
        trained = {key: parameter for key, parameter in network.named_parameters() if parameter.requires_grad}
        if deep_supervision:
            assert len(trained) == len(list(network.parameters()))
        for key, parameter in trained.items():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
        reached |= {key for key, parameter in trained.items() if parameter.grad.count_nonzero() > 0}
        # MAGIC's softmax over voxels cancels the bias of its logits, and DDConv's offsets start at zero whatever gates
        # their kernels have.
        idle = ("attention.mask.bias", "offset_gates.weight", "offset_gates.bias")
        missing = {key for key in trained.keys() - reached if not key.endswith(idle)}
        if not missing:
            break
    assert not missing


@small_plans
def test_nnunet_builds_and_initialises_it_from_a_plan(name: str, plan: Plan):
    arguments = plan.arguments(name)
    classes = {key: f"{v.__module__}.{v.__name__}" for key, v in arguments.items() if isinstance(v, type)}
    network = get_network_from_plans(
        f"nnunet_deform.networks.{network_class(name).__name__}",
        {**arguments, **classes},
        list(classes),
        2,
        4,
        True,
        deep_supervision=True,
    )
    assert isinstance(network, network_class(name))
    image = plan.image(channels=2)
    before = network(image)
    assert all(output.isfinite().all() for output in before)
    # A second initialisation draws other weights: it is the network's, not only its constructor's.
    network.apply(network.initialize)
    assert all(not torch.allclose(*pair) for pair in zip(before, network(image), strict=True))


@pytest.mark.parametrize(
    ("plan", "size"),
    [
        (ISOTROPIC, (7, 9, 6)),
        (ISOTROPIC, (8, 12, 5)),
        (ANISOTROPIC, (3, 9, 14)),
        (ANISOTROPIC, (5, 4, 8)),
        (TWO_DIMENSIONAL, (17, 23)),
        (TWO_LEVELS, (3, 5, 2)),
    ],
    ids=str,
)
def test_any_size_is_the_padded_input_cropped(name: str, plan: Plan, size: tuple[int, ...]):
    network = stir(plan.network(name, deep_supervision=True)).double().eval()
    image = torch.randn(2, 1, *size, dtype=torch.float64)
    padding: list[int] = []
    for axis, length in enumerate(size):
        total = 1
        for stride in plan.strides:
            total *= stride[axis]
        padding = [0, -length % total, *padding]
    assert any(padding)
    whole = network(F.pad(image, padding))
    outputs = network(image)
    sizes = cropped_sizes(size, plan.strides)
    assert [tuple(output.shape[2:]) for output in outputs] == sizes
    for output, padded, level_size in zip(outputs, whole, sizes, strict=True):
        torch.testing.assert_close(output, crop(padded, level_size), rtol=0, atol=1e-12)
    network.decoder.deep_supervision = False
    single = network(image)
    assert single.shape[2:] == image.shape[2:]
    torch.testing.assert_close(single, outputs[0], rtol=0, atol=1e-12)


@small_plans
def test_samples_do_not_see_each_other(name: str, plan: Plan):
    network = stir(plan.network(name)).double().eval()
    images = plan.image(batch=3, dtype=torch.float64)
    images[1] *= 50
    together = network(images)
    for sample in range(3):
        alone = network(images[sample : sample + 1])[0]
        torch.testing.assert_close(together[sample], alone, rtol=0, atol=1e-10)


@small_plans
def test_evaluation_is_deterministic_and_training_state_makes_no_difference(name: str, plan: Plan):
    network = stir(plan.network(name))
    image = plan.image()
    training = network(image)
    network.eval()
    with torch.no_grad():
        assert torch.equal(network(image), network(image))
        # Without gradients, the same sums may be taken in another order.
        torch.testing.assert_close(network(image), training, rtol=0, atol=2e-5)


def test_training_after_inference_mode(name: str):
    """nnU-Net validates between epochs: nothing kept from that may reach the backward pass."""
    network = ISOTROPIC.network(name)
    image = ISOTROPIC.image()
    with torch.inference_mode():
        first = network(image).clone()
    output = network(image)
    output.square().mean().backward()
    torch.testing.assert_close(output, first, rtol=0, atol=2e-5)
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)


def test_a_training_step_lowers_the_loss(name: str):
    network = TWO_DIMENSIONAL.network(name, deep_supervision=True)
    image = TWO_DIMENSIONAL.image(batch=2)
    target = (image[:, 0] > 0).long()

    def loss() -> Tensor:
        return F.cross_entropy(network(image)[0], target)

    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    before = loss().item()
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.9 * before


@small_plans
def test_copies_give_the_same_output(name: str, plan: Plan):
    network = stir(plan.network(name, deep_supervision=True)).eval()
    image = plan.image()
    expected = network(image)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert all(torch.equal(*pair) for pair in zip(twin(image), expected, strict=True))
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    # Nothing is shared with the copies.
    assert all(torch.equal(*pair) for pair in zip(network(image), expected, strict=True))


def test_the_whole_network_is_saved_by_torch(name: str):
    """torch.save pickles with protocol 2, which takes less than pickle's default."""
    network = stir(ISOTROPIC.network(name))
    image = ISOTROPIC.image()
    saved = io.BytesIO()
    torch.save(network, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False)(image), network(image))


def _bfloat16_errors(network: torch.nn.Module, image: Tensor) -> tuple[float, float]:
    """Of the outputs, the worst of them, and of the gradient, relative to float32."""
    exact = network(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = network(image)
    errors = []
    for half, full in zip(rounded, exact, strict=True):
        assert half.dtype == torch.bfloat16
        assert half.isfinite().all()
        errors.append(((half.float() - full).square().mean() / full.square().mean()).sqrt().item())
    sum(output.square().mean() for output in exact).backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    # Without oneDNN: of torch 2.15 it reads memory it has not written for the bfloat16 gradient of a 3D convolution's
    # weight where the depth is 2, on processors with AVX512-BF16.
    with torch.backends.mkldnn.flags(enabled=False):
        sum(output.float().square().mean() for output in rounded).backward()
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    error = torch.cat([parameter.grad.flatten() for parameter in network.parameters()]) - whole
    return max(errors), (error.norm() / whole.norm()).item()


@small_plans
def test_bfloat16_autocast_stays_close(name: str, plan: Plan):
    """A norm of nearly constant features amplifies rounding, so at some draws of the weights it is large. What is wrong
    is off at every draw, a wrong gradient by about 1."""
    found = []
    for _ in range(5):
        # In evaluation: two images of noise hardly differ in what MAGIC's attention reads, and standardised by the two
        # a rounding is as large as a difference.
        network = stir(plan.network(name, deep_supervision=True), scale=0.1).eval()
        found.append(_bfloat16_errors(network, plan.image(batch=2)))
        # Bfloat16 has 8 bits; about twenty roundings in a row make a few per cent. Gradients: 0.05 to 0.19 in 9 of 10.
        if found[-1][0] < 0.04 and found[-1][1] < 0.2:
            return
    raise AssertionError(found)


@pytest.mark.parametrize("plan", [ISOTROPIC, ANISOTROPIC, TWO_DIMENSIONAL], ids=str)
def test_memory_estimate_is_near_what_autograd_keeps(name: str, plan: Plan):
    network = plan.network(name, deep_supervision=True)
    with kept_by_autograd(network) as kept:
        network(plan.image())
    estimate = network.compute_conv_feature_map_size(plan.patch)
    assert isinstance(estimate, int)
    assert estimate == pytest.approx(sum(kept) / STORED_PER_COUNTED, rel=MEMORY_TOLERANCE[name])


def hooked(network: nn.Module) -> nn.Module:
    """A copy that calls each of its parts, because each has a hook: the form that keeps what its operations keep."""
    network = copy.deepcopy(network)
    for part in network.modules():
        part.register_forward_hook(lambda *_: None)
    return network


@pytest.mark.parametrize(
    ("plan", "recompute"),
    [
        *((plan, "cheap") for plan in SMALL_PLANS),
        (TWO_DIMENSIONAL, "blocks"),
        pytest.param(ANISOTROPIC, "blocks", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_training_step_is_that_of_the_form_that_keeps_more(name: str, plan: Plan, recompute: str):
    network = stir(plan.network(name, deep_supervision=True, recompute=recompute).double())
    plain = hooked(network)
    images = [plan.image(batch=2, dtype=torch.float64).requires_grad_() for _ in range(2)]
    gradients = []
    for form in (network, plain):
        # Used twice before the backward pass, which is made twice.
        losses = [sum(output.square().mean() for output in form(image)) for image in images]
        parameters = [parameter for parameter in form.parameters() if parameter.requires_grad]
        total = torch.stack(losses).sum()
        torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        gradients.append([total, *torch.autograd.grad(total, [*images, *parameters], allow_unused=True)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    # Statistics have taken each image in once, though it was seen twice more.
    for ours, theirs in zip(network.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_recomputed_blocks_keep_less_and_need_none_of_it_in_prediction(name: str):
    plan = TWO_DIMENSIONAL
    kept = {}
    for recompute in ("cheap", "blocks"):
        network = plan.network(name, deep_supervision=True, recompute=recompute)
        tensors: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor, tensors: dict[int, torch.Tensor] = tensors) -> torch.Tensor:
            return tensors.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = as_list(network(plan.image()))
        del outputs
        own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        kept[recompute] = sum(t.untyped_storage().nbytes() for key, t in tensors.items() if key not in own)
        with torch.no_grad():
            assert not any(output.requires_grad for output in as_list(network(plan.image())))
    # Of this small network, ODConv's kernels are the most of what is kept; DDConv's blocks are not recomputed.
    assert kept["blocks"] < (1 if name.startswith("Dynamic") else 0.9) * kept["cheap"]


def test_what_is_recomputed_is_one_of_two(name: str):
    with pytest.raises(ValueError, match=r"^recompute='all' must be 'cheap' or 'blocks'\.$"):
        ISOTROPIC.network(name, recompute="all")


def test_frozen_parameters_get_no_gradient_and_change_no_other(name: str):
    network = stir(TWO_DIMENSIONAL.network(name, deep_supervision=True).double())
    image = TWO_DIMENSIONAL.image(batch=2, dtype=torch.float64)
    frozen = copy.deepcopy(network)
    for index, parameter in enumerate(frozen.parameters()):
        parameter.requires_grad_(parameter.requires_grad and index % 3 != 0)
    for form in (network, frozen):
        sum(output.square().mean() for output in form(image)).backward()
    for one, other in zip(network.parameters(), frozen.parameters(), strict=True):
        if other.requires_grad and one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-10, atol=1e-12)
        else:
            assert other.grad is None
