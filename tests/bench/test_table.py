"""The table's numbers against numbers made by hand."""

import math
import statistics
from dataclasses import replace

import pytest
from plans import PLAN, finished, make_plan

from lightning_rlora.bench.outputs import cells, number_with_spread
from lightning_rlora.bench.results import result_of
from lightning_rlora.bench.table import MEAN_OF_TASKS, mean_of_tasks, table

INF = math.inf


LOSSES = {("adamw", 0.01): (2.0, 2.2), ("adamw", 0.1): (2.5, 2.7), ("sgd", 1.0): (1.1, 1.1)}


def test_a_row_tells_of_the_best_rate_over_seeds(tmp_path):
    plan = make_plan(tmp_path)
    results = [finished(run, LOSSES[run.method, run.rate][run.seed], seconds=1 + run.seed) for run in plan.runs()]
    sgd, adamw = table(results, "words", plan)
    assert (adamw.method, adamw.rate, adamw.seeds, adamw.runs, adamw.diverged) == ("adamw", 0.01, 2, 4, 0)
    assert adamw.loss == pytest.approx(2.1)
    assert adamw.spread == pytest.approx(statistics.stdev([2.0, 2.2]))
    assert adamw.scores["accuracy"] == pytest.approx((0.75, statistics.stdev([1.0, 0.5])))
    assert adamw.edge and sgd.edge
    assert adamw.by_rate == pytest.approx({0.01: 2.1, 0.1: 2.6})
    assert (adamw.steps_to_reference, adamw.seconds_to_reference) == (4, 6)  # the mean of 1 and 2 seconds a step
    # from 5 down to 1.1 in 4 steps: at 2.1 after 2.9 / 3.9 of them
    assert sgd.steps_to_reference == pytest.approx(4 * 2.9 / 3.9)
    assert sgd.seconds_to_reference == pytest.approx(1.5 * 4 * 2.9 / 3.9)
    assert (sgd.seconds_per_step, sgd.peak_memory, sgd.parameters, sgd.adapter_bytes) == (1.5, 2**20, 10, 40)
    assert table(results, "another", plan) == []


def test_a_diverged_seed_takes_its_rate_out_and_brackets_the_best_one(tmp_path):
    methods = PLAN["methods"] | {"adamw": PLAN["methods"]["adamw"] | {"rates": [0.01, 0.1, 1.0]}}
    plan = make_plan(tmp_path, methods=methods)
    loss = {0.01: 3.0, 0.1: 2.0, 1.0: 1.0}
    results = [
        result_of(run, "diverged") if (run.rate, run.seed) == (1.0, 1) else finished(run, loss[run.rate])
        for run in plan.runs()
        if run.method == "adamw"
    ]
    (row,) = table(results, "words", plan)
    assert (row.rate, row.edge, row.diverged, row.runs) == (0.1, False, 1, 6)
    assert row.by_rate[1.0] == INF


def test_a_rate_with_fewer_seeds_is_not_chosen_until_it_has_as_many(tmp_path):
    methods = PLAN["methods"] | {"adamw": PLAN["methods"]["adamw"] | {"rates": [0.01, 0.1, 1.0, 10.0]}}
    plan = make_plan(tmp_path, methods=methods)
    loss = {0.01: 3.0, 0.1: 2.0, 1.0: 1.0}
    runs = [run for run in plan.runs() if run.method == "adamw" and (run.rate, run.seed) != (1.0, 1)]
    results = [
        result_of(run, "diverged") if run.rate == 10 else finished(run, loss[run.rate])
        for run in runs
        if (run.rate, run.seed) != (10, 1)  # one seed tells enough of a rate that diverged
    ]
    (row,) = table(results, "words", plan)
    assert (row.rate, row.seeds, row.loss, row.complete) == (0.1, 2, 2.0, False)
    assert row.steps_to_reference == 4  # the goal is its own loss, not that of the single seed
    assert row.window.high == 0.1 and not row.window.open_high  # next to it, of those compared, is the diverged rate
    assert row.by_rate == {0.01: 3.0, 0.1: 2.0, 1.0: 1.0, 10.0: INF}
    assert number_with_spread(row) == "2.0000 ± 0.0000 (n=2, incomplete)"
    runs = {(run.method, run.rate, run.seed): run for run in plan.runs()}
    (row,) = table([*results, finished(runs["adamw", 1.0, 1], 1.2)], "words", plan)
    assert (row.rate, row.seeds, row.complete) == (1.0, 2, True)
    (row,) = table([finished(run, loss[run.rate]) for run in plan.runs() if run.rate in (0.01, 0.1)], "words", plan)
    assert not row.complete  # of two rates nothing is known yet


