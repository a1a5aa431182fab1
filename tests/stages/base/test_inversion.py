"""The protocol by real command lines: any number of processes, surfaces, and tables beside the paper's numbers."""

import json
import math

import numpy as np
import pytest
import torch

from datamodules.portraits import PortraitDataModule
from models import artifact
from models.encoders.pyramid import Encoder4Editing
from models.files import ROOT
from models.image import read_image
from models.metrics.e3dge import E3DGEProtocol
from models.metrics.records import read_records
from models.metrics.scan import Scan, Unmeasurable
from stages.commands import table as results
from tests.stages import inversions
from tests.stages.processes import galatea

ENCODER = inversions.ENCODER | {"expressions": 2}
SURFACE = "--model.protocol.init_args.surface={cells: 8, levels: 1, steps: 2, rays: 16, coarse: 4, fine: 2}"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folder of an untrained inverter, and its scores by one process."""
    folder = inversions.prepare(tmp_path_factory.mktemp("work"))
    torch.manual_seed(0)
    modules = {"generator": artifact.load(folder / "tiny").module("generator"), "encoder": Encoder4Editing(**ENCODER)}
    artifact.save(folder / "inverter", stage="invert", modules=modules)
    galatea(*line(folder), f"--out={folder / 'alone'}")
    return folder


def line(folder):
    """Three portraits, an odd number; surfaces of two of them."""
    command = inversions.invert(folder)
    surfaces = ["--model.protocol.init_args.surfaces=2", "--model.protocol.init_args.surface_views=3", SURFACE]
    data = ["--data.test_fraction=0.25", "--data.batch_size=1"]
    return [command[0], "test", *command[2:], f"--model.tested.path={folder / 'inverter'}", *surfaces, *data]


def test_ranks_equal_one_process(work, tmp_path):
    galatea(*line(work), "--trainer.strategy=ddp", f"--out={tmp_path}", ranks=2)
    assert (tmp_path / "metrics.csv").read_bytes() == (work / "alone" / "metrics.csv").read_bytes()


def test_what_a_test_leaves_behind(work):
    records = read_records(work / "alone")
    items = {record.item for record in records if record.metric == "psnr"}
    assert len(items) == 3
    fitted = {record.item for record in records if record.metric == "psnr_mv" and record.value == record.value}
    assert len(fitted) == 2 and fitted < items
    assert {record.metric for record in records if record.item == "all"} == {"fid", "kid", "fid_nv", "kid_nv"}
    networks = {record.metric: record.feature_network for record in records}
    assert (networks["fid"], networks["id_nv"]) == ("EmbeddedDistribution", "EmbeddedIdentity")
    folders = {path.name: sorted(path.glob("*.png")) for path in (work / "alone").iterdir() if path.is_dir()}
    assert [len(folders[name]) for name in ("input", "surface", "line")] == [3, 2, 2]
    assert read_image(folders["line"][0]).shape == (1, 3, 32, 32)
    assert "sweep" not in folders  # nobody knows the truth of these portraits


def test_tables_show_the_papers_numbers_beside_ours(work, tmp_path, capsys):
    table = tmp_path / "table.md"
    results.main([str(work / "alone"), str(ROOT / "docs" / "graminverter"), f"--markdown={table}", "--metric", "psnr"])
    lines = table.read_text().splitlines()
    assert any(row.startswith("| inversion vpaper | celeba-hq | psnr |") and "| 21.51 |" in row for row in lines)
    assert any(row.startswith("| inversion v1 | test | psnr |") and "| invert |" in row for row in lines)
    assert "21.51" in capsys.readouterr().out


def e3dge(folder):
    """The same portraits by E3DGE's protocol."""
    given = {
        "perceptual": inversions.network("EmbeddedLPIPS"),
        "identity": inversions.network("EmbeddedIdentity"),
        "frames": 4,
    }
    protocol = {"class_path": "models.metrics.e3dge.E3DGEProtocol", "init_args": given}
    return [word for word in line(folder) if "protocol" not in word] + [f"--model.protocol={json.dumps(protocol)}"]


def test_another_protocol_by_any_number_of_processes(work, tmp_path):
    galatea(*e3dge(work), f"--out={tmp_path / 'one'}")
    galatea(*e3dge(work), "--trainer.strategy=ddp", f"--out={tmp_path / 'two'}", ranks=2)
    assert (tmp_path / "one" / "metrics.csv").read_bytes() == (tmp_path / "two" / "metrics.csv").read_bytes()
    records = read_records(tmp_path / "one")
    assert {record.protocol for record in records} == {"e3dge"}
    assert len({record.item for record in records}) == 3
    assert {"mae", "ssim_e3dge", "id_input_nv@far"} <= {record.metric for record in records}
    assert len(list((tmp_path / "one" / "trajectory").glob("*.png"))) == 3


def distances(name):
    """Of a portrait's scan, as many as its name says."""
    return torch.rand(5 + int(name[:2]), generator=torch.Generator().manual_seed(int(name[:2])), dtype=torch.float64)


class ScannedPortraits(PortraitDataModule):
    """Portraits with scans, whose points are the distances that :class:`ToldDistances` tells."""

    def scan_truth(self, sample):
        return Scan(distances(sample["name"])[:, None].expand(-1, 3), torch.zeros(7, 3))


class ToldDistances(E3DGEProtocol):
    """One portrait's head has no surface."""

    def scan_distances(self, scan, head, rig, device):
        if len(scan.points) == self.frames + 5:
            raise Unmeasurable("nothing is there")
        return scan.points[:, 0]


def test_scan_distances_of_all_portraits_are_pooled(work, tmp_path):
    """As NoW's tables have them, whatever the number of processes; a head without a surface is counted as missing."""
    names = sorted({record.item for record in read_records(work / "alone") if record.item != "all"})
    line = e3dge(work)
    (index,) = (i for i, word in enumerate(line) if word.startswith("--model.protocol="))
    protocol = json.loads(line[index].partition("=")[2])
    protocol["class_path"] = "tests.stages.base.test_inversion.ToldDistances"
    protocol["init_args"]["frames"] = int(names[1][:2])  # tells the second one
    line[index] = f"--model.protocol={json.dumps(protocol)}"
    line.append("--data.class_path=tests.stages.base.test_inversion.ScannedPortraits")
    for name, given in (("one", []), ("two", ["--trainer.strategy=ddp"])):
        galatea(*line, *given, f"--out={tmp_path / name}", ranks=len(given) + 1)
    assert (tmp_path / "one" / "metrics.csv").read_bytes() == (tmp_path / "two" / "metrics.csv").read_bytes()
    records = read_records(tmp_path / "one")
    every = np.concatenate([distances(name).numpy() for name in (names[0], names[2])])
    assert {record.metric: record.value for record in records if record.item == "all"} == pytest.approx({
        "scan_median_pooled": np.median(every), "scan_mean_pooled": every.mean(), "scan_sd_pooled": every.std(),
        "scan_missing": 1,
    })  # fmt: skip
    own = {record.item: record.value for record in records if record.metric == "scan_mean"}
    assert own[names[0]] == pytest.approx(float(distances(names[0]).mean())) and math.isnan(own[names[1]])
