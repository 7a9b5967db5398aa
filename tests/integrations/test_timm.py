"""timm through the override, a tiny model with random weights."""

import pytest
import torch
from torch.func import jvp

from jvp_flash_attention.override import sdpa_override
from tests.integrations.derivative import check_tangent, relative

timm = pytest.importorskip("timm", reason="needs timm, which needs torchvision")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_output_is_that_of_sdpa_and_the_tangent_equals_finite_differences(name):
    torch.manual_seed(0)
    size = 28 if "patch14" in name else 32
    net = timm.create_model(name, img_size=size, depth=2, num_classes=5).double().eval()
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    exact = net(x)
    with pytest.raises(NotImplementedError, match="forward AD"):
        jvp(net, (x,), (x,))
    with sdpa_override():
        out, _ = check_tangent(net, x)
    assert relative(out, exact) < 1e-12
