"""DreamBoothData as it is used: photos, prompts, class images drawn on demand, and one line for bad input."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from drawn_images import gradient, save
from lightning.pytorch import LightningModule, Trainer

from lightning_rlora.cli import main
from lightning_rlora.data import DreamBoothData
from lightning_rlora.data.class_images import missing_class_images
from lightning_rlora.errors import UserError


def photos(folder, count=5):
    for number in range(count):
        save(folder / f"{number}.jpg", 96, 64)
    return str(folder)


def data(images, **options):
    return DreamBoothData(images, "dog", **{"size": 32, "repeats": 3, "batch_size": 4, **options})


def test_an_epoch_shows_every_photo_equally_often_in_full_batches(tmp_path):
    loader = data(photos(tmp_path)).train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    assert {tuple(batch["pixel_values"].shape) for batch in batches} == {(4, 3, 32, 32)}
    assert {prompt for batch in batches for prompt in batch["prompt"]} == {"a photo of sks dog"}
    shown = Counter(key for batch in batches for key in batch["key"])
    assert sorted(shown.values()) == [3, 3, 3, 3, 4]  # 15 showings and one more to fill the last batch
    assert all(batch["weight"].tolist() == [1] * 4 for batch in batches)


def test_templates(tmp_path):
    prompts = ["a {token} {class_name}", "a {class_name} in the snow"]
    module = data(photos(tmp_path), token="zwx", prompts=prompts, repeats=20)
    counts = Counter(prompt for batch in module.train_dataloader() for prompt in batch["prompt"])
    assert set(counts) == {"a zwx dog", "a dog in the snow"} and min(counts.values()) > 30
    assert {prompt for batch in module.val_dataloader() for prompt in batch["prompt"]} == {"a zwx dog"}


def test_class_images_follow_the_photos(tmp_path):
    classes = photos(tmp_path / "class", 7)
    module = data(photos(tmp_path / "dog"), class_images=classes, prior_weight=0.5, num_class_images=6)
    batches = list(module.train_dataloader())
    for batch in batches:
        assert batch["pixel_values"].shape == (8, 3, 32, 32)
        assert batch["weight"].tolist() == [1] * 4 + [0.5] * 4
        assert batch["prompt"] == ["a photo of sks dog"] * 4 + ["a photo of dog"] * 4
        assert all("/class/" in key for key in batch["key"][4:]) and not any("/class/" in k for k in batch["key"][:4])
    shown = Counter(key for batch in batches for key in batch["key"][4:])
    assert len(shown) == 6 and set(shown.values()) <= {2, 3}
    assert {weight for batch in module.val_dataloader() for weight in batch["weight"].tolist()} == {1}


class Painter(LightningModule):
    """Draws a grey for every seed, and keeps what it was asked for."""

    def __init__(self, fail_after=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.asked, self.seen, self.fail_after = [], [], fail_after

    def sample(self, prompts, seeds):
        if self.fail_after is not None and len(self.asked) == self.fail_after:
            raise RuntimeError("broken off")
        self.asked.append((prompts, seeds))
        torch.rand(1)  # a sampler may draw from the global generator
        return [gradient(32, 32) for _ in seeds]

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["key"], torch.rand(1).item()))
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self):
        self.trainer.estimated_stepping_batches  # noqa: B018 (a schedule asks for it, and Lightning for the loader)
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, datamodule):
    torch.manual_seed(0)
    Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1).fit(
        module, datamodule
    )
    return module


def test_missing_class_images_are_drawn_before_training(tmp_path):
    dog, classes = photos(tmp_path / "dog"), tmp_path / "class"
    save(classes / "own.jpg")
    options = {"class_images": str(classes), "num_class_images": 6}
    with pytest.raises(RuntimeError, match="broken off"):
        fit(Painter(fail_after=1), data(dog, **options))
    assert sorted(file.name for file in classes.iterdir()) == [f"class_0000{n}.png" for n in range(4)] + ["own.jpg"]
    painter = fit(Painter(), data(dog, **options))
    assert painter.asked == [(["a photo of dog"], [4])]
    assert len(list(classes.iterdir())) == 6 and not missing_class_images(classes, 6)
    assert len({key for keys, _ in painter.seen for key in keys if "/class/" in key}) == 6
    again = fit(Painter(), data(dog, **options))
    assert not again.asked and again.seen == painter.seen  # drawing left no trace in the random numbers


def test_validation_folder_and_order(tmp_path):
    module = data(photos(tmp_path / "dog"), validation=photos(tmp_path / "more", 2), random_crop=True, flip=True)
    module.setup("fit")
    ((first, second),), two = ([batch["key"] for batch in module.val_dataloader()] for _ in range(2))
    assert two == [[first, second]] and "more/0.jpg|32x32+0+8" in first and "more/1.jpg|32x32+0+8" in second


def test_random_crops_and_flips_are_seeded(tmp_path):
    folder = photos(tmp_path)
    keys = lambda **options: [batch["key"] for batch in data(folder, **options).train_dataloader()]  # noqa: E731
    drawn = keys(random_crop=True, flip=True)
    assert drawn == keys(random_crop=True, flip=True, num_workers=1) != keys(random_crop=True, flip=True, seed=1)
    assert len({key for batch in drawn for key in batch}) > 10
    assert len({key for batch in keys(flip=True) for key in batch}) <= 10


def test_the_embedded_subject():
    module = data("embedded:robot", size=64)
    module.setup("fit")
    train, held_out = ([*loader] for loader in (module.train_dataloader(), module.val_dataloader()))
    keys = [{key for batch in part for key in batch["key"]} for part in (train, held_out)]
    assert len(keys[0]) == 8 and len(keys[1]) == 4 and not keys[0] & keys[1]
    assert train[0]["pixel_values"].shape == (4, 3, 64, 64)


def test_the_command_line_knows_it_by_its_short_name(capsys):
    options = ["--model", "CausalLM", "--model.adapter.r", "2", "--data", "DreamBoothData"]
    with pytest.raises(SystemExit) as end:
        main(["fit", *options, "--data.images", "embedded:robot", "--data.class_name", "robot", "--print_config"])
    assert end.value.code == 0 and "repeats: 100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "absent"}, "there is no folder 'absent'"),
        ({"images": "embedded:cat"}, "unknown embedded subject 'embedded:cat': there is embedded:robot"),
        ({"prompts": ["a {subject}"]}, r"the prompt 'a \{subject\}' may only name \{token\} and \{class_name\}"),
        ({"prompts": ["a {"]}, r"the prompt 'a \{' may only name"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [" "]}, "a prompt is empty"),
        ({"size": 60}, "size is 60: it must be a multiple of 8"),
        ({"repeats": 0}, "repeats is 0"),
        ({"num_class_images": 3}, "num_class_images needs class_images"),
        ({"class_images": "absent"}, "there is no folder 'absent'"),
        ({"class_images": "dog/0.jpg", "num_class_images": 2}, r"class_images: 'dog/0\.jpg' is a file: name a folder"),
        ({"class_images": "absent", "prior_weight": 0}, "prior_weight is 0"),
        ({"class_images": "absent", "num_class_images": 200}, "holds 0 of 200 images: add 200, lower num_class_images"),
    ],
)
def test_one_line_for_bad_input(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        data(**{"images": photos(tmp_path / "dog"), **options}).train_dataloader()
    assert "\n" not in str(raised.value) and not (tmp_path / "absent").exists()


def test_the_module_may_refuse_prompts_before_training(tmp_path):
    class Module:
        def check_prompts(self, prompts):
            assert prompts == ["a photo of sks dog", "a photo of dog"]
            raise UserError("too long")

    module = data(photos(tmp_path), class_images=str(tmp_path))
    module.trainer = SimpleNamespace(lightning_module=Module())
    with pytest.raises(UserError, match="too long"):
        module.setup("fit")


def test_a_broken_photo_is_found_before_training(tmp_path):
    folder = photos(tmp_path)
    whole = (tmp_path / "3.jpg").read_bytes()
    (tmp_path / "3.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"the image .*3\.jpg cannot be read \(.*\): replace it"):
        data(folder).setup("fit")
