"""`generate` end to end on a toy engine set: hand-written ONNX graphs, real ONNX Runtime.

The toy network is one line of arithmetic, so that a result can be computed here as well.
"""

from __future__ import annotations

import gc
import threading
import tracemalloc
import weakref
from dataclasses import replace

import numpy as np
import onnx.parser
import onnxruntime
import pytest
import tokenizers

import reelrt
from reelrt.bundle.manifest import SCHEDULES, TOKENIZER, Engine, EngineSet, Model, Pipeline
from reelrt.bundle.schedule import Schedule, Schedules
from reelrt.bundle.spec import Geometry, Range, step_spec, text_encoder_spec, vae_decoder_spec
from reelrt.errors import BackendError, Cancelled, CompatibilityError, InputError, IntegrityError, RangeError
from reelrt.jetson.device import Gpu, detect
from reelrt.runtime import lanes
from reelrt.runtime.loop import Request, StepLoop
from reelrt.runtime.noise import starting_noise
from tests.strikes import strike

GEOMETRY = Geometry(4, 8, 16, tokens=6, text_width=2, state_rows=3, frames=4, height=32, width=48)
WORDS = ["[start]", "[end]", "red", "blue", "circle", "square"]
CELLS = "frames, height, width"

GRAPHS = {
    "text_encoder": """
        <ir_version: 8, opset_import: ["" : 18]>
        encode (int64[batch, 6] tokens) => (float[batch, 6, 2] text)
        <float[6, 2] rows = {0, 0, 0.1, 0.2, 0.3, -0.4, -0.5, 0.6, 0.7, 0.1, -0.3, 0.8}> {
            text = Gather <axis = 0> (rows, tokens)
        }
    """,
    "step": f"""
        <ir_version: 8, opset_import: ["" : 18]>
        advance (float[batch, 3, 4, {CELLS}] state, float[batch, rows, 15] table,
                 int64[batch] step, float[batch, 2, 6, 2] text)
            => (float[batch, 3, 4, {CELLS}] state_next, int64[batch] step_next) <
            int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}},
            int64[1] end = {{15}}, int64[2] last = {{1, 2}}, int64[5] each = {{-1, 1, 1, 1, 1}},
            int64[3] square = {{-1, 3, 4}}, int64[3] flat = {{0, 4, -1}}, float[1] thousand = {{1000}}> {{
            at = Unsqueeze (step, one)
            row = GatherND <batch_dims = 1> (table, at)
            timestep = Slice (row, zero, one, one)
            scale = Slice (row, one, two, one)
            which = Slice (row, two, three, one)
            weights = Slice (row, three, end, one)
            matrix = Reshape (weights, square)
            newest = Slice (state, zero, one, one)
            scale5 = Reshape (scale, each)
            x = Squeeze (newest, one)
            seen = Mul (x, scale5)
            index = Cast <to = 7> (which)
            prompt = GatherND <batch_dims = 1> (text, index)
            meaning = ReduceMean <keepdims = 0> (prompt, last)
            meaning5 = Reshape (meaning, each)
            time = Div (timestep, thousand)
            time5 = Reshape (time, each)
            sum = Add (seen, meaning5)
            bent = Tanh (sum)
            output = Add (bent, time5)
            output6 = Unsqueeze (output, one)
            all = Concat <axis = 1> (state, output6)
            columns = Reshape (all, flat)
            next = MatMul (matrix, columns)
            shape = Shape (state)
            state_next = Reshape (next, shape)
            step_next = Add (step, one)
        }}
    """,
    "vae_decoder": f"""
        <ir_version: 8, opset_import: ["" : 18]>
        decode (float[batch, 4, {CELLS}] latents) => (uint8[batch, frames, h, w, 3] frames_out) <
            int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] three = {{3}},
            float[5] scales = {{1, 1, 8, 8, 1}}, float low = {{0}}, float high = {{255}},
            float half = {{127.5}}, float[0] roi = {{}}> {{
            rgb = Slice (latents, zero, three, one)
            last = Transpose <perm = [0, 2, 3, 4, 1]> (rgb)
            large = Resize <mode = "nearest"> (last, roi, scales)
            bright = Mul (large, half)
            raised = Add (bright, half)
            clear = Clip (raised, low, high)
            round = Round (clear)
            frames_out = Cast <to = 2> (round)
        }}
    """,
}


