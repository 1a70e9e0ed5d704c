"""The model families that can be exported, as data: classes and stages. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """What a diffusers folder of one family consists of.

    Attributes:
        name: As manifests have it.
        pipeline: The pipeline's class.
        components: Component to class name; "" where any will do for now.
        stages: Stage to the component it is made from, in the order of export.
    """

    name: str
    pipeline: str
    components: Mapping[str, str]
    stages: Mapping[str, str]


UNET3D = Family(
    "unet3d",
    "TextToVideoSDPipeline",
    components={
        "text_encoder": "CLIPTextModel",
        "unet": "UNet3DConditionModel",
        "vae": "AutoencoderKL",
        "tokenizer": "CLIPTokenizer",
        "scheduler": "",
    },
    stages={"text_encoder": "text_encoder", "vae_decoder": "vae", "step": "unet"},
)

FAMILIES: Mapping[str, Family] = {family.pipeline: family for family in (UNET3D,)}
"""Pipeline class to family."""
