"""The pilot: which rates go on, what is run when, also after a stop, and what the tables say of it."""

import json
import math
from dataclasses import replace

import pytest
from fake_fits import fake_fit
from hypothesis import given
from hypothesis import strategies as st
from plans import PLAN, finished, make_plan

from lightning_rlora.bench.compare import _Progress, run_plan, write_outputs
from lightning_rlora.bench.outputs import explanation
from lightning_rlora.bench.pilot import around_best, count_runs, kept_runs, pilot_plan, pilot_sweeps
from lightning_rlora.bench.plan import MEAN_OF_TASKS, PILOT, Pilot
from lightning_rlora.bench.pool import TimeLimit
from lightning_rlora.bench.results import result_of, write_result
from lightning_rlora.bench.table import mean_of_tasks, table
from lightning_rlora.bench.worker import Job
from lightning_rlora.errors import UserError

INF = math.inf
RATES = (0.01, 0.1, 1.0)
TASKS = dict.fromkeys(("one", "two", "three"), PLAN["tasks"]["words"])
METHODS = PLAN["methods"] | {"adamw": PLAN["methods"]["adamw"] | {"rates": list(RATES)}}


def planned(folder, **changes):
    """Three tasks, two seeds, a method with three rates and one with a single one."""
    return make_plan(folder, **({"tasks": TASKS, "methods": METHODS, "pilot": {"tasks": ["one", "two"]}} | changes))


def results_of(runs, loss):
    """A result for each run by its loss; none where that is None."""
    losses = [(run, loss(run)) for run in runs]
    return [
        result_of(run, "diverged") if math.isinf(value) else finished(run, value)
        for run, value in losses
        if value is not None
    ]


def by_rate(losses):
    """Losses of runs by task and rate; seeds add their number, the other method has 1."""
    return lambda run: losses[run.task][run.rate] + run.seed if run.method == "adamw" else 1.0


LOSSES = {
    "one": {0.01: 1.0, 0.1: 2.0, 1.0: 3.0},
    "two": {0.01: 3.0, 0.1: 1.5, 1.0: 4.0},
    "three": {0.01: 2.0, 0.1: 2.0, 1.0: 1.0},
}


def test_the_rates_around_the_best_are_the_nearest_ones():
    losses = {0.1: 3.0, 0.2: 1.0, 0.4: 2.0, 0.8: INF, 1.6: 1.5}
    assert [around_best(losses, keep) for keep in (1, 2, 3, 9)] == [
        (0.2,),
        (0.2, 0.4),  # of the two neighbours the better one
        (0.1, 0.2, 0.4),
        (0.1, 0.2, 0.4, 0.8, 1.6),
    ]
    assert around_best({0.1: 1.0, 0.2: 2.0, 0.4: 0.5}, 3) == (0.1, 0.2, 0.4)
    assert around_best({0.1: INF, 0.2: 5.0}, 1) == (0.2,)
    assert around_best({0.1: INF, 0.2: INF}, 1) == (0.1,)


@given(
    st.dictionaries(st.floats(1e-6, 1e3), st.floats(0.1, 10) | st.just(INF), min_size=1, max_size=6), st.integers(1, 8)
)
def test_what_is_kept_is_a_stretch_of_the_rates_with_the_best_one(losses, keep):
    kept, rates = around_best(losses, keep), sorted(losses)
    first = rates.index(kept[0])
    assert list(kept) == rates[first : first + min(keep, len(rates))]
    assert min(losses.values()) in [losses[rate] for rate in kept]


def test_one_rate_for_all_tasks_is_the_best_by_the_mean_over_the_pilots(tmp_path):
    plan = planned(tmp_path)
    assert plan.pilot == Pilot(("one", "two"), (0,), 1)
    results = results_of(plan.runs(), by_rate(LOSSES))  # of more than the pilot: without effect
    sweeps = pilot_sweeps(plan, results)
    assert {task: sweeps[task, "adamw", 4].kept for task in TASKS} == dict.fromkeys(TASKS, (0.1,))  # (2 + 1.5) / 2
    assert sweeps["one", "adamw", 4].losses == LOSSES["one"]
    assert sweeps["three", "adamw", 4].losses == sweeps[MEAN_OF_TASKS, "adamw", 4].losses == {}
    assert pilot_sweeps(plan, [r for r in results if r.task != "three" and r.seed == 0]) == sweeps
    losses = LOSSES | {"two": LOSSES["two"] | {0.1: INF}}
    sweeps = pilot_sweeps(plan, results_of(plan.runs(), by_rate(losses)))
    assert sweeps["one", "adamw", 4].kept == (0.01,)  # what diverged on one task diverged


