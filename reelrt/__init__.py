"""ReelRT: text-to-video diffusion models as engines for NVIDIA Jetson and RTX devices."""

__version__ = "0.1.0"
