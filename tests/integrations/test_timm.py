"""timm through the override, a tiny model with random weights."""

import pytest
import torch
from torch import nn
from torch.func import jvp

from jvp_flash_attention.integrations.timm import use_fused_attention
from jvp_flash_attention.override import sdpa_override
from tests.integrations.derivative import check_tangent, math_jvp, relative

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


SMALL = {"img_size": 32}
NETS = {  # one a file of timm that calls SDPA, and what makes it small
    "vit_tiny_patch16_224": SMALL | {"depth": 2},
    "vit_relpos_small_patch16_224": SMALL | {"depth": 2},
    "vit_base_patch16_rope_reg1_gap_256": SMALL | {"depth": 2, "embed_dim": 48, "num_heads": 4},
    "samvit_base_patch16": {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 4},
    "deit_tiny_patch16_224": SMALL | {"depth": 2},
    "beit_base_patch16_224": SMALL | {"depth": 2, "embed_dim": 48, "num_heads": 4},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2},
    "cait_xxs24_224": SMALL | {"depth": 2},
    "xcit_nano_12_p16_224": SMALL | {"depth": 2},
    "swin_tiny_patch4_window7_224": SMALL | {"depths": (1, 1), "embed_dim": 24,
                                             "num_heads": (2, 4)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "twins_svt_small": SMALL | {"depths": (1, 1, 1, 1)},
    "nest_tiny": {"img_size": 128},
    "tiny_vit_5m_224": {"depths": (1, 1, 1, 1)},
    "davit_tiny": {"depths": (1, 1, 1, 1)},
    "coatnet_nano_rw_224": SMALL,
    "hiera_tiny_224": {"img_size": 64, "stages": (1, 1, 1, 1)},
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_an_architecture_has_the_tangent_of_pytorchs_attention(name):
    torch.manual_seed(0)
    try:
        net = timm.create_model(name, num_classes=5, **NETS[name])
    except RuntimeError as error:  # of another version
        pytest.skip(f"timm {timm.__version__}: {error}")
    net = net.double().eval()
    for p in net.parameters():  # a head that starts at zero would hide the rest
        if not p.any():
            nn.init.normal_(p, std=0.1)
    layers = use_fused_attention(net)
    size = NETS[name].get("img_size", 64)
    x, t = torch.randn(2, 1, 3, size, size, dtype=torch.float64)
    exact, calls = math_jvp(net, x, t)
    with sdpa_override() as o:
        got = jvp(net, (x,), (t,))
    assert o.jvp_calls == calls > 0
    assert calls <= layers
    for g, e in zip(got, exact, strict=True):
        assert relative(g, e) < 1e-11