def test_a_pilot_of_all_tasks_chooses_for_each_unless_their_mean_is_wanted(tmp_path):
    plan = planned(tmp_path, pilot={})
    results = results_of(plan.runs(), by_rate(LOSSES))
    sweeps = pilot_sweeps(plan, results)
    assert [sweeps[task, "adamw", 4].kept for task in TASKS] == [(0.01,), (0.1,), (1.0,)]
    sweeps = pilot_sweeps(replace(plan, mean_of_tasks=True), results)
    assert [sweeps[task, "adamw", 4].kept for task in TASKS] == [(0.1,)] * 3
    assert sweeps[MEAN_OF_TASKS, "adamw", 4].losses == pytest.approx({0.01: 2.0, 0.1: 5.5 / 3, 1.0: 8 / 3})
    assert pilot_sweeps(replace(plan, pilot=None), results) == {}


@pytest.mark.parametrize("pilot", [{}, {"tasks": ["two", "one"]}], ids=str)
def test_nothing_is_kept_while_the_pilot_lacks_a_run(pilot, tmp_path):
    plan = planned(tmp_path, pilot=pilot)
    lacking = next(run.folder for run in plan.runs() if (run.task, run.rate) == ("two", 1.0) and run.method == "adamw")
    results = results_of(plan.runs(), lambda run: None if run.folder == lacking else by_rate(LOSSES)(run))
    sweeps = pilot_sweeps(plan, results)
    done = {"one", "three"} if pilot == {} else set()  # each task by its own rates, or all by the mean
    assert all((sweeps[task, "adamw", 4] == ((), {})) == (task not in done) for task in TASKS)
    assert all(sweeps[task, "sgd", 4].kept == (1.0,) for task in TASKS)
    assert {run.task for run in kept_runs(plan, sweeps) if run.method == "adamw"} == done


@pytest.mark.parametrize(
    "pilot", [None, {}, {"seeds": [0, 1]}, {"tasks": "two", "seeds": 1, "keep": 2}, {"keep": 5}], ids=str
)
def test_the_number_of_runs_is_known_before_any(pilot, tmp_path):
    plan = planned(tmp_path, pilot=pilot)
    runs = plan.runs()
    if pilot is not None:
        swept = pilot_plan(plan).runs()
        runs = [*swept, *kept_runs(plan, pilot_sweeps(plan, results_of(swept, by_rate(LOSSES))))]
        assert {run.folder for run in runs} <= {run.folder for run in plan.runs()}
    assert count_runs(plan) == len({run.folder for run in runs})


def calls(folder):
    """Optimizer, rate and seed of the runs that were done."""
    path = folder / "calls"
    return [tuple(line.split()[:3]) for line in path.read_text().splitlines()] if path.exists() else []


def compare(plan, output, **options):
    run_plan(plan, output, fake_fit, devices=["cpu"], **options)


