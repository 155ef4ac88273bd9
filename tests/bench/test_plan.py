"""Plans: merging, what tells runs apart, their order, and one clear line for each mistake."""

import copy

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from plans import PLAN, make_plan, write_plan

from lightning_rlora.bench.plan_file import read_plan
from lightning_rlora.errors import UserError
from lightning_rlora.fragments import merge

values = st.integers(0, 3) | st.just([1, 2])
for _ in range(2):
    values = values | st.dictionaries(st.sampled_from("abc"), values, max_size=2)
mappings = st.dictionaries(st.sampled_from("abc"), values, max_size=3)


@given(mappings, mappings)
def test_merging_keeps_what_the_overlay_says_and_changes_neither(base, overlay):
    before = copy.deepcopy((base, overlay))
    merged = merge(base, overlay)
    assert merge(merged, overlay) == merged
    assert merge(base, {}) == base == merge({}, base) == merge(base, base)
    assert merged.keys() == base.keys() | overlay.keys()
    assert (base, overlay) == before


def test_another_class_replaces_the_arguments_and_the_same_one_keeps_them():
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"weight_decay": 0.1}}
    assert merge({"o": adamw}, {"o": {"class_path": "Riemannion"}}) == {"o": {"class_path": "Riemannion"}}
    same = merge({"o": adamw}, {"o": {"class_path": "AdamW", "init_args": {"eps": 1}}})
    assert same["o"]["init_args"] == {"weight_decay": 0.1, "eps": 1}
    assert merge({"o": adamw}, {"o": {"init_args": {"lr": 1}}})["o"]["init_args"] == {"weight_decay": 0.1, "lr": 1}
    assert merge({"callbacks": [1, 2]}, {"callbacks": []}) == {"callbacks": []}


def test_every_run_is_there_and_the_first_seed_comes_first(tmp_path):
    runs = make_plan(tmp_path).runs()
    assert [(run.method, run.rate, run.seed) for run in runs] == [
        *(("adamw", 0.01, 0), ("adamw", 0.1, 0), ("sgd", 1.0, 0)),
        *(("adamw", 0.01, 1), ("adamw", 0.1, 1), ("sgd", 1.0, 1)),
    ]
    assert len({run.fingerprint for run in runs}) == len({run.folder for run in runs}) == 6


def test_a_run_is_a_configuration_for_rlora_fit(tmp_path):
    plan = make_plan(tmp_path)
    config = plan.filled(plan.runs()[4])
    assert config["model"]["init_args"] == {
        "base": "embedded:tiny-lm",
        "adapter": {"r": 2},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.1}},
    }
    assert config["seed_everything"] == config["data"]["init_args"]["seed"] == 1
    assert config["data"]["init_args"]["train"] == f"{tmp_path}/a.jsonl"
    assert config["trainer"] == {
        "max_steps": 4,
        "max_epochs": -1,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
    }


def test_validations_are_counted_in_steps_and_budgets_belong_to_methods(tmp_path):
    methods = copy.deepcopy(PLAN["methods"])
    methods["adamw"]["steps"] = [4, 8]
    plan = make_plan(tmp_path, methods=methods, common={"trainer": {"accumulate_grad_batches": 3}}, seeds=0)
    assert [(run.method, run.steps) for run in plan.runs()] == [("adamw", 4)] * 2 + [("adamw", 8)] * 2 + [("sgd", 4)]
    assert all(run.config["trainer"]["val_check_interval"] == 6 for run in plan.runs())


def test_places_do_not_tell_runs_apart_and_everything_else_does(tmp_path):
    prints = [run.fingerprint for run in make_plan(tmp_path).runs()]
    elsewhere = read_plan(write_plan(tmp_path), {"data": "/elsewhere", "base": "another"})
    assert [run.fingerprint for run in elsewhere.runs()] == prints
    common = merge(PLAN["common"], {"trainer": {"default_root_dir": "runs/x"}})
    assert [run.fingerprint for run in make_plan(tmp_path, common=common).runs()] == prints
    for other in ({"adapter": {"r": 3}}, {"dtype": "bfloat16"}):
        changed = make_plan(tmp_path, common=merge(PLAN["common"], {"model": {"init_args": other}}))
        assert not {run.fingerprint for run in changed.runs()} & set(prints)


