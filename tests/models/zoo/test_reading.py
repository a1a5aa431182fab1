"""Official files are read as data: what they hold is found, and nothing they ask for is run."""

import argparse
import collections
import copyreg
import io
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from models.errors import UserError
from models.zoo.family import ZooError
from models.zoo.reading import read
from tests.models.zoo.pickling import Asks, dumps, persistent

WEIGHT = torch.arange(12.0).reshape(3, 4)


def save(content, path, old=False):
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    return path


def same(ours, theirs):
    assert list(ours) == list(theirs)
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key])


@pytest.fixture
def official_code():
    """Modules of the names that official pickles refer to; gone when the files are read."""
    before = set(sys.modules)

    def define(module, **members):
        parent = ""
        for part in module.split("."):
            parent = f"{parent}.{part}".lstrip(".")
            sys.modules.setdefault(parent, types.ModuleType(parent))
        for name, member in members.items():
            member.__module__, member.__qualname__ = module, name
            setattr(sys.modules[module], name, member)

    def forget():
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("training", "torch_utils", "torch_ema", "dnnlib"):
                del sys.modules[name]

    yield types.SimpleNamespace(define=define, forget=forget)
    forget()


class TestTorchFiles:
    @pytest.mark.parametrize("old", [False, True])
    def test_states_and_values(self, tmp_path, old):
        state = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).state_dict()
        state["view"] = WEIGHT.t()[1:]
        content = {
            "g_ema": state,
            "latent_avg": WEIGHT[0],
            "args": argparse.Namespace(size=64, betas=(0, 0.99), name="ffhq"),
            "g_optim": {"state": {0: {"step": 1, "exp_avg": WEIGHT}}, "param_groups": [{"lr": 0.001, "params": [0]}]},
        }
        official = read(save(content, tmp_path / "a.pt", old))
        assert list(official.states) == ["g_ema"]
        same(official.states["g_ema"], state)
        assert torch.equal(official.values["latent_avg"], WEIGHT[0])
        assert official.values["args"] == {"size": 64, "betas": (0, 0.99), "name": "ffhq"}
        assert official.values["g_optim"]["param_groups"][0]["lr"] == 0.001

    @pytest.mark.parametrize("old", [False, True])
    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]
    )
    def test_bare_state_of_any_type(self, tmp_path, old, dtype):
        state = {"a": WEIGHT.to(dtype), "b": torch.zeros((), dtype=dtype), "c": torch.zeros(0, 3, dtype=dtype)}
        state["tied"] = state["a"]
        official = read(save(state, tmp_path / "a.pth", old))
        assert list(official.states) == [""]
        same(official.states[""], state)

    def test_agrees_with_torch(self, tmp_path):
        file = save({"x": {"w": nn.Parameter(WEIGHT)}, "sizes": [WEIGHT.shape, torch.float16]}, tmp_path / "a.pt")
        official = read(file)
        same(official.states["x"], torch.load(file, weights_only=True)["x"])
        assert official.values["sizes"] == [(3, 4), torch.float16]

    def test_numpy(self, tmp_path):
        content = {"a": {"w": WEIGHT}, "n": np.arange(6).reshape(2, 3).T, "b": np.float32(0.5), "c": np.array(2, ">i2")}
        for protocol in (2, 4, 5):
            torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol)
            values = read(tmp_path / "a.pt").values
            assert values["n"].tolist() == [[0, 3], [1, 4], [2, 5]]
            assert values["b"] == 0.5
            assert values["c"].item() == 2
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(content["n"].copy(), 5))
        with pytest.raises(ZooError, match="holds a Tensor where a dictionary"):
            read(tmp_path / "a.pkl")

    def test_whole_average(self, tmp_path, official_code):
        class ExponentialMovingAverage:
            def __init__(self):
                self.decay, self.num_updates, self.shadow_params = 0.999, 3, [WEIGHT, WEIGHT[0]]

        official_code.define("torch_ema.ema", ExponentialMovingAverage=ExponentialMovingAverage)
        save(ExponentialMovingAverage(), tmp_path / "ema.pth")
        official_code.forget()
        official = read(tmp_path / "ema.pth")
        assert official.states == {}
        assert official.values["decay"] == 0.999
        assert torch.equal(official.values["shadow_params"][1], WEIGHT[0])


