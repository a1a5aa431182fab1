"""The NoW layout on disk: a made-up data set of two subjects, and what is said of damaged ones."""

import numpy as np
import pytest
import torch
import trimesh

from datamodules.now import NoWDataModule, NoWScans, pairs, read_keypoints, read_obj, read_picked_points, read_ply
from datamodules.truth import KnowsScan
from models.errors import UserError
from models.metrics.now import measure, records
from models.metrics.records import read_records, write_records
from models.metrics.scan import Scan, scan_distances, scan_scores
from models.names import item_id

CORNERS = [[-0.47, 0.06], [-0.11, 0.06], [0.11, 0.06], [0.47, 0.06], [0.0, -0.3], [-0.22, -0.5], [0.22, -0.5]]
KEYPOINTS = 80 * np.array([[x, y, (1 - x * x - y * y) ** 0.5] for x, y in CORNERS])
HEADER = """<!DOCTYPE PickedPoints>
<PickedPoints>
 <DocumentData>
  <DateTime time="12:00:00" date="2018-01-01"/>
  <User name="nobody"/>
  <DataFileName name="scan.obj"/>
  <templateName name=""/>
 </DocumentData>
"""


def picked(points: np.ndarray) -> str:
    rows = [
        f' <point x="{x:.6f}" y="{y:.6f}" z="{z:.6f}" name="{n}" active="1"/>' for n, (x, y, z) in enumerate(points)
    ]
    return HEADER + "\n".join(rows) + "\n</PickedPoints>\n"


def obj(vertices: np.ndarray, faces: np.ndarray) -> str:
    lines = ["# made up"] + [f"v {x:.6f} {y:.6f} {z:.6f} 0.5 0.5 0.5" for x, y, z in vertices]
    return "\n".join(lines + [f"f {a}//{a} {b}//{b} {c}//{c}" for a, b, c in faces + 1]) + "\n"


@pytest.fixture
def now(tmp_path):
    ball = trimesh.creation.icosphere(3, 80.0)
    for subject in ("S1", "S2"):
        for folder in ("scans", "scans_lmks_onlypp"):
            (tmp_path / "data" / folder / subject).mkdir(parents=True)
        (tmp_path / "data/scans" / subject / "scan.obj").write_text(obj(ball.vertices, ball.faces))
        (tmp_path / "data/scans_lmks_onlypp" / subject / "scan.pp").write_text(picked(KEYPOINTS))
    names = ["S1/multiview_neutral/IMG_1.jpg", "S1/selfie/IMG.2.jpg", "S2/selfie/IMG_3.jpg"]
    (tmp_path / "data/imagepathsvalidation.txt").write_text("".join(f"iphone_pictures/{name}\n" for name in names))
    egg = trimesh.creation.icosphere(3, 1.0)
    egg.vertices *= [1.0, 1.0, 1.1]
    one, two = tmp_path / "found/S1/multiview_neutral", tmp_path / "found/S1/selfie"
    for folder in (one, two):
        folder.mkdir(parents=True)
    (one / "IMG_1.obj").write_text(obj(ball.vertices / 80 + 3, ball.faces))  # the scan, elsewhere, in other units
    np.save(one / "IMG_1.npy", KEYPOINTS[None] / 80 + 3)
    egg.export(two / "IMG.2.ply")
    (two / "IMG.2.txt").write_text("\n".join(" ".join(map(str, point)) for point in KEYPOINTS / 80))
    return tmp_path