def schedule(solver, steps):
    fade = np.linspace(0.9, 0.5, steps)
    samples = np.stack([fade, 0.1 * fade], 1) if solver == "two" else fade[:, None]
    outputs = np.full((steps, 1), 1e38 if solver == "broken" else 0.3)
    return Schedule(
        solver,
        np.linspace(900, 10, steps),
        np.linspace(0.7, 1, steps),
        samples,
        outputs,
        1.0 + (solver == "two"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_engines(tmp_path_factory.mktemp("engines"))


def make_engines(folder, **changes):
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, "[end]")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(folder / TOKENIZER))
    Schedules([schedule(solver, n) for solver in ("one", "two", "broken") for n in range(1, 13)]).save(
        folder / SCHEDULES
    )
    specs = [text_encoder_spec(GEOMETRY), step_spec(GEOMETRY), vae_decoder_spec(GEOMETRY)]
    profile = {"batch": Range(1, 1, 3), "rows": Range(1, 20, 20), "frames": Range(2, 4, 8)}
    profile.update(height=Range(2, 4, 8), width=Range(2, 6, 12))
    small = {
        "batch": Range(1, 1, 1),
        "frames": Range(1, 3, 3),
        "height": Range(2, 4, 8),
        "width": Range(2, 6, 10),
    }
    profiles = {"text_encoder": {"batch": Range(1, 1, 1)}, "step": profile, "vae_decoder": small}
    engines = {}
    for spec in specs:
        graph = onnx.parser.parse_model(GRAPHS[spec.name].replace("frames_out", "decoded"))
        if spec.name == "vae_decoder":
            graph.graph.output[0].name = graph.graph.node[-1].output[0] = "frames"
        onnx.checker.check_model(graph)
        onnx.save(graph, folder / f"{spec.name}.onnx")
        engines[spec.name] = Engine(
            spec, f"{spec.name}.onnx", "fp32", profiles[spec.name], "key", {}, 1, 1, 0.1
        )
    pipeline = Pipeline(Model("toy", "unet3d", "5a" * 32), GEOMETRY, "split", "one", 3.0, 0, 1, 1)
    head = {
        "backend": "onnxruntime",
        "backend_version": onnxruntime.__version__,
        "target": "host",
        "compute_capability": "",
        **changes,
    }
    EngineSet(folder, "b" * 64, pipeline, engines=engines, **head).save("0.1.0")
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["one-thread", "two-threads"])
def pipe(folder, request):
    return reelrt.load(folder, threads=request.param)


def expected_latents(solver, steps, guidance, seed, ids, negative=(0, 1, 1, 1, 1, 1), shape=(4, 4, 4, 6)):
    rows = np.array([0, 0, 0.1, 0.2, 0.3, -0.4, -0.5, 0.6, 0.7, 0.1, -0.3, 0.8]).reshape(6, 2)
    table = schedule(solver, steps)
    xs = [starting_noise(seed, shape) * table.init_noise_sigma]
    for i in range(steps):
        seen = xs[0] * table.input_scale[i]
        low, high = (
            np.tanh(seen + rows[list(t)].mean()) + table.timesteps[i] / 1000 for t in (negative, ids)
        )
        output = low + guidance * (high - low)
        following = sum(a * x for a, x in zip(table.samples[i], xs, strict=False))
        xs.insert(0, following + table.outputs[i, 0] * output)
    return xs[0][None]


RED_CIRCLE = (0, 2, 4, 1, 1, 1)


