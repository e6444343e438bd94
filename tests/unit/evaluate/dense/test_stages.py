"""The backbone below the pyramid: its maps are timm's, and what is frozen stays as it is."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from ubgen.core.errors import UserError
from ubgen.evaluate.backbone import load_backbone
from ubgen.evaluate.dense.stages import Stages

MODEL = "test_resnet"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    network = timm.create_model(MODEL, num_classes=7)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@torch.no_grad()
def test_maps_are_those_of_timms_own_network(weights: Path) -> None:
    stages = Stages(load_backbone(f"timm:{MODEL}@{weights}", device="cpu")).eval()
    peer = timm.create_model(
        MODEL, features_only=True, out_indices=(1, 2, 3, 4), pretrained=False, num_classes=7
    )
    whole = timm.create_model(MODEL, checkpoint_path=str(weights), num_classes=7).eval()
    peer.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("fc.")})
    images = torch.randn(2, 3, 64, 96)
    ours, theirs = stages(images), peer.eval()(images)
    hidden = whole.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)
    assert stages.channels == [x.shape[1] for x in ours] == peer.feature_info.channels()
    assert [x.shape[2:] for x in ours] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    for one, two, three in zip(ours, theirs, hidden, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
        torch.testing.assert_close(one, three, rtol=0, atol=0)


def test_the_frozen_part_keeps_weights_and_statistics(weights: Path) -> None:
    stages = Stages(load_backbone(f"timm:{MODEL}@{weights}", device="cpu"), frozen=1, frozen_norm=True)
    stages.train()
    before = {name: value.clone() for name, value in stages.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in stages.parameters() if p.requires_grad], 0.1)
    sum(x.square().mean() for x in stages(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    changed = {name for name, value in stages.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not any(name.startswith(("body.conv1", "body.bn1", "body.layer1")) for name in changed)
    assert not any("running" in name for name in changed)  # nowhere
    assert any(
        "bn" in name and name.startswith("body.layer3") for name in changed
    )  # scale and shift are trained


def test_without_freezing_all_is_trained(weights: Path) -> None:
    stages = Stages(load_backbone(f"timm:{MODEL}@{weights}", device="cpu")).train()
    assert all(parameter.requires_grad for parameter in stages.parameters())
    before = stages.body.bn1.running_mean.clone()
    stages(torch.randn(2, 3, 64, 64))
    assert not torch.equal(stages.body.bn1.running_mean, before)


def test_another_kind_of_network_is_refused() -> None:
    with pytest.raises(UserError, match="test_vit is no ResNet; detection and segmentation need one"):
        Stages(load_backbone("random:test_vit", device="cpu"))


def test_weights_of_another_network_are_an_error(tmp_path: Path) -> None:
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match="none of its tensors belongs to test_resnet"):
        load_backbone(f"timm:{MODEL}@{tmp_path / 'vit.safetensors'}", device="cpu")