class TestNetworksPickledWhole:
    @pytest.fixture
    def file(self, tmp_path, official_code):
        class EasyDict(dict):
            pass

        class OSGDecoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(nn.Linear(4, 3), nn.Softplus())

        def _reconstruct_persistent_obj(meta):
            raise AssertionError("never called by the reader")

        class Layer(nn.Module):
            def __init__(self, **options):
                super().__init__()
                self._init_args, self._init_kwargs = (), EasyDict(options)
                self.rendering_kwargs = options
                self.noise = nn.Parameter(WEIGHT[1])
                self.register_buffer("w_avg", WEIGHT[0])
                self.register_buffer("scratch", WEIGHT, persistent=False)
                self.absent = None

            def __reduce__(self):
                source = "import pathlib; pathlib.Path('ran').touch()"
                meta = {"type": "class", "version": 6, "module_src": source, "class_name": "TriPlaneGenerator"}
                return _reconstruct_persistent_obj, ({**meta, "state": super().__reduce__()[2]},)

        official_code.define("dnnlib.util", EasyDict=EasyDict)
        official_code.define("training.triplane", OSGDecoder=OSGDecoder)
        official_code.define("torch_utils.persistence", _reconstruct_persistent_obj=_reconstruct_persistent_obj)
        network = Layer(z_dim=512, superresolution_module="training.superresolution.SuperresolutionHybrid8XDC")
        network.backbone, network.decoder = Layer(channel_base=32768), OSGDecoder()
        (tmp_path / "a.pkl").write_bytes(
            pickle.dumps({"training_set_kwargs": EasyDict(path="x.zip"), "G": None, "G_ema": network})
        )
        state = {key: value.detach() for key, value in network.state_dict().items()}
        official_code.forget()
        return tmp_path / "a.pkl", state

    def test_state_and_arguments(self, file, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        official = read(file[0])
        assert not (tmp_path / "ran").exists()
        assert list(official.states) == ["G_ema"]
        same(official.states["G_ema"], file[1])
        assert list(official.states["G_ema"]) == [
            "noise", "w_avg", "backbone.noise", "backbone.w_avg", "decoder.net.0.weight", "decoder.net.0.bias",
        ]  # fmt: skip
        value = official.values["G_ema"]
        assert value["class_name"] == "TriPlaneGenerator"
        assert value["init_kwargs"]["z_dim"] == 512
        assert value["attributes"]["rendering_kwargs"]["superresolution_module"].endswith("8XDC")
        assert official.values["training_set_kwargs"] == {"path": "x.zip"}

    def test_a_network_that_holds_itself(self, tmp_path, monkeypatch):
        monkeypatch.setattr("models.zoo.reading._TOO_MANY", 1000)
        modules: dict = {"_parameters": {}, "_buffers": {}, "_modules": {}}
        content = {"g": Asks("torch.nn.modules.container", "Sequential", (), modules)}
        modules["_modules"]["again"] = content["g"]
        (tmp_path / "a.pkl").write_bytes(dumps(content))
        with pytest.raises(ZooError, match="a network in it holds itself"):
            read(tmp_path / "a.pkl")


class TestSeveralFiles:
    def test_names(self, tmp_path):
        for folder in ("identity", "expression"):
            (tmp_path / folder).mkdir()
            save({"fc.weight": WEIGHT}, tmp_path / folder / "vae.pth")
        save({"decay": 0.9, "shadow_params": [WEIGHT]}, tmp_path / "ema.pth")
        save({"g_ema": {"w": WEIGHT}}, tmp_path / "ffhq1024x1024.pt")
        names = ("identity/vae.pth", "expression/vae.pth", "ema.pth", "ffhq1024x1024.pt")
        official = read(*(tmp_path / name for name in names))
        assert list(official.states) == ["identity/vae", "expression/vae", "ffhq1024x1024/g_ema"]
        assert list(official.values) == ["ema/decay", "ema/shadow_params"]

    def test_twice_the_same(self, tmp_path):
        file = save({"fc.weight": WEIGHT}, tmp_path / "vae.pth")
        with pytest.raises(ZooError, match="two of the files have the same name and folder name"):
            read(file, file)


def test_safetensors(tmp_path):
    safetensors.torch.save_file({"w": WEIGHT}, tmp_path / "a.safetensors", {"size": "64"})
    official = read(tmp_path / "a.safetensors")
    same(official.states[""], {"w": WEIGHT})
    assert official.values == {"size": "64"}
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-5])
    with pytest.raises(ZooError, match=r"b\.safetensors is damaged or cut short"):
        read(tmp_path / "b.safetensors")


