"""The networks of the step benchmark: MONAI's, as its users build them, and their sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

import dpfast

__all__ = ["BATCH_FACTOR", "NETWORKS", "QUICK_NETWORKS", "Network", "built", "network_of"]

BATCH_FACTOR = 8  # how much larger the batch is in the rows on the largest batch

Sizes = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Network:
    """A network with two classes as its output, and what it is measured on.

    Attributes:
      name: as in the tables.
      build: makes it with MONAI's `networks.nets`.
      cpu: batch size and extent of an image.
      cuda: the same on CUDA; None where it is not measured there.
      has_target: whether PERFORMANCE.md's targets are about it.
    """

    name: str
    build: Callable[[Any], nn.Module]
    cpu: Sizes
    cuda: Sizes | None = None
    has_target: bool = False


def _without_chance(model: nn.Module) -> nn.Module:
    """Switch dropout and stochastic depth off: a batch and its samples would draw differently."""
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d, nn.Dropout3d)):
            module.p = 0.0
        for name in ("drop_connect_rate", "_drop_connect_rate"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    return model


_CUBE_48, _CUBE_96 = (48, 48, 48), (96, 96, 96)
_UNET = {"channels": (16, 32, 64, 128), "strides": (2, 2, 2), "num_res_units": 2}
_BASIC_FEATURES = (16, 16, 32, 64, 128, 16)

# The first four are those with targets. The channels of the two UNets are those that give 0.40
# million parameters in 2D and 1.19 million in 3D, the networks of the peers' published figures.
NETWORKS = (
    Network(
        "UNet 2D", lambda n: n.UNet(2, 1, 2, **_UNET), (16, (128, 128)), (32, (256, 256)), True
    ),
    Network("UNet 3D", lambda n: n.UNet(3, 1, 2, **_UNET), (4, _CUBE_48), (4, _CUBE_96), True),
    Network("SegResNet 3D", lambda n: n.SegResNet(3, 8, 1, 2), (4, _CUBE_48), (4, _CUBE_96), True),
    Network(
        "DynUNet 3D",
        lambda n: n.DynUNet(
            3, 1, 2, (3,) * 5, (1, 2, 2, 2, 2), (2, 2, 2, 2), filters=(8, 16, 32, 64, 128)
        ),
        (4, _CUBE_48),
        (4, _CUBE_96),
        True,
    ),
    Network(
        "BasicUNet 2D", lambda n: n.BasicUNet(2, 1, 2, features=_BASIC_FEATURES), (8, (96, 96))
    ),
    Network(
        "BasicUNet++ 2D",
        lambda n: n.BasicUNetPlusPlus(2, 1, 2, features=_BASIC_FEATURES),
        (4, (64, 64)),
    ),
    Network(
        "SegResNetDS 3D",
        lambda n: n.SegResNetDS(3, 8, 1, 2, norm="INSTANCE", blocks_down=(1, 2, 2)),
        (4, (32, 32, 32)),
    ),
    Network(
        "AttentionUnet 2D",
        lambda n: n.AttentionUnet(2, 1, 2, (16, 32, 64), (2, 2)),
        (8, (64, 64)),
    ),
    Network(
        "VNet 3D",
        lambda n: n.VNet(3, 1, 2, dropout_prob_down=0.0, dropout_prob_up=(0.0, 0.0)),
        (2, (16, 16, 16)),
    ),
    Network(
        "FlexibleUNet 2D",
        lambda n: n.FlexibleUNet(1, 2, "efficientnet-b0", pretrained=False, spatial_dims=2),
        (4, (64, 64)),
    ),
    Network(
        "UNETR 2D",
        lambda n: n.UNETR(
            1, 2, (64, 64), feature_size=8, hidden_size=96, mlp_dim=192, num_heads=6,
            spatial_dims=2, norm_name="instance",
        ),
        (4, (64, 64)),
    ),
    Network(
        "SwinUNETR 2D", lambda n: n.SwinUNETR(1, 2, feature_size=12, spatial_dims=2), (4, (64, 64))
    ),
)  # fmt: skip

# To try the harness out. Both Opacus' and torch.func's ways meet something that they cannot do.
QUICK_NETWORKS = (
    Network(
        "tiny UNet 2D",
        lambda n: n.UNet(2, 1, 2, channels=(4, 8), strides=(2,), num_res_units=1),
        (4, (16, 16)),
        (4, (16, 16)),
    ),
    Network(
        "tiny BasicUNet 2D",
        lambda n: n.BasicUNet(2, 1, 2, features=(4, 4, 4, 4, 4, 4)),
        (3, (32, 32)),
        (3, (32, 32)),
    ),
)


def network_of(name: str) -> Network:
    """The network of a name."""
    return {network.name: network for network in (*NETWORKS, *QUICK_NETWORKS)}[name]


def built(network: Network) -> nn.Module:
    """The network without what no private training can have: BatchNorm, and chance."""
    from monai.networks import nets

    model = _without_chance(network.build(nets))
    return dpfast.replace_batchnorm(model)
