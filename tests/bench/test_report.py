"""What is made of results: tables, files in PEFT's layout, and a report that needs nothing beside it."""

import base64
import csv
import json
import re
from dataclasses import replace

import pytest
from plans import PLAN, finished, make_plan, write_plan

from lightning_rlora.bench.compare import write_outputs
from lightning_rlora.bench.plots import figures
from lightning_rlora.bench.results import read_result, result_of, write_result
from lightning_rlora.bench.table import table
from lightning_rlora.cli import main

LOSSES = {("adamw", 0.01): 2.0, ("adamw", 0.1): 2.5, ("sgd", 1.0): 1.9}


@pytest.fixture
def compared(tmp_path):
    """A plan in which the first seed is done, with one failure."""
    plan = make_plan(tmp_path, description="<b>why</b>", sources={"words": "https://example.org"})
    for run in plan.runs():
        if run.seed == 0:
            write_result(tmp_path, run, finished(run, LOSSES[run.method, run.rate]))
    last = plan.runs()[-1]
    write_result(tmp_path, last, result_of(last, "failed", note="no <memory>", config=last.config))
    write_outputs(plan, tmp_path)
    return tmp_path


def test_the_report_is_one_file_without_a_reference_to_another(compared):
    page = (compared / "report.html").read_text()
    sources = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'>)]{0,40})""", page)
    assert len(sources) == 4
    for source in sources:
        assert source.startswith("data:image/svg+xml;base64,")
    pictures = [base64.b64decode(data).decode() for data in re.findall(r"base64,([^\"]+)", page)]
    for picture in pictures:
        assert picture.startswith("<?xml")
        assert not re.findall(r'xlink:href="(?!#)', picture)
    assert "<script" not in page and "<link" not in page
    assert "&lt;b&gt;why" in page and "<b>why" not in page and "no &lt;memory&gt;" in page
    assert "3 finished, 0 diverged, 1 failed of 6 planned" in page
    assert str(compared) not in page
    for name in ("final_losses", "curves", "rates"):
        assert (compared / f"words_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_results_make_the_same_files(compared):
    names = ["report.html", "table.md", "table.csv", "table.json"]
    before = [(compared / name).read_bytes() for name in names]
    write_outputs(make_plan(compared, description="<b>why</b>", sources={"words": "https://example.org"}), compared)
    assert [(compared / name).read_bytes() for name in names] == before


def test_failed_runs_are_named_below_the_table(compared):
    assert "\nFailed, to be tried again at the next start: sgd (1 run).\n" in (compared / "table.md").read_text()


def test_the_tables_hold_the_numbers(compared):
    lines = (compared / "table.md").read_text().splitlines()
    assert lines[4].startswith("| sgd | 4 | 1 (edge) | 1.9000 (n=1) | 100.00% | ≥ x1 | 4 (1.03x) |")
    assert lines[5].startswith(
        "| adamw | 4 | 0.01 (edge) | 2.0000 (n=1) | 100.00% | ≥ x1.1 | 4 | 4 | 1000 | 1.0 MiB | 10 |"
    )
    with (compared / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], float(row["loss"]), row["edge"]) for row in rows] == [
        ("sgd", 1.9, "True"),
        ("adamw", 2.0, "True"),
    ]
    content = json.loads((compared / "table.json").read_text())
    assert content["words"][1]["loss_by_rate"] == [[0.01, 2.0], [0.1, 2.5]]


