"""LayerNorm over channels, norms that compile to fewer operations, and standardisation by running statistics."""

import pytest
import torch
from torch import Tensor, nn

from nnunet_deform.layers import ChannelLayerNorm, RunningNorm
from nnunet_deform.layers.norm import GroupNorm, InstanceNorm2d, InstanceNorm3d

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def by_hand(x: Tensor, norm: ChannelLayerNorm) -> Tensor:
    mean = x.mean(dim=1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=1, keepdim=True)
    per_channel = (1, -1, *[1] * (x.ndim - 2))
    return (x - mean) / torch.sqrt(variance + 1e-6) * norm.weight.view(per_channel) + norm.bias.view(per_channel)


# At 1e-3 the epsilon is as large as the variance; at 1e-6 it is nearly all there is.
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("size", [(3, 5), (2, 3, 4), (1, 1, 1)], ids=str)
def test_equals_mean_and_variance_by_hand(size: tuple[int, ...], scale: float):
    norm = ChannelLayerNorm(6).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = scale * torch.randn(2, 6, *size, dtype=torch.float64) + 0.5 * scale
    torch.testing.assert_close(norm(x), by_hand(x, norm), rtol=0, atol=1e-12)


def test_starts_as_the_identity_of_normalised_voxels():
    norm = ChannelLayerNorm(64)
    y = norm(3 + 2 * torch.randn(2, 64, 4, 5))
    assert norm.eps == 1e-6
    torch.testing.assert_close(y.mean(dim=1), torch.zeros(2, 4, 5), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.var(dim=1, correction=0), torch.ones(2, 4, 5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("ndim", [2, 3])
def test_channels_last_is_kept_without_a_copy(ndim: int):
    norm = ChannelLayerNorm(6)
    size = (4, 5, 7)[:ndim]
    x = torch.randn(2, 6, *size).contiguous(memory_format=CHANNELS_LAST[ndim])
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = norm(x)
    assert x.untyped_storage().data_ptr() in saved
    assert y.stride() == x.stride()
    assert y.is_contiguous(memory_format=CHANNELS_LAST[ndim])
    torch.testing.assert_close(y, norm(x.contiguous()), rtol=0, atol=1e-6)


def test_autocast_normalises_in_float32():
    norm = ChannelLayerNorm(8)
    # In bfloat16 the mean of 1000 would swallow these differences.
    x = 1000 + torch.randn(1, 8, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x)
    torch.testing.assert_close(y.float(), by_hand(x.double(), norm.double()).float(), rtol=0, atol=2e-2)


def batches(steps: int, batch: int) -> Tensor:
    return 3 + torch.randn(steps, batch, 5, dtype=torch.float64) * torch.arange(1, 6)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_first_hundred_steps_weigh_the_same(batch: int):
    norm = RunningNorm(5).double()
    x = batches(100, batch)
    for step, sample in enumerate(x, 1):
        y = norm(sample)
        seen = x[:step].flatten(0, 1)
        mean, variance = seen.mean(0), ((seen - seen.mean(0)) ** 2).mean(0)
        torch.testing.assert_close(norm.running_mean, mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(norm.running_var, variance, rtol=0, atol=1e-11)
        torch.testing.assert_close(y, ((sample - mean) / torch.sqrt(variance + 1e-5)).clamp(-5, 5), rtol=0, atol=1e-10)
    assert norm.num_batches_tracked == 100


def test_then_the_newest_weighs_a_hundredth():
    norm = RunningNorm(5).double()
    for sample in batches(150, 2):
        mean, variance = norm.running_mean.clone(), norm.running_var.clone()
        steps = int(norm.num_batches_tracked)
        norm(sample)
        if steps >= 100:
            # The second moment about zero is a plain weighted mean.
            second = 0.99 * (variance + mean**2) + 0.01 * (sample**2).mean(0)
            expected = 0.99 * mean + 0.01 * sample.mean(0)
            torch.testing.assert_close(norm.running_mean, expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(norm.running_var, second - expected**2, rtol=0, atol=1e-10)


def test_evaluation_takes_nothing_in_and_does_what_the_last_training_step_did():
    norm = RunningNorm(5).double()
    x = batches(3, 2)
    y = [norm(sample) for sample in x][-1]
    norm.eval()
    norm(batches(1, 4)[0])
    assert torch.equal(norm(x[-1]), y)
    norm.reset_parameters()
    torch.testing.assert_close(norm(y), y, rtol=0, atol=1e-4)


def test_the_statistics_have_no_gradient():
    norm = RunningNorm(5).double()
    x = batches(1, 3)[0].requires_grad_()
    norm(x).sum().backward()
    expected = (x.detach().var(0, correction=0) + 1e-5).rsqrt().expand(3, 5)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-12)
    assert not norm.running_mean.requires_grad


def test_without_variance_and_far_from_it_values_are_bounded():
    norm = RunningNorm(5)
    x = batches(1, 1)[0].float()
    # One sample has no variance: in training it is its own mean, in evaluation others are cut.
    assert torch.equal(norm(x), torch.zeros(1, 5))
    norm.eval()
    assert torch.equal(norm(x + 1), torch.full((1, 5), 5.0))
    norm.train()
    for _ in range(200):
        assert norm(x).abs().max() < 1e-3


def test_a_batch_that_is_not_finite_is_left_out():
    norm = RunningNorm(5)
    norm(batches(1, 2)[0].float())
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    for value in (torch.nan, torch.inf):
        broken = batches(1, 2)[0].float()
        broken[1, 2] = value
        norm(broken)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


def test_it_is_not_converted_to_sync_batch_norm():
    network = nn.Sequential(RunningNorm(5), nn.BatchNorm1d(5))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert type(converted[0]) is RunningNorm
    assert type(converted[1]) is nn.SyncBatchNorm


def test_disabled_it_is_the_identity_without_a_state():
    norm = RunningNorm(5)
    norm.enabled = False
    x = batches(1, 2)[0].float()
    assert norm(x) is x
    assert norm.num_batches_tracked == 0
    assert not norm.state_dict()
    norm.load_state_dict({}, strict=True)


NORMS = [
    pytest.param(GroupNorm(4, 8), nn.GroupNorm(4, 8), (2, 8, 3, 4, 5), id="group-3d"),
    pytest.param(GroupNorm(2, 6, affine=False), nn.GroupNorm(2, 6, affine=False), (1, 6, 4, 5), id="group-2d"),
    pytest.param(InstanceNorm3d(5), nn.InstanceNorm3d(5), (2, 5, 3, 4, 5), id="instance-3d"),
    pytest.param(InstanceNorm2d(5, affine=True), nn.InstanceNorm2d(5, affine=True), (2, 5, 4, 5), id="instance-2d"),
]


@pytest.mark.parametrize(("ours", "torchs", "shape"), NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_compiled_norms_equal_torchs(ours: nn.Module, torchs: nn.Module, shape: tuple[int, ...], scale: float):
    torch.compiler.reset()
    ours, torchs = ours.double(), torchs.double()
    with torch.no_grad():
        for one, other in zip(ours.parameters(), torchs.parameters(), strict=True):
            other.copy_(one.normal_())
    x = (scale * torch.randn(shape, dtype=torch.float64) + 0.5).requires_grad_()
    gradient = torch.randn(shape, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = []
    for norm, parameters in ((compiled, ours.parameters()), (torchs, torchs.parameters())):
        y = norm(x)
        results.append([y, *torch.autograd.grad(y, [x, *parameters], gradient)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("ours", "torchs", "shape"), NORMS)
def test_compiled_norms_of_half_precision(ours: nn.Module, torchs: nn.Module, shape: tuple[int, ...]):
    torch.compiler.reset()
    ours, torchs = ours.float(), torchs.float()
    torchs.load_state_dict(ours.state_dict())
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    # Sums of half-precision numbers would lose these differences.
    x = (100 + torch.randn(shape)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, eager = compiled(x), torchs(x)
    torch.testing.assert_close(y.float(), torchs(x.float()), rtol=0, atol=2e-2)
    assert y.dtype == eager.dtype
