"""QLoRA on several processes: a base in 4 bits that is whole under DDP, and sharded by FSDP1 and FSDP2."""

import os
from functools import partial

import pytest
import torch
from embedded_runs import rows, trainer
from processes import launch
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import DataLoader

from lightning_rlora import CausalLM, UserError
from lightning_rlora.adapters import LoftQ
from lightning_rlora.callbacks import AdapterInit, LocallyOptimalInit

pytest.importorskip("bitsandbytes")
NAMES = ("ddp", "fsdp1", "fsdp2")
CASES = {
    "LOI, in bfloat16, recomputed": {
        "start": lambda: LocallyOptimalInit(alpha=0.05),
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
    },
    "LoftQ, DoRA": {"start": lambda: AdapterInit(LoftQ()), "dora": True},
}


def made(dora=False, **options):
    torch.manual_seed(0)
    adapter = {"r": 2, "lora_alpha": 2, "use_dora": dora, "target_modules": ["q_proj", "v_proj"]}
    return CausalLM(adapter=adapter, quantization="4bit", **options)


def trained(module):
    return [p.detach().clone() for p in module.parameters() if p.requires_grad]


def held(module):
    """Bytes of the blocks' frozen weights that this process holds."""
    frozen = [p for name, p in module.named_parameters() if ".layers." in name and not p.requires_grad]
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in frozen)


def fit_cases(strategy, folder):
    found = {}
    for name, case in CASES.items():
        options = dict(case)
        start = options.pop("start")()
        module = made(**options)
        run = trainer(strategy, 2, folder, callbacks=[start], max_steps=3)
        run.fit(module, DataLoader(rows(12), batch_size=2), DataLoader(rows(4), batch_size=2))
        found[name] = trained(module), run.callback_metrics["val/loss"], held(module)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    return {name: launch(2, fit_cases, name, folder / name, folder=folder / name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_a_base_in_4_bits_trains_as_under_ddp(case, name, runs):
    ddp, loss, whole = runs["ddp"][0][case]
    for weights, measured, bytes_held in (run[case] for run in runs[name]):
        assert all(torch.equal(x, y) and bool(x.isfinite().all()) for x, y in zip(ddp, weights, strict=True))
        assert measured == loss
        assert bytes_held == whole if name == "ddp" else bytes_held < 0.51 * whole


def steps(strategy, folder, first=0, last=4, resume=None):
    module = made(lr_scheduler=partial(ConstantLR, factor=1))
    run = trainer(strategy, 2, folder, max_steps=last, max_epochs=-1, use_distributed_sampler=False)
    turns = range(4 * first + int(os.environ["RANK"]), 40, 2)
    run.fit(module, DataLoader(rows(40), batch_size=2, sampler=turns), ckpt_path=resume)
    if last < 4:
        run.save_checkpoint(folder / f"{strategy}.ckpt")
    return trained(module)


def interrupted(folder):
    """Four steps under DDP, and two under each strategy that are followed by two under the next."""
    whole = steps("ddp", folder)
    for name in NAMES:
        steps(name, folder, last=2)
    turns = zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)
    return whole, [steps(name, folder, first=2, resume=folder / f"{other}.ckpt") for other, name in turns]


def test_a_checkpoint_goes_on_under_another_strategy(tmp_path):
    for whole, resumed in launch(2, interrupted, tmp_path, folder=tmp_path):
        for run in resumed:
            assert all(torch.equal(x, y) for x, y in zip(whole, run, strict=True))
    saved = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"] for name in NAMES]
    assert saved[0].keys() == saved[1].keys() == saved[2].keys()
    assert all(".lora_" in key or "manifold_offset" in key for key in saved[0])


def refused(folder):
    for strategy in ("fsdp1", "fsdp2"):
        module = CausalLM(adapter={"r": 2, "lora_alpha": 2}, quantization="8bit")
        with pytest.raises(UserError, match="cannot be sharded: use quantization 4bit, or strategy ddp"):
            trainer(strategy, 2, folder, max_steps=1).fit(module, DataLoader(rows(4), batch_size=2))


def test_a_base_in_8_bits_is_not_sharded(tmp_path):
    launch(2, refused, tmp_path, folder=tmp_path)
