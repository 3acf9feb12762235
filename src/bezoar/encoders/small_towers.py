"""Small image towers, and the usual normalisations of images."""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from bezoar.encoders.encoder import Preprocess
from bezoar.errors import UserError, first_line

# Means and standard deviations of pixels in 0..1. BadEncoder uses cifar, stl10, clip and none.
# The deviations of cifar are means over images, as in much published code; those of cifar10 are
# over all pixels. timm's Inception, SigLIP and ViT use half.
MEAN_STD: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "stl10": ((0.44087798, 0.42790666, 0.38678814), (0.25507198, 0.24801506, 0.25641308)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
MAX_WIDTH, MAX_DIM = 4096, 65536  # of fresh networks
# Depth of a ResNet -> blocks in each of its four stages, and whether a block is a bottleneck of
# three convolutions.
RESNETS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
}


def named_preprocess(size: int, mean_std: str, interpolation: str = "bicubic") -> Preprocess:
    """The preprocessing with a normalisation of `MEAN_STD`."""
    mean, std = MEAN_STD[mean_std]
    return Preprocess(size, mean, std, interpolation)


def check_widths(width: int, dim: int = 1) -> None:
    """Raise ValueError for a width or a size of the vector that is far too large."""
    if width > MAX_WIDTH or dim > MAX_DIM:
        raise ValueError(f"width is at most {MAX_WIDTH}, and dim {MAX_DIM}; got {width} and {dim}")


def check_mean_std(name: str) -> None:
    """Raise ValueError unless `MEAN_STD` has a normalisation of this name."""
    if name not in MEAN_STD:
        raise ValueError(f"mean_std must be one of {', '.join(MEAN_STD)}; got {name!r}")


def check_input_size(tower: nn.Module, size: int, name: str) -> None:
    """Run one black image through a tower. Raises UserError unless it gives one vector."""
    mode = tower.training
    try:
        with torch.inference_mode():
            shape = tower.eval()(torch.zeros(1, 3, size, size)).shape
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = first_line(error)[:120]
        raise UserError(f"{name} takes no images of {size} px: {reason}") from error
    finally:
        tower.train(mode)
    if len(shape) != 2:
        raise UserError(f"{name} gives {tuple(shape)} for one image; an encoder gives one vector")


class ConvTower(nn.Module):
    """(B, 3, S, S) -> (B, dim): 3x3 convolutions, batch norm, ReLU; mean and maximum pooling."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for i in range(4):
            out = width << i
            stride = 1 if i == 0 else 2
            conv = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(2 * channels, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Embed images of 32 px and more; the last feature map is pooled."""
        x = self.layers(x)  # (B, C, S / 8, S / 8)
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)  # (B, 2 C)
        z: Tensor = self.head(pooled)
        return z


class StridedShortcut(nn.Conv2d):
    """A strided 1x1 convolution, computed as a selection of pixels and a convolution.

    torch 2.15's strided convolution writes beyond its memory on CPUs when several threads compute
    its gradient for few channels in the channels-last layout.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The numbers that nn.Conv2d gives."""
        x = x[:, :, :: self.stride[0], :: self.stride[1]]
        return nn.functional.conv2d(x, self.weight, self.bias)


class ResNetTrunk(nn.Module):
    """A ResNet without its classifier (He et al. 2016), (B, 3, S, S) -> (B, 8 or 32 times `width`).

    Blocks, names of weights and initialisation are torchvision's, whose own class has neither
    `stem` nor `width`.
    """

    def __init__(self, depth: int, stem: str, width: int) -> None:
        """Build a fresh network.

        Args:
            depth: a key of `RESNETS`.
            stem: `imagenet`, a 7x7 convolution with stride 2 and a max-pool; or `cifar`, 3x3 with
                stride 1 and none.
            width: channels of the first convolution, 64 in the paper.
        """
        super().__init__()
        counts, bottleneck = RESNETS[depth]
        block: type[BasicBlock | Bottleneck] = Bottleneck if bottleneck else BasicBlock
        kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        channels = width
        for i, count in enumerate(counts):
            stage = _build_stage(block, channels, width << i, count, 1 if i == 0 else 2)
            self.add_module(f"layer{i + 1}", stage)
            channels = (width << i) * block.expansion
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Embed images; the last feature map is averaged."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(4):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)


def _build_stage(
    block: type[BasicBlock | Bottleneck], channels: int, width: int, count: int, stride: int
) -> nn.Sequential:
    """`count` blocks; the first reads `channels` and has the stride."""
    out = width * block.expansion
    shortcut = None
    if stride > 1 or channels != out:
        conv = StridedShortcut(channels, out, 1, stride, bias=False)
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(out))
    first = block(channels, width, stride, shortcut)
    return nn.Sequential(first, *(block(out, width) for _ in range(count - 1)))
