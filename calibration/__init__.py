"""How good a model's videos are: the moving-shapes world, a judge of its videos, evaluations."""
