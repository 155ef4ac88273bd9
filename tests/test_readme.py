"""The README's code runs as printed."""

import re
from pathlib import Path

import pytest

from lightning_rlora.cli import _parser

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def block_with(word):
    found = [block for block in BLOCKS if word in block]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("word", ["class SmoothedLM", "class YourModule"])
def test_the_code_runs_as_printed(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "readme"}
    exec(compile(block_with(word), "README.md", "exec"), scope)
    assert scope["trainer"].global_step > 0


def test_the_saved_adapter_loads_as_printed(tmp_path, monkeypatch):
    import lightning_rlora.trainer_cli  # noqa: F401
    from lightning_rlora.cli import main

    monkeypatch.chdir(tmp_path)
    main(
        [
            *("fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--trainer.max_steps", "1"),
            *("--trainer.limit_val_batches", "1", "--trainer.enable_progress_bar", "false", "--data.max_length", "64"),
        ]
    )
    scope = {}
    exec(compile(block_with("PeftModel.from_pretrained"), "README.md", "exec"), scope)
    assert scope["model"].peft_config["default"].r == 16  # exact: twice the rank of 8, because of the offset


def test_the_commands_are_those_that_are_checked():
    commands = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)[:2]
    script = (ROOT / ".ci" / "run").read_text()
    for command in commands:
        assert command.strip() in script
    for command in re.findall(r"^rlora (\w+)", TEXT, re.MULTILINE):
        assert command in _parser().format_help()


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@[A-Z]+@|TODO|XXX", TEXT)
    assert re.search(r"Python 3\.\d+", TEXT)
    assert "| LoRA + AdamW |" in TEXT


def test_files_that_are_named_exist():
    for name in re.findall(r"`((?:configs|examples|lightning_rlora)/[\w/.-]+)`", TEXT):
        assert (ROOT / name).exists(), name
