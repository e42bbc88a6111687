"""Time one image of 128 pixels: every backend and stock Diffusers, on the same weights, in turns.

    python benchmarks/generate.py [--steps 15] [--rounds 5] [--model FOLDER] [--ort-python PYTHON]

The model has the size of the nearest project's: UNet 192, 384, 576 and Stable Diffusion's decoder, 148 and
84 million parameters. Its weights are random, which does not change the time. --model takes a trained model
with its ONNX folder next to it instead, such as garden/model. --ort-python names the python of an environment
with Optimum. Its ORTStableDiffusionPipeline then takes its turns as well, in a process of its own.
"""

import argparse
import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from flowerdiff.core.files import write_json
from flowerdiff.drawing.model_files import find_model, weights_fingerprint
from flowerdiff.inference.backends import BACKENDS, onnx_beside, open_backend, reads_onnx, why_unavailable
from flowerdiff.inference.benchmark import network_parts, overhead
from flowerdiff.inference.generator import Generator
from flowerdiff.inference.onnx_export import copy_configs, export_part, model_parts, to_half, to_int8
from flowerdiff.models.components import TextEncoder
from flowerdiff.models.saving import save_components, save_pipeline

PROMPT = '{} red roses under a blue sky'  # another text in every round, because embeddings are cached
ORT = """import sys, time
from optimum.onnxruntime import ORTStableDiffusionPipeline

folder, steps, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
pipe = ORTStableDiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
for line in sys.stdin:
    start = time.perf_counter()
    pipe(line.strip(), num_inference_steps=steps, guidance_scale=4.0, height=size, width=size)
    print(time.perf_counter() - start, flush=True)"""


def full_size(
    folder: Path, words: int | None = None
):  # a model with random weights, exported; words: of the text encoder, None: the tokenizer's
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    assets = Path(sys.modules['flowerdiff'].__file__).parent / 'assets/garden/clip'
    tokenizer = CLIPTokenizer.from_pretrained(assets, model_max_length=77)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words or len(tokenizer),
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=2,
        block_out_channels=(192, 384, 576),
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
        cross_attention_dim=768,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=('DownEncoderBlock2D',) * 4,
        up_block_types=('UpDecoderBlock2D',) * 4,
        latent_channels=4,
        layers_per_block=2,
        sample_size=128,
    )
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', steps_offset=1
    )
    save_components(folder / 'parts', vae, TextEncoder(tokenizer, text))
    save_pipeline(folder / 'model', unet, folder / 'parts', scheduler)
    backend, out = open_backend('torch', folder / 'model'), folder / 'onnx'
    for name, part in model_parts(backend).items():
        path = export_part(part, out / name)
        to_half(path)
        to_int8(path)
    copy_configs(folder / 'model', out)
    write_json(out / 'parity.json', dict(passed=True, model=weights_fingerprint(folder / 'model')))


def fastest_of(function, calls: int = 9) -> float:  # seconds
    "Return the time of the fastest of several calls in a row, as the calls of a loop."
    function()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--steps', type=int, default=15)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--model', type=Path)
    parser.add_argument('--ort-python')
    return parser.parse_args()


def image_calls(model: Path, onnx: Path | None, generators: dict, steps: int) -> dict:
    "Return name -> function of a prompt, for every backend and for stock Diffusers."
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(model)
    stock.set_progress_bar_config(disable=True)
    size = generators['torch'].backend.size
    settings = dict(num_inference_steps=steps, guidance_scale=4.0)
    calls = {name: partial(generator, **settings) for name, generator in generators.items()}
    return calls | {'StableDiffusionPipeline': partial(stock, height=size, width=size, **settings)}


class OptimumProcess:
    "ORTStableDiffusionPipeline in a process of another environment."

    def __init__(self, python: str, onnx: Path, steps: int, size: int):
        self.process = subprocess.Popen(
            [python, '-c', ORT, str(onnx), str(steps), str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, prompt: str) -> float:
        print(prompt, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def time_images(calls: dict, rounds: int, optimum: OptimumProcess | None) -> dict:  # name -> seconds
    "Time all calls in turns. The first round warms up."
    seconds = {name: [] for name in calls}
    if optimum:
        seconds['ORTStableDiffusionPipeline'] = []
    for i in range(rounds + 1):
        for name, call in calls.items():
            time.sleep(0.3)  # threads of the one before may still wait for work, and keep a core busy
            start = time.perf_counter()
            call(PROMPT.format(i))
            if i:
                seconds[name].append(time.perf_counter() - start)
        if optimum:
            took = optimum.seconds(PROMPT.format(i))
            if i:
                seconds['ORTStableDiffusionPipeline'].append(took)
    return seconds


def part_columns(generator: Generator, steps: int) -> str:
    "Return the columns on the networks and on the time beyond them."
    settings = dict(num_inference_steps=steps, guidance_scale=4.0)
    count = itertools.count(1)

    def new_prompt():
        generator(f'{next(count)}: {PROMPT}', **settings)

    def known_prompt():
        generator(PROMPT, **settings)

    calls = network_parts(generator.backend) | dict(new=new_prompt, known=known_prompt)
    own = {name: 1000 * fastest_of(call) for name, call in calls.items()}
    new = overhead(own['new'], steps, own)
    known = overhead(own['known'], steps, own)
    return f' {own["unet"]:.1f} ms | {own["decode"]:.1f} ms | {new:.1%} | {known:.1%} |'


def main():
    args = parse_arguments()
    scratch = None
    if not args.model:
        scratch = Path(tempfile.mkdtemp())
        full_size(scratch)
        args.model = scratch / 'model'
    model = find_model(args.model)
    onnx = onnx_beside(model)
    generators = {
        name: Generator(open_backend(name, onnx if reads_onnx(name) else model))
        for name in BACKENDS
        if (onnx or not reads_onnx(name)) and not why_unavailable(name, onnx)
    }
    size = generators['torch'].backend.size
    optimum = OptimumProcess(args.ort_python, onnx, args.steps, size) if args.ort_python else None
    seconds = time_images(image_calls(model, onnx, generators, args.steps), args.rounds, optimum)
    print(f'\n{size} pixels, {args.steps} steps with guidance, {torch.get_num_threads()} threads', end='')
    print(f', {args.rounds} rounds in turns\n')
    print('| | an image, median (range) | of stock Diffusers | one step | decoder', end=' ')
    print('| overhead, new prompt | known prompt |\n|---|---|---|---|---|---|---|')
    base = statistics.median(seconds['StableDiffusionPipeline'])
    for name, times in sorted(seconds.items(), key=lambda item: statistics.median(item[1])):
        median = statistics.median(times)
        times_text = f'{median:.3f} s ({min(times):.3f} to {max(times):.3f})'
        columns = part_columns(generators[name], args.steps) if name in generators else ' | | | |'
        print(f'| {name} | {times_text} | {base / median:.2f}x faster |{columns}')
    if optimum:
        optimum.process.kill()
    if scratch:
        shutil.rmtree(scratch)


if __name__ == '__main__':
    main()