# ------------------------------------------------------------------------------------------------------- poison


def zipped(content):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return stream.getvalue()


def legacy(content, place=3):
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts: list = [0x1950A86A20F9469CFC6C, 1001, system, {}, []]
    parts[place] = content
    return b"".join(dumps(part) for part in parts)


CONTAINERS = {
    "zip": lambda call: zipped(dumps({"w": call})),
    "legacy": lambda call: legacy({"w": call}),
    "legacy_system": lambda call: legacy(call, 2),
    "legacy_keys": lambda call: legacy(call, 4),
    "pickle": lambda call: dumps({"w": call}),
    "pickle_protocol_0": lambda call: b"\x80\x02" + dumps({"w": call}, 0),
    "persistence": lambda call: dumps({"G_ema": persistent("G", {"_parameters": call})}),
    "persistence_meta": lambda call: dumps(Asks("torch_utils.persistence", "_reconstruct_persistent_obj", [call])),
    "namespace": lambda call: zipped(dumps({"args": Asks("argparse", "Namespace", (), {"size": call})})),
    "storage": lambda call: dumps({"w": Asks("torch.storage", "_load_from_bytes", [zipped(dumps(call))])}),
    "legacy_storage": lambda call: dumps({"w": Asks("torch.storage", "_load_from_bytes", [legacy(call)])}),
    "tensor_of_type": lambda call: dumps({"w": Asks("torch._tensor", "_rebuild_from_type_v2", [call, 0, (), 0])}),
    "key": lambda call: dumps(Asks("collections", "OrderedDict", [[[call, 1]]])),
}


class TestPoison:
    @pytest.mark.parametrize("container", CONTAINERS)
    @pytest.mark.parametrize(
        ("module", "name", "argument"),
        [
            ("os", "system", "touch {}"),
            ("posix", "system", "touch {}"),
            ("builtins", "eval", "open({!r}, 'w')"),
            ("__builtin__", "exec", "open({!r}, 'w')"),
            ("subprocess", "check_call", ["touch", "{}"]),
            ("pathlib", "Path.touch", "{}"),
            ("torch", "load", "{}"),
            ("torch.serialization", "load", "{}"),
        ],
    )
    def test_nothing_is_run(self, tmp_path, container, module, name, argument):
        marker = tmp_path / "ran"
        if isinstance(argument, list):
            argument = [part.format(marker) for part in argument]
        else:
            argument = argument.format(str(marker))
        file = tmp_path / "a.pt"
        file.write_bytes(CONTAINERS[container](Asks(module, name, [argument])))
        with pytest.raises(ZooError, match="which is not data: nothing of it was run") as caught:
            read(file)
        message = str(caught.value)
        assert message.startswith(f"{file}: it asks for '") and "\n" not in message
        assert not marker.exists()

    def test_the_poison_works(self, tmp_path):
        """Of the same bytes, Python's own reader runs the command: the tests above test something."""
        marker = tmp_path / "ran"
        pickle.loads(dumps({"w": Asks("os", "system", [f"touch {marker}"])}))
        assert marker.exists()

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_crafted_reduce(self, tmp_path, protocol):
        class Crafted:
            def __reduce__(self):
                return eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

        for old in (False, True):
            torch.save(
                {"w": Crafted()}, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=not old
            )
            with pytest.raises(ZooError, match=r"a\.pt: it asks for 'builtins.eval'"):
                read(tmp_path / "a.pt")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name", ["getattr", "__import__", "type", "open", "compile", "globals"])
    def test_builtins(self, tmp_path, name):
        (tmp_path / "a.pkl").write_bytes(dumps({"w": Asks("builtins", name, ["os"])}))
        with pytest.raises(ZooError, match=f"asks for 'builtins.{name}'"):
            read(tmp_path / "a.pkl")

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (pickle.GLOBAL + b"collections\nOrderedDict\n}\x8c\x06__eq__K\x01sb.", "sets attributes of a type"),
            (pickle.GLOBAL + b"torch.storage\n_load_from_bytes\n}b.", "sets attributes of a function"),
            (pickle.GLOBAL + b"copyreg\n_reconstructor\n(cos\nsystem\nNNtR.", "asks for 'os.system'"),
            (b"(S'touch ran'\nios\nsystem\n.", "asks for 'os.system'"),
            (b"(cos\nsystem\nS'touch ran'\no.", "asks for 'os.system'"),
            (b"\x8c\x02os\x8c\x06system\x93.", "asks for 'os.system'"),
            (b"\x82\x01.", "extensions"),
            (b"Pstorage\n.", "refers to something outside"),
            (b"K\x01Q.", "refers to something outside"),
        ],
    )
    def test_other_ways_out(self, tmp_path, content, match):
        copyreg.add_extension("os", "system", 1)
        try:
            (tmp_path / "a.pkl").write_bytes(b"\x80\x04" + content)
            with pytest.raises(ZooError, match=match):
                read(tmp_path / "a.pkl")
        finally:
            copyreg.remove_extension("os", "system", 1)


