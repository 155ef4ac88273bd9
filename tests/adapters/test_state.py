"""What an adapter-only checkpoint holds, what is refused, and files that are no checkpoints."""

import pickle

import pytest
import torch
from adapted_models import IDS, llama, randomise
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_rlora.adapters import (
    adapter_keys,
    check_adapter,
    find_pairs,
    keep_adapter,
    read_checkpoint,
    track_offsets,
)
from lightning_rlora.errors import UserError


def module(*, seed=0, r=2, targets=("q_proj", "v_proj"), hidden=16):
    """A module around an adapted model with a head and magnitudes."""
    config = LoraConfig(r=r, target_modules=list(targets), modules_to_save=["lm_head"], use_dora=True)
    model = randomise(get_peft_model(llama(hidden=hidden), config), seed=seed)
    track_offsets(find_pairs(model))
    outer = nn.Module()
    outer.model = model.eval()
    return outer


def test_keys_are_what_trains_and_the_offsets():
    outer = module()
    state = outer.state_dict()
    keys = adapter_keys(outer)
    assert keys <= state.keys()
    offsets = {key for key in keys if ".manifold_offset." in key}
    assert len(offsets) == 3 * 4  # three buffers of four layers
    assert keys - offsets == {name for name, p in outer.named_parameters() if p.requires_grad}
    # by PEFT's names: 2 factors and a magnitude for 4 layers, and the head
    assert sorted(key.split(".lora_")[-1].split(".")[0] for key in keys - offsets) == sorted(
        ["A", "B", "magnitude_vector"] * 4 + ["model"]
    )


def test_kept_state_alone_restores_the_function():
    outer, other = module(), module(seed=5)
    state = outer.state_dict() | {"unrelated": torch.zeros(1)}
    kept = keep_adapter(outer, state)
    assert kept.keys() == adapter_keys(outer)
    check_adapter(other, kept)
    assert not torch.equal(other.model(IDS).logits, outer.model(IDS).logits)
    other.load_state_dict(kept, strict=False)
    assert torch.equal(other.model(IDS).logits, outer.model(IDS).logits)


def test_a_full_state_dict_is_fine_too():
    check_adapter(module(), module(seed=5).state_dict())


@pytest.mark.parametrize(
    ("saved", "sentence"),
    [
        ({"r": 3}, "another rank"),
        ({"hidden": 24}, "another base model"),
        ({"targets": ("q_proj",)}, r"has no '.*v_proj.*': it was made with other target modules"),
        ({"targets": ("q_proj", "v_proj", "o_proj")}, r"'.*o_proj.*' has no place in the model"),
    ],
    ids=["rank", "base", "missing", "surplus"],
)
def test_adapters_that_do_not_fit_are_refused_before_loading(saved, sentence):
    outer, other = module(), module(**saved)
    with pytest.raises(UserError, match=sentence) as error:
        check_adapter(outer, keep_adapter(other, other.state_dict()))
    assert "\n" not in str(error.value)


def test_an_entry_that_is_no_tensor_is_missing():
    outer = module()
    state = keep_adapter(outer, outer.state_dict())
    state[next(key for key in state if "lora_B" in key)] = "text"
    with pytest.raises(UserError, match="the checkpoint has no"):
        check_adapter(outer, state)


def test_frozen_adapters_of_the_same_model_are_no_surplus():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("frozen", LoraConfig(r=3, target_modules=["q_proj"]))
    check_adapter(model, model.state_dict())
    assert not any("frozen" in key for key in adapter_keys(model))


def test_reading_a_checkpoint(tmp_path):
    contents = {"state_dict": {"w": torch.arange(3.0)}, "epoch": 2, "names": ["a"]}
    torch.save(contents, tmp_path / "good.ckpt")
    read = read_checkpoint(tmp_path / "good.ckpt")
    assert torch.equal(read["state_dict"]["w"], contents["state_dict"]["w"])
    assert read["epoch"] == 2


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="is a folder, as sharded checkpoints are"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint(tmp_path, zipped, share):
    path = tmp_path / "cut.ckpt"
    torch.save({"state_dict": {"w": torch.randn(100)}}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match="truncated or no checkpoint"):
        read_checkpoint(path)


def test_any_bytes_are_a_user_error_or_a_dictionary(tmp_path):
    path = tmp_path / "noise.ckpt"
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for length in range(1, 200):
        path.write_bytes(bytes(torch.randint(256, (length,), generator=generator).tolist()))
        try:
            assert isinstance(read_checkpoint(path), dict)
        except UserError:
            refused += 1
    assert refused > 190
    for text in ("version https://git-lfs.github.com/spec/v1\n", "<html></html>", "{}"):
        path.write_text(text)
        with pytest.raises(UserError):
            read_checkpoint(path)


class Code:
    """Runs a command when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "save", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))], ids=["torch", "pickle"]
)
def test_code_in_a_checkpoint_is_not_run(tmp_path, save):
    save({"state_dict": {}, "callback": Code(tmp_path / "was_run")}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError):
        read_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "was_run").exists()


def test_a_file_of_one_tensor_is_no_checkpoint(tmp_path):
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(UserError, match="holds a Tensor"):
        read_checkpoint(tmp_path / "tensor.pt")
