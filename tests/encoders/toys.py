"""What the tests of encoders share."""

import torch


def jumbled(module, seed=0):
    """The module with every weight and statistic different, so that no two tensors can be mistaken
    for one another.
    """
    draw = torch.Generator().manual_seed(seed)
    for v in module.state_dict().values():
        if v.is_floating_point():
            noise = torch.randn(v.shape, generator=draw)
            v.copy_(1 + 0.2 * noise.clamp(-2, 2) if v.ndim < 2 else noise * v[0].numel() ** -0.5)
    return module.eval()


def pixels(size, n=2):
    """uint8 (n, 3, size, size), always the same."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