# ------------------------------------------------------------------------------------------------ bombs and damage


def tensor_call(storage, size, stride, offset=0):
    return Asks("torch._utils", "_rebuild_tensor_v2", [storage, offset, size, stride, False, {}])


SMALL = Asks("torch.storage", "_load_from_bytes", [b""])


def storage_bytes(elements, claimed):
    """A legacy file of one storage that claims other sizes."""
    keys = b"\x80\x02](X\x01\x00\x00\x000e."
    pid = b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    pid += pickle.dumps(claimed, 2)[2:-1] + b"NtQ."
    return legacy({})[: -len(dumps({}) + dumps([]))] + pid + keys + struct.pack("<q", elements) + bytes(4 * elements)


class TestBombs:
    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62), "damaged or cut short"),
            (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x", "damaged or cut short"),
            (b"\x80\x05\x96" + struct.pack("<Q", 1 << 62) + b"x", "damaged or cut short"),
            (b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"x", "damaged or cut short"),
            (b"\x80\x02Nr\xff\xff\xff\xff.", "holds a NoneType"),
            (b"\x80\x02I" + b"9" * 100_000 + b"\n.", "damaged or cut short"),
            (b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s.", "uses a tuple as a key"),
            (b"\x80\x04\x8f(" + b")" + b"\x85" * 200_000 + b"\x90.", "uses a tuple as a key"),
            (b"\x80\x04(" + b")" + b"\x85" * 200_000 + b"\x91.", "uses a tuple as a key"),
            (dumps(Asks("builtins", "bytearray", [1 << 40])), "damaged or cut short"),
            (dumps(Asks("builtins", "set", [range(3)])), "asks for 'builtins.(x?range)'"),
            (dumps({"w": tensor_call(SMALL, (1 << 40,), (0,))}), "damaged or cut short"),
            (dumps({"w": Asks("numpy", "dtype", ["O"])}), "only numbers are read"),
            (dumps({"w": Asks("numpy", "dtype", ["V8"])}), "only numbers are read"),
            (dumps({"w": Asks("_codecs", "encode", ["x", "punycode"])}), "another encoding"),
        ],
        ids=range(15),
    )
    def test_claims(self, tmp_path, content, match):
        (tmp_path / "a.pkl").write_bytes(content)
        with pytest.raises(ZooError, match=match) as caught:
            read(tmp_path / "a.pkl")
        assert len(str(caught.value)) < 400

    def test_deep_lists(self, tmp_path):
        content = b"\x80\x02}X\x01\x00\x00\x00x" + b"]" * 200_000 + b"a" * 199_999 + b"s."
        (tmp_path / "a.pkl").write_bytes(content)
        assert isinstance(read(tmp_path / "a.pkl").values["x"], list)

    def test_copies(self, tmp_path):
        text = "x" * 500_000
        calls = [Asks("_codecs", "encode", [text, "latin1"]) for _ in range(10)]
        (tmp_path / "a.pkl").write_bytes(dumps({"w": calls}))
        with pytest.raises(ZooError, match="copies its parts over and over"):
            read(tmp_path / "a.pkl")

    @pytest.mark.parametrize(("claimed", "match"), [(1 << 40, "more numbers than it has bytes"), (-1, "more numbers")])
    def test_storages_of_old_files(self, tmp_path, claimed, match):
        (tmp_path / "a.pt").write_bytes(storage_bytes(3, claimed))
        with pytest.raises(ZooError, match=match):
            read(tmp_path / "a.pt")

    @pytest.mark.parametrize(
        ("size", "stride", "offset", "match"),
        [
            ((1 << 40,), (0,), 0, "a tensor claims more numbers than its storage has"),
            ((5,), (1,), 0, "out of bounds"),
            ((3,), (1,), 1, "out of bounds"),
            ((3,), (-1,), 2, "damaged"),
            (((1, 2), 1 << 40), (1, 1), 0, "a tensor claims more"),
        ],
    )
    def test_tensors(self, tmp_path, size, stride, offset, match):
        storage = Asks("torch.storage", "_load_from_bytes", [storage_bytes(3, 3)])
        (tmp_path / "a.pkl").write_bytes(dumps({"w": tensor_call(storage, (3,), (1,))}, 4))
        assert read(tmp_path / "a.pkl").states[""]["w"].tolist() == [0, 0, 0]
        (tmp_path / "a.pkl").write_bytes(dumps({"w": tensor_call(storage, size, stride, offset)}, 4))
        with pytest.raises(ZooError, match=match):
            read(tmp_path / "a.pkl")

    def test_zip_bomb(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(10_000_000))
        with pytest.raises(ZooError, match="unpacks to more than its size"):
            read(tmp_path / "a.pt")


