"""FID and KID with a network of choice. Their values depend on that network: name it beside them.

The metrics hand it pictures as they are given, in [-1, 1]: torchmetrics scales for its own network alone.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from models.errors import UserError, one_line
from models.features.base import Frozen
from models.features.embedded import WORKING_SIZE, EmbeddedStyle, labelled
from models.features.weights import MissingWeightsError, read_state
from models.files import resolve
from models.image import resized


class Distribution(nn.Module):
    """A network whose features FID and KID compare: (B, 3, H, W) in [-1, 1] -> (B, num_features)."""

    num_features: int


class EmbeddedDistribution(Distribution):
    """Features of the embedded style network before its last layer: (B, 3, H, W) in [-1, 1] -> (B, num_features)."""

    def __init__(self, weights: str | None = "embedded") -> None:
        super().__init__()
        self.style = Frozen(EmbeddedStyle(weights=weights))
        self.label = labelled(type(self).__name__, weights)
        self.num_features = self.style.module.head.out.in_features

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]  # as nn.Module
        self.style.module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        network = self.style.module
        return network.head.statistics(network.trunk(resized(image, WORKING_SIZE)))


class InceptionDistribution(Distribution):
    """Inception-v3 features as of the original FID, its resizing too: (B, 3, H, W) in [-1, 1] -> (B, 2048).

    Args:
        weights: path of ``weights-inception-2015-12-05-6726825d.pth``.

    Raises:
        MissingWeightsError: when there is no such file.
        UserError: when the file holds something else, or the package torch-fidelity, which has the network, is not
            installed.
    """

    num_features = 2048

    def __init__(self, weights: str) -> None:
        super().__init__()
        path = resolve(weights)
        if not path.is_file():
            source = "the torch-fidelity project page"
            raise MissingWeightsError("InceptionDistribution", path, source, "weights", "there is no")
        if importlib.util.find_spec("torch_fidelity") is None:
            raise UserError(
                "FID with Inception needs the package torch-fidelity (extra: inception), or use the embedded FID"
            )
        from torchmetrics.image.fid import NoTrainInceptionV3

        state = read_state(path, "InceptionDistribution")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "inception.pt"
            torch.save(state, copy)  # the library unpickles whatever it is given: so it is given a file of ours
            try:
                self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(copy), antialias=False)
            except RuntimeError as error:
                raise UserError(f"{path} does not hold the weights of Inception-v3: {one_line(error)[:200]}") from error

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        return self.network(((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)).reshape(len(image), -1)


class Precomputed(Distribution):
    """Takes features (B, num_features) instead of images: for values that every image must enter once."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(features: Distribution, gather: bool = True) -> FrechetInceptionDistance:
    """Frechet distance (Heusel et al. 2017, Eq. 6): ``update(images, real=...)``, then ``compute()``.

    Needs clearly more images than features to be meaningful; with few images give :func:`kid` beside it.

    Args:
        features: the network.
        gather: whether ``compute()`` joins what all ranks have seen.
    """
    return FrechetInceptionDistance(feature=features, sync_on_compute=gather)


def kid(features: Distribution, subset_size: int, subsets: int = 50, gather: bool = True) -> KernelInceptionDistance:
    """Kernel distance (Binkowski et al. 2018): ``compute()`` gives mean and deviation over random subsets.

    Args:
        features: the network.
        subset_size: images per subset, no more than were seen of either kind.
        subsets: number of them, drawn from torch's global generator.
        gather: whether ``compute()`` joins what all ranks have seen.
    """
    return KernelInceptionDistance(feature=features, subsets=subsets, subset_size=subset_size, sync_on_compute=gather)


@torch.no_grad()
def features_of(network: nn.Module, parts: Iterable[Tensor], device: torch.device) -> Tensor:
    """Features (N, F) on the CPU of pictures that come in parts (n, 3, H, W), in [-1, 1]."""
    network.to(device)
    return torch.cat([network(chunk.to(device)).cpu() for part in parts for chunk in part.split(32)])


def feature_distances(
    found: Tensor, real: Tensor, seed: int, subset: int | None = None, metrics: Sequence[str] = ("fid", "kid")
) -> dict[str, float]:
    """``fid`` and ``kid`` of features (N, F) and (M, F), two or more of either.

    Args:
        seed: of KID's subsets. subset: their size; half of what there are of either kind by default, 100 at most.
        metrics: which of the two.
    """
    given, values = Precomputed(found.shape[1]), {}
    if subset is None:
        subset = max(2, min(100, len(found) // 2, len(real) // 2))
    for name in metrics:
        metric = fid(given, gather=False) if name == "fid" else kid(given, subset, gather=False)
        metric.update(real, real=True)
        metric.update(found, real=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            value = metric.compute()
        values[name] = float(value[0] if isinstance(value, tuple) else value)  # KID has a deviation too
    return values


def recall(found: Tensor, real: Tensor, neighbours: int = 3) -> float:
    """Share of real features (M, D) that lie among those found (N, D): no farther from one of these than its own
    ``neighbours``-th nearest neighbour is (Kynkaanniemi et al. 2019, Eq. 2). What it misses, samples do not show.

    Raises:
        UserError: for fewer than ``neighbours`` + 1 of those found.
    """
    if len(found) <= neighbours:
        raise UserError(f"recall is told by {neighbours + 1} pictures or more, there are {len(found)}")
    found, real = found.double(), real.double()
    radius = torch.cdist(found, found).kthvalue(neighbours + 1).values  # each is its own nearest
    return float((torch.cdist(real, found) <= radius).any(1).double().mean())


def cmmd(found: Tensor, real: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Maximum mean discrepancy of embeddings (N, D) and (M, D) by a Gaussian kernel, after these are brought to unit
    length (CMMD, Jayasumana et al. 2024, whose embedding is CLIP's). In float64; unlike KID it needs no subsets.

    Args:
        sigma: width of the kernel. scale: of the value.
    """
    one, other = (torch.nn.functional.normalize(embeddings.double(), dim=1) for embeddings in (found, real))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-torch.cdist(a, b).square() / (2 * sigma**2)).exp().mean()

    return float(scale * (kernel(one, one) + kernel(other, other) - 2 * kernel(one, other)))