def test_a_data_set_is_measured(now):
    scans = NoWScans(str(now / "data"))
    assert [picture.item for picture in scans.pictures] == [
        "S1/multiview_neutral/IMG_1", "S1/selfie/IMG.2", "S2/selfie/IMG_3",
    ]  # fmt: skip
    found = list(measure(pairs(scans, str(now / "found"))))
    (_, same), (_, egg), (_, missing) = found
    assert same is not None and float(same.max()) < 1e-3
    assert missing is None and egg is not None
    mesh = trimesh.load(now / "found/S1/selfie/IMG.2.ply", process=False)
    ball = trimesh.creation.icosphere(3, 80.0)
    scan = Scan(torch.tensor(ball.vertices.round(6)), torch.tensor(KEYPOINTS.round(6)))
    wanted = scan_distances(
        scan, torch.tensor(np.array(mesh.vertices)), torch.tensor(np.array(mesh.faces)), torch.tensor(KEYPOINTS / 80)
    )
    torch.testing.assert_close(egg, wanted, atol=1e-4, rtol=1e-4)
    rows = records(found, "mine")
    values = {(row.item, row.metric): row.value for row in rows}
    assert values["S1/selfie/IMG.2", "scan_median"] == pytest.approx(float(np.median(egg)))
    every = np.concatenate([same, egg])
    assert values["all", "scan_median_pooled"] == pytest.approx(np.median(every))
    assert values["all", "scan_sd_pooled"] == pytest.approx(every.std())
    assert values["all", "scan_missing"] == 1
    assert {row.subject for row in rows} == {"S1", ""}
    assert read_records(write_records(now / "metrics.csv", rows)) == rows
    assert scan_scores(egg)["scan_mean"] > 0.05


def test_pictures_with_scans(now, tmp_path):
    """Under the names that ``galatea align`` gives them, and in folders of their own."""
    given = {"scans": str(now / "data"), "path": str(tmp_path)}
    data = NoWDataModule(**given)
    assert isinstance(data, KnowsScan)
    for name in ("aligned/S1/selfie/IMG.2.png", f"{item_id('S1/selfie/IMG.2.jpg')}.png"):
        scan = data.scan_truth({"name": name})
        torch.testing.assert_close(scan.keypoints, torch.tensor(KEYPOINTS), atol=1e-4, rtol=0)
    with pytest.raises(UserError, match=r"IMG_9\.png is no picture of"):
        data.scan_truth({"name": "S1/selfie/IMG_9.png"})
    with pytest.raises(UserError, match="there is no such folder"):
        NoWDataModule(**{**given, "scans": str(now / "nothing")})


def test_wavefront_files(tmp_path):
    file = tmp_path / "a.obj"
    file.write_text("o x\nv 0 0 0\nv 1 0 0\nvt 0 0\nv 1 1 0\nv 0 1 0\nusemtl y\nf 1/1 2/1 3/1 4/1\nf -1 -2 -4\n")
    vertices, faces = read_obj(file)
    assert vertices.shape == (4, 3) and vertices.dtype == torch.float64
    assert faces.tolist() == [[0, 1, 2], [0, 2, 3], [3, 2, 0]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("f 1 2 3\n", "no vertices"),
        ("v 0 0 0\n", "no triangles"),
        ("v 0 0 zero\n", "line 1: 'v 0 0 zero' is no vertex or face"),
        ("v 0 0\n", "line 1"),
        ("v 0 0 nan\nf 1 1 1\n", "not finite"),
        ("v 0 0 0\nv 1 0 0\nf 1 2\n", "line 3"),
        ("v 0 0 0\nv 1 0 0\nf 1 2 3\n", "2 vertices and a triangle with vertex 3"),
        ("v 0 0 0\nf 1 -9 1\n", "line 2"),
        ("v 0 0 0\nf 0 1 1\n", "line 2: 'f 0 1 1' is no vertex or face"),
        ("v 0 0 0\nf 99999999999999999999 1 2\n", "line 2"),
        ("v 0 0 0\nf -99999999999999999999 1 2\n", "line 2"),
    ],
)
def test_damaged_wavefront_files(tmp_path, content, message):
    file = tmp_path / "a.obj"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_obj(file)


