"""FID and KID with the embedded network against numpy."""

import numpy as np
import pytest
import torch

from models.errors import UserError
from models.features.embedded import EmbeddedStyle
from models.metrics.distribution import EmbeddedDistribution, InceptionDistribution, cmmd, fid, kid, recall


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(0)
    return EmbeddedDistribution(weights=None)


@pytest.fixture(scope="module")
def samples():
    g = torch.Generator().manual_seed(0)
    return torch.rand(12, 3, 32, 32, generator=g) * 2 - 1, torch.rand(12, 3, 32, 32, generator=g)


def test_fid_against_numpy(features, samples):
    metric = fid(features)
    real, fake = samples
    for images, flag in ((real, True), (fake, False)):
        for part in images.split(5):
            metric.update(part, real=flag)
    a, b = (features(images).double().numpy() for images in samples)
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The trace of the root of a product of covariances, from the singular values of the two centred samples.
    roots = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    trace = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum(np.trace(c) for c in covariances) - 2 * trace
    assert float(metric.compute()) == pytest.approx(wanted, rel=1e-3)


def test_kid_tells_equal_from_different(features, samples):
    real, fake = samples
    results = []
    for other in (real, fake):
        metric = kid(features, subset_size=12, subsets=2)
        metric.update(real, real=True)
        metric.update(other, real=False)
        results.append(float(metric.compute()[0]))
    assert results[0] <= 1e-6 < results[1]


def test_cmmd_by_hand():
    """Sums over all pairs, in numpy; 0 for equal sets, and the farther the more."""
    a, b = (np.random.default_rng(seed).normal(size=(n, 5)) + shift for seed, n, shift in ((0, 7, 0), (1, 9, 1)))
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))

    def mean(p, q):
        return np.mean([np.exp(-((u - v) ** 2).sum() / 200) for u in p for v in q])

    wanted = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert cmmd(torch.from_numpy(3 * a).float(), torch.from_numpy(b).float()) == pytest.approx(wanted, rel=1e-4)
    assert cmmd(torch.from_numpy(a), torch.from_numpy(a)) == pytest.approx(0, abs=1e-9)


def test_recall_by_hand():
    """Those found lie at 0, 1, 2, 4 and 10: their third neighbours are 4, 3, 2, 4 and 9 away, together 14."""
    found = torch.tensor([[0.0], [1.0], [2.0], [4.0], [10.0]])
    real = torch.tensor([[-4.5], [-3.5], [0.2], [18.9], [19.1]])
    assert recall(found, real) == pytest.approx(3 / 5)
    with pytest.raises(UserError, match="4 pictures or more, there are 3"):
        recall(found[:3], real)


def test_features_are_the_style_networks_hidden_layer(features):
    image = torch.rand(1, 3, 64, 64)
    style: EmbeddedStyle = features.style.module
    hidden = features(image)
    assert hidden.shape == (1, features.num_features)
    torch.testing.assert_close(torch.nn.functional.normalize(style.head.out(hidden), dim=1), style(image))
    assert features.double()(image.double()).dtype == torch.float64
    features.float()
    assert not features.state_dict()


def test_inception_asks_for_its_file(tmp_path):
    with pytest.raises(UserError, match="InceptionDistribution has no weights"):
        InceptionDistribution(str(tmp_path / "missing.pth"))


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """The network's file, with random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)  # stay as initialised
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path)).eval()
    torch.save(network.state_dict(), path)
    return path, network


def test_inception_sees_what_the_original_network_sees(inception):
    path, network = inception
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        (expected,) = network(image)
    found = InceptionDistribution(str(path))(image / 127.5 - 1)
    assert found.shape == (2, InceptionDistribution.num_features) and float(expected.std()) > 0
    torch.testing.assert_close(found, expected)


class Evil:
    """Code in a file."""

    def __reduce__(self):
        return (pytest.fail, ("code of a file was run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [(Evil(), "cannot be read as weights"), ({"a": torch.zeros(1)}, "does not hold the weights")],
)
def test_another_file_than_inception_s(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message):
        InceptionDistribution(str(tmp_path / "weights.pth"))
