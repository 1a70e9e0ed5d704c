"""What every test shares."""

from __future__ import annotations

import os

# Threads that wait in a loop make two cores several times slower; set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
