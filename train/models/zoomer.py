"""The zoomer: a small convolutional student that predicts where an image decides its class (ZoomViT, section 3.2)."""

from __future__ import annotations

import torch
from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor, nn

# Stages of a ResNet-18 by the number of blocks up to their end; the paper's n (Tables 2 and 10).
_STAGES = {2: 1, 4: 2, 6: 3}


class Zoomer(nn.Module):
    """A ResNet-18 trunk cut after `num_blocks` basic blocks, and a projection onto the teacher's grid (Fig. 3).

    The trunk's map is average-pooled to (2 * grid)^2 cells, reduced to one channel by a 1x1 convolution, passed
    through ReLU, flattened, and projected by one linear layer and a sigmoid. Any image size works; if the trunk's
    map has fewer than 2 * grid cells a side, pooling repeats them.

    At 224 x 224 with the default width (Table 10): n = 2, 4, 6 have 0.3114, 0.8371, 2.9369 M parameters and
    0.581, 0.992, 1.403 GMACs (convolutions and the linear layer; normalisation, activations and pooling not counted).

    While it guides a ZoomViT the zoomer is frozen, and its BatchNorm must use the statistics it was trained with.
    Call `freeze()` for that: it stops gradients, switches to eval, and from then on ignores `.train()`, so that no
    trainer that owns the zoomer can let the statistics drift. A zoomer that isn't frozen follows `.train()` and
    `.eval()` like any module.

    Args:
        num_blocks: 2, 4 (the paper's default) or 6 basic blocks.
        grid: cells a side of the teacher's relevance map (14 for 224-pixel images in 16-pixel patches).
        width: channels of the first stage; 64 is ResNet-18, less suits small images.
        in_chans: channels of the images.

    Raises:
        ValueError: num_blocks other than 2, 4 or 6; grid or width below 1.
    """

    def __init__(self, num_blocks: int = 4, grid: int = 14, *, width: int = 64, in_chans: int = 3) -> None:
        super().__init__()
        if num_blocks not in _STAGES:
            raise ValueError(f"num_blocks must be 2, 4 or 6, got {num_blocks}")
        if grid < 1 or width < 1:
            raise ValueError(f"grid and width must be at least 1, got grid {grid}, width {width}")
        self.num_blocks = num_blocks
        self.grid = grid
        self.width = width
        self.in_chans = in_chans
        self.frozen = False

        layers: list[nn.Module] = [
            nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]
        channels = width
        for stage in range(_STAGES[num_blocks]):
            planes, stride = width * 2**stage, 1 if stage == 0 else 2
            shortcut = downsample_conv(channels, planes, kernel_size=1, stride=stride) if stride > 1 else None
            layers += [BasicBlock(channels, planes, stride, shortcut), BasicBlock(planes, planes)]
            channels = planes
        self.trunk = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(2 * grid)
        self.reduce = nn.Conv2d(channels, 1, 1)
        self.project = nn.Linear(4 * grid * grid, grid * grid)

        for module in self.trunk.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):
                module.zero_init_last()

    def model_args(self) -> dict[str, int]:
        """The arguments of the constructor that made this zoomer."""
        return {"num_blocks": self.num_blocks, "grid": self.grid, "width": self.width, "in_chans": self.in_chans}

    def freeze(self) -> Zoomer:
        """Stop gradients and stay in eval mode from now on. Returns the zoomer itself."""
        self.requires_grad_(False)
        self.frozen = True
        return self.eval()

    def train(self, mode: bool = True) -> Zoomer:
        """Set the mode; a frozen zoomer stays in eval mode."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, in_chans, H, W] float -> scores float32 [B, grid * grid] in [0, 1], row-major.

        Under autocast only the trunk runs in half precision. Scores are compared with each other, and half precision
        would make many of them equal; a zoomer in float64 has scores in float64.
        """
        x = self.trunk(images)  # [B, C, h, w]
        with torch.autocast(x.device.type, enabled=False):
            x = self.pool(x.to(self.reduce.weight.dtype))
            x = torch.relu(self.reduce(x))  # [B, 1, 2*grid, 2*grid]
            logits = self.project(x.flatten(1))  # [B, grid*grid]
            return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
