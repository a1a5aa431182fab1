"""The order of the tests, and where those run that are marked ``gpu``."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--device cpu`` shows that the tests marked ``gpu`` work; it is not what they are for."""
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="where tests marked gpu run")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Of a test marked ``gpu``, which is skipped where it is not there. fp32 is fp32."""
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first: the last one to finish decides how long two workers take."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
