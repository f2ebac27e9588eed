"""What encoding, swapping and distilling cost, as one Markdown document.

    python examples/benchmarks/run.py [--only encoding swapping distilling] [--out results.md]

Models have their true sizes and random weights. All that a ratio compares was measured in turns, in
one process; a ratio is the median of those of the turns (with the least and the most of them). What
the memory doesn't allow is left out, and the document says so.
"""

import argparse
import copy
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring
import psutil
import sizes
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from measuring import DEVICE, peak_gib, random_weights, ratio, result, start_process, turns
from memory import PIPELINES, tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, T5EncoderModel

import t5slim

PRESETS = ("small", "base", "large", "xl")
TINY = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2}


def main() -> None:
    """Run the parts, and write the document after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="where to write; printed in any case")
    parser.add_argument("--lengths", nargs="+", type=int, default=[77, 256, 512])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=3, help="turns of students")
    parser.add_argument("--xxl-repeats", type=int, default=1, help="turns of T5-XXL; 0: without it")
    parser.add_argument("--compile", action="store_true", help="compile the students")
    parser.add_argument("--tiny", action="store_true", help="miniature models, to try this script")
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)  # of a process of its own
    args = parser.parse_args()
    if args.task:
        task, kwargs = args.task
        print(json.dumps(TASKS[task](**json.loads(kwargs)) | {"peak": peak_gib()}))
        return
    document = f"# Benchmarks\n\n{measuring.machine()}"
    for part in args.only:
        document += f"\n## {part.capitalize()}\n\n"
        for line in PARTS[part](args):
            print(line, flush=True)
            document += line + "\n"
            if args.out:  # so that a killed run leaves what it measured
                args.out.write_text(document, "utf-8")


def encoder(name: str, dtype: str, tiny: bool = False) -> Any:
    """T5-XXL, or the student of a preset, with random weights."""
    with torch.device("meta"):
        if name == "T5-XXL":
            config = sizes.XXL if not tiny else type(sizes.XXL)(**sizes.XXL.to_dict() | TINY)
            model: nn.Module = T5EncoderModel(config)
            if not fits(name, dtype, tiny):
                # As much arithmetic, and as many bytes to read: no cache holds a layer.
                blocks = model.encoder.block  # the first also has the position biases
                for i in range(8, len(blocks)):
                    blocks[i] = blocks[1 + i % 7]
        else:
            config = t5slim.SlimT5Config.preset(
                name, **(TINY | {"project_out_dim": TINY["d_model"]} if tiny else {})
            )
            model = t5slim.SlimT5Encoder(config)
    return random_weights(model, getattr(torch, dtype))


def fits(name: str, dtype: str, tiny: bool) -> bool:
    """Whether T5-XXL fits into memory, with a tenth of its size to spare."""
    with torch.device("meta"):
        size = sizes.count(T5EncoderModel(sizes.XXL)) * getattr(torch, dtype).itemsize
    free = psutil.virtual_memory().available if DEVICE == "cpu" else torch.cuda.mem_get_info()[0]
    return tiny or name != "T5-XXL" or 1.1 * size < free


def plain(student: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """transformers' T5EncoderModel and a Sequential, with the very weights of a student."""
    config = sizes.XXL.to_dict() | {key: getattr(student.config, key) for key in TINY}
    with torch.device("meta"):
        t5 = T5EncoderModel(type(sizes.XXL)(**config))
    t5.load_state_dict(student.encoder.state_dict(), assign=True)
    projection = nn.Sequential(*student.final_projection)
    t5.eval()
    return lambda ids: projection(t5(ids)[0])


