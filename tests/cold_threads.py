"""Runs with cold caches: CUDA graphs, first calls of two threads, then a padded Llama.

    python -m tests.cold_threads --runs 20 --jobs 7
    python -m tests.cold_threads --runs 2 --jobs 1 --device cpu

Each run is a process of its own whose caches, of Triton and of Inductor, are empty folders of its
own. It goes through the steps in order, and stops at the first that fails. Printed are the whole
error of each run that failed, and a summary as JSON. A step notes down how many file descriptors
are open: Triton's "@jit functions should be defined in a Python file" hides that the source which
Inductor just wrote could not be read, be it gone or no descriptor left.
"""

import argparse
import functools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from moba_flex import MoBAConfig, moba_attention
from perf.timing import captured

CONFIGS = {"dense": MoBAConfig(64, 9, cached="dense"), "sparse": MoBAConfig(64, 2)}
# A plan that Inductor does not compile, and one that it does.
PLANS = {"cuda": ("fused", "routed"), "cpu": ("routed", "masked")}
_LENGTH = 500  # of 9 blocks at most, and of more than 2


def draw(device: str) -> list[Tensor]:
    """Return q, k and v."""
    shapes = [(2, heads, _LENGTH, 64) for heads in (4, 2, 2)]
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


def attend(inputs: Sequence[Tensor], plan: Any, softcap: float | None = None) -> list[Tensor]:
    """Return the output of a call, and the gradients of the inputs where the plan has any."""
    options: dict[str, Any] = {"block_size": 64, "top_k": 3, "plan": plan, "softcap": softcap}
    if plan == "masked":
        return [moba_attention(*(x.detach() for x in inputs), **options)]
    out = moba_attention(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]


def run_cuda_graphs(device: str, plans: Sequence[str]) -> None:
    """Capture a call in a CUDA graph, and replay it with other inputs; on CPU call twice."""
    for plan in plans:
        inputs = draw(device)
        call = functools.partial(attend, inputs, plan)
        if device == "cuda":
            graph, found = captured(call)
        for _ in range(2):
            with torch.no_grad():
                for x in inputs:
                    x.normal_()
            if device == "cuda":
                graph.replay()
            else:
                found = call()
            for x, y in zip(found, call(), strict=True):
                assert torch.equal(x, y)


def run_threads(device: str, plans: Sequence[str]) -> None:
    """Make first calls of two plans in two threads at once; a soft cap makes them new."""
    together = Barrier(2)

    def call(plan: str) -> list[Tensor]:
        together.wait(timeout=60)
        return attend(draw(device), plan, softcap=9.0)

    with ThreadPoolExecutor(2) as threads:
        for tensors in threads.map(call, PLANS[device]):
            assert all(bool(x.isfinite().all()) for x in tensors)


def run_autocast(device: str, plans: Sequence[str]) -> None:
    """Call under autocast."""
    with torch.autocast(device, dtype=torch.bfloat16):
        for plan in plans:
            assert attend(draw(device), plan)[0].dtype == torch.bfloat16


def run_deterministic(device: str, plans: Sequence[str]) -> None:
    """Call twice under deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        for plan in plans:
            inputs = draw(device)
            assert all(map(torch.equal, attend(inputs, plan), attend(inputs, plan)))
    finally:
        torch.use_deterministic_algorithms(False)


def run_llama(device: str, name: str) -> None:
    """Train and run a padded float32 Llama, and compare it with dense attention if it is."""
    import transformers

    from moba_flex.integrations.transformers import apply

    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        pad_token_id=0,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(device).eval()
    ids = torch.randint(1, 61, (2, _LENGTH), device=device)
    real = torch.ones_like(ids)
    real[0, :77] = 0
    inputs = {"input_ids": ids, "attention_mask": real, "use_cache": False}
    with torch.no_grad():
        want = model(**inputs).logits
    apply(model, CONFIGS[name])
    out = model(**inputs).logits[real.bool()]
    out.square().mean().backward()
    assert all(bool(x.grad.isfinite().all()) for x in model.parameters())
    if name == "dense":
        error = (out - want[real.bool()]).norm() / want.norm()
        assert error < 1e-2, f"relative error {error:.1e}"
        with torch.no_grad():
            model.generate(ids, attention_mask=real, max_new_tokens=3, do_sample=False)


STEPS: dict[str, Callable[[str, Sequence[str]], None]] = {
    "graphs": run_cuda_graphs,
    "threads": run_threads,
    "autocast": run_autocast,
    "deterministic": run_deterministic,
    "dense": lambda device, plans: run_llama(device, "dense"),
    "sparse": lambda device, plans: run_llama(device, "sparse"),
}


def whole_error(error: BaseException) -> str:
    """Return the traceback of an error, and those of the ones that PyTorch wrapped into it."""
    text = "".join(traceback.format_exception(error))
    inner = getattr(error, "inner_exception", None)
    return text if inner is None else f"{text}\nwhich is\n\n{whole_error(inner)}"


def run_steps(device: str, steps: Sequence[str], plans: Sequence[str]) -> dict[str, Any]:
    """Go through the steps in this process, and return what came of them."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {"seconds": {}, "descriptors": {}, "failed": None, "error": None}
    for name in steps:
        start = time.monotonic()
        try:
            STEPS[name](device, plans)
        except Exception as error:
            result |= {"failed": name, "error": whole_error(error)}
        result["seconds"][name] = round(time.monotonic() - start, 1)
        result["descriptors"][name] = len(os.listdir("/proc/self/fd"))
        if result["failed"]:
            break
    return result


