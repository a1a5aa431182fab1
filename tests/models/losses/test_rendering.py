"""How far renderings are from pictures with maps, where the renderings' own maps are smaller."""

import torch

from models.losses.rendering import RenderingLoss
from models.rendering.output import Rendering
from tests.models.generators.protocol import seeded


def test_maps_of_a_smaller_side_are_compared_with_means():
    draws = seeded(2)
    shape = (2, 1, 1, 8, 8)
    mask = (torch.rand(shape, generator=draws) > 0.1).double()
    mask[0, 0, 0, :2, :2] = 1.0
    batch = {
        "image": torch.rand(2, 1, 3, 8, 8, generator=draws).double(),
        "mask": mask,
        "depth": 6 + torch.rand(shape, generator=draws).double(),
    }
    alpha = torch.rand(2, 1, 4, 4, generator=draws).double()
    depth, spread = (k + torch.rand(2, 1, 4, 4, generator=draws).double() for k in (6, 0))
    raw = torch.rand(2, 3, 4, 4, generator=draws).double()
    fake = Rendering(batch["image"][:, 0], raw=raw, alpha=alpha, depth=depth, spread=spread)
    found = RenderingLoss(raw_weight=0.5, mask_weight=2.0, depth_weight=0.3)(fake, batch)  # type: ignore[arg-type]

    sums, solid = {"mask": 0.0, "depth": 0.0}, 0
    for b in range(2):
        for i in range(4):
            for j in range(4):
                block = (b, 0, 0, slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
                share = float(mask[block].mean())
                sums["mask"] += (float(alpha[b, 0, i, j]) - share) ** 2
                if share > 0.99:
                    solid += 1
                    error = float(depth[b, 0, i, j] - batch["depth"][block].mean())
                    sums["depth"] += (error**2 + float(spread[b, 0, i, j]) + 1e-6) ** 0.5
    assert 0 < solid < 32
    for name, total in sums.items():
        torch.testing.assert_close(float(found[name]), total / 32, rtol=1e-9, atol=0)
    small = torch.nn.functional.interpolate(batch["image"][:, 0], (4, 4), mode="bilinear", antialias=True)
    expected = (raw - small).abs().mean() + 2 * (raw - small).square().mean()
    torch.testing.assert_close(found["raw"], expected)
    total = 0.5 * found["raw"] + 2 * found["mask"] + 0.3 * found["depth"]
    torch.testing.assert_close(found["reconstruction"], total)  # the picture itself is right
