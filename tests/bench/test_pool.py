"""Runs on worker processes: what is done, what is not done again, and what a crash leaves."""

import json
import os

import pytest
from fake_fits import fake_fit
from plans import finished, make_plan, write_plan

from lightning_rlora.bench.compare import run_plan, write_outputs
from lightning_rlora.bench.plan_file import read_plan
from lightning_rlora.bench.pool import _Worker
from lightning_rlora.bench.results import read_result, write_result
from lightning_rlora.bench.worker import Job, execute
from lightning_rlora.errors import UserError


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def overlay(kind):
    return {"model": {"init_args": {"optimizer": {"class_path": kind}}}}


def compare(plan, output, fit=fake_fit, **options):
    run_plan(plan, output, fit, devices=["cpu"], **options)
    return {(run.method, run.rate, run.seed): read_result(output, run) for run in plan.runs()}


def calls(folder):
    path = folder / "calls"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_finished_runs_are_not_repeated_wherever_they_come_from(tmp_path, capsys):
    plan = make_plan(tmp_path, seeds=[0])
    results = compare(plan, tmp_path / "out", only=["adamw"])
    assert [line[:2] for line in calls(tmp_path)] == [["AdamW", "0.01"], ["AdamW", "0.1"]]
    assert len({line[3] for line in calls(tmp_path)}) == 1  # one process did both
    result = results["adamw", 0.1, 0]
    assert result.validation == [[0, 5.0], [2, 4.0], [4, 2.1]] and result.train == [[2, 4.0], [4, 3.0]]
    assert result.adapter == {"bytes": 4, "config": {"peft_type": "LORA", "base_model_name_or_path": None}}
    assert results["sgd", 1.0, 0] is None
    run = plan.runs()[0]
    assert not (tmp_path / "out" / run.folder / "adapter").exists()
    assert "trained" in (tmp_path / "out" / run.folder / "log.txt").read_text()

    (tmp_path / "out").rename(tmp_path / "moved")
    elsewhere = tmp_path / "elsewhere" / tmp_path.name
    elsewhere.mkdir(parents=True)
    results = compare(make_plan(elsewhere, seeds=[0]), tmp_path / "moved", keep_adapters=True)
    assert [line[:2] for line in calls(elsewhere)] == [["SGD", "1.0"]]
    assert all(results.values())
    assert (tmp_path / "moved" / plan.runs()[2].folder / "adapter").exists()
    printed = capsys.readouterr().out
    assert "3 runs, 2 of them done" in printed and "[3/3] words sgd rate 1 seed 0 4 steps: loss 3.0000" in printed

    compare(plan, tmp_path / "moved")
    assert len(calls(tmp_path)) == 2