def test_an_overlay_is_a_file_beside_the_plan_or_several(tmp_path):
    (tmp_path / "overlays").mkdir()
    optimizer = {"class_path": "Riemannion", "init_args": {"momentum": 0.6, "lr": 7}}
    (tmp_path / "overlays" / "m.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"optimizer": optimizer}}}))
    overlay = ["overlays/m.yaml", {"model": {"init_args": {"adapter": {"r": 9}}}}]
    plan = make_plan(tmp_path, methods={"adamw": {"overlay": overlay, "rates": [0.5]}})
    arguments = plan.runs()[0].config["model"]["init_args"]
    assert arguments["optimizer"] == {"class_path": "Riemannion", "init_args": {"momentum": 0.6, "lr": 0.5}}
    assert arguments["adapter"] == {"r": 9}


def test_numbers_need_no_point(tmp_path):
    path = write_plan(tmp_path)
    path.write_text(path.read_text().replace("- 0.1\n", "- 1e-3\n"))
    assert read_plan(path).methods["adamw"].rates == (0.001, 0.01)


def test_a_date_is_text(tmp_path):
    path = write_plan(tmp_path, tasks={"words": {"data": {"init_args": {"since": "DATE"}}}})
    path.write_text(path.read_text().replace("DATE", "2024-01-31"))
    run = read_plan(path).runs()[0]
    assert run.config["data"]["init_args"]["since"] == "2024-01-31" and run.fingerprint


def test_a_run_tells_of_the_variables_it_uses_and_of_no_place_on_this_machine(tmp_path):
    path = write_plan(tmp_path, variables={"base": "org/small", "data": None, "unused": 3})
    assert read_plan(path).runs()[0].variables == {"base": "org/small"}
    settings = {"base": f"{tmp_path}/small/", "data": "./here/texts"}
    assert read_plan(path, settings).runs()[0].variables == {"base": "small", "data": "texts"}


def test_the_plans_callbacks_stand_before_a_runs_own(tmp_path):
    """While of common, task and method the last one counts, as with files of `rlora fit`."""

    def part(*names):
        return {"trainer": {"callbacks": list(names)}}

    optimizer = PLAN["methods"]["adamw"]["overlay"]
    methods = {
        "adamw": {"rates": [0.1], "overlay": optimizer | part("C", "D")},
        "none": {"rates": [0.1], "overlay": optimizer | part()},
    }
    measured = [{"class_path": "Measure"}]
    plan = make_plan(tmp_path, callbacks=measured, common=PLAN["common"] | part("A"), methods=methods)
    found = {run.method: run.config["trainer"]["callbacks"] for run in plan.runs()}
    assert found == {"adamw": [*measured, "C", "D"], "none": measured}


@pytest.mark.parametrize("value", [None, 0, "many"])
def test_accumulation_that_is_no_number_is_refused(value, tmp_path):
    plan = make_plan(tmp_path, common={"trainer": {"accumulate_grad_batches": value}})
    with pytest.raises(UserError, match=r"'adamw': trainer.accumulate_grad_batches: expected a whole number"):
        plan.runs()


WRONG = {
    "no methods": ({"methods": None}, ["methods", "missing"]),
    "empty methods": ({"methods": {}}, ["methods", "empty"]),
    "a misspelt key": ({"seedz": [1]}, ["seedz", "seeds"]),
    "a method's misspelt key": ({"methods": {"adamw": {"rate": [1], "rates": [1]}}}, ["'rate'", "rates", "adamw"]),
    "no rates": ({"methods": {"adamw": {"overlay": {}}}}, ["adamw", "rates", "missing"]),
    "a word for a rate": ({"methods": {"adamw": {"rates": ["high"]}}}, ["adamw", "high"]),
    "a rate of zero": ({"methods": {"adamw": {"rates": [0.0]}}}, ["adamw", "0.0"]),
    "a rate twice": ({"methods": {"adamw": {"rates": [0.1, 0.1]}}}, ["twice"]),
    "a seed below zero": ({"seeds": [-1]}, ["seeds", "-1"]),
    "no seeds": ({"seeds": []}, ["seeds", "empty"]),
    "no steps": ({"steps": 0}, ["steps", "0"]),
    "a last step without validation": ({"steps": 5}, ["5 steps", "validate_every"]),
    "an unknown reference": ({"reference": "adam"}, ["'adam'", "adamw"]),
    "a score that is no name": ({"scores": [{"val": 1}]}, ["scores", "names"]),
    "a score that is a column": ({"scores": ["steps"]}, ["scores", "'steps'", "column"]),
    "callbacks that are none": ({"callbacks": ["RunCost"]}, ["callbacks", "class_path"]),
    "a word for whether": ({"mean_of_tasks": "maybe"}, ["mean_of_tasks", "'maybe'"]),
    "a task called like the mean": ({"tasks": {"mean-of-tasks": {}}}, ["mean-of-tasks", "another name"]),
    "a task called like the pilot": ({"tasks": {"pilot": {}}}, ["'pilot'", "another name"]),
    "a pilot that is none": ({"pilot": [1]}, ["pilot", "[1]"]),
    "a pilot's misspelt key": ({"pilot": {"task": "words"}}, ["pilot", "'task'", "tasks"]),
    "a pilot on no task": ({"pilot": {"tasks": []}}, ["pilot: tasks", "empty"]),
    "a pilot on an unknown task": ({"pilot": {"tasks": ["wods"]}}, ["pilot", "'wods'", "words"]),
    "a pilot with another seed": ({"pilot": {"seeds": [0, 2]}}, ["pilot", "seed 2", "0, 1"]),
    "a pilot that keeps nothing": ({"pilot": {"keep": 0}}, ["pilot: keep", "0"]),
    "a missing overlay": ({"methods": {"adamw": {"rates": [1], "overlay": "nowhere.yaml"}}}, ["nowhere.yaml"]),
    "a variable for the seed": ({"variables": {"seed": 1}}, ["seed", "another name"]),
    "a name that is no folder": ({"tasks": {"a/b": {}}}, ["a/b"]),
    "a list for a task": ({"tasks": {"words": [1]}}, ["words", "[1]"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plan_is_refused_in_one_line(case, tmp_path):
    changes, words = WRONG[case]
    with pytest.raises((UserError, OSError)) as error:
        read_plan(write_plan(tmp_path, **changes))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_that_stands_twice_is_refused_and_a_date_is_a_text(tmp_path):
    path = write_plan(tmp_path, variables={"data": "x"}, common={"trainer": {"note": "2026-01-01"}})
    path.write_text(path.read_text().replace("'2026-01-01'", "2026-01-01"))
    assert read_plan(path).common["trainer"]["note"] == "2026-01-01"
    path.write_text(path.read_text() + "  adamw: {rates: [0.5]}\n")
    with pytest.raises(UserError, match="'adamw' stands there twice"):
        read_plan(path)


@pytest.mark.parametrize(
    "common",
    [
        {"trainer": "fast"},
        {"model": [1]},
        {"model": {"init_args": [1]}},
        *({"trainer": {"accumulate_grad_batches": n}} for n in (0, None, "2x")),
    ],
    ids=str,
)
def test_parts_of_the_wrong_kind_are_refused_with_their_place(common, tmp_path):
    methods = {"adamw": {"rates": [0.1], "overlay": {}}}  # lays nothing over what is wrong
    plan = make_plan(tmp_path, common=common, methods=methods)
    ((part, below),) = common.items()
    words = [part, *(below if isinstance(below, dict) else [])]
    with pytest.raises(UserError, match="task 'words', method 'adamw': " + ".".join(words)):
        plan.runs()


def test_wrong_variables_and_missing_optimizers_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no variable 'dta'.*base, data"):
        read_plan(write_plan(tmp_path), {"dta": "x"})
    plan = read_plan(write_plan(tmp_path))
    with pytest.raises(UserError, match="--set data="):
        plan.filled(plan.runs()[0])
    plan = make_plan(tmp_path, tasks={"words": {"data": "${dta}"}})
    with pytest.raises(UserError, match=r"\$\{dta\}"):
        plan.filled(plan.runs()[0])
    with pytest.raises(UserError, match="'adamw' names no optimizer"):
        make_plan(tmp_path, methods={"adamw": {"rates": [1]}}).runs()
