"""The example in the documentation runs as it stands, but for its URL and its length."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "python-api.md"


def test_the_documented_example_runs(whole_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    for documented, ours in (("s3://bucket/imagenet/train", str(whole_dataset)), ("batch.step == 2000", "True")):
        assert code.count(documented) == 1
        code = code.replace(documented, ours)
    names: dict[str, Any] = {}
    exec(compile(code, DOCUMENT.name, "exec"), names)
    assert capsys.readouterr().out == "28 ('100%25', 'cat', 'hot dog', 'ünï.d')\n"
    batch = names["batch"]
    assert (batch.step, batch.micro_step, batch.num_micro_steps) == (1000, 0, 1)
    for name, shape in re.findall(r"batch\.(\w+)  # \[([B\d, ]+)\]", code):
        sizes = [128 if size == "B" else int(size) for size in shape.split(", ")]  # half of the global batch
        assert list(getattr(batch, name).shape) == sizes, name
    assert batch.sample_ids.tolist() == names["dataset"].step_sample_ids(names["config"], 1000)[::2].tolist()