@pytest.mark.parametrize(
    ("solver", "steps", "guidance"), [("one", 4, 3.0), ("two", 10, 2.5), ("two", 5, 1.0)]
)
def test_the_latents_are_the_samplers(pipe, solver, steps, guidance):
    video = pipe.generate("red circle", steps=steps, guidance=guidance, solver=solver, seed=7)
    expected = expected_latents(solver, steps, guidance, 7, RED_CIRCLE)
    assert video.latents.dtype == np.float32 and video.latents.shape == (1, 4, 4, 4, 6)
    assert np.abs(video.latents - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_frames_are_the_decoded_latents(pipe):
    """Four latent frames, three to a call of the decoder."""
    video = pipe.generate("red circle", steps=3, seed=7)
    pixels = np.round(np.clip(video.latents[0, :3].transpose(1, 2, 3, 0) * 127.5 + 127.5, 0, 255))
    expected = pixels.astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    assert video.frames.dtype == np.uint8
    assert np.array_equal(video.frames, expected)
    assert [len(part) for part in pipe.decode(video.latents)] == [3, 1]


def test_a_video_says_how_it_was_made(pipe):
    video = pipe.generate("red circle", negative_prompt="blue", steps=3, seed=7)
    assert dict(video.metadata) == {
        "prompt": "red circle",
        "negative_prompt": "blue",
        "seed": 7,
        "steps": 3,
        "guidance": 3.0,
        "solver": "one",
        "width": 48,
        "height": 32,
        "frames": 4,
        "model": "toy",
        "model_sha256": "5a" * 32,
        "backend": f"onnxruntime {onnxruntime.__version__}",
        "precision": "fp32",
        "reelrt": reelrt.__version__,
    }
    assert set(video.timings) == {"text", "denoise", "decode"}
    assert all(seconds > 0 for seconds in video.timings.values())
    assert video.peak_memory > 1e6


def test_negative_prompt_and_guidance_matter(pipe):
    plain = pipe.generate("red circle", steps=4, seed=7)
    steered = pipe.generate("red circle", negative_prompt="blue", steps=4, seed=7)
    expected = expected_latents("one", 4, 3.0, 7, RED_CIRCLE, (0, 3, 1, 1, 1, 1))
    assert np.abs(steered.latents - expected).max() < 1e-5
    assert np.abs(plain.latents - steered.latents).max() > 1e-3


def test_five_prompts_on_three_slots(pipe):
    prompts = ["red circle", "blue square", "red square", "blue circle", "red"]
    together = pipe.generate(prompts, steps=4, seed=10)
    alone = [pipe.generate(text, steps=4, seed=10 + index) for index, text in enumerate(prompts)]
    for one, two in zip(together, alone, strict=True):
        assert one.metadata == two.metadata
        assert one.latents.tobytes() == two.latents.tobytes()
        assert one.frames.tobytes() == two.frames.tobytes()


def test_seeds(pipe):
    one, two = pipe.generate(["red", "red"], steps=2, seed=(3, 3))
    assert np.array_equal(one.latents, two.latents)
    drawn = pipe.generate("red", steps=2)
    again = pipe.generate("red", steps=2, seed=drawn.metadata["seed"])
    assert np.array_equal(drawn.latents, again.latents)
    with pytest.raises(InputError, match="2 seeds for 3 prompts"):
        pipe.generate(["red"] * 3, steps=2, seed=[1, 2])


def test_latents_in(pipe):
    noise = pipe.starting_latents(7, frames=3, size=(64, 16))
    assert noise.shape == (1, 4, 3, 2, 8)
    given = pipe.generate("red circle", steps=3, solver="two", latents=noise)
    seeded = pipe.generate("red circle", steps=3, solver="two", seed=7, frames=3, size=(64, 16))
    assert np.array_equal(given.latents, seeded.latents)
    assert given.metadata["seed"] is None
    pair = pipe.generate(["red", "blue"], steps=3, latents=noise.astype(np.float64))
    assert not np.array_equal(pair[0].latents, pair[1].latents)
    both = np.concatenate([noise, noise[:, ::-1]])
    first, second = pipe.generate(["red", "red"], steps=3, latents=both)
    assert np.array_equal(first.latents, pair[0].latents)
    assert not np.array_equal(first.latents, second.latents)
    for bad, match in [
        (noise[0], "latents have shape"),
        (both, "latents have shape"),
        (noise[:, :3], "latents have shape"),
        (np.full_like(noise, np.nan), "not all finite"),
        (noise.astype(np.int64), "not all finite"),
        (np.zeros((1, 4, 9, 2, 8), np.float32), "frames 9 is not available: these engines take 2 to 8"),
    ]:
        with pytest.raises(InputError, match=match):
            pipe.generate("red", steps=3, latents=bad)
    for options in ({"seed": 1}, {"frames": 4}, {"size": (32, 32)}):
        with pytest.raises(InputError, match=next(iter(options))):
            pipe.generate("red", steps=3, latents=noise, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " \n"}, "the prompt ' \\\\n' is empty"),
        ({"prompt": []}, "no prompt was given"),
        ({"prompt": ["red", ""]}, "the prompt '' is empty"),
        ({"prompt": [3]}, "the prompt 3 is empty or no text"),
        ({"negative_prompt": None}, "negative prompt None"),
        ({"steps": 0}, "steps 0 is not available: one takes 1 to 12"),
        ({"steps": 13}, "steps 13 is not available: one takes 1 to 12"),
        ({"steps": 12}, "steps 12 is not available: these engines take up to 10 at this guidance"),
        ({"steps": 2.5}, "steps 2.5 is not a whole number"),
        ({"guidance": -1}, "guidance -1"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"guidance": 1e9}, "guidance 1000000000.0 is not possible: give a number from 0 to 1000"),
        ({"guidance": "7"}, "guidance '7'"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63}, "seed 9223372036854775808"),
        ({"solver": "heun"}, "solver 'heun' is not available: choose one of one, two, broken"),
        ({"frames": 1}, "frames 1 is not available: these engines take 2 to 8"),
        ({"frames": 9}, "frames 9 is not available: these engines take 2 to 8"),
        ({"frames": 4.0}, "frames 4.0 is not a whole number"),
        ({"size": (40, 32)}, "width 40 is not a multiple of 16 pixels"),
        ({"size": (48, 0)}, "height 0 is not a multiple of 16 pixels"),
        ({"size": (48, 80)}, "height 80 is not available: these engines take 16 to 64"),
        ({"size": (112, 32)}, "width 112 is not available: these engines take 16 to 96"),
        ({"size": (96, 32)}, "width 96 is not available: these engines take 16 to 80"),
        ({"size": 48}, "size 48"),
        ({"prompt": b"red"}, "the prompt is a bytes"),
        ({"prompt": {"red": 1}}, "the prompt is a dict"),
        ({"prompt": "red \udcff"}, "is not UTF-8"),
        ({"negative_prompt": "\ud800"}, "is not UTF-8"),
        ({"seed": b"1"}, "seed b'1'"),
        ({"seed": None, "latents": [[1], [2, 3]]}, "latents are no array"),
        (
            {"seed": None, "latents": np.full((1, 4, 4, 4, 6), 1e300)},
            "which float32 does not hold",
        ),
        ({"seed": None, "latents": np.zeros((1, 4, 4, 4, 6), np.float32), "size": 64}, "size 64 is not"),
    ],
)
def test_bad_input(pipe, options, message):
    with pytest.raises(InputError, match=message):
        pipe.generate(**{"prompt": "red", "steps": 2, "seed": 1, **options})


