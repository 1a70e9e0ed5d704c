"""A model folder is checked before anything is loaded or written: each fault is one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from reelrt.cli import app
from reelrt.errors import ModelError
from reelrt.export.folder import open_folder

CLASSES = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet3DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
}
WEIGHTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
UNET = f"unet/{WEIGHTS['unet']}"
CARD = "---\nlicense: apache-2.0\ninference:\n  parameters:\n    guidance_scale: 6\n---\n\n# A model\n"


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with every file that is looked at, and nothing in them that could run."""
    folder = tmp_path / "model"
    for component in CLASSES:
        (folder / component).mkdir(parents=True)
    write_json(folder / "model_index.json", {"_class_name": "TextToVideoSDPipeline", **CLASSES})
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler"})
    for component, file in WEIGHTS.items():
        write_json(folder / component / "config.json", {"made": "by a test"})
        save_file({"weight": np.ones((4, 4), np.float32)}, folder / component / file)
    write_json(folder / "tokenizer" / "tokenizer.json", {"made": "by a test"})
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def edit_index(model: Path, **changes: object) -> None:
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    write_json(model / "model_index.json", {**index, **changes})


def shard(model: Path) -> None:
    folder = model / "unet"
    for number in (1, 2):
        save_file({f"weight{number}": np.ones(3, np.float32)}, folder / f"part-{number}.safetensors")
    weight_map = {f"weight{number}": f"part-{number}.safetensors" for number in (1, 2)}
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": weight_map})
    (model / UNET).unlink()


def lose_a_shard(model: Path) -> None:
    shard(model)
    (model / "unet" / "part-2.safetensors").unlink()


def pickle_only(model: Path) -> None:
    (model / UNET).rename(model / "unet" / "diffusion_pytorch_model.bin")


FAULTS = {
    "no folder": (shutil.rmtree, "model is not a folder."),
    "no index": (lambda m: (m / "model_index.json").unlink(), "has no model_index.json."),
    "index cut off": (lambda m: cut(m / "model_index.json", 20), "model_index.json cannot be read"),
    "index no object": (lambda m: write_json(m / "model_index.json", []), "holds no JSON object"),
    "index no text": (
        lambda m: (m / "model_index.json").write_bytes(b"\xff\xfe\x00"),
        "model_index.json cannot be read",
    ),
    "other pipeline": (
        lambda m: edit_index(m, _class_name="StableDiffusionPipeline"),
        "is a StableDiffusionPipeline, which cannot be exported. Supported is TextToVideoSDPipeline.",
    ),
    "tokenizer missing": (
        lambda m: (m / "tokenizer" / "tokenizer.json").unlink(),
        "tokenizer holds no tokenizer",
    ),
    "no pipeline": (
        lambda m: edit_index(m, _class_name=None),
        "is a model of no class, which",
    ),
    "other text encoder": (
        lambda m: edit_index(m, text_encoder=["transformers", "T5EncoderModel"]),
        "text_encoder is a T5EncoderModel; only CLIPTextModel can be exported.",
    ),
    "component not named": (lambda m: edit_index(m, vae=[None, None]), "model_index.json names no vae."),
    "config missing": (lambda m: (m / "vae" / "config.json").unlink(), "vae/config.json is missing."),
    "config broken": (
        lambda m: (m / "unet" / "config.json").write_text("{,}", encoding="utf-8"),
        "unet/config.json cannot be read",
    ),
    "scheduler config missing": (
        lambda m: (m / "scheduler" / "scheduler_config.json").unlink(),
        "scheduler/scheduler_config.json is missing.",
    ),
    "weights missing": (lambda m: (m / UNET).unlink(), "unet has no safetensors weights."),
    "weights cut off": (lambda m: cut(m / UNET, -1), f"{UNET} is damaged: it has"),
    "weights' header cut off": (lambda m: cut(m / UNET, 30), f"{UNET} is damaged: its header"),
    "weights empty": (lambda m: cut(m / UNET, 0), f"{UNET} is damaged: its header"),
    "weights too long": (
        lambda m: (m / UNET).write_bytes((m / UNET).read_bytes() + b"x"),
        f"{UNET} is damaged: it has",
    ),
    "weights something else": (lambda m: (m / UNET).write_bytes(b"PK\x03\x04" * 99), f"{UNET} is damaged"),
    "weights pickled": (pickle_only, "pickled .bin files only"),
    "shard missing": (lose_a_shard, "unet/part-2.safetensors is missing."),
    **{
        f"no {component}": (
            lambda m, component=component: shutil.rmtree(m / component),
            f"model has no folder {component}.",
        )
        for component in CLASSES
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence_with_exit_code_3_and_nothing_is_written(fault, model, tmp_path):
    damage, sentence = FAULTS[fault]
    damage(model)
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["export", str(model), "-o", str(tmp_path / "bundle")])
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith(f"Error: {tmp_path}")
    assert result.stderr.count("\n") == 1
    assert sentence in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_whole_folder_says_of_itself(model):
    (model / "LICENSE").write_text("Apache-2.0", encoding="utf-8")
    folder = open_folder(model)
    assert folder.family.name == "unet3d"
    assert folder.classes["scheduler"] == "DDIMScheduler"
    assert folder.variants == {"text_encoder": "", "unet": "", "vae": ""}
    assert folder.licence == "apache-2.0"
    assert folder.parameter("guidance_scale", 7.5) == 6
    assert folder.parameter("num_frames", 16) == 16
    assert {path.name for path in folder.papers()} == {"README.md", "LICENSE"}
    assert folder.config("unet") == {"made": "by a test"}


def test_shards_and_half_precision_variants_are_found(model):
    shard(model)
    vae = model / "vae" / WEIGHTS["vae"]
    vae.rename(vae.with_suffix(".fp16.safetensors"))
    assert open_folder(model).variants == {"text_encoder": "", "unet": "", "vae": "fp16"}


@pytest.mark.parametrize(
    "card", ["", "# No front matter\n", "---\n[broken: yaml\n---\n", "---\njust text\n---\n"]
)
def test_a_card_that_says_nothing_is_no_fault(model, card):
    (model / "README.md").write_text(card, encoding="utf-8")
    folder = open_folder(model)
    assert folder.licence == ""
    assert folder.parameter("guidance_scale", 7.5) == 7.5


def test_a_card_s_parameter_that_is_no_number_is_named(model):
    (model / "README.md").write_text(CARD.replace("6", "high"), encoding="utf-8")
    with pytest.raises(ModelError, match=r"README.md gives 'high' as guidance_scale, which is no number"):
        open_folder(model).parameter("guidance_scale", 7.5)


def test_the_hash_is_of_configuration_and_weights_and_not_of_the_place(model, tmp_path):
    first = open_folder(model).sha256()
    moved = model.rename(tmp_path / "elsewhere")
    (moved / "README.md").write_text("another card", encoding="utf-8")
    assert open_folder(moved).sha256() == first
    save_file({"weight": np.zeros((4, 4), np.float32)}, moved / UNET)
    assert open_folder(moved).sha256() != first
