"""Training by CUDA graphs against training launched from Python, and where it is refused."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from tiny_pipelines import batch, saved
from torch.utils.data import DataLoader

from lightning_rlora import LocallyOptimalInit, Riemannion, TextToImage, UserError
from lightning_rlora.modules.adapted_model import AdaptedModel
from lightning_rlora.optim import LinearWithWarmup

ADAPTER = {"r": 2, "lora_alpha": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {kind: saved(folder / kind, kind) for kind in ("sd15", "sdxl")}


def loader(*batches):
    return DataLoader(list(batches), batch_size=None, generator=torch.Generator())


class Replays(Callback):
    """Counts the shapes that were recorded."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.recorded = 0 if pl_module._replayed is None else len(pl_module._replayed._recorded)


def fitted(folder, root, *, cuda_graphs, accelerator="gpu", callbacks=(), optimizer=None, dropout=0.0, **options):
    torch.manual_seed(0)
    module = TextToImage(
        folder,
        ADAPTER | {"lora_dropout": dropout},
        # not Adam, which makes steps of the rate's size from gradients that are but rounding
        optimizer=optimizer or (lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9)),
        lr_scheduler=lambda made: LinearWithWarmup(made, warmup=0.2),
        cuda_graphs=cuda_graphs,
    )
    settings = {"max_steps": 12, "val_check_interval": 4, "check_val_every_n_epoch": None} | options
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        default_root_dir=root,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        callbacks=[*callbacks, replays := Replays()],
        **settings,
    )
    torch.manual_seed(1)
    whole, part = [batch(seed) for seed in range(16)], batch(99, size=3)
    trainer.fit(module, loader(*whole[:5], part, *whole[5:]), loader(batch(50)))
    factors = {name: p.detach().cpu() for name, p in module.named_parameters() if p.requires_grad}
    return factors, trainer.callback_metrics["val/loss"].item(), replays.recorded


def far(one, two):
    assert one.keys() == two.keys()
    return max(((one[key] - two[key]).norm() / two[key].norm().clamp_min(1e-12)).item() for key in one)


def updates(factors):
    """The products B A, by names of B: singular vectors may come with other signs."""
    pairs = {name: name.replace("lora_B", "lora_A") for name in factors if "lora_B" in name}
    return {left: factors[left] @ factors[right] for left, right in pairs.items()}


def test_it_is_refused_without_a_gpu(folders, tmp_path):
    with pytest.raises(UserError, match="single process with a CUDA device"):
        fitted(folders["sd15"], tmp_path, cuda_graphs=True, accelerator="cpu")


def test_it_is_refused_beside_recomputed_activations(folders):
    with pytest.raises(UserError, match="gradient_checkpointing"):
        TextToImage(folders["sd15"], ADAPTER, cuda_graphs=True, gradient_checkpointing=True)


def recorder(call, examples, **_):
    """What torch's recorder does, without a graph: results and gradients lie where the next call puts its own."""
    trained = [parameter for parameter in call.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(parameter) for parameter in trained]

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, count, *tensors):
            for example, given in zip(examples, tensors[:count], strict=True):
                example.copy_(given)
            with torch.enable_grad():
                ctx.result = call(*examples)
            return ctx.result.detach()

        @staticmethod
        def backward(ctx, gradient):
            for place, found in zip(gradients, torch.autograd.grad(ctx.result, trained, gradient), strict=True):
                place.copy_(found)
            return None, *(None for _ in examples), *(place.detach() for place in gradients)

    return lambda *inputs: Replay.apply(len(inputs), *inputs, *trained)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_recorded_is_the_unet_itself(kind, accumulate, folders, tmp_path, monkeypatch):
    """On a CPU, all but the graphs."""
    options = {"accelerator": "cpu", "accumulate_grad_batches": accumulate, "max_steps": 12 // accumulate}
    options["val_check_interval"] = 4 * accumulate
    launched = fitted(folders[kind], tmp_path, cuda_graphs=False, **options)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorder)
    monkeypatch.setattr(TextToImage, "on_fit_start", AdaptedModel.on_fit_start)
    replayed = fitted(folders[kind], tmp_path, cuda_graphs=True, **options)
    assert far(replayed[0], launched[0]) == 0
    assert replayed[1] == launched[1]
    assert (launched[2], replayed[2]) == (0, 3)  # batches of 4 and of 3, and the evaluated ones


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    ("precision", "accumulate", "tolerance"),
    [("32-true", 1, 1e-3), ("32-true", 2, 1e-3), ("bf16-mixed", 1, 5e-2), ("16-mixed", 1, 5e-2)],
)
def test_the_weights_are_those_of_a_launched_run(kind, precision, accumulate, tolerance, folders, tmp_path):
    options = {"precision": precision, "accumulate_grad_batches": accumulate, "val_check_interval": 4 * accumulate}
    options["max_steps"] = 12 // accumulate
    launched, loss, none = fitted(folders[kind], tmp_path, cuda_graphs=False, **options)
    replayed, replayed_loss, recorded = fitted(folders[kind], tmp_path, cuda_graphs=True, **options)
    assert (none, recorded) == (0, 3)  # batches of 4 and of 3, and the evaluated ones
    print(f"{kind} {precision} x {accumulate}: weights {far(replayed, launched):.2g}, loss {replayed_loss - loss:.2g}")
    assert far(replayed, launched) < tolerance
    assert replayed_loss == pytest.approx(loss, rel=1e-4 if precision == "32-true" else 1e-2)


@pytest.mark.gpu
def test_a_start_from_gradients_comes_before_the_recording(folders, tmp_path):
    def optimizer(groups):
        return Riemannion(groups, lr=0.05)

    runs = [
        fitted(folders["sd15"], tmp_path, cuda_graphs=replay, callbacks=[LocallyOptimalInit()], optimizer=optimizer)
        for replay in (False, True)
    ]
    difference = far(updates(runs[1][0]), updates(runs[0][0]))
    print(f"updates {difference:.2g}, loss {runs[1][1] - runs[0][1]:.2g}")
    assert difference < 1e-2


@pytest.mark.gpu
def test_dropout_takes_the_same_masks(folders, tmp_path):
    runs = [fitted(folders["sd15"], tmp_path, cuda_graphs=replay, dropout=0.3) for replay in (False, True)]
    print(f"weights {far(runs[1][0], runs[0][0]):.2g}")
    assert far(runs[1][0], runs[0][0]) < 1e-3
