"""Which prompts the bundled model is examined with: a set balanced over what they ask for.

Knows the moving-shapes world only.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from reelrt.calibration.shapes import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene, all_captions, all_scenes

_CHOICES = {
    "color": len(COLORS),
    "shape": len(SHAPES),
    "motion": len(MOTIONS),
    "background": len(BACKGROUNDS),
}


def pick_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes that ask for each word of an attribute about equally often.

    No scene comes a second time before all have come once, and the first n are balanced as well.

    Args:
        count: Number of scenes.
        seed: Equal seeds give equal scenes.
    """
    rng, picked = np.random.default_rng(seed), list[Scene]()
    left: list[Scene] = []
    seen: Counter[str] = Counter()
    for _ in range(count):
        if not left:
            every = all_scenes()
            left = [every[index] for index in rng.permutation(len(every))]
        scene = min(left, key=lambda scene: sum(seen[word] * n for word, n in _words(scene)))
        left.remove(scene)
        seen.update(word for word, _ in _words(scene))
        picked.append(scene)
    return picked


def pick_prompts(scenes: list[Scene], seed: int, *, paraphrases: bool = False) -> list[str]:
    """A sentence for each scene: the canonical one, or any other of those it was trained with.

    Args:
        scenes: What to ask for.
        seed: Chooses among the other sentences.
        paraphrases: Whether to take those.
    """
    if not paraphrases:
        return [scene.prompt for scene in scenes]
    rng = np.random.default_rng(seed)
    others = [all_captions(scene)[1:] for scene in scenes]
    return [sentences[rng.integers(len(sentences))] for sentences in others]


def _words(scene: Scene) -> list[tuple[str, int]]:
    """A scene's words, each with the number of words it could have been instead."""
    return [(f"{name} {getattr(scene, name)}", count) for name, count in _CHOICES.items()]
