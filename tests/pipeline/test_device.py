import pytest
import torch

from vivit.pipeline.device import autocast, resolve_device, resolve_precision
from vivit.pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("precision", "message"), [("float8", "must be auto, float32"), ("float16", "float16 needs a GPU")]
)
def test_a_precision_that_cannot_work_is_refused(precision: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_precision(precision, torch.device("cpu"))


@pytest.mark.parametrize("name", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{name}' cannot be used .*: pass auto, cpu or cuda"):
        resolve_device(name)


def test_auto_is_float32_on_the_cpu() -> None:
    assert resolve_precision("auto", torch.device("cpu")) == "float32"


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_matrix_products_run_in_the_precision_asked_for(precision: str, dtype: torch.dtype) -> None:
    matrix = torch.ones(2, 2)
    with autocast(torch.device("cpu"), precision):
        assert (matrix @ matrix).dtype == dtype
