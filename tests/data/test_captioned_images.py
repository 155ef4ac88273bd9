"""CaptionedImageData as it is used: folders, metadata, Parquet and hub sets, buckets, and one line for bad input."""

import io
import json
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from drawn_images import captioned, gradient, save

from lightning_rlora.data import CaptionedImageData
from lightning_rlora.errors import UserError

SIZES = [(64, 64), (128, 64), (64, 128), (70, 66), (130, 60), (64, 64), (64, 64), (90, 40), (64, 130)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` keeps what it reads of Parquet files; here, for one test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def png(width=64, height=64):
    content = io.BytesIO()
    gradient(width, height).save(content, "PNG")
    return content.getvalue()


def data(train, **options):
    return CaptionedImageData(train, **{"size": 64, "multiple": 16, "batch_size": 2, **options})


def prompts(loader):
    return sorted(prompt for batch in loader for prompt in batch["prompt"])


def test_every_batch_comes_from_one_bucket(tmp_path):
    loader = data(captioned(tmp_path, SIZES)).train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader)
    assert prompts(batches) == [f"picture {number}" for number in range(len(SIZES))]
    shapes = {tuple(batch["pixel_values"].shape[2:]) for batch in batches}
    assert shapes == {(64, 64), (48, 80), (80, 48), (32, 96)}  # the last for 90 x 40
    for batch in batches:
        height, width = batch["pixel_values"].shape[2:]
        assert height % 16 == width % 16 == 0
        for original in batch["original_size"].tolist():
            assert (height > width) == (original[0] > original[1] * 1.2)


def test_multiple_as_large_as_size_crops_squares(tmp_path):
    loader = data(captioned(tmp_path, SIZES), multiple=64).train_dataloader()
    assert {tuple(batch["pixel_values"].shape[1:]) for batch in loader} == {(3, 64, 64)} and len(loader) == 5


def test_the_order_depends_on_seed_and_epoch_only(tmp_path):
    folder = captioned(tmp_path, SIZES)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def seen(epoch=0, **options):
        loader = data(folder, random_crop=True, flip=True, **options).train_dataloader()
        return [(batch["key"], batch["pixel_values"].sum().item()) for batch in loader.batches(epoch, 0)]

    first = seen()
    assert seen() == first == seen(num_workers=2)
    assert seen(epoch=1) != first and seen(seed=1) != first
    assert len(seen(epoch=1)) == len(first)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_validation_is_the_same_every_time(tmp_path):
    folder = captioned(tmp_path, SIZES)
    module = data(folder, validation=folder, random_crop=True, flip=True)
    one, two = ([batch["key"] for batch in module.val_dataloader()] for _ in range(2))
    assert one == two and [len(batch) for batch in one] == [2, 2, 2, 2, 1] and "flipped" not in str(one)


def test_held_out_images_are_not_trained_on(tmp_path):
    module = data(captioned(tmp_path, SIZES), validation_fraction=0.3)
    train, held_out = prompts(module.train_dataloader()), prompts(module.val_dataloader())
    assert len(held_out) == 3 and sorted(train + held_out) == [f"picture {number}" for number in range(len(SIZES))]


def test_nothing_to_validate_on(tmp_path):
    module = data(captioned(tmp_path, SIZES))
    with pytest.raises(UserError, match="nothing to validate on"):
        module.val_dataloader()
    module.setup("fit")
    assert module.val_dataloader is None


def test_processes_share_the_batches(tmp_path):
    module = data(captioned(tmp_path, SIZES))
    parts = []
    for rank in range(2):
        module._processes = lambda rank=rank: {"rank": rank, "world_size": 2}
        parts.append(prompts(module.train_dataloader()))
        assert len(module.train_dataloader()) == 3
    assert set(parts[0] + parts[1]) == {f"picture {number}" for number in range(len(SIZES))}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_as_imagefolder_has_it(tmp_path, name):
    for number in range(3):
        save(tmp_path / "below" / f"{number}.jpg")
    rows = [(f"below/{number}.jpg", f"picture, {number}") for number in range(3)]
    if name.endswith("csv"):
        text = "file_name,text\n" + "".join(f'{file},"{caption}"\n' for file, caption in rows)
    else:
        text = "".join(json.dumps({"file_name": file, "text": caption}) + "\n" for file, caption in rows)
    (tmp_path / name).write_text(text)
    assert prompts(data(str(tmp_path)).train_dataloader()) == [caption for _, caption in rows]


def test_names_in_metadata_are_those_of_files_however_they_are_written(tmp_path, monkeypatch):
    save(tmp_path / "set" / "0.png"), save(tmp_path / "set" / "1.png")
    names = [str(tmp_path / "set" / "0.png"), "../set/./1.png"]
    lines = [json.dumps({"file_name": name, "text": f"picture {i}"}) for i, name in enumerate(names)]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    assert prompts(data("set").train_dataloader()) == ["picture 0", "picture 1"]


def test_the_module_may_refuse_prompts_before_training(tmp_path):
    class Module:
        def check_prompts(self, prompts):
            assert prompts == ["picture 0", "picture 1", "picture 2"]
            raise UserError("too long")

    module = data(captioned(tmp_path, SIZES[:3]))
    module.trainer = SimpleNamespace(lightning_module=Module())
    with pytest.raises(UserError, match="too long"):
        module.train_dataloader()


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_there_is_nothing_to_test_or_predict_on(tmp_path, stage):
    with pytest.raises(UserError, match=r"rlora validate|SampleImages"):
        getattr(data(captioned(tmp_path, SIZES[:3])), f"{stage}_dataloader")()


@pytest.mark.parametrize("form", ["bytes", "feature", "path"])
def test_parquet(tmp_path, form):
    save(tmp_path / "photos" / "0.png")
    path = str(tmp_path / "photos" / "0.png")
    images = {"bytes": png(), "feature": {"bytes": png(), "path": None}, "path": path}
    kinds = {"bytes": Value("binary"), "feature": ImageFeature(), "path": Value("string")}
    features = Features({"picture": kinds[form], "caption": Value("string")})
    rows = {"picture": [images[form]] * 5, "caption": [f"row {number}" for number in range(5)]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "a.parquet")
    options = {"image_column": "picture", "caption_column": "caption"}
    for source in ("a.parquet", "", "*.parquet"):
        loader = data(str(tmp_path / "set" / source), **options).train_dataloader()
        assert prompts(loader) == rows["caption"]
    expected = torch.from_numpy(np.asarray(gradient(64, 64)).copy()).permute(2, 0, 1) / 127.5 - 1
    wide = data(str(tmp_path / "set"), multiple=64, **options).train_dataloader()
    if form != "path":
        assert torch.equal(next(iter(wide))["pixel_values"][0], expected)
    copy = pickle.loads(pickle.dumps(wide.pictures))  # as workers get it where they are not forked
    assert copy[copy.centred(4)].prompt == "row 4"


def test_hub_sets_and_several_captions(monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        rows = {"image": [{"bytes": png(), "path": None}] * 2, "text": [["one", "two"], ["one", "two"]]}
        return Dataset.from_dict(rows).cast_column("image", ImageFeature())

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    module = data("user/set", validation="user/set#dev", hub_config="small", batch_size=2)
    module.prepare_data()
    assert asked == [("user/set", "small", "train", False), ("user/set", "small", "dev", False)]
    loader = module.train_dataloader()
    seen = {prompt for epoch in range(9) for batch in loader.batches(epoch, 0) for prompt in batch["prompt"]}
    assert seen == {"one", "two"} and prompts(module.val_dataloader()) == ["one", "one"]


def test_one_warning_of_upscaling(tmp_path, recwarn):
    data(captioned(tmp_path, [(64, 64), (30, 20), (40, 40)])).train_dataloader()
    (warning,) = [str(entry.message) for entry in recwarn.list if "scaled up" in str(entry.message)]
    assert "train: 2 of 3 images are smaller" in warning and "1.png (30 x 20 pixels)" in warning


def spoil(folder, how):
    """Spoils a good folder and returns the source to read."""
    if how == "empty caption":
        (folder / "1.txt").write_text(" \n")
    elif how == "no caption":
        (folder / "1.txt").unlink()
    elif how == "no UTF-8":
        (folder / "1.txt").write_bytes(b"\xff\xfe\xff")
    elif how == "file absent":
        (folder / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "a"}\n')
    elif how == "outside":
        (folder / "below").mkdir()
        save(folder / "below" / "0.png")
        (folder / "below" / "metadata.jsonl").write_text('{"file_name": "../0.png", "text": "a"}\n')
        return str(folder / "below")
    elif how == "endless name":
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "x" * 5000, "text": "a"}))
    elif how == "number for a caption":
        (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": ["a", 5]}\n')
    elif how == "named twice":
        (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n' * 2)
    elif how == "dangling link":
        (folder / "9.png").symlink_to(folder / "gone.png")
    elif how == "wrong field":
        (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "label": "a"}\n')
    elif how == "empty field":
        (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": null}\n')
    elif how == "one pixel":
        save(folder / "1.png", 1, 1)
    elif how == "not an image":
        (folder / "1.png").write_text("nothing")
    elif how == "no images":
        return str(folder / "empty")
    elif how == "no folder":
        return str(folder / "absent")
    elif how == "text file":
        return str(folder / "1.txt")
    elif how == "broken parquet":
        (folder / "empty" / "a.parquet").write_text("nothing")
        return str(folder / "empty")
    elif how in ("wrong column", "empty cell", "no image"):
        rows = {"image": [png(), png()], "caption" if how == "wrong column" else "text": ["one", "two"]}
        if how == "empty cell":
            rows["text"][1] = None
        if how == "no image":
            rows["image"][1] = None
        Dataset.from_dict(rows).to_parquet(folder / "empty" / "a.parquet")
        return str(folder / "empty" / "a.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty caption", r"1\.txt: the caption is empty: write one or take the image out"),
        ("no caption", r"the image .*1\.png has no caption: write one into 1\.txt beside it or into metadata\.jsonl"),
        ("no UTF-8", r"1\.txt' is not UTF-8 text"),
        (
            "file absent",
            r"metadata\.jsonl, record 1 names '9\.png', which is no image in .*: add it or drop the record",
        ),
        ("outside", r"metadata\.jsonl, record 1 names '\.\./0\.png', which is no image in .*below"),
        ("endless name", r"record 1 names 'x{99} \.\.\., which is no image in"),
        ("number for a caption", r"metadata\.jsonl, record 1: the caption is 5, which is no text: name another column"),
        ("named twice", r"metadata\.jsonl, record 2 names '0\.png' a second time: keep one record an image"),
        ("dangling link", r"9\.png is a link to .*gone\.png, which is not there: mend or remove it"),
        ("wrong field", r"metadata\.jsonl, record 1 has no field 'text': its fields are file_name, label"),
        ("empty field", r"metadata\.jsonl, record 1: the caption is empty"),
        ("one pixel", r"the image .*1\.png has 1 x 1 pixels"),
        ("not an image", r"the image .*1\.png is broken"),
        ("no images", "holds no image that ends in"),
        ("no folder", "no such file or folder"),
        ("text file", r"1\.txt' is no Parquet file: give a folder of images"),
        ("broken parquet", r"a\.parquet' cannot be read as Parquet"),
        ("wrong column", r"has no column 'text': its columns are image, caption; give `caption_column`"),
        ("empty cell", r"row 2 of .*a\.parquet: the caption is empty"),
        ("no image", r"the image row 2 of .*a\.parquet cannot be read \(the column 'image' holds NoneType"),
    ],
)
def test_one_line_for_bad_input(tmp_path, how, message):
    captioned(tmp_path, SIZES[:3])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as raised:
        data(spoil(tmp_path, how)).train_dataloader()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("part", [{}, {"validation_fraction": 0.5}])
def test_a_truncated_image_is_found_before_training(tmp_path, ending, part):
    captioned(tmp_path, SIZES[:3])
    (tmp_path / "1.png").unlink()
    broken = save(tmp_path / f"1.{ending}", 200, 200)
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"^the image .*1\.{ending} cannot be read \(.*\): replace it"):
        data(str(tmp_path), **part).setup("fit")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_one_line_from_a_worker_too(tmp_path, workers):
    captioned(tmp_path, SIZES[:3])
    whole = save(tmp_path / "1.png", 200, 200).read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"^the image .*1\.png cannot be read \(.*\): replace it") as raised:
        list(data(str(tmp_path), num_workers=workers).train_dataloader())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 60}, "size is 60: it must be a multiple of 16"),
        ({"size": 0}, "size is 0"),
        ({"multiple": 0}, "multiple is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(UserError, match=message):
        data("folder", **options)
