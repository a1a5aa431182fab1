"""Directions are found where they are known, by the numbers of an independent computation."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from models.errors import UserError
from models.heads.boundaries import (
    LinearBoundaries,
    Samples,
    compact,
    ends,
    imported,
    linear_svm,
    pattern,
    project_out,
    read_boundary,
)
from models.heads.calibration import Calibration, spread_and_reach, useful_end
from models.latents import Latents

GROUPS = {"renderer": (3, 8), "decoder": (4, 5)}


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def world(count=2000, held_out=600, noise=0.0):
    """Codes of two groups, made of one z, and two attributes that are linear in z and correlated."""
    z = torch.randn(count, 6, generator=draws(), dtype=torch.float64)
    mixes = {
        name: torch.randn(6, width, generator=draws(1), dtype=torch.float64) for name, (_, width) in GROUPS.items()
    }
    mixes["decoder"] = mixes["decoder"][:, :5]
    axes = torch.tensor([[1.0, 0, 0, 0, 0, 0], [0.6, 0.8, 0, 0, 0, 0]], dtype=torch.float64)
    scores = z @ axes.T
    codes = {name: (z @ mix)[:, None].expand(-1, GROUPS[name][0], -1) for name, mix in mixes.items()}
    scores = scores + noise * torch.randn(scores.shape, generator=draws(2), dtype=torch.float64)
    return z, mixes, axes, Samples.collect([compact(Latents(codes))], ("smile", "age"), scores, held_out)


def orthogonal(count=3000, width=12):
    """Codes whose numbers are independent: the boundary of a linear score is the score's own axis."""
    codes = torch.randn(count, width, generator=draws(3), dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(width, 3, generator=draws(4), dtype=torch.float64))[0].T
    axes = axes / axes.norm(dim=1, keepdim=True)
    oblique = torch.stack([axes[0], 0.6 * axes[0] + 0.8 * axes[1], axes[2]])
    names = ("smile", "age", "glasses")
    return oblique, Samples.collect([Latents({"ws": codes[:, None]})], names, codes @ oblique.T, count // 3)


class TestMachine:
    def test_the_boundary_is_that_of_an_independent_computation(self):
        """min 1/2 (|w|^2 + b^2) + C sum max(0, 1 - y (w . x + b))^2, by quasi-Newton steps in float64."""
        x = torch.randn(80, 6, generator=draws(5), dtype=torch.float64) * 3 + 1
        y = torch.where(x[:, 0] - x[:, 3] + torch.randn(80, generator=draws(6), dtype=torch.float64) > 0, 1.0, -1.0)
        normal, offset = linear_svm(x, y.double(), 0.7, 0)
        mean, scale = x.mean(0).numpy(), float((x - x.mean(0)).square().mean().sqrt())
        scaled, signs = (x.numpy() - mean) / scale, y.numpy()

        def objective(v):
            slack = np.maximum(0, 1 - signs * (scaled @ v[:-1] + v[-1]))
            slope = -2 * 0.7 * slack * signs
            return 0.5 * v @ v + 0.7 * (slack**2).sum(), v + np.append(slope @ scaled, slope.sum())

        best = minimize(objective, np.zeros(7), jac=True, method="L-BFGS-B", options={"gtol": 1e-10, "ftol": 1e-15}).x
        length = np.linalg.norm(best[:-1])
        np.testing.assert_allclose(normal.numpy(), best[:-1] / length, atol=1e-5)
        wanted = best[:-1] @ mean / length - scale * best[-1] / length
        assert float(offset) == pytest.approx(wanted, abs=1e-4)

    def test_codes_may_lie_anywhere_at_any_scale(self):
        x = torch.randn(60, 4, generator=draws(7), dtype=torch.float64)
        y = torch.where(x[:, 1] > 0, 1.0, -1.0).double()
        normal, offset = linear_svm(x, y, 1.0, 0)
        moved, there = linear_svm(1e3 * x + 7, y, 1.0, 0)
        torch.testing.assert_close(moved, normal, atol=1e-6, rtol=0)
        torch.testing.assert_close(there, 1e3 * offset + 7 * normal.sum(), atol=1e-2, rtol=0)

    def test_the_known_direction_is_found(self):
        axes, samples = orthogonal()
        for axis, found in zip(axes, LinearBoundaries(share=0.1).find(samples, 0), strict=True):
            normal = found.normals["ws"]
            assert normal.shape == (1, 12) and float(normal.norm()) == pytest.approx(1, abs=1e-12)
            assert float(normal.flatten() @ axis) > 0.99
            assert found.scores["ws/accuracy"] == 1 and found.scores["ws/correlation"] > 0.99

    def test_each_group_has_its_own(self):
        """Of separate boundaries each parts its own codes; both say the same of a head."""
        z, mixes, axes, samples = world()
        assert {name: codes.shape[1] for name, codes in samples.codes.items()} == {"renderer": 1, "decoder": 1}
        found = LinearBoundaries(share=0.1).find(samples, 0)[0]
        assert found.normals.keys() == {"renderer", "decoder"}
        assert found.normals["renderer"].shape == (1, 8) and found.normals["decoder"].shape == (1, 5)
        assert found.scores["renderer/accuracy"] > 0.98 and found.scores["renderer/correlation"] > 0.95
        turned = z @ mixes["renderer"] @ found.normals["renderer"].flatten()
        assert float(torch.corrcoef(torch.stack([turned, z @ axes[0]]))[0, 1]) > 0.95

    def test_scores_that_are_noise_are_seen_on_held_out_codes(self):
        _, samples = orthogonal()
        noise = torch.randn(len(samples), 3, generator=draws(8), dtype=torch.float64)
        blind = Samples(samples.codes, samples.names, noise, samples.held_out)
        for found in LinearBoundaries(share=0.1).find(blind, 0):
            assert 0.3 < found.scores["ws/accuracy"] < 0.7 and abs(found.scores["ws/correlation"]) < 0.15

    def test_heads_that_cannot_be_scored_are_left_out(self):
        axes, samples = orthogonal()
        scores = samples.scores.clone()
        scores[::3, 0] = math.nan
        found = LinearBoundaries(share=0.1).find(Samples(samples.codes, samples.names, scores, 1000), 0)
        assert float(found[0].normals["ws"].flatten() @ axes[0]) > 0.98
        assert found[0].scores["ws/correlation"] > 0.98

    def test_layers_with_codes_of_their_own_have_directions_of_their_own(self):
        codes = torch.randn(1500, 2, 3, generator=draws(9), dtype=torch.float64)
        samples = Samples.collect([Latents({"ws": codes})], ("a",), codes[:, 1, 2:3], 500)
        normal = LinearBoundaries(share=0.2).find(samples, 0)[0].normals["ws"]
        assert normal.shape == (2, 3) and float(normal[1, 2]) > 0.98


class TestSamples:
    def test_blocks_are_joined(self):
        """As if all codes were one block: of one row where no block needs more."""
        codes = torch.randn(6, 3, 4, generator=draws(20))
        same = codes[:, :1].expand(-1, 3, -1)
        blocks = [compact(Latents({"a": same[:2], "b": same[:2]})), compact(Latents({"a": same[2:], "b": codes[2:]}))]
        assert [block.groups["b"].shape[1] for block in blocks] == [1, 3]
        found = Samples.collect(blocks, ("x",), torch.zeros(6, 1), 2)
        assert torch.equal(found.codes["a"], same[:, :1].double())
        assert torch.equal(found.codes["b"], torch.cat([same[:2], codes[2:]]).double())
        assert found.scores.dtype == torch.float64 and len(found) == 6


class TestPattern:
    def test_it_is_the_slope_of_a_regression(self):
        widths = torch.tensor([9.0, 1, 1, 0.1, 2], dtype=torch.float64)
        codes = torch.randn(400, 5, generator=draws(11), dtype=torch.float64) * widths
        normal = torch.randn(1, 5, generator=draws(12), dtype=torch.float64)
        place = codes.numpy() @ normal.numpy()[0]
        slopes = np.array([np.polyfit(place, column, 1)[0] for column in codes.numpy().T])
        found = pattern(codes[:, None], normal)
        np.testing.assert_allclose(found.numpy()[0], slopes / np.linalg.norm(slopes), atol=1e-12)

    def test_codes_move_as_they_differ(self):
        """Of w = z A with an attribute in z, its row of A is what a change of the attribute adds; a normal is not."""
        z = torch.randn(6000, 4, generator=draws(13), dtype=torch.float64)
        widths = torch.tensor([5.0, 1, 1, 0.2], dtype=torch.float64)
        mix = torch.randn(4, 4, generator=draws(14), dtype=torch.float64) * widths
        samples = Samples.collect([Latents({"ws": (z @ mix)[:, None]})], ("a", "b"), z[:, :2], 1000)
        true = mix[0] / mix[0].norm()
        cosines = {}
        for along in ("normal", "pattern"):
            found = LinearBoundaries(share=0.3, along=along).find(samples, 0)[0]
            cosines[along] = float(found.normals["ws"].flatten() @ true)
        assert cosines["pattern"] > 0.99 > 0.9 > cosines["normal"]

    def test_what_is_held_stays(self):
        _, samples = orthogonal()
        plain = LinearBoundaries(share=0.1).find(samples, 0)
        held = LinearBoundaries(share=0.1, hold="all", along="pattern").find(samples, 0)
        for k, found in enumerate(held):
            others = [plain[j].normals["ws"].flatten() for j in range(3) if j != k]
            assert max(abs(float(found.normals["ws"].flatten() @ other)) for other in others) < 1e-12


class TestEnds:
    def test_a_share_of_both(self):
        low, high = ends(torch.tensor([5.0, 1, 4, 2, 3, 0, 9, 8, 7, 6]), 0.2, "a")
        assert low.tolist() == [5, 1] and high.tolist() == [7, 6]

    def test_scores_that_are_there_or_not(self):
        scores = torch.tensor([0.0] * 8 + [1.0, 1.0])
        for share in (0.2, 0.3, 0.5):
            low, high = ends(scores, share, "glasses")
            assert high.tolist() == [8, 9] and bool((scores[low] == 0).all()) and len(low) == round(10 * share)
        low, high = ends(1 - scores, 0.4, "none")
        assert low.tolist() == [8, 9] and bool((1 - scores[high] == 1).all())

    @pytest.mark.parametrize(
        "values", [[1.0] * 10, [math.nan] * 10, [math.nan] * 7 + [1.0, 2.0, 3.0], [0.0] * 9 + [1.0]]
    )
    def test_scores_that_tell_nothing(self, values):
        with pytest.raises(UserError, match=r"the scores of a tell too few heads apart: \d+ of 10 codes are scored"):
            ends(torch.tensor(values), 0.3, "a")


class TestHold:
    def test_projection(self):
        """n - B pinv(B) n, of a Gram-Schmidt loop in float64; InterFaceGAN's Eq. 10 for one condition."""
        n, one, two = torch.randn(3, 1, 9, generator=draws(10), dtype=torch.float64)
        alone = project_out(n, [one])
        unit = one / one.norm()
        primal = n / n.norm()
        wanted = primal - (primal * unit).sum() * unit
        torch.testing.assert_close(alone, wanted / wanted.norm(), atol=1e-14, rtol=0)
        both = project_out(n, [one, two, one + 1e-13 * two])
        basis = np.stack([one.numpy()[0], two.numpy()[0]], 1)
        wanted = n.numpy()[0] - basis @ np.linalg.pinv(basis) @ n.numpy()[0]
        np.testing.assert_allclose(both.numpy()[0], wanted / np.linalg.norm(wanted), atol=1e-12)

    def test_nothing_is_left(self):
        n = torch.ones(1, 4, dtype=torch.float64)
        with pytest.raises(UserError, match="nothing is left of smile"):
            project_out(n, [2 * n], "smile")

    @pytest.mark.parametrize("hold", ["all", {"age": ["smile"]}])
    def test_held_attributes_stay(self, hold):
        axes, samples = orthogonal()
        plain = LinearBoundaries(share=0.1).find(samples, 0)
        held = LinearBoundaries(share=0.1, hold=hold).find(samples, 0)
        smile, age = (found.normals["ws"].flatten() for found in plain[:2])
        assert float(smile @ age) > 0.5
        assert abs(float(smile @ held[1].normals["ws"].flatten())) < 1e-12
        assert float(held[1].normals["ws"].flatten() @ axes[1]) > 0.7
        assert torch.equal(held[0].normals["ws"], plain[0].normals["ws"]) is (hold != "all")

    @pytest.mark.parametrize(
        ("hold", "words"),
        [
            ({"joy": []}, "method.hold names 'joy', the attributes are: smile, age"),
            ({"age": ["age"]}, "cannot be held"),
        ],
    )
    def test_mistakes(self, hold, words):
        with pytest.raises(UserError, match=words):
            LinearBoundaries(hold=hold).held(("smile", "age"))

    @pytest.mark.parametrize("options", [{"share": 0.6}, {"share": 0}, {"cost": math.nan}, {"hold": "none"}])
    def test_settings(self, options):
        with pytest.raises(UserError, match="method"):
            LinearBoundaries(**options)


class TestRange:
    def test_where_a_change_is_enough(self):
        """The first such place, within a 32nd of a step."""
        end, found = useful_end(lambda s: s * s, 3.0, 2.0, 3)
        assert math.sqrt(2) <= end < math.sqrt(2) + 1 / 32 and found == end * end
        end, found = useful_end(lambda s: s * s, -3.0, 2.0, 3)
        assert -math.sqrt(2) - 1 / 32 < end <= -math.sqrt(2)
        assert useful_end(lambda s: 1.5 * (1 < s < 2) + (s > 2.5), 3.0, 1.0, 2)[0] == pytest.approx(1.03, abs=0.05)
        assert useful_end(abs, -3.0, 4.0, 5) == (-3.0, 3.0)

    def test_how_far_codes_reach(self):
        codes = torch.tensor([[-3.0, 5.0], [1.0, 0.0], [1.0, 1.0], [1.0, 7.0]])[:, None]
        spread, low, high = spread_and_reach(codes, torch.tensor([[1.0, 0.0]]))
        assert (spread, low, high) == pytest.approx((math.sqrt(3), 3 / math.sqrt(3), 1 / math.sqrt(3)))
        with pytest.raises(UserError, match="do not differ"):
            spread_and_reach(codes[1:], torch.tensor([[1.0, 0.0]]))
        repeated, rows = codes.expand(-1, 3, -1), torch.tensor([[0.6, 0.0], [0.0, 0.0], [0.8, 0.0]])
        assert spread_and_reach(codes, rows) == pytest.approx(spread_and_reach(repeated, rows))

    def test_settings(self):
        with pytest.raises(UserError, match=r"calibration\.distance"):
            Calibration(distance=-1)


class TestFiles:
    @pytest.mark.parametrize("suffix", [".npy", ".pt"])
    @pytest.mark.parametrize(("shape", "group"), [((1, 8), "renderer"), ((5,), "decoder"), ((1, 4, 5), "decoder")])
    def test_boundaries(self, tmp_path, suffix, shape, group):
        values = torch.randn(shape, generator=draws())
        file = tmp_path / f"smile{suffix}"
        torch.save(values, file) if suffix == ".pt" else np.save(file, values.numpy())
        (found,) = imported({"smile": str(file)}, GROUPS, "the generator")
        (normal,) = found.normals.values()
        assert found.normals.keys() == {group} and normal.dtype == torch.float64
        torch.testing.assert_close(normal.flatten(), (values / values.norm()).double().flatten(), atol=1e-7, rtol=0)

    @pytest.mark.parametrize("given", [{}, None, "", {"renderer": None}, {"renderer": ""}, 3, ["a.npy"]])
    def test_names_without_files(self, given):
        with pytest.raises(UserError, match=r"^boundaries\.smile is .*: give a file, or for each group of codes one$"):
            imported({"smile": given}, GROUPS, "it")

    def test_both_groups(self, tmp_path):
        for name, width in (("a", 8), ("b", 5)):
            np.save(tmp_path / f"{name}.npy", np.ones((1, width)))
        files = {"renderer": f"{tmp_path}/a.npy", "decoder": f"{tmp_path}/b.npy"}
        assert imported({"smile": files}, GROUPS, "it")[0].normals.keys() == {"renderer", "decoder"}
        with pytest.raises(UserError, match=r"b.npy is a boundary of codes \(1, 5\): it has renderer \(3, 8\)"):
            imported({"smile": {"renderer": f"{tmp_path}/b.npy"}}, GROUPS, "it")
        with pytest.raises(UserError, match=r"smile: it has no codes 'ws', it has renderer \(3, 8\), decoder"):
            imported({"smile": {"ws": f"{tmp_path}/b.npy"}}, GROUPS, "it")
        with pytest.raises(UserError, match=r"may be of any of the codes one, two: name them, {smile: {one: FILE}}"):
            imported({"smile": f"{tmp_path}/b.npy"}, {"one": (1, 5), "two": (9, 5)}, "it")

    @pytest.mark.parametrize(
        ("name", "values", "words"),
        [
            ("a.npy", np.zeros((1, 8)), "not finite, or all 0"),
            ("a.npy", np.full((1, 8), np.nan), "not finite, or all 0"),
            ("a.npy", np.zeros((2, 3, 8)), r"is of shape \(2, 3, 8\)"),
            ("a.npy", np.zeros((0, 8)), r"is of shape \(0, 8\)"),
            ("a.npy", np.array(["x"]), "no boundary of plain numbers"),
            ("a.npy", np.array([{"x": 1}], dtype=object), "no boundary of plain numbers"),
            ("a.pt", {"smile": torch.ones(8)}, "it holds dict, not a tensor"),
            ("a.pt", Samples, "no boundary of plain numbers"),
            ("a.npy", b"", "no boundary of plain numbers"),
            ("a.pt", b"junk", "no boundary of plain numbers"),
            ("a.npy", None, "there is no such file"),
        ],
    )
    def test_what_is_none(self, tmp_path, name, values, words):
        file = tmp_path / name
        if isinstance(values, bytes):
            file.write_bytes(values)
        elif isinstance(values, np.ndarray):
            np.save(file, values, allow_pickle=True)
        elif values is not None:
            torch.save(values, file)
        with pytest.raises(UserError, match=words) as caught:
            read_boundary(str(file))
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