def test_steps_up_to_the_table_without_guidance(pipe):
    assert pipe.generate("red", steps=12, guidance=1).metadata["steps"] == 12
    with pytest.raises(RangeError):
        pipe.generate("red", steps=11)


def test_an_over_long_prompt_warns_and_remembers(pipe):
    long = "red blue red blue circle square"
    for _ in range(2):
        with pytest.warns(UserWarning, match="6 tokens; 2 words were cut: 'circle square'") as caught:
            video = pipe.generate(["red", long], steps=2, seed=1)[1]
        assert [warning.filename for warning in caught] == [__file__]
    assert video.metadata["cut"] == "circle square"
    with pytest.warns(UserWarning, match="2 words were cut: 'circle square'"):
        video = pipe.generate("red", negative_prompt=long, steps=2, seed=1)
    assert video.metadata["negative_cut"] == "circle square"
    assert "cut" not in video.metadata


def test_progress_tells_every_stage(pipe):
    calls = []
    pipe.generate(["red", "blue"], steps=3, seed=1, progress=lambda *call: calls.append(call))
    assert [done for what, done, _ in calls if what == "text"] == [0, 1, 2]
    assert [call[1:] for call in calls if call[0] == "denoise"] == [(n, 12) for n in range(0, 13, 2)]
    assert [call[1:] for call in calls if call[0] == "decode"] == [(3, 8), (4, 8), (7, 8), (8, 8)]


