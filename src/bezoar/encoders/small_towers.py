"""Image towers that several networks share, and the numbers that published encoders normalise their pixels by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bezoar.encoders.encoder import Preprocess
from bezoar.errors import UserError

# Of pixels in 0..1. cifar, stl10, clip and none are what the encoders of BadEncoder were trained with.
MEAN_STD: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "stl10": ((0.44087798, 0.42790666, 0.38678814), (0.25507198, 0.24801506, 0.25641308)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
# depth -> blocks in each of the four stages, and whether a block is a bottleneck of three convolutions
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
}


def preprocess(size: int, mean_std: str, interpolation: str = "bicubic") -> Preprocess:
    """What a network's pixels must look like, by the name of their normalisation."""
    mean, std = MEAN_STD[mean_std]
    return Preprocess(size, mean, std, interpolation)


def check_mean_std(name: str) -> None:
    """ValueError unless it names a normalisation."""
    if name not in MEAN_STD:
        raise ValueError(f"mean_std must be one of {', '.join(MEAN_STD)}; got {name!r}")


def check_size(tower: nn.Module, size: int, name: str) -> None:
    """Raise UserError unless a tower maps (B, 3, size, size) to (B, D): one black image is run through it."""
    mode = tower.training
    try:
        with torch.inference_mode():
            shape = tower.eval()(torch.zeros(1, 3, size, size)).shape
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name} takes no images of {size} px: {reason[:120]}") from error
    finally:
        tower.train(mode)
    if len(shape) != 2:
        raise UserError(f"{name} gives {tuple(shape)} for one image; an encoder gives one vector")


class Tower(nn.Module):
    """(B, 3, S, S) -> (B, dim): 3x3 convolutions, batch norm, ReLU; mean and maximum pooling side by side."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for i in range(4):
            out = width << i
            layers += [
                nn.Conv2d(channels, out, 3, 1 if i == 0 else 2, 1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            ]
            channels = out
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(2 * channels, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Pooling over whatever space is left makes the tower work at any size of 32 px and more."""
        x = self.layers(x)
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))


class Shortcut(nn.Conv2d):
    """A 1x1 convolution in steps: the pixels that it looks at, then a product. Torch's own one, given few channels laid
    out last, writes beyond its memory when several threads take the gradient (2.15, CPU)."""

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers as nn.Conv2d's."""
        return nn.functional.conv2d(
            x[:, :, :: self.stride[0], :: self.stride[1]], self.weight, self.bias
        )


class Trunk(nn.Module):
    """(B, 3, S, S) -> (B, D): a residual network without its classifier (He et al. 2016). D is 8 or 32 times `width`.

    Blocks, names of weights and initialisation are torchvision's. stem: `imagenet`, 7x7 in steps of 2 and a max-pool, or
    `cifar`, 3x3 in steps of 1 and no max-pool. width: channels of the first convolution, 64 in the paper.
    """

    def __init__(self, depth: int, stem: str, width: int) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock, Bottleneck

        counts, bottleneck = DEPTHS[depth]
        small = stem == "cifar"
        self.conv1 = (
            nn.Conv2d(3, width, 3, 1, 1, bias=False)
            if small
            else nn.Conv2d(3, width, 7, 2, 3, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        channels = width
        for i, count in enumerate(counts):
            block: type[BasicBlock | Bottleneck] = Bottleneck if bottleneck else BasicBlock
            out, stride = (width << i) * block.expansion, 1 if i == 0 else 2
            short = None
            if stride > 1 or channels != out:
                short = nn.Sequential(
                    Shortcut(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
                )
            first = block(channels, width << i, stride, short)
            self.add_module(
                f"layer{i + 1}",
                nn.Sequential(first, *(block(out, width << i) for _ in range(count - 1))),
            )
            channels = out
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """The mean over what space is left, so that any size will do."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(4):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