class TestDamage:
    @pytest.mark.parametrize("old", [False, True])
    def test_cut_anywhere(self, tmp_path, old):
        whole = save({"g_ema": collections.OrderedDict(w=WEIGHT), "latent_avg": WEIGHT[0]}, tmp_path / "a.pt", old)
        content = whole.read_bytes()
        for length in range(0, len(content), 7):
            (tmp_path / "b.pt").write_bytes(content[:length])
            with pytest.raises(ZooError, match=r"b\.pt"):
                read(tmp_path / "b.pt")

    @pytest.mark.parametrize("old", [False, True])
    def test_bytes_changed(self, tmp_path, old):
        content = bytearray(save({"g": {"w": WEIGHT}, "n": np.arange(3)}, tmp_path / "a.pt", old).read_bytes())
        draws = np.random.default_rng(0)
        for _ in range(100):
            damaged = bytearray(content)
            for place in draws.integers(0, len(content), 4):
                damaged[place] = draws.integers(256)
            (tmp_path / "b.pt").write_bytes(damaged)
            try:
                read(tmp_path / "b.pt")  # what only changes a number cannot be known
            except ZooError as error:
                assert "\n" not in str(error)

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (b"", "is empty"),
            (b"some text\n", "is not a torch file, a pickle or safetensors"),
            (b"<!DOCTYPE html><html>", "is a web page: the download went wrong"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
            (pickle.dumps([1]), "holds a list where a dictionary of weights is expected"),
            (zipped(b"")[:10] + b"x", "damaged or cut short"),
            (struct.pack("<Q", 1 << 60) + b'{"w": 1}', "damaged or cut short"),
        ],
    )
    def test_other_files(self, tmp_path, content, match):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(ZooError, match=match):
            read(tmp_path / "a.pt")

    def test_no_file(self, tmp_path):
        with pytest.raises(ZooError, match="is a folder, not a file of weights"):
            read(tmp_path)
        with pytest.raises(UserError, match=r"cannot read .*: No such file"):
            read(tmp_path / "a.pt")

    def test_archives_that_are_not_torch_files(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("readme.txt", "text")
        with pytest.raises(ZooError, match="a zip archive, but not one of torch"):
            read(Path(tmp_path / "a.pt"))
