"""Pickles that name things which are not there, as official files do, and malicious ones."""

from __future__ import annotations

import io
import pickle
from typing import Any


class Asks:
    """Pickled as: call MODULE.NAME with arguments, then set the state."""

    def __init__(self, module: str, name: str, arguments: Any, state: Any = None) -> None:
        self.module, self.name, self.arguments, self.state = module, name, arguments, state


class _Name(Asks):
    def __init__(self, module: str, name: str) -> None:
        super().__init__(module, name, ())


class _Pickler(pickle._Pickler):
    """Writes a call whether or not there is such a thing in this process."""

    def save(self, value, save_persistent_id=True):
        if isinstance(value, _Name):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Asks) and id(value) not in self.memo:
            self.save(_Name(value.module, value.name))
            self.save(tuple(value.arguments))
            self.write(pickle.REDUCE)
            self.memoize(value)
            if value.state is not None:
                self.save(value.state)
                self.write(pickle.BUILD)
        else:
            super().save(value, save_persistent_id)


def dumps(content: Any, protocol: int = 2) -> bytes:
    """As ``pickle.dumps``, of objects that may hold :class:`Asks`."""
    stream = io.BytesIO()
    _Pickler(stream, protocol).dump(content)
    return stream.getvalue()


def persistent(class_name: str, state: Any) -> Asks:
    """An object of EG3D's ``torch_utils.persistence``."""
    source = "import os\nos.system('touch ran')\n"
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
    return Asks("torch_utils.persistence", "_reconstruct_persistent_obj", [meta])


def network(class_name: str, state: dict[str, Any], init_kwargs: Any, attributes: dict[str, Any]) -> Asks:
    """A network as EG3D pickles it: a tree of objects with their parameters."""

    def module(prefix: str) -> dict[str, Any]:
        inside = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        children = dict.fromkeys(key.split(".")[0] for key in inside if "." in key)
        return {
            "training": False,
            "_parameters": {key: tensor for key, tensor in inside.items() if "." not in key},
            "_buffers": {},
            "_non_persistent_buffers_set": set(),
            "_modules": {name: persistent("Layer", module(f"{prefix}{name}.")) for name in children},
        }

    return persistent(class_name, {**module(""), "_init_args": (), "_init_kwargs": init_kwargs, **attributes})
