"""Weights of TensorFlow Lite files, operation by operation; nothing in them is run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.errors import UserError
from models.zoo.family import ZooError

_TYPES = {0: np.float32, 1: np.float16}


def layers(content: bytes) -> list[list[Tensor]]:
    """The weights of every operation that has some, in order, laid out as torch's layers have them.

    A convolution's kernel is (outputs, inputs, height, width), a transposed one's (inputs, outputs, height, width),
    one for each channel (channels, 1, height, width); biases and the slopes of a PReLU are (channels,).

    Raises:
        UserError: when the package that reads such files is not installed.
        ZooError: for an operation with weights of another kind.
    """
    try:
        import tflite
    except ImportError as error:
        raise UserError("reading these networks takes the package tflite: pip install 'galatea[faces]'") from error

    model: Any = tflite.Model.GetRootAsModel(content, 0)
    graph = model.Subgraphs(0)
    constants: dict[int, np.ndarray] = {}
    for number in range(graph.TensorsLength()):
        tensor = graph.Tensors(number)
        data = model.Buffers(tensor.Buffer()).DataAsNumpy()
        if tensor.Type() in _TYPES and isinstance(data, np.ndarray):
            constants[number] = np.frombuffer(data.tobytes(), _TYPES[tensor.Type()]).reshape(tensor.ShapeAsNumpy())
    found = []
    for number in range(graph.OperatorsLength()):
        operator = graph.Operators(number)
        kind = model.OperatorCodes(operator.OpcodeIndex()).BuiltinCode()
        inputs, output = operator.InputsAsNumpy(), operator.OutputsAsNumpy()[0]
        weights = [constants[i] for i in inputs if i in constants]
        if not weights:
            continue
        match kind:
            case tflite.BuiltinOperator.DEQUANTIZE:
                constants[output] = weights[0]
            case tflite.BuiltinOperator.CONV_2D:
                found.append(_laid_out(weights, (0, 3, 1, 2)))
            case tflite.BuiltinOperator.DEPTHWISE_CONV_2D | tflite.BuiltinOperator.CUSTOM:  # transposed convolutions
                found.append(_laid_out(weights, (3, 0, 1, 2)))
            case tflite.BuiltinOperator.PRELU:
                found.append([torch.from_numpy(weights[0].astype(np.float32).reshape(-1))])
            case _:
                raise ZooError(f"operation {number} of the file has weights, and is of the kind {kind}")
    return found


def _laid_out(weights: list[np.ndarray], axes: tuple[int, ...]) -> list[Tensor]:
    kernel, *biases = (torch.from_numpy(array.astype(np.float32)) for array in weights)
    return [kernel.permute(axes).contiguous(), *biases]
