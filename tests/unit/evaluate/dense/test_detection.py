"""Mask R-CNN: the losses beside torchvision's, and one step at real size."""

import resource
from dataclasses import replace

import pytest
import torch
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork

from ubgen.evaluate.backbone import load_backbone
from ubgen.evaluate.dense.detection import box_losses, build_mask_rcnn
from ubgen.evaluate.dense.settings import DetectSettings

SMALL = DetectSettings(short_side=64, long_side=96, anchor=8, channels=16, hidden=16, rois=16)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    backbone = replace(load_backbone("random:test_resnet", device="cpu"), mean=(0.1, 0.2, 0.3))
    return build_mask_rcnn(backbone, 3, SMALL)


def sample(boxes: list[list[float]], size: tuple[int, int] = (48, 64)) -> tuple[torch.Tensor, dict]:
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[int(y0) : int(y1), int(x0) : int(x1)] = 1
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.arange(len(boxes)) % 3 + 1,
        "masks": masks,
    }
    return torch.rand(3, *size), target


def test_numbers_are_mmdetections() -> None:
    model = build_mask_rcnn(load_backbone("random:test_resnet", device="cpu"), 80, DetectSettings())
    assert (model.transform.min_size, model.transform.max_size) == ((800,), 1333)
    assert model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert model.rpn._post_nms_top_n["training"] == 1000
    assert model.rpn._pre_nms_top_n["training"] == 2000
    assert model.rpn.nms_thresh == 0.7
    assert (model.rpn.fg_bg_sampler.batch_size_per_image, model.rpn.fg_bg_sampler.positive_fraction) == (
        256,
        0.5,
    )
    heads = model.roi_heads
    assert (heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction) == (512, 0.25)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    assert (heads.box_roi_pool.output_size, heads.mask_roi_pool.output_size) == ((7, 7), (14, 14))
    assert heads.box_roi_pool.sampling_ratio == heads.mask_roi_pool.sampling_ratio == 0  # adaptive
    assert heads.box_predictor.cls_score.out_features == 81
    assert model.backbone.out_channels == 256


def test_the_backbones_mean_and_deviation_normalise(network: torch.nn.Module) -> None:
    assert network.transform.image_mean == [0.1, 0.2, 0.3]


def test_box_loss_is_torchvisions_but_for_the_corner() -> None:
    """Beyond 1/9, smooth L1 is L1 less 1/18."""
    generator = torch.Generator().manual_seed(0)
    logits, deltas = torch.randn(6, 4, generator=generator), torch.randn(6, 16, generator=generator) + 5
    labels, targets = (
        [torch.tensor([0, 1, 3]), torch.tensor([2, 0, 2])],
        [torch.zeros(3, 4), torch.zeros(3, 4)],
    )
    ours = box_losses(logits, deltas, labels, targets)
    classes, boxes = fastrcnn_loss(logits, deltas, labels, targets)
    torch.testing.assert_close(ours["loss_classifier"], classes)
    torch.testing.assert_close(ours["loss_box_reg"] - boxes, torch.tensor(4 * 4 / 18 / 6))
    near = box_losses(logits, torch.full_like(deltas, 0.05), labels, targets)["loss_box_reg"]
    torch.testing.assert_close(near, torch.tensor(4 * 4 * 0.05 / 6))


def test_other_losses_are_torchvisions(network: torch.nn.Module) -> None:
    torch.manual_seed(1)
    network.train()
    images, targets = zip(sample([[4, 6, 24, 22], [30, 8, 54, 38]]), sample([[2, 2, 42, 42]]), strict=True)
    batch, resized = network.transform(list(images), list(targets))
    features = network.backbone(batch.tensors)
    proposals = [target["boxes"] + 1 for target in resized]
    found = []
    for forward in (type(network.roi_heads).forward, RoIHeads.forward):
        torch.manual_seed(2)
        found.append(forward(network.roi_heads, features, proposals, batch.image_sizes, resized)[1])
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name in ("loss_classifier", "loss_mask"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    losses = []
    anchors = network.rpn.anchor_generator(batch, list(features.values()))
    labels, matched = network.rpn.assign_targets_to_anchors(anchors, resized)
    regression = network.rpn.box_coder.encode(matched, anchors)
    count = sum(map(len, anchors))
    objectness, deltas = torch.randn(count, 1), torch.randn(count, 4) + 20
    for compute in (type(network.rpn).compute_loss, RegionProposalNetwork.compute_loss):
        torch.manual_seed(3)
        losses.append(compute(network.rpn, objectness, deltas, labels, regression))
    torch.testing.assert_close(losses[0][0], losses[1][0])
    assert 0 < losses[0][1] - losses[1][1] <= 4 / 18  # of at most all samples


def test_an_image_without_objects_trains(network: torch.nn.Module) -> None:
    network.train()
    image, target = sample([])
    losses = network([image], [target])
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()


@pytest.mark.slow
def test_one_step_at_real_size() -> None:
    """ResNet-50, one image of 1333 x 800 on the CPU: finite losses, and the memory it takes."""
    torch.manual_seed(0)
    model = build_mask_rcnn(load_backbone("random:resnet50", device="cpu"), 80, DetectSettings()).train()
    image, target = sample([[40, 60, 440, 420], [500, 300, 700, 700]], (800, 1333))
    losses = model([image], [target])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert model.backbone.body.body.layer2[0].conv1.weight.grad is not None
    assert model.backbone.body.body.layer1[0].conv1.weight.grad is None
    print(
        f"highest memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    )