def test_cancel_between_steps_leaves_the_pipeline_usable(pipe):
    before = pipe.generate("red", steps=5, seed=1)
    cancel, seen = threading.Event(), []

    def progress(what, done, total):
        seen.append((what, done))
        if (what, done) == ("denoise", 4):
            cancel.set()

    with pytest.raises(Cancelled, match="denoise"):
        pipe.generate(["red", "blue"], steps=5, seed=1, progress=progress, should_cancel=cancel.is_set)
    assert seen[-1] == ("denoise", 4)
    assert np.array_equal(pipe.generate("red", steps=5, seed=1).latents, before.latents)


def test_ctrl_c_leaves_the_pipeline_usable(pipe):
    before = pipe.generate(["red", "blue", "red"], steps=5, seed=1)

    def interrupt(what, done, total):
        if what == "denoise" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.generate(["red", "blue"], steps=5, seed=1, progress=interrupt)
    after = pipe.generate(["red", "blue", "red"], steps=5, seed=1)
    assert all(np.array_equal(a.latents, b.latents) for a, b in zip(before, after, strict=True))


def test_ctrl_c_at_any_moment_never_hangs(pipe):
    """A signal every few milliseconds, several on end: one may strike while a lane waits for the other."""
    before = pipe.generate("red", steps=5, seed=1)

    def suffer():
        pipe.generate(["red", "blue"], steps=5, seed=1)

    assert strike(suffer, seconds=2, pause=0.004, at_once=3) > 10
    assert np.array_equal(pipe.generate("red", steps=5, seed=1).latents, before.latents)


def test_a_pass_that_a_second_ctrl_c_left_running_keeps_its_buffers(folder, monkeypatch):
    sessions = reelrt.load(folder, threads=2).sessions
    main, let_go, real = threading.get_ident(), threading.Event(), lanes.run

    def run(calls):
        if threading.get_ident() != main:
            assert let_go.wait(30)
        real(calls)

    def interrupt(errand, seconds):
        raise KeyboardInterrupt

    loop = StepLoop(sessions.open_step((4, 4, 4, 6)))
    text = np.zeros((2, 6, 2), np.float32)
    loop.admit(Request(schedule("one", 2).table(3.0, "split", 3), text, starting_noise(1, (4, 4, 4, 6))))
    buffer = weakref.ref(loop._session._ahead)  # a deallocated array's memory is another's at once
    with monkeypatch.context() as patch:
        patch.setattr(lanes, "run", run)
        patch.setattr(lanes.Errand, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            loop.step()
        del loop
        gc.collect()
        assert buffer() is not None
        let_go.set()
    sessions._lanes.wait()
    gc.collect()
    assert buffer() is None


def test_seeds_from_an_array(pipe):
    videos = pipe.generate(["red", "blue"], steps=1, seed=np.array([4, 9]))
    assert [video.metadata["seed"] for video in videos] == [4, 9]


def test_calling_it_from_its_own_progress_is_refused(pipe):
    with pytest.raises(InputError, match="from its own progress"):
        pipe.generate("red", steps=1, progress=lambda *_: pipe.generate("blue", steps=1))
    assert pipe.generate("red", steps=1, seed=1).frames.any()


def test_decoding_what_is_none(pipe):
    good = pipe.starting_latents(1)
    for latents, message in ((good * np.nan, "not all finite"), (good[0], "latents have shape")):
        with pytest.raises(InputError, match=message):
            list(pipe.decode(latents))


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", 10**5])
def test_threads_that_cannot_be(folder, threads):
    with pytest.raises(InputError, match="threads .* is not possible"):
        reelrt.load(folder, threads=threads)


def test_calls_from_several_threads_take_turns(pipe):
    alone = [pipe.generate("red", steps=5, seed=seed, frames=2 + seed % 3) for seed in range(6)]
    results = {}

    def work(seed):
        results[seed] = pipe.generate("red", steps=5, seed=seed, frames=2 + seed % 3)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(results[seed].latents, alone[seed].latents) for seed in range(6))


