"""Weights of a TensorFlow Lite file that is made here, against NumPy's transposes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.zoo.family import ZooError
from models.zoo.tflite import layers

tflite = pytest.importorskip("tflite", reason="the extra faces is not installed")
flatbuffers = pytest.importorskip("flatbuffers")
KIND = tflite.BuiltinOperator


def vector(builder, start, numbers: list[int], put) -> int:
    start(builder, len(numbers))
    for number in reversed(numbers):
        put(number)
    return builder.EndVector()


def model(tensors: list[np.ndarray | tuple[int, ...]], operations: list[tuple[int, list[int], int]]) -> bytes:
    """A graph of ``tensors``, constants or just shapes, and of (kind, inputs, output)."""
    builder = flatbuffers.Builder(1024)
    buffers, entries, codes, steps = [], [], [], []
    for tensor in tensors:
        constant = isinstance(tensor, np.ndarray)
        data = builder.CreateNumpyVector(np.frombuffer(tensor.tobytes(), np.uint8)) if constant else None
        tflite.BufferStart(builder)
        if data is not None:
            tflite.BufferAddData(builder, data)
        buffers.append(tflite.BufferEnd(builder))
        sides = list(tensor.shape if constant else tensor)
        shape = vector(builder, tflite.TensorStartShapeVector, sides, builder.PrependInt32)
        tflite.TensorStart(builder)
        tflite.TensorAddShape(builder, shape)
        tflite.TensorAddType(builder, 1 if constant and tensor.dtype == np.float16 else 0)
        tflite.TensorAddBuffer(builder, len(buffers) - 1)
        entries.append(tflite.TensorEnd(builder))
    for number, (kind, inputs, output) in enumerate(operations):
        tflite.OperatorCodeStart(builder)
        tflite.OperatorCodeAddDeprecatedBuiltinCode(builder, kind)  # where those below 127 are
        codes.append(tflite.OperatorCodeEnd(builder))
        given = vector(builder, tflite.OperatorStartInputsVector, inputs, builder.PrependInt32)
        made = vector(builder, tflite.OperatorStartOutputsVector, [output], builder.PrependInt32)
        tflite.OperatorStart(builder)
        tflite.OperatorAddOpcodeIndex(builder, number)
        tflite.OperatorAddInputs(builder, given)
        tflite.OperatorAddOutputs(builder, made)
        steps.append(tflite.OperatorEnd(builder))
    put = builder.PrependUOffsetTRelative
    own, order = (
        vector(builder, tflite.SubGraphStartTensorsVector, entries, put),
        vector(builder, tflite.SubGraphStartOperatorsVector, steps, put),
    )
    tflite.SubGraphStart(builder)
    tflite.SubGraphAddTensors(builder, own)
    tflite.SubGraphAddOperators(builder, order)
    graph = tflite.SubGraphEnd(builder)
    parts = [
        vector(builder, tflite.ModelStartSubgraphsVector, [graph], put),
        vector(builder, tflite.ModelStartOperatorCodesVector, codes, put),
        vector(builder, tflite.ModelStartBuffersVector, buffers, put),
    ]
    tflite.ModelStart(builder)
    tflite.ModelAddSubgraphs(builder, parts[0])
    tflite.ModelAddOperatorCodes(builder, parts[1])
    tflite.ModelAddBuffers(builder, parts[2])
    builder.Finish(tflite.ModelEnd(builder), b"TFL3")
    return bytes(builder.Output())


def test_weights_come_in_order_and_in_torchs_layout() -> None:
    draws = np.random.default_rng(0)
    half = draws.normal(size=(4, 3, 2, 5)).astype(np.float16)
    bias, slopes, each, back = (
        draws.normal(size=shape).astype(np.float32) for shape in ((4,), (1, 1, 4), (1, 3, 3, 4), (1, 2, 2, 4))
    )
    content = model(
        [(1, 8, 8, 5), half, (4, 3, 2, 5), bias, (1, 8, 8, 4), slopes, each, back],
        [
            (KIND.DEQUANTIZE, [1], 2),
            (KIND.CONV_2D, [0, 2, 3], 4),
            (KIND.PRELU, [4, 5], 4),
            (KIND.RELU, [4], 4),
            (KIND.DEPTHWISE_CONV_2D, [4, 6], 4),
            (KIND.CUSTOM, [4, 7], 4),
        ],
    )
    convolution, prelu, depthwise, transposed = layers(content)
    np.testing.assert_array_equal(convolution[0].numpy(), half.astype(np.float32).transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(convolution[1].numpy(), bias)
    assert convolution[0].dtype == torch.float32
    np.testing.assert_array_equal(prelu[0].numpy(), slopes[0, 0])
    np.testing.assert_array_equal(depthwise[0].numpy(), each.transpose(3, 0, 1, 2))
    np.testing.assert_array_equal(transposed[0].numpy(), back.transpose(3, 0, 1, 2))


def test_weights_of_another_kind_of_operation_are_refused() -> None:
    content = model([(1, 4), np.zeros((4, 4), np.float32)], [(KIND.FULLY_CONNECTED, [0, 1], 0)])
    with pytest.raises(ZooError, match="operation 0 of the file has weights, and is of the kind 9"):
        layers(content)