def run_cold(arguments: Sequence[str], timeout: float) -> dict[str, Any]:
    """Go through the steps in a process of its own, with caches of its own.

    Args:
        arguments: Of the command, what the process needs to know.
        timeout: Seconds.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            f"{name}_CACHE_DIR": str(Path(folder, name.lower()))
            for name in ("TRITON", "TORCHINDUCTOR")
        }
        own = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        command = [sys.executable, "-m", "tests.cold_threads", *arguments, "--inside", folder]
        output = Path(folder, "output")
        with output.open("w") as file:
            try:
                status: Any = subprocess.run(
                    command,
                    env=os.environ | caches | own,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=timeout,
                ).returncode
            except subprocess.TimeoutExpired:
                status = f"more than {timeout:.0f} s"
        found = Path(folder, "result.json")
        if found.exists():
            result: dict[str, Any] = json.loads(found.read_text())
        else:
            last = output.read_text()[-4000:]
            result = {"failed": "process", "error": f"{last}\nThe process ended with {status}"}
    return result | {"total": round(time.monotonic() - start, 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs; 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.cold_threads", description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=7, help="runs at a time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--more", action="store_true", help="more calls that Inductor compiles")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for all of it")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside is not None:
        plans = PLANS[options.device][: 2 if options.more else 1]
        result = run_steps(options.device, options.steps, plans)
        (options.inside / "result.json").write_text(json.dumps(result))
        return 0

    start = time.monotonic()

    def left() -> float:
        return options.limit - (time.monotonic() - start)

    def run(number: int) -> dict[str, Any] | None:
        # Every other run asks for the two models in the other order.
        steps = options.steps
        if number % 2 and steps[-2:] == ["dense", "sparse"]:
            steps = [*steps[:-2], "sparse", "dense"]
        if left() < 30:
            return None
        more = ["--more"] if options.more else []
        result = run_cold(["--device", options.device, "--steps", *steps, *more], left())
        if result["error"]:
            print(f"Run {number} failed in {result['failed']!r}:\n{result['error']}", flush=True)
        return result

    with ThreadPoolExecutor(options.jobs) as threads:
        results = list(threads.map(run, range(options.runs)))
    made = [x for x in results if x is not None]
    failed = [x for x in made if x["error"]]
    slowest: dict[str, float] = {}
    for result in made:
        for name, seconds in result.get("seconds", {}).items():
            slowest[name] = max(seconds, slowest.get(name, 0.0))
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    summary = {
        "device": gpu or "cpu",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "transformers")},
        "runs": len(made),
        "not_started": options.runs - len(made),
        "failed": len(failed),
        "failed_in": [x["failed"] for x in failed],
        "seconds": round(time.monotonic() - start, 1),
        "slowest_run": max((x["total"] for x in made), default=0.0),
        "slowest_steps": slowest,
        "most_descriptors": max(
            (n for x in made for n in x.get("descriptors", {}).values()), default=0
        ),
        "descriptor_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    print(json.dumps(summary, indent=2))
    return int(bool(failed) or not made)


if __name__ == "__main__":
    sys.exit(main())