def products(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """The matrix products of a forward pass alone, on tensors of the same shapes."""
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [
        m.register_forward_pre_hook(
            lambda m, args: inputs.append((torch.rand_like(args[0]), m.weight))
        )
        for m in linear
    ]
    model.forward(ids)  # not compiled
    for hook in hooks:
        hook.remove()
    config, (batch, length) = model.config, ids.shape
    shape = batch, config.num_heads, length, config.d_kv
    query = torch.rand(shape, dtype=model.dtype, device=ids.device)
    key = query.transpose(2, 3).contiguous()

    def multiply() -> None:
        for values, weight in inputs:
            F.linear(values, weight)
        for _ in range(config.num_layers):
            (query @ key) @ query

    return multiply


def compared(
    student: Any, eager: Any, teacher: Any, ids: torch.Tensor, bits: int
) -> measuring.Ways:
    """A student beside the plain composition and the ceiling; or T5-XXL beside a student."""
    ways: dict[str, Callable[[], Any]] = {
        "student": lambda: student(ids),
        "eager": lambda: eager(ids),
    }
    if teacher is None:
        composed = plain(student)
        return {**ways, "plain": lambda: composed(ids), "products": products(student, ids)}
    ways["T5-XXL"] = lambda: teacher(ids)
    return ways if bits < 16 else {**ways, "products": products(teacher, ids)}


@torch.inference_mode()
def encode(
    dtype: str,
    presets: list[str],
    lengths: list[int],
    batch_sizes: list[int],
    repeats: int,
    bits: int,
    compiled: bool,
    tiny: bool,
) -> dict[str, Any]:
    """Rows of the table of one dtype; `bits` of T5-XXL, or 0 to measure the students alone."""
    rows, teacher = [], None
    if bits:
        teacher = encoder("T5-XXL", dtype, tiny)
        if bits < 16:
            with tempfile.TemporaryDirectory() as folder:
                teacher.save_pretrained(folder)
                del teacher
                how: dict[str, Any] = {"load_in_8bit": True}
                if bits == 4:
                    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
                    how["bnb_4bit_compute_dtype"] = getattr(torch, dtype)
                quantized = {"quantization_config": BitsAndBytesConfig(**how), "dtype": "auto"}
                teacher = T5EncoderModel.from_pretrained(folder, device_map=DEVICE, **quantized)
    for preset in ("base",) if bits else presets:
        student = encoder(preset, dtype, tiny)
        eager = copy.deepcopy(student)
        eager.set_attn_implementation("eager")
        for model in (student, eager) if compiled else ():
            model.compile()
        for length in lengths:
            for batch in batch_sizes:
                ids = torch.randint(3, 32_000, (batch, length), device=DEVICE)
                ways = compared(student, eager, teacher, ids, bits)
                rows.append([preset, length, batch, turns(ways, repeats)])
    return {"rows": rows}


def forget(folder: str) -> None:
    """Take files out of the system's cache, which may hold what was just written."""
    os.sync()
    for file in Path(folder).rglob("*.*") if hasattr(os, "posix_fadvise") else ():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@torch.inference_mode()
def cold(folder: str, name: str) -> dict[str, Any]:
    """Load an encoder from the disk, and encode; without what transformers does once a process."""
    with tempfile.TemporaryDirectory() as small:
        encoder("T5-XXL", "float32", tiny=True).save_pretrained(small)
        T5EncoderModel.from_pretrained(small)
    forget(folder)
    start = time.perf_counter()
    cls = T5EncoderModel if name == "T5-XXL" else t5slim.SlimT5Encoder
    cls.from_pretrained(folder).to(DEVICE)(torch.ones(1, 77, dtype=torch.int64, device=DEVICE))
    return {"seconds": time.perf_counter() - start}


@torch.inference_mode()
def throughput(start: float, seconds: float, tiny: bool) -> dict[str, Any]:
    """Prompts per second from a moment that other processes wait for as well."""
    student, ids, count = encoder("base", "float32", tiny), torch.ones(1, 77, dtype=torch.int64), 0
    student(ids)
    time.sleep(max(0.0, start - time.time()))
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        student(ids)
        count += 1
    return {"rate": count / (time.perf_counter() - begin)}


def encoding(args: argparse.Namespace) -> Iterator[str]:
    """Students beside the plain composition, and beside T5-XXL."""
    common = {"lengths": args.lengths, "batch_sizes": args.batch_sizes, "tiny": args.tiny}
    common |= {"presets": args.presets, "compiled": args.compile}
    yield 'eager: with attn_implementation="eager", plain products and a softmax.\n'
    yield (
        "| encoder | dtype | tokens | batch | s | over plain | share of the ceiling "
        "| eager over plain | its share |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    for dtype in args.dtypes:
        task = start_process(
            __file__, "encode", dtype=dtype, repeats=args.repeats, bits=0, **common
        )
        for preset, length, batch, of in result(task).get("rows", []):
            ratios = [
                f"{ratio(of[way], of['plain'])} | {ratio(of['products'], of[way])}"
                for way in ("student", "eager")
            ]
            yield (
                f"| {preset} | {dtype} | {length} | {batch} "
                f"| {statistics.median(of['student']):.3f} | {' | '.join(ratios)} |"
            )
    yield "\n| T5-XXL in | tokens | batch | s | over base | over base, eager | its share |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for dtype, bits in [*((dtype, 16) for dtype in args.dtypes), ("bfloat16", 8), ("bfloat16", 4)]:
        name = dtype if bits == 16 else f"{bits} bits"
        if not args.xxl_repeats:
            yield f"| {name} | left out: as asked |"
            continue
        if not fits("T5-XXL", dtype, args.tiny):
            name += ", with the weights of 8 layers for 24"
        found = result(
            start_process(
                __file__, "encode", dtype=dtype, repeats=args.xxl_repeats, bits=bits, **common
            )
        )
        if "failed" in found:
            yield f"| {name} | left out: too little memory, or no bitsandbytes |"
        for _, length, batch, of in found.get("rows", []):
            share = ratio(of["products"], of["T5-XXL"]) if "products" in of else "-"
            yield (
                f"| {name} | {length} | {batch} | {statistics.median(of['T5-XXL']):.2f} "
                f"| {ratio(of['T5-XXL'], of['student'])} | {ratio(of['T5-XXL'], of['eager'])} "
                f"| {share} |"
            )
    yield "\n| cold start | dtype | load and first embedding, s | with imports, s | peak, GiB |"
    yield "|---|---|---:|---:|---:|"
    for dtype in args.dtypes:
        for name in (*args.presets, "T5-XXL"):
            with tempfile.TemporaryDirectory() as folder:
                enough = shutil.disk_usage(folder).free > 30 * 2**30
                if name == "T5-XXL" and not (
                    args.xxl_repeats and enough and fits(name, dtype, args.tiny)
                ):
                    continue
                model = encoder(name, dtype, args.tiny)
                model.save_pretrained(folder)
                del model
                gc.collect()
                start, found = time.perf_counter(), []
                for _ in range(args.repeats):
                    found.append(result(start_process(__file__, "cold", folder=folder, name=name)))
                whole = (time.perf_counter() - start) / args.repeats
            seconds = sorted(each["seconds"] for each in found)
            middle = statistics.median(seconds)
            spread = f"{middle:.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})"
            yield f"| {name} | {dtype} | {spread} | {whole:.1f} | {found[0]['peak']:.2f} |"
    if DEVICE == "cpu":
        one, two = [], []
        for _ in range(args.repeats):
            for count, rates in ((1, one), (2, two)):
                kwargs = {"start": time.time() + 25, "seconds": 1 if args.tiny else 8}
                if args.tiny:
                    kwargs["start"] = time.time()
                each = [
                    start_process(__file__, "throughput", threads=1, tiny=args.tiny, **kwargs)
                    for _ in range(count)
                ]
                rates.append(sum(result(process)["rate"] for process in each))
        yield f"\nTwo processes of a thread each encode {ratio(two, one)} x the prompts of one"
        yield "(base, 77 tokens, float32)."


def write_pipeline(name: str, folder: Path, tiny: bool) -> None:
    """A pipeline of published shapes without its denoiser, with random weights."""
    flux = name == "FLUX.1-dev"
    with torch.device("meta"):
        built = sizes.flux() if flux else sizes.sd3_medium()
    built.pop("transformer")
    parts: dict[str, Any] = {
        key: random_weights(m, torch.bfloat16, "cpu") for key, m in built.items()
    }
    t5 = "text_encoder_2" if flux else "text_encoder_3"
    parts[t5] = encoder("T5-XXL", "bfloat16", tiny).cpu()
    for part in [key for key in parts if key.startswith("text_encoder")]:
        parts[part.replace("text_encoder", "tokenizer")] = tokenizer(512 if part == t5 else 77)
    scheduler = FlowMatchEulerDiscreteScheduler()
    PIPELINES[name](scheduler=scheduler, transformer=None, **parts).save_pretrained(folder)


@torch.inference_mode()
def swap(name: str, folder: str, student: str, way: str) -> dict[str, Any]:
    """Load a pipeline from the disk in one of three ways, and encode a prompt.

    Loading alone would map T5-XXL's file into memory without reading it.
    """
    cls, found = PIPELINES[name], {}
    kwargs: dict[str, Any] = {"dtype": torch.bfloat16, "transformer": None}
    read = time.perf_counter()
    if way == "patched":  # once before, so that the file is in the system's cache for both
        t5slim.SlimT5Encoder.from_pretrained(student)
        read = time.perf_counter()
        t5slim.SlimT5Encoder.from_pretrained(student)
    reading = time.perf_counter() - read
    forget(folder)
    start = time.perf_counter()
    if way == "patched by class":
        pipe = t5slim.patch_pipeline(cls, folder, student=student, **kwargs)
    else:
        pipe = cls.from_pretrained(folder, **kwargs)
        if way == "patched":
            patching = time.perf_counter()
            t5slim.patch_pipeline(pipe, student)
            found["beyond"] = time.perf_counter() - patching - reading
    prompts = ["a fox"] * (2 if cls is FluxPipeline else 3)
    pipe.to(DEVICE).encode_prompt(*prompts, max_sequence_length=77)
    return {"seconds": time.perf_counter() - start, **found}


def swapping(args: argparse.Namespace) -> Iterator[str]:
    """Loading with T5-XXL, patched, and patched by class."""
    yield "| without denoiser | loaded | s to an embedding | over with T5-XXL | peak, GiB |"
    yield "|---|---|---:|---:|---:|"
    beyond = []
    for name in PIPELINES:
        with tempfile.TemporaryDirectory() as folder:
            if shutil.disk_usage(folder).free < 30 * 2**30 or not fits(
                "T5-XXL", "bfloat16", args.tiny
            ):
                yield f"| {name} | left out: it takes 30 GB of disk, and 12 GiB of memory |"
                continue
            pipeline, student = Path(folder, "pipeline"), Path(folder, "student")
            write_pipeline(name, pipeline, args.tiny)
            encoder("base", "bfloat16", args.tiny).save_pretrained(student)
            gc.collect()
            ways = ("with T5-XXL", "patched", "patched by class")
            kwargs = {"name": name, "folder": str(pipeline), "student": str(student)}
            found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
            for _ in range(args.repeats):
                for way in ways:
                    found[way].append(result(start_process(__file__, "swap", way=way, **kwargs)))
        times = {way: [each["seconds"] for each in found[way]] for way in ways}
        beyond += [each["beyond"] for each in found["patched"]]
        for way in ways:
            yield (
                f"| {name} | {way} | {statistics.median(times[way]):.2f} | "
                f"{ratio(times[way], times['with T5-XXL'])} | "
                f"{max(each['peak'] for each in found[way]):.2f} |"
            )
    if beyond:
        yield (
            f"\nPatching takes {statistics.median(beyond):.3f} s ({min(beyond):.3f} to "
            f"{max(beyond):.3f}) more than reading the student's file."
        )


def distilling(args: argparse.Namespace) -> Iterator[str]:
    """`train` over a bare loop of the same passes."""
    from trainer_cost import costs

    updates, seconds = costs(1 if args.tiny else 2, args.repeats, 2 if args.tiny else 32)
    yield "| way | updates/s | time over the bare loop |\n|---|---:|---:|"
    for way, times in seconds.items():
        rate = updates / statistics.median(times)
        yield f"| {way} | {rate:.2f} | {ratio(times, seconds['bare loop'])} |"
    yield f"\nPeak memory of all of them: {peak_gib():.2f} GiB."


PARTS = {"encoding": encoding, "swapping": swapping, "distilling": distilling}
TASKS = {"encode": encode, "cold": cold, "throughput": throughput, "swap": swap}

if __name__ == "__main__":
    main()