# the fields of the files in PEFT's method_comparison/MetaMathQA/results (PEFT 0.21); processing.py there reads them
RUN_INFO = {"created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg"}
TRAIN_INFO = {
    *("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time"),
    *("file_size", "num_trainable_params", "num_total_params", "status", "metrics"),
}
META_INFO = {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"}
LAST_METRICS = {"step", "test accuracy", "train loss", "train samples", "train total tokens"}


def test_the_best_runs_are_there_in_pefts_layout(compared):
    files = {path.name: json.loads(path.read_text()) for path in (compared / "method_comparison").iterdir()}
    assert set(files) == {"words--adamw-steps4-lr0.01-seed0.json", "words--sgd-steps4-lr1-seed0.json"}
    run = files["words--adamw-steps4-lr0.01-seed0.json"]
    assert set(run) == {"run_info", "train_info", "meta_info"}
    assert set(run["run_info"]) == RUN_INFO
    assert set(run["train_info"]) == TRAIN_INFO
    assert set(run["meta_info"]) == META_INFO
    assert set(run["train_info"]["metrics"][-1]) >= LAST_METRICS
    assert run["train_info"]["status"] == "success"
    assert run["run_info"]["train_config"]["optimizer_kwargs"] == {"lr": 0.01}
    assert run["run_info"]["train_config"]["model_id"] == "embedded:tiny-lm"
    assert run["run_info"]["peft_config"]["peft_type"] == "LORA"
    assert [entry["valid loss"] for entry in run["train_info"]["metrics"]] == [3.5, 2.0, 2.0]
    assert [entry.get("train time") for entry in run["train_info"]["metrics"]] == [2.0, 2.0, None]


def test_the_run_of_a_rate_that_is_no_longer_the_best_goes(compared):
    plan = make_plan(compared)
    better = next(run for run in plan.runs() if (run.method, run.rate, run.seed) == ("adamw", 0.1, 0))
    write_result(compared, better, finished(better, 1.0))
    write_outputs(plan, compared)
    names = {path.name for path in (compared / "method_comparison").iterdir()}
    assert names == {"words--adamw-steps4-lr0.1-seed0.json", "words--sgd-steps4-lr1-seed0.json"}


def test_pictures_do_not_call_the_loss_of_classes_one_of_tokens(compared):
    page = (compared / "report.html").read_text()
    for name in ("final_losses", "curves"):
        plan = make_plan(compared)
        results = [result for run in plan.runs() if (result := read_result(compared, run))]
        for axes in figures(table(results, "words", plan), results, plan)[name].axes:
            assert "token" not in axes.get_xlabel() + axes.get_ylabel()
    assert "(per token, of language models)" in page


def test_a_goal_that_lies_above_the_start_is_reached_at_once(tmp_path):
    plan = make_plan(tmp_path)
    for run in plan.runs():
        write_result(tmp_path, run, finished(run, 6.0 if run.method == "adamw" else 2.0))  # from 5 at the start
    write_outputs(plan, tmp_path)
    for line in (tmp_path / "table.md").read_text().splitlines()[4:6]:
        assert line.split(" | ")[6:8] == ["0", "0"]


def test_a_single_rate_and_every_seed_stand_within_their_panel(tmp_path, recwarn):
    plan = make_plan(tmp_path)
    results = [finished(run, LOSSES[run.method, run.rate] - run.seed) for run in plan.runs()]
    rows = table(results, "words", plan)
    assert [len(row.by_rate) for row in rows] == [1, 2]
    for row, axes in zip(rows, figures(rows, results, plan)["rates"].axes, strict=True):
        low, high = axes.get_xlim()
        assert low < min(row.by_rate) <= max(row.by_rate) < high < 4 * max(row.by_rate)
        assert axes.get_ylim()[0] < 0.9  # the second seed of sgd
        assert axes.get_title(loc="left").splitlines() == [row.method, f"{row.loss:.4f} at {row.rate:g}"]
    assert not [warning for warning in recwarn if "identical low and high" in str(warning.message)]


def test_there_is_a_report_before_the_first_run_and_after_nothing_but_divergence(tmp_path, capsys):
    path = write_plan(tmp_path)
    output = tmp_path / "out"
    main(["compare", str(path), "--output", str(output), "--report-only", "--set", "data=x"])
    assert "No run of this task has ended yet" in (output / "report.html").read_text()
    plan = make_plan(tmp_path)
    for run in plan.runs():
        write_result(output, run, result_of(run, "diverged", note="nan", config=run.config))
    main(["compare", str(path), "--output", str(output), "--report-only"])
    assert "| diverged |" in (output / "table.md").read_text()
    assert "4 of 4" in capsys.readouterr().out


def test_many_methods_and_budgets_can_be_drawn(tmp_path):
    overlay = PLAN["methods"]["sgd"]["overlay"]
    names = ["adamw", *(f"method_{n}" for n in range(9))]
    methods = {name: {"rates": [0.01, 0.1, 1.0], "overlay": overlay} for name in names}
    methods["adamw"]["steps"] = [4, 8]
    plan = make_plan(tmp_path, methods=methods)
    for place, run in enumerate(plan.runs()):
        diverges = run.rate == 1.0 and run.seed == 1
        result = result_of(run, "diverged") if diverges else finished(run, 2 + 0.01 * (place % 13))
        write_result(tmp_path, run, result)
    write_outputs(plan, tmp_path)
    assert "adamw | 8" in (tmp_path / "table.md").read_text()


def test_the_mean_of_tasks_stands_before_them(tmp_path):
    tasks = {"one": PLAN["tasks"]["words"], "two": PLAN["tasks"]["words"]}
    plan = make_plan(tmp_path, tasks=tasks, mean_of_tasks=True)
    for run in plan.runs():
        write_result(tmp_path, run, finished(run, 1.0 if run.task == "one" else 2.0))
    write_outputs(plan, tmp_path)
    rows = json.loads((tmp_path / "table.json").read_text())
    assert list(rows) == ["mean-of-tasks", "one", "two"]
    assert [rows[task][0]["loss"] for task in rows] == [1.5, 1.0, 2.0]
    assert rows["mean-of-tasks"][0]["accuracy"] == 0.75
    assert all((tmp_path / f"{task}_scores.png").is_file() for task in rows)
    assert "12 finished" in (tmp_path / "report.html").read_text()  # means are no runs


def test_a_seed_without_a_score_and_a_score_that_is_nowhere_do_no_harm(tmp_path):
    plan = make_plan(tmp_path, scores=["accuracy", "recall"])
    for run in plan.runs():
        result = finished(run, 1.0)
        write_result(tmp_path, run, replace(result, scores={}) if run.seed else result)
    with pytest.warns(UserWarning, match="no validation logged recall; there is accuracy"):
        write_outputs(plan, tmp_path)
    assert (tmp_path / "words_scores.png").is_file() and (tmp_path / "report.html").is_file()


def test_results_that_knew_one_score_only_count(tmp_path):
    plan = make_plan(tmp_path)
    run = plan.runs()[0]
    write_result(tmp_path, run, finished(run, 1.0))
    path = tmp_path / run.folder / "result.json"
    content = json.loads(path.read_text())
    content["accuracy"] = content.pop("scores")["accuracy"]
    path.write_text(json.dumps(content))
    assert read_result(tmp_path, run).scores == {"accuracy": content["accuracy"]}