def test_damaged_keypoints(tmp_path):
    (tmp_path / "a.pp").write_text(picked(KEYPOINTS[:5]))
    with pytest.raises(UserError, match="must hold 7 points of three finite numbers: it has 5 x 3"):
        read_picked_points(tmp_path / "a.pp")
    (tmp_path / "b.pp").write_text(HEADER + '<point x="1" y="2"/>')
    with pytest.raises(UserError, match="a picked point has no place"):
        read_picked_points(tmp_path / "b.pp")
    (tmp_path / "c.txt").write_text("1 2 3\n4 5\n")
    with pytest.raises(UserError, match=r"c\.txt holds no points"):
        read_keypoints(tmp_path / "c.txt")
    np.save(tmp_path / "d.npy", KEYPOINTS[:, :2])
    with pytest.raises(UserError, match="it has 7 x 2"):
        read_keypoints(tmp_path / "d.npy")
    np.save(tmp_path / "e.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"e\.npy holds no points"):  # never unpickled
        read_keypoints(tmp_path / "e.npy")
    np.savez(tmp_path / "g.npz", KEYPOINTS)
    (tmp_path / "g.npz").rename(tmp_path / "g.npy")
    np.save(tmp_path / "h.npy", np.zeros((1, 3)))
    header = (tmp_path / "h.npy").read_bytes()
    claim = header.replace(b"(1, 3), }" + 16 * b" ", b"(%d, 3), }" % (1 << 55))
    assert len(claim) == len(header) and claim != header
    (tmp_path / "h.npy").write_bytes(claim)
    np.save(tmp_path / "i.npy", KEYPOINTS.astype(complex))
    (tmp_path / "j.txt").write_bytes(b"\xff\xfe")
    for name in ("g.npy", "h.npy", "i.npy", "j.txt"):
        with pytest.raises(UserError, match=rf"{name} holds no points: [^\n]+$"):
            read_keypoints(tmp_path / name)
    (tmp_path / "f.ply").write_text("ply\nnonsense")
    with pytest.raises(UserError, match=r"f\.ply is not a PLY file"):
        read_ply(tmp_path / "f.ply")


def test_incomplete_folders(now):
    with pytest.raises(UserError, match="there is no such folder"):
        NoWScans(str(now / "nowhere"))
    with pytest.raises(UserError, match=r"cannot read .*other\.txt"):
        NoWScans(str(now / "data"), "other.txt")
    (now / "data/bad.txt").write_text("IMG_1.jpg\n")
    with pytest.raises(UserError, match=r"bad\.txt, line 1: 'IMG_1\.jpg' is no SUBJECT/CHALLENGE/PICTURE"):
        NoWScans(str(now / "data"), "bad.txt")
    for bad in ("/etc/passwd.jpg", "a/../b/c.jpg", "a/b/..jpg", "a/b/IMG", "S1/sel\x07fie/IMG_1.jpg", r"a/C:\b/c.jpg"):
        (now / "data/bad.txt").write_text(f"{bad}\n")
        with pytest.raises(UserError, match=r"line 1: .* is no SUBJECT/CHALLENGE/PICTURE"):
            NoWScans(str(now / "data"), "bad.txt")
    (now / "data/none.txt").write_text("\n")
    with pytest.raises(UserError, match="lists no pictures"):
        NoWScans(str(now / "data"), "none.txt")
    scans = NoWScans(str(now / "data"))
    with pytest.raises(UserError, match=r"reconstructions .* there is no such folder"):
        next(pairs(scans, str(now / "nowhere")))
    np.save(now / "found/S1/multiview_neutral/IMG_1.npy", KEYPOINTS * [1, 0, 0])
    with pytest.raises(UserError, match=r"^S1/multiview_neutral/IMG_1: of a reconstruction: keypoints .* on one line"):
        list(measure(pairs(scans, str(now / "found"))))
    (now / "found/S1/selfie/IMG.2.txt").unlink()
    with pytest.raises(UserError, match=r"IMG\.2 has no keypoints"):
        list(pairs(scans, str(now / "found")))
    (now / "data/scans/S1/scan.obj").rename(now / "data/scans/S1/scan.stl")
    with pytest.raises(UserError, match=r"must hold one \*\.obj: it has no file"):
        NoWScans(str(now / "data")).scan("S1")
    with pytest.raises(UserError, match="no picture"):
        records([(scans.pictures[0], None)], "mine")
