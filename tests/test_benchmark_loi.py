"""The benchmark of locally optimal initialisation, at small shapes on a CPU."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import bench
import loi

pytestmark = pytest.mark.skipif(bench.ON_GPU, reason="these shapes are those of a CPU")

SMALL = ["--layers", "1", "--shrink", "64", "--rank", "2", "--batches", "2", "--repeats", "2", "--length", "8"]


def test_times_the_passes_loi_and_lora_ga(tmp_path, capsys):
    out = tmp_path / "loi.json"
    loi.main([*SMALL, "--power-steps", "2", "--out", str(out)])
    results = json.loads(out.read_text())["results"]
    assert set(results) == {"passes", "LOI", "LOI, base left alone", "PEFT's LoRA-GA"}
    for result in results.values():
        assert len(result["all_ms"]) == 2 and min(result["all_ms"]) <= result["ms"] <= max(result["all_ms"])
    assert results["LOI"]["ms"] > 0.5 * results["passes"]["ms"]  # it contains them
    printed = capsys.readouterr().out
    assert "| 12 passes |" in printed and "7 adapters, rank 2, 2 batches of 2 x 8 tokens" in printed


def test_a_peft_without_lora_ga_is_said_and_the_rest_stands(tmp_path, monkeypatch, capsys):
    import peft

    monkeypatch.delattr(peft, "LoraGAConfig")
    loi.main([*SMALL, "--repeats", "1", "--out", str(tmp_path / "loi.json")])
    assert "PEFT's LoRA-GA | ImportError: cannot import name 'LoraGAConfig'" in capsys.readouterr().out
