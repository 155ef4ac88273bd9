"""A text-to-image model on the command line: killed, resumed to the same bits, exported, merged; bad input."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from test_resume import result, same
from tiny_pipelines import build, images, saved

import lightning_rlora.trainer_cli  # noqa: F401  - its loggers must not take hold of one test's captured stream
from lightning_rlora.cli import main

TESTS = Path(__file__).parent
PROJECTS = TESTS / "projects"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's folder and the arguments that made it, but for the folder's."""
    folder = tmp_path_factory.mktemp("cli")
    sys.path.insert(0, str(PROJECTS))
    arguments = [
        *("fit", "--model", "TextToImage", "--model.pipeline", saved(folder / "pipeline", "sdxl")),
        *("--model.adapter", "{r: 2, lora_alpha: 3, lora_dropout: 0.1}"),
        *("--model.min_snr_gamma", "5", "--model.noise_offset", "0.1"),
        *("--model.optimizer", "Riemannion", "--model.optimizer.lr", "0.1"),
        *("--trainer.callbacks+=LocallyOptimalInit", "--trainer.callbacks.alpha=-0.5", "--trainer.callbacks.draws=2"),
        *("--trainer.callbacks+=SampleImages", "--trainer.callbacks.prompts=[a photo of sks dog, a red cat]"),
        *("--trainer.callbacks.every_n_steps=2", "--trainer.callbacks.num_inference_steps=2"),
        *("--trainer.callbacks.seeds=[1, 2]", "--data", "random_pictures.RandomPictures"),
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", "5", "--trainer.log_every_n_steps", "1"),
        *("--checkpoint.every_n_train_steps", "1", "--ckpt_path", "last"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    ]
    main([*arguments, "--trainer.default_root_dir", str(folder / "run")])
    yield folder / "run", arguments
    sys.path.remove(str(PROJECTS))


def test_a_killed_run_resumes_to_the_same_bits(run, tmp_path):
    folder, arguments = run
    arguments = [*arguments, "--trainer.default_root_dir", str(tmp_path)]
    # in the second epoch, before the step's checkpoint and its pictures
    killer = ["--trainer.callbacks+=killer.KillAt", "--trainer.callbacks.batch=5"]
    paths = {"PYTHONPATH": os.pathsep.join([str(TESTS), str(PROJECTS), os.environ.get("PYTHONPATH", "")])}
    killed = subprocess.run(
        [sys.executable, "-m", "lightning_rlora.cli", *arguments, *killer],
        env=os.environ | paths | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "samples/step=000005.png").exists()
    main(arguments)
    for whole, resumed in zip(result(folder), result(tmp_path), strict=True):
        assert same(whole, resumed)
    pictures = {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}
    steps = [f"step={step:06d}.png" for step in (0, 2, 4, 5)]
    assert sorted(pictures) == ["before_after.png", *steps, "trained_on.png"]
    assert pictures == {path.name: path.read_bytes() for path in (tmp_path / "samples").iterdir()}


def test_exported_and_merged_it_makes_the_same_pictures(run, tmp_path):
    folder, _ = run
    main(["export", "--ckpt_path", str(folder), "--output", str(tmp_path / "exported")])
    main(["merge", "--ckpt_path", str(folder), "--output", str(tmp_path / "merged")])
    pictures = [images(StableDiffusionXLPipeline.from_pretrained(tmp_path / "merged"), [1])]
    for adapter in (folder / "adapter", tmp_path / "exported"):
        stock = build("sdxl")
        stock.load_lora_weights(adapter)
        pictures.append(images(stock, [1]))
    assert (pictures[0] - images(build("sdxl"), [1])).abs().max() > 0.01
    for picture in pictures[1:]:
        torch.testing.assert_close(picture, pictures[0], rtol=0, atol=1e-4)  # measured 8e-7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.pipeline", "nobody/nothing"], "cannot load the pipeline 'nobody/nothing': no such folder"),
        (["--model.pipeline", "embedded:nothing"], "no model 'embedded:nothing' in the package"),
        (["--model.adapter.target_modules", "[q_proj]"], "the adapter does not fit the base model: Target modules"),
        (["--trainer.callbacks.seeds=[]"], "SampleImages needs at least one prompt and one seed"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(options, words, run, tmp_path, capsys):
    _, arguments = run
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*arguments, *options, "--trainer.default_root_dir", str(tmp_path / "run")])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlora: error:")]
    assert end.value.code == 2 and len(errors) == 1 and words in errors[0]
    assert not (tmp_path / "run").exists()
