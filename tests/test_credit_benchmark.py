import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "credit.py"


@pytest.fixture
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("credit", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_noise_does_not_count_as_length_of_the_mean_and_does_of_an_update(bench: Any) -> None:
    g = torch.Generator().manual_seed(0)
    gold, other = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([3.0, -4.0, 0.0])  # cosine -7 / 25
    noise = torch.randn(2, 20000, 3, generator=g)
    blocks = {"same": gold + noise[0], "other": other + noise[0]}
    for name, cosine in (("same", 1.0), ("other", -0.28)):
        found = bench.cosines(blocks[name], gold + noise[1], 25 + 3 * 10)
        assert found["of the mean"] == pytest.approx(cosine, abs=0.01)
        assert found["of 10 updates"] == pytest.approx(cosine * 5 / (25 + 3) ** 0.5, abs=0.01)
        assert found["of one update"] == pytest.approx(cosine * 5 / 55**0.5, abs=0.01)
    assert math.isnan(bench.cosines(torch.tensor([[1.0], [-1.0]]), torch.ones(2, 1), 1.0)["of the mean"])


@pytest.mark.slow
def test_the_credit_of_a_finished_run(bench: Any, smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    models = str(smoke / "models" / "smoke")
    monkeypatch.setattr(sys, "argv", ["credit.py", "--models", models, "--rollouts", "20", "--output", "o/credit.json"])
    bench.main()
    found = json.loads(Path("o/credit.json").read_text())["cosine with the gradient of gold"]
    assert 0 < found["gold"]["of one update"] < found["gold"]["of 10 updates"] <= 1.0
    assert {"sparse", "caption", "step_potential local", "sparse and 0.3 of step_potential local"} <= found.keys()
    assert "sparse and 0.3 of step_potential local" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["credit.py", "--rollouts", "25", "--output", "x.json"])
    with pytest.raises(SystemExit):
        bench.main()