@pytest.mark.parametrize("stop", [2, 5])
def test_both_stages_are_run_and_go_on_after_a_stop_in_either(stop, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tasks = {name: TASKS[name] for name in ("one", "two")}
    plan = planned(tmp_path, tasks=tasks, pilot={"tasks": ["one"]})
    report, ended = _Progress.report, []

    def stopping(self, job, result):
        report(self, job, result)
        ended.append(job)
        if len(ended) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Progress, "report", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare(plan, tmp_path / "out")
    assert len(calls(tmp_path)) in (stop, stop + 1)  # the next one may have begun
    before = capsys.readouterr().out
    compare(plan, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "pilot: 4 runs, 0 of them done; 1 at a time on cpu" in before
    assert f"pilot: 4 runs, {min(stop, 4)} of them done" in printed
    assert f"kept rates: 8 runs, {max(stop, 4) - 2} of them done" in printed
    swept = [("one", "adamw", rate, 0) for rate in RATES] + [("one", "sgd", 1.0, 0)]
    others = [(task, seed) for seed in (0, 1) for task in ("one", "two")][1:]
    kept = [(task, *method, seed) for task, seed in others for method in (("adamw", 0.01), ("sgd", 1.0))]
    done = [(job.run.task, job.run.method, job.run.rate, job.run.seed) for job in ended]
    assert done == swept + kept  # each once, and the lowest rate is the best
    assert len(done) == len(list((tmp_path / "out").rglob("result.json"))) == count_runs(plan)
    assert "[pilot 4/4] one sgd rate 1 seed 0" in before + printed and "[kept rates 8/8] two sgd rate 1" in printed
    compare(plan, tmp_path / "out", only=["adamw"])
    printed = capsys.readouterr().out
    assert "pilot: 3 runs, 3 of them done" in printed and "kept rates: 4 runs, 4 of them done" in printed
    compare(plan, tmp_path / "out", only=["two", "adamw"])
    printed = capsys.readouterr().out
    assert "pilot: 3 runs, 3 of them done" in printed and "kept rates: 3 runs, 3 of them done" in printed
    compare(replace(plan, pilot=None), tmp_path / "out", only=["sgd"])  # the very runs of a plan without a pilot
    assert "\n4 runs, 4 of them done" in "\n" + capsys.readouterr().out


@pytest.mark.parametrize("pilot", [{}, {"tasks": ["one"]}], ids=str)
def test_a_task_alone_gets_what_it_needs_of_the_pilot(pilot, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan = planned(tmp_path, tasks={name: TASKS[name] for name in ("one", "two")}, pilot=pilot)
    compare(plan, tmp_path / "out", only=["two", "adamw"])
    by_itself = [("two", rate, 0) for rate in RATES] + [("two", 0.01, 1)]
    by_another = [("one", rate, 0) for rate in RATES] + [("two", 0.01, 0), ("two", 0.01, 1)]
    done = [run for run in plan.runs() if (tmp_path / "out" / run.folder / "result.json").exists()]
    found = [(run.task, run.rate, run.seed) for run in done if run.method == "adamw"]
    assert len(done) == len(found) and sorted(found) == sorted(by_another if pilot else by_itself)


def test_a_second_stage_waits_for_its_pilot_and_for_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    overlay = {"model": {"init_args": {"optimizer": {"class_path": "Wrong"}}}}  # its runs fail
    methods = {"adamw": METHODS["sgd"], "wrong": {"rates": [0.1], "overlay": overlay}}
    plan = planned(tmp_path, methods=methods, tasks={"one": TASKS["one"]}, pilot={})
    compare(plan, tmp_path / "out", limit_minutes=1e-9)
    assert calls(tmp_path) == []
    printed = capsys.readouterr().out
    assert "time is up with 2 runs of the pilot left" in printed and "kept rates" not in printed
    compare(plan, tmp_path / "out")
    assert calls(tmp_path) == [("SGD", "1.0", "0"), ("Wrong", "0.1", "0"), ("SGD", "1.0", "1")]
    assert "kept rates: 2 runs, 1 of them done" in capsys.readouterr().out


def test_results_of_another_base_model_are_refused_before_the_pilot_begins(tmp_path):
    plan = planned(tmp_path)
    last = plan.runs()[-1]  # of the second stage
    write_result(tmp_path / "out", last, replace(finished(last, 1.0), variables={"base": "another"}))
    with pytest.raises(UserError, match="base = another"):
        compare(plan, tmp_path / "out")
    assert calls(tmp_path) == []


def test_a_stage_knows_the_pace_of_the_one_before(tmp_path):
    plan = planned(tmp_path)
    job = Job(plan.runs()[0], {}, tmp_path, side_by_side=1, keep_adapter=False)
    limit = TimeLimit(60.0)
    assert not limit.too_late(job)
    limit.learn(job, 1000.0)
    assert limit.too_late(job) and limit.too_late(replace(job, run=plan.runs()[-1]))
    assert not TimeLimit(None).too_late(job)


def tabled(plan, results):
    """The rows of the method with three rates by task, of those results that the plan asks for."""
    sweeps = pilot_sweeps(plan, results)
    asked = {run.folder for run in [*pilot_plan(plan).runs(), *kept_runs(plan, sweeps)]}
    places = {(run.task, run.method, run.rate, run.seed) for run in plan.runs() if run.folder in asked}
    results = [result for result in results if (result.task, result.method, result.rate, result.seed) in places]
    means = mean_of_tasks(results, plan)
    tables = {task: table(results, task, plan, sweeps) for task in TASKS}
    tables[MEAN_OF_TASKS] = table(means, MEAN_OF_TASKS, plan, sweeps)
    return {task: next((row for row in rows if row.method == "adamw"), None) for task, rows in tables.items()}


def test_edges_and_windows_are_the_pilots(tmp_path):
    plan = planned(tmp_path, mean_of_tasks=True)
    rows = tabled(plan, results_of(plan.runs(), by_rate(LOSSES)))
    assert [rows[task].rate for task in rows] == [0.1] * 4
    assert not any(row.edge for row in rows.values())  # though nothing else was run on all seeds
    assert all(row.complete and row.seeds == 2 for row in rows.values())
    assert [rows[task].loss for task in ("one", "two", "three")] == [2.5, 2.0, 2.5]
    assert rows[MEAN_OF_TASKS].loss == pytest.approx(7 / 3)
    assert rows["one"].by_rate == LOSSES["one"]  # of the pilot's seed
    # around the pilot's best on the task: from 1.0 at 0.01 the loss rises by 1 on the way to 0.1, the limit is 1.01
    assert (rows["one"].window.low, rows["one"].window.open_low) == (0.01, True)
    assert rows["one"].window.high == pytest.approx(10**-1.99)
    assert rows["three"].window is None and rows[MEAN_OF_TASKS].window is None
    assert rows["three"].by_rate == {0.1: 2.5}
    assert (rows["one"].runs, rows["three"].runs) == (4, 2)

    low = {task: {0.01: 1.0, 0.1: 2.0, 1.0: 3.0} for task in TASKS}
    rows = tabled(plan, results_of(plan.runs(), by_rate(low)))
    assert all(row.edge and row.rate == 0.01 for row in rows.values())


def test_the_mean_of_tasks_has_a_window_where_the_pilot_was_on_all(tmp_path):
    plan = planned(tmp_path, mean_of_tasks=True, pilot={"keep": 2})
    rows = tabled(plan, results_of(plan.runs(), by_rate(LOSSES)))
    assert rows[MEAN_OF_TASKS].by_rate == pytest.approx({0.01: 2.0, 0.1: 5.5 / 3, 1.0: 8 / 3})
    assert rows[MEAN_OF_TASKS].rate == 0.1 and 0.01 < rows[MEAN_OF_TASKS].window.low < 0.1
    assert [rows[task].rate for task in TASKS] == [0.01, 0.1, 0.01]  # of 0.01 and 0.1, which went on
    assert rows["one"].edge and not rows["two"].edge


def test_a_row_is_complete_when_all_kept_rates_have_all_seeds(tmp_path):
    plan = planned(tmp_path, pilot={"tasks": ["one", "two"], "keep": 2})  # 0.1 and 0.01
    losses = by_rate(LOSSES)
    whole = tabled(plan, results_of(plan.runs(), losses))
    assert all(whole[task].complete for task in TASKS)
    first = tabled(plan, results_of(plan.runs(), lambda run: losses(run) if run.seed == 0 else None))
    assert not any(first[task].complete for task in TASKS)
    lacking = tabled(plan, results_of(plan.runs(), lambda run: None if run.seed and run.rate == 0.1 else losses(run)))
    assert not any(lacking[task].complete for task in TASKS)
    assert [lacking[task].rate for task in TASKS] == [0.01] * 3  # the one with all seeds
    diverged = tabled(plan, results_of(plan.runs(), lambda run: INF if run.seed and run.rate == 0.1 else losses(run)))
    assert all(diverged[task].complete and diverged[task].diverged == 1 for task in TASKS)
    swept = [run for run in pilot_plan(plan).runs() if run.rate < 1]
    begun = tabled(plan, results_of(swept, losses))
    assert begun["one"].rate == 0.01 and not begun["one"].complete and begun["one"].window is None


def test_the_outputs_tell_of_the_pilot(tmp_path):
    plan = planned(tmp_path, mean_of_tasks=True)
    for run in plan.runs():  # also of rates that the pilot does not keep
        write_result(tmp_path, run, finished(run, by_rate(LOSSES)(run)))
    shown = write_outputs(plan, tmp_path)
    assert len(shown) == count_runs(plan)
    tables = json.loads((tmp_path / "table.json").read_text())
    assert list(tables) == [MEAN_OF_TASKS, PILOT, *TASKS]
    rows = {task: next(row for row in rows if row["method"] == "adamw") for task, rows in tables.items()}
    assert rows[PILOT]["loss_by_rate"] == [[0.01, 2.0], [0.1, 1.75], [1.0, 3.5]]
    assert (rows[PILOT]["loss"], rows[PILOT]["seeds"], rows[PILOT]["edge"]) == (1.75, 1, False)
    assert rows[PILOT]["window_low"] > 0.01 and rows[MEAN_OF_TASKS]["window_low"] is None
    text = (tmp_path / "table.md").read_text()
    assert "| adamw | 4 | 0.1 | 2.5000 ± 0.7071 (n=2) | 75.00% ± 35.36 |  |" in text
    sentence = "it tried all rates on one, two with seed 0, and the best by the mean over these tasks went on"
    assert sentence in text and sentence in (tmp_path / "report.html").read_text()
    assert f"of {count_runs(plan)} planned" in (tmp_path / "report.html").read_text()
    assert [path.name for path in tmp_path.glob("pilot_*")] == ["pilot_rates.png"]
    assert (tmp_path / "three_rates.png").is_file()
    files = {path.name.split("-seed")[0] for path in (tmp_path / "method_comparison").iterdir()}
    assert {name for name in files if "adamw" in name} == {f"{task}--adamw-steps4-lr0.1" for task in TASKS}


def test_the_footnote_says_how_rates_were_chosen(tmp_path):
    assert "pilot" not in explanation(planned(tmp_path, pilot=None))
    text = explanation(planned(tmp_path, pilot={"keep": 3, "seeds": [1, 0]}))
    assert "on one, two, three with seed 1, 0, and the 3 around the best of each task went on" in text