def test_a_result_that_is_half_written_or_of_another_plan_does_not_count(tmp_path):
    plan = make_plan(tmp_path, seeds=[0])
    run = plan.runs()[2]
    path = tmp_path / "out" / run.folder / "result.json"
    compare(plan, tmp_path / "out", only=["sgd"])
    whole = path.read_text()
    for broken in (whole[: len(whole) // 2], "[]", "{}", json.dumps(json.loads(whole) | {"fingerprint": "0"})):
        path.write_text(broken)
        assert read_result(tmp_path / "out", run) is None
    path.write_text(whole)
    assert read_result(tmp_path / "out", run).loss == 3.0


def test_a_crash_ends_one_run_and_not_the_sweep(tmp_path, capsys):
    kinds = ["Dies", "Bug", "Wrong", "Diverges", "NaN", "Unvalidated", "Good"]
    methods = {kind: {"rates": [1.0], "overlay": overlay(kind)} for kind in kinds}
    plan = make_plan(tmp_path, methods=methods, reference="Good", seeds=[0])
    results = {key[0]: result for key, result in compare(plan, tmp_path / "out").items()}
    assert {kind: results[kind].status for kind in kinds} == {
        **dict.fromkeys(("Dies", "Bug", "Wrong", "Unvalidated"), "failed"),
        **dict.fromkeys(("Diverges", "NaN"), "diverged"),
        "Good": "finished",
    }
    assert "exit code 3" in results["Dies"].note
    assert results["Bug"].note == "RuntimeError: two lines"
    assert results["Wrong"].note == "no such file"
    assert results["Diverges"].note == "the training loss is nan"
    assert results["NaN"].validation == [[0, 5.0], [2, 4.0]]
    assert "no validation at the last step" in results["Unvalidated"].note
    process = {line[0]: line[3] for line in calls(tmp_path)}
    assert len(set(process.values())) == 3  # a fresh one after the death and after the bug
    assert "Traceback" in (tmp_path / "out" / plan.runs()[1].folder / "log.txt").read_text()
    capsys.readouterr()

    compare(plan, tmp_path / "out", only=["Wrong", "Diverges", "NaN", "Good"])  # what failed is tried again, no more
    assert [line[0] for line in calls(tmp_path)[7:]] == ["Wrong"]


def executed(tmp_path, kind, rate=1.0):
    plan = make_plan(tmp_path, methods={kind: {"rates": [rate], "overlay": overlay(kind)}}, reference=kind, seeds=[0])
    run = plan.runs()[0]
    job = Job(run, plan.filled(run), tmp_path / "out", side_by_side=1, keep_adapter=False)
    job.folder.mkdir(parents=True)
    return execute(job, "cpu", fake_fit)


@pytest.mark.parametrize("kind", ["Riemannion", "FactorMuon"])
def test_a_gradient_that_overflows_is_divergence(kind, tmp_path):
    result, in_order = executed(tmp_path, kind)
    assert (result.status, in_order) == ("diverged", True)
    assert "the gradient is not finite" in result.note


def test_a_score_that_is_no_number_is_left_out(tmp_path):
    result, _ = executed(tmp_path, "Good")
    assert result.status == "finished"
    assert result.scores == {"accuracy": [(0, 0.5)]}


def test_a_worker_that_died_between_two_runs_is_replaced(tmp_path):
    plan = make_plan(tmp_path, seeds=[0])
    worker = _Worker("cpu", 1, fake_fit)
    try:
        for run in plan.runs()[:2]:
            worker.begin(Job(run, plan.filled(run), tmp_path / "out", side_by_side=1, keep_adapter=False))
            assert worker.end()[1].status == "finished"
            worker._process.kill()
            worker._process.join()
    finally:
        worker.stop()


def test_results_of_another_base_model_are_refused_and_of_the_same_one_elsewhere_are_not(tmp_path):
    def plan(**settings):
        return read_plan(write_plan(tmp_path, seeds=[0]), {"data": str(tmp_path)} | settings)

    output = tmp_path / "out"
    for run in plan(base="org/small").runs():
        write_result(output, run, finished(run, 2.0))
    for base in ("org/small", "small", "/models/small", "../small/"):
        compare(plan(base=base), output)
    assert calls(tmp_path) == []
    write_outputs(read_plan(tmp_path / "plan.yaml", {"base": "org/small"}), output)  # where the data lie is not said
    before = {path: path.read_bytes() for path in output.rglob("*.json")}
    for other in ("large", "another/small", "org/small-2"):
        for use in (compare, write_outputs):
            with pytest.raises(UserError, match=f"base = org/small, and now base = {other}: give another --output"):
                use(plan(base=other), output)
    assert {path: path.read_bytes() for path in output.rglob("*.json")} == before
    layout = next((output / "method_comparison").iterdir()).read_text()
    assert json.loads(layout)["run_info"]["train_config"]["model_id"] == "org/small"
    write_outputs(plan(base="/models/small"), output)
    assert next((output / "method_comparison").iterdir()).read_text() == layout  # what the runs were made with
    assert str(tmp_path) not in "".join(path.read_text() for path in output.rglob("result.json"))


def test_time_runs_out_between_two_runs(tmp_path, capsys):
    plan = make_plan(tmp_path, seeds=[0])
    compare(plan, tmp_path / "out", limit_minutes=1e-9)  # no pace is known yet: the clock alone decides
    assert calls(tmp_path) == []
    assert "time is up with 3 runs left" in capsys.readouterr().out


def test_two_comparisons_do_not_share_a_folder(tmp_path):
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another comparison is at work"):
            compare(make_plan(tmp_path), tmp_path / "out")


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'adam'.*adamw, sgd; nor of the tasks: words"):
        compare(make_plan(tmp_path), tmp_path / "out", only=["adam"])
    assert not os.path.lexists(tmp_path / "out")
