"""UPerNet: the same function as transformers', with dropout; one step at real size."""

import resource

import pytest
import torch
from transformers import TimmBackboneConfig, UperNetConfig, UperNetForSemanticSegmentation

from ubgen.evaluate.backbone import load_backbone
from ubgen.evaluate.dense.segmentation import UperNet
from ubgen.evaluate.dense.settings import SegmentSettings

SMALL = SegmentSettings(crop=64, channels=16, auxiliary_channels=8, dropout=0.0)


def test_logits_and_losses_are_transformers() -> None:
    torch.manual_seed(0)
    backbone = load_backbone("random:test_resnet", device="cpu")
    ours = UperNet(backbone, 5, SMALL).eval()
    config = UperNetConfig(
        backbone_config=TimmBackboneConfig(
            backbone="test_resnet", out_indices=[1, 2, 3, 4], use_pretrained_backbone=False
        ),
        hidden_size=16,
        auxiliary_channels=8,
        num_labels=5,
    )
    theirs = UperNetForSemanticSegmentation(config).eval()
    theirs.backbone._backbone.load_state_dict(ours.stages.body.state_dict())
    for name in ("decode_head", "auxiliary_head"):
        state = {
            k.replace("classifier.1.", "classifier."): v for k, v in getattr(ours, name).state_dict().items()
        }
        getattr(theirs, name).load_state_dict(state)
    images, labels = torch.rand(2, 3, 64, 96), torch.randint(0, 5, (2, 64, 96))
    labels[:, :10] = 255
    losses = ours(images, labels)
    normalised = (images - torch.tensor(backbone.mean)[:, None, None]) / torch.tensor(backbone.std)[
        :, None, None
    ]
    peer = theirs(normalised, labels=labels)
    torch.testing.assert_close(ours(images), peer.logits)
    torch.testing.assert_close(losses["loss_decode"] + losses["loss_auxiliary"], peer.loss)


def test_dropout_is_before_both_classifiers() -> None:
    model = UperNet(load_backbone("random:test_resnet", device="cpu"), 5, SegmentSettings())
    for head in (model.decode_head, model.auxiliary_head):
        assert isinstance(head.classifier[0], torch.nn.Dropout2d)
        assert head.classifier[0].p == 0.1
    assert model.decode_head.classifier[1].in_channels == 512
    assert model.auxiliary_head.classifier[1].in_channels == 256


def test_what_is_ignored_has_no_loss_and_padding_counts_as_the_mean() -> None:
    model = UperNet(load_backbone("random:test_resnet", device="cpu"), 5, SMALL).eval()
    images = torch.rand(2, 3, 64, 64)
    losses = model(images, torch.full((2, 64, 64), 255))
    assert {loss.item() for loss in losses.values()} == {0.0}
    padded = images.clone()
    padded[..., 40:] = float("nan")
    images[..., 40:] = model.mean
    torch.testing.assert_close(model(padded), model(images))


@pytest.mark.slow
def test_one_step_at_real_size() -> None:
    """ResNet-50, two crops of 512 on the CPU: finite losses, and the memory it takes."""
    torch.manual_seed(0)
    model = UperNet(load_backbone("random:resnet50", device="cpu"), 150, SegmentSettings()).train()
    losses = model(torch.rand(2, 3, 512, 512), torch.randint(0, 150, (2, 512, 512)))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(parameter.grad is not None for parameter in model.parameters())
    print(
        f"highest memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    )
