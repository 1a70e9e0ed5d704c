"""A service that already uses pycuda shares its context, its stream and its arrays with ReelRT.

    pip install "reelrt[rtx,pycuda]"
    python examples/pycuda_service.py build/engines red.mp4

No latent and no frame is copied on its way between the two. pycuda comes as source: it is compiled when it is
installed, which takes a C++ compiler, CUDA's headers and the driver's libcuda.so.
"""

from __future__ import annotations

import sys

import numpy as np
import pycuda.autoprimaryctx  # makes the GPU's primary context this thread's own
import pycuda.driver
import pycuda.gpuarray

import reelrt

PROMPT = "a red circle moving right on a black background"


def main(engines: str, output: str, steps: str = "25") -> None:
    stream = pycuda.driver.Stream()
    # In pycuda's context, and in order with whatever else the service puts on this stream.
    pipe = reelrt.load(engines, stream=stream)

    noise = pycuda.gpuarray.to_gpu(pipe.starting_latents(7))
    video = pipe.generate(PROMPT, steps=int(steps), latents=noise, on_device=True, save_to=output)

    shared = video.on_device["frames"]  # uint8 [F, H, W, 3]; `base` keeps the memory
    frames = pycuda.gpuarray.GPUArray(shared.shape, shared.dtype, base=shared, gpudata=shared.pointer)
    if not np.array_equal(frames.get(), video.frames):
        raise SystemExit("the frames on the GPU are not those of the file")
    print(f"{output}: {len(frames)} frames, shared at {int(frames.gpudata):#x}")


if __name__ == "__main__":
    main(*sys.argv[1:])