def test_numbers_that_are_none_are_reported(pipe):
    with pytest.raises(BackendError, match="not finite"):
        pipe.generate("red", steps=10, solver="broken")


def test_a_launch_allocates_no_buffer(pipe):
    loop = StepLoop(pipe._sessions.open_step((4, 8, 8, 10)))
    table = schedule("one", 10).table(3.0, "split", 3)
    request = Request(table, np.zeros((2, 6, 2), np.float32), starting_noise(1, (4, 8, 8, 10)))
    loop.admit(request)
    loop.admit(request)
    loop.step()
    tracemalloc.start()
    loop.step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4096  # bytes; one row of the state has 30,720


def test_engine_sets_that_cannot_run_here(tmp_path, monkeypatch):
    """Another version, another GPU (a description stands for one), damage."""

    def make(name, **changes):
        (tmp_path / name).mkdir()
        return make_engines(tmp_path / name, **changes)

    with pytest.raises(CompatibilityError, match=r"built by ONNX Runtime 1\.2\.3"):
        reelrt.load(make("old", backend_version="1.2.3"))
    rtx = {"backend": "tensorrt_rtx", "target": "rtx3060", "compute_capability": "8.6"}
    set_for_rtx = make("rtx", **rtx)
    for gpu, here in ((None, "no NVIDIA GPU"), (Gpu("RTX 4060", "8.9", 2**33, "13.0"), "RTX 4060, .* 8.9")):
        monkeypatch.setattr("reelrt.runtime.session.detect", lambda gpu=gpu: replace(detect(), gpu=gpu))
        with pytest.raises(CompatibilityError, match=f"for rtx3060, compute capability 8.6; .*{here}"):
            reelrt.load(set_for_rtx)
    gpu = Gpu("RTX 3060", "8.6", 2**33, "13.0")
    monkeypatch.setattr("reelrt.runtime.session.detect", lambda: replace(detect(), gpu=gpu))
    with pytest.raises((BackendError, CompatibilityError), match="no NVIDIA driver|built by TensorRT-RTX"):
        reelrt.load(set_for_rtx)
    with pytest.raises(BackendError, match=r"teapot engines for host; this version of reelrt runs onnxr"):
        reelrt.load(make("teapot", backend="teapot"))
    with pytest.raises(InputError, match="stream 5 is for a GPU"):
        reelrt.load(make("cpu"), stream=5)
    damaged = make("damaged")
    (damaged / "step.onnx").write_bytes((damaged / "step.onnx").read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"step\.onnx is damaged"):
        reelrt.load(damaged)
    with pytest.raises(BackendError, match=r"cannot open .*step\.onnx"):
        reelrt.load(damaged, check=False)
    with pytest.raises(IntegrityError, match="there is no folder"):
        reelrt.load(tmp_path / "none")
    with pytest.raises(InputError, match="threads 0"):
        reelrt.load(damaged, threads=0)
