"""Layered meshes: what a viewer blends is what the generator paints."""

import json
import math
import struct

import pytest
import torch
import trimesh

from models import artifact
from models.errors import UserError
from models.rendering.baked import bake
from models.rendering.layers import layers_of, write_layers
from models.rendering.raster import draw_layers


@pytest.fixture(scope="module")
def shipped():
    return artifact.load("assets/prior").module("generator").requires_grad_(False)


@pytest.fixture(scope="module")
def ws(shipped):
    return shipped.mapping(shipped.sample_z(4, torch.Generator().manual_seed(3)), truncation=0.7)[2]


@pytest.fixture(scope="module")
def layers(shipped, ws):
    return layers_of(bake(shipped, ws, 64), 64)


def test_drawn_as_a_viewer_would_they_are_the_synthesis(shipped, ws, layers):
    camera = shipped.rig.camera(0.5)
    seen, painted = draw_layers(layers, camera, 64, supersample=1), shipped.synthesis(ws, camera)
    white = painted.image + (1 - painted.alpha) * (1 - shipped.backdrop(ws, 64))
    assert 10 * math.log10(4 / (seen.image - white).square().mean()) > 21
    assert ((seen.alpha > 0.5) != (painted.alpha > 0.5)).float().mean() < 0.03


def test_they_go_from_the_inside_out_and_face_outwards(layers):
    assert [layer.core for layer in layers] == [True] + [False] * (len(layers) - 1)
    sizes = []
    for layer in layers:
        a, b, c = layer.vertices[layer.faces].unbind(1)
        outwards = torch.tensor([1.0, 0.0, 1.0]) * ((a + b + c) / 3 - torch.tensor([0.0, 0.0, -0.1]))
        assert (((torch.linalg.cross(b - a, c - a) * outwards).sum(1)) > 0).float().mean() > 0.9
        face = layer.vertices[layer.vertices[:, :2].abs().amax(1) < 0.1]  # before the nose's root
        sizes.append(float(face[:, 2].max()) if len(face) else None)
    found = [size for size in sizes[1:] if size is not None]
    assert found == sorted(found) and len(found) > 5
    assert layers[0].faces.shape[0] > 1000


def test_the_file_holds_them_in_order(layers, tmp_path):
    write_layers(tmp_path / "head.glb", layers)
    content = (tmp_path / "head.glb").read_bytes()
    (length,) = struct.unpack("<I", content[12:16])
    tree = json.loads(content[20 : 20 + length])
    assert [mesh["name"] for mesh in tree["meshes"]][:2] == ["core", "manifold_01"]
    assert [m["alphaMode"] for m in tree["materials"]] == ["MASK"] + ["BLEND"] * (len(layers) - 1)
    assert all("KHR_materials_unlit" in m["extensions"] and not m.get("doubleSided") for m in tree["materials"])
    scene = trimesh.load(tmp_path / "head.glb")
    assert len(scene.geometry) == len(layers)
    for layer, mesh in zip(layers, scene.geometry.values(), strict=True):
        assert mesh.vertices == pytest.approx(layer.vertices.numpy(), abs=1e-6)
        assert (mesh.visual.uv * [1, -1] + [0, 1]) == pytest.approx(layer.uv.numpy(), abs=1e-6)
        picture = mesh.visual.material.baseColorTexture
        assert picture.mode == "RGBA" and picture.size == (64, 64)
        red = ((layer.texture[0, 40, 20] + 1) / 2).clamp(0, 1)
        assert abs(picture.getpixel((20, 40))[0] / 255 - float(red)) < 0.005


def test_air_has_no_layers(shipped, ws, tmp_path):
    head = bake(shipped, ws, 16)
    head.textures[:, 3] = 0
    assert layers_of(head, 16) == []
    with pytest.raises(UserError, match="transparent throughout"):
        write_layers(tmp_path / "air.glb", [])
    assert not list(tmp_path.iterdir())