def test_a_goal_that_is_reached_at_the_start_is_reached(tmp_path):
    plan = make_plan(tmp_path)
    results = [finished(run, 6.0 if run.method == "adamw" else 4.0) for run in plan.runs() if run.seed == 0]
    sgd, adamw = table(results, "words", plan)
    assert (sgd.steps_to_reference, adamw.steps_to_reference) == (0, 0)
    assert cells(sgd, adamw)["steps to reference"] == cells(adamw, adamw)["steps to reference"] == "0"


def test_a_score_that_was_no_number_at_the_end_is_none(tmp_path):
    plan = make_plan(tmp_path)
    results = [finished(run, 2.0) for run in plan.runs() if run.method == "sgd"]
    results = [replace(result, scores={"accuracy": result.scores["accuracy"][:-1]}) for result in results]
    assert table(results, "words", plan)[0].scores == {"accuracy": None}


def test_the_mean_of_tasks_has_one_rate_for_all(tmp_path):
    tasks = {"one": PLAN["tasks"]["words"], "two": PLAN["tasks"]["words"]}
    plan = make_plan(tmp_path, tasks=tasks, mean_of_tasks=True)
    loss = {("one", 0.01): 1.0, ("two", 0.01): 3.0, ("one", 0.1): 2.5, ("two", 0.1): 1.3}
    results = [finished(run, loss[run.task, run.rate] + run.seed) for run in plan.runs() if run.method == "adamw"]
    assert [table(results, task, plan)[0].rate for task in ("one", "two")] == [0.01, 0.1]
    (row,) = table(mean_of_tasks(results, plan), MEAN_OF_TASKS, plan)
    assert (row.rate, row.seeds, row.peak_memory) == (0.1, 2, 2**20)
    assert row.loss == pytest.approx(1.9 + 0.5)
    assert row.scores["accuracy"] == pytest.approx((0.75, statistics.stdev([1.0, 0.5])))
    diverged = [
        result_of(run, "diverged") if (run.task, run.rate, run.seed) == ("two", 0.1, 1) else result
        for run, result in zip([run for run in plan.runs() if run.method == "adamw"], results, strict=True)
    ]
    (row,) = table(mean_of_tasks(diverged, plan), MEAN_OF_TASKS, plan)
    assert (row.rate, row.diverged) == (0.01, 1)
    assert mean_of_tasks(results[: len(results) // 4], plan) == []  # only one of the tasks yet


def test_without_a_reference_or_with_nothing_but_divergence_there_is_still_a_table(tmp_path):
    plan = make_plan(tmp_path)
    results = [result_of(run, "diverged") for run in plan.runs() if run.method == "adamw"]
    results += [finished(run, 2.0) for run in plan.runs() if run.method == "sgd" and run.seed == 0]
    results += [result_of(run, "failed") for run in plan.runs() if run.method == "sgd" and run.seed == 1]
    sgd, adamw = table(results, "words", plan)
    assert adamw.loss == INF and adamw.steps_to_reference is None and adamw.diverged == 4
    assert (sgd.loss, sgd.spread, sgd.seeds, sgd.runs) == (2.0, None, 1, 1)
    assert sgd.steps_to_reference is None
