"""The boundary-weighted loss against sums over voxels written out one by one."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from nnunet_deform.losses import BoundaryWeightedLoss, class_weights

IGNORE = 9


def loss_for(**options) -> BoundaryWeightedLoss:
    return BoundaryWeightedLoss(
        **{"regions": False, "ignore_label": None, "batch_dice": False, "boundary_kernel": (3, 3), **options}
    )


def by_hand(
    p: Tensor, y: Tensor, valid: Tensor, *, regions: bool, batch_dice: bool, kernel=(3, 3), boundary_weight=0.5
) -> float:
    """p, y [B, C, H, W] probabilities and one-hot targets, valid [B, H, W]."""
    batch, classes, height, width = p.shape
    voxels = [v for v in itertools.product(range(batch), range(height), range(width)) if valid[v]]

    def at(x: Tensor, c: int, v: tuple[int, ...]) -> float:
        return x[v[0], c, v[1], v[2]].item()

    counts = [sum(at(y, c, v) for v in voxels) for c in range(classes)]
    present = [c for c in range(classes) if counts[c]]
    inverse = {c: len(voxels) / counts[c] for c in present}
    mean = sum(inverse.values()) / max(1, len(present))
    w = [min(10.0, max(0.1, inverse[c] / mean)) if c in present else 1.0 for c in range(classes)]

    def bce(c: int, v: tuple[int, ...]) -> float:
        q = min(1 - 1e-6, max(1e-6, at(p, c, v)))
        return -math.log(q) if at(y, c, v) else -math.log(1 - q)

    if regions:
        per_region = [sum(bce(c, v) for v in voxels) / max(1, len(voxels)) for c in range(classes)]
        ce = sum(wc * term for wc, term in zip(w, per_region, strict=True)) / sum(w)
    else:
        label = {v: next(c for c in range(classes) if at(y, c, v)) for v in voxels}
        total = sum(w[label[v]] for v in voxels)
        ce = sum(-w[label[v]] * math.log(at(p, label[v], v)) for v in voxels) / total if voxels else 0.0

    groups = [voxels] if batch_dice else [[v for v in voxels if v[0] == b] for b in range(batch)]
    scored = range(classes) if regions else range(1, classes)
    dice = 0.0
    for group, c in itertools.product(groups, scored):
        overlap = 2 * sum(at(p, c, v) * at(y, c, v) for v in group) + 1e-5
        size = sum(at(p, c, v) + at(y, c, v) for v in group) + 1e-5
        dice += w[c] * (1 - overlap / size) / len(groups)
    dice /= sum(w[c] for c in scored)

    def neighbours(v: tuple[int, ...]) -> list[tuple[int, ...]]:
        rows = range(max(0, v[1] - kernel[0] // 2), min(height, v[1] + kernel[0] // 2 + 1))
        columns = range(max(0, v[2] - kernel[1] // 2), min(width, v[2] + kernel[1] // 2 + 1))
        return [(v[0], *place) for place in itertools.product(rows, columns)]

    band_sum = band_size = 0.0
    for c, v in itertools.product(range(classes), voxels):
        around = neighbours(v)
        if all(valid[u] for u in around) and len({at(y, c, u) for u in around}) == 2:
            band_sum += w[c] * bce(c, v)
            band_size += w[c]
    return ce + dice + boundary_weight * band_sum / (band_size + 1e-5)


def label_case(ignore: bool) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    target = torch.zeros(2, 1, 7, 6)
    target[0, 0, 1:4, 1:5] = 1
    target[1, 0, 4:, 2:] = 2  # class 3 is absent
    if ignore:
        target[0, 0, 3:6, 4:] = IGNORE
        target[1, 0, :2] = IGNORE
    return logits, target


def region_case(ignore: bool) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    target = torch.zeros(2, 3 + ignore, 7, 6)
    target[0, 0, 1:6, 1:5] = 1
    target[0, 1, 2:4, 2:5] = 1  # within the first region; region 2 is absent
    if ignore:
        target[0, :, 3:5, 3:] = torch.tensor([0.0, 0, 0, 1]).view(4, 1, 1)
    return logits, target


@pytest.mark.parametrize("ignore", [False, True], ids=["", "ignore"])
@pytest.mark.parametrize("batch_dice", [False, True], ids=["", "batch-dice"])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 3)], ids=str)
def test_labels_by_hand(ignore, batch_dice, kernel):
    logits, target = label_case(ignore)
    loss = loss_for(ignore_label=IGNORE if ignore else None, batch_dice=batch_dice, boundary_kernel=kernel)
    valid = target[:, 0] != IGNORE
    one_hot = (target == torch.arange(4).view(1, 4, 1, 1)).float() * valid[:, None]
    expected = by_hand(logits.softmax(1), one_hot, valid, regions=False, batch_dice=batch_dice, kernel=kernel)
    assert loss(logits, target).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("ignore", [False, True], ids=["", "ignore"])
@pytest.mark.parametrize("batch_dice", [False, True], ids=["", "batch-dice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_regions_by_hand(ignore, batch_dice, dtype):
    logits, target = region_case(ignore)
    loss = loss_for(regions=True, ignore_label=IGNORE if ignore else None, batch_dice=batch_dice)
    valid = target[:, 3] == 0 if ignore else torch.ones(2, 7, 6, dtype=torch.bool)
    expected = by_hand(torch.sigmoid(logits), target[:, :3], valid, regions=True, batch_dice=batch_dice)
    assert loss(logits, target.to(dtype)).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("regions", [False, True], ids=["labels", "regions"])
def test_gradient(regions):
    logits, target = (region_case if regions else label_case)(True)
    loss = loss_for(regions=regions, ignore_label=IGNORE)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits.requires_grad_())


@pytest.mark.parametrize("regions", [False, True], ids=["labels", "regions"])
def test_ignored_voxels_do_not_count(regions):
    logits, target = (region_case if regions else label_case)(True)
    loss = loss_for(regions=regions, ignore_label=IGNORE)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, target), logits)
    ignored = (target[:, -1:] == 1) if regions else (target == IGNORE)
    assert (gradient.masked_select(ignored) == 0).all()
    assert gradient.masked_select(~ignored).count_nonzero() > 0


@pytest.mark.parametrize("regions", [False, True], ids=["labels", "regions"])
def test_nothing_but_ignored_voxels_is_a_connected_zero(regions):
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    target = torch.full((1, 1, 4, 4), IGNORE)
    if regions:
        target = torch.tensor([0.0, 0, 0, 1]).view(1, 4, 1, 1).expand(1, 4, 4, 4)
    loss = loss_for(regions=regions, ignore_label=IGNORE)(logits, target)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_without_any_boundary_it_is_dice_and_cross_entropy():
    logits = torch.randn(1, 3, 4, 4)
    target = torch.zeros(1, 1, 4, 4)
    loss = loss_for()(logits, target)
    assert loss == loss_for(boundary_weight=0.0)(logits, target)
    assert loss.isfinite()


def test_a_better_edge_lowers_the_boundary_term():
    target = torch.zeros(1, 1, 8, 8)
    target[..., 4:] = 1

    def term(wrong_column: int) -> Tensor:
        labels = target.clone()
        labels[..., wrong_column] = 1 - labels[..., wrong_column]
        logits = 4 * torch.cat((1 - labels, labels), 1)
        return loss_for()(logits, target) - loss_for(boundary_weight=0.0)(logits, target)

    assert term(3) > 10 * term(0)


def test_class_weights():
    one_hot = torch.zeros(1, 4, 10, 10)
    one_hot[:, 0, :, :8] = 1
    one_hot[:, 1, :, 8] = 1
    one_hot[:, 2, :, 9] = 1
    valid = torch.ones(1, 1, 10, 10)
    inverse = torch.tensor([100 / 80, 10, 10])
    assert class_weights(one_hot, valid).tolist() == pytest.approx([*(3 * inverse / inverse.sum()).tolist(), 1])
    # One voxel in ten thousand would weigh 2 of 2 in the mean of two; the background is bounded from below.
    tiny = torch.zeros(1, 2, 100, 100)
    tiny[:, 0] = 1
    tiny[0, :, 0, 0] = torch.tensor([0.0, 1.0])
    assert class_weights(tiny, torch.ones(1, 1, 100, 100)).tolist() == pytest.approx([0.1, 2], rel=1e-3)
    many = torch.zeros(1, 21, 100, 100)
    many[:, 0] = 1
    for c in range(1, 21):
        many[0, 0, 0 if c == 1 else slice(4 * c, 4 * c + 4)] = 0
        many[0, c, 0 if c == 1 else slice(4 * c, 4 * c + 4)] = 1
    many[0, 1], many[0, 0, 0] = 0, 1
    many[0, :2, 0, 0] = torch.tensor([0.0, 1.0])
    assert class_weights(many, torch.ones(1, 1, 100, 100))[1] == 10


def test_deep_supervision_weighs_scales_and_bounds_the_finest_only():
    fine, target = label_case(False)
    coarse, coarse_target = fine[..., ::2, ::2], target[..., ::2, ::2]
    outputs = [fine, coarse, torch.full_like(coarse, float("nan"))]
    targets = [target, coarse_target, coarse_target]
    loss = loss_for(scale_weights=[0.7, 0.3, 0.0])(outputs, targets)
    expected = 0.7 * loss_for()(fine, target) + 0.3 * loss_for(boundary_weight=0.0)(coarse, coarse_target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_three_dimensions_and_a_flat_kernel():
    logits, target = torch.randn(1, 2, 3, 6, 6, dtype=torch.float64), torch.zeros(1, 1, 3, 6, 6)
    target[0, 0, :, 2:4, 2:4] = 1
    slices = [(logits[:, :, z], target[:, :, z]) for z in range(3)]
    loss = loss_for(boundary_kernel=(1, 3, 3), batch_dice=True)(logits, target)
    # A kernel that is flat through the slices sees them as samples.
    flat = loss_for(batch_dice=True)(*(torch.cat(tensors) for tensors in zip(*slices, strict=True)))
    assert loss.item() == pytest.approx(flat.item(), rel=1e-12)


def test_one_region_and_a_batch_of_one():
    target = torch.zeros(1, 1, 5, 5)
    target[0, 0, 2, 2] = 1
    assert loss_for(regions=True)(torch.randn(1, 1, 5, 5), target).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits_are_taken_to_float32(dtype):
    logits, target = label_case(False)
    logits = 30 * logits.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_for()(logits, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loss_for()(logits.double(), target).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (1, 3, 4, 4), r"the target has shape \(1, 3, 4, 4\).* need \(1, 1, 4, 4\)"),
        ({}, (1, 1, 4, 5), r"the target has shape \(1, 1, 4, 5\)"),
        ({"regions": True}, (1, 4, 4, 4), r"the target has shape \(1, 4, 4, 4\).* need \(1, 3, 4, 4\)"),
        ({"regions": True, "ignore_label": 3}, (1, 3, 4, 4), r"need \(1, 4, 4, 4\)"),
    ],
    ids=str,
)
def test_targets_that_do_not_fit_are_named(options, shape, message):
    with pytest.raises(ValueError, match=message):
        loss_for(**options)(torch.zeros(1, 3, 4, 4), torch.zeros(shape))


@pytest.mark.parametrize("kernel", [(2, 3), (3, 0)], ids=str)
def test_bad_kernels_are_named(kernel):
    with pytest.raises(ValueError, match=rf"boundary_kernel=\({kernel[0]}, {kernel[1]}\) must be odd"):
        loss_for(boundary_kernel=kernel)
