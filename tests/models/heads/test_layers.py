"""Layered meshes: what a viewer blends is what the generator paints."""

import json
import math
import struct

import numpy as np
import pytest
import torch
import trimesh
from torch.nn import functional as F

from models import artifact
from models.errors import UserError
from models.heads.layers import layers_of
from models.rendering.layers import write_layers
from models.rendering.raster import draw_layers


@pytest.fixture(scope="module")
def shipped():
    return artifact.load("assets/prior").module("generator").requires_grad_(False)


@pytest.fixture(scope="module")
def ws(shipped):
    return shipped.mapping(shipped.sample_z(4, torch.Generator().manual_seed(3)), truncation=0.7)[2]


@pytest.fixture(scope="module")
def layers(shipped, ws):
    return layers_of(shipped.bake(ws, 64), 64)


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
    """What blends is one mesh, whose triangles come layer after layer: no viewer sorts those."""
    write_layers(tmp_path / "head.glb", layers)
    content = (tmp_path / "head.glb").read_bytes()
    (length,) = struct.unpack("<I", content[12:16])
    tree = json.loads(content[20 : 20 + length])
    assert [mesh["name"] for mesh in tree["meshes"]] == ["core", "manifolds"]
    assert [m["alphaMode"] for m in tree["materials"]] == ["MASK", "BLEND"]
    assert all("KHR_materials_unlit" in m["extensions"] and not m.get("doubleSided") for m in tree["materials"])
    core, manifolds = trimesh.load(tmp_path / "head.glb").geometry.values()
    assert core.vertices == pytest.approx(layers[0].vertices.numpy(), abs=1e-6)
    picture = manifolds.visual.material.baseColorTexture
    assert picture.mode == "RGBA" and min(picture.size) > 64
    texels = torch.tensor(np.asarray(picture), dtype=torch.float32).permute(2, 0, 1)[None] / 255
    vertex = face = 0
    for layer in layers[1:]:
        vertices, faces = manifolds.vertices[vertex:][: len(layer.vertices)], manifolds.faces[face:][: len(layer.faces)]
        assert vertices == pytest.approx(layer.vertices.numpy(), abs=1e-6)
        assert (faces == layer.faces.numpy() + vertex).all()
        uv = torch.tensor(manifolds.visual.uv[vertex:][: len(vertices)] * [1, -1] + [0, 1], dtype=torch.float32)
        found, own = (
            F.grid_sample(x, place[None, None] * 2 - 1, align_corners=False, padding_mode="border")[0, :, 0]
            for x, place in ((texels, uv), (layer.texture[None], layer.uv))
        )
        assert (found[:3] - (own[:3] + 1) / 2).abs().max() < 0.01
        assert (found[3] - own[3]).abs().max() < 0.01
        vertex, face = vertex + len(vertices), face + len(faces)
    assert vertex == len(manifolds.vertices) and face == len(manifolds.faces)


def test_air_has_no_layers(shipped, ws, tmp_path):
    head = shipped.bake(ws, 16)
    head.textures[:, 3] = 0
    assert layers_of(head, 16) == []
    with pytest.raises(UserError, match="transparent throughout"):
        write_layers(tmp_path / "air.glb", [])
    assert not list(tmp_path.iterdir())
