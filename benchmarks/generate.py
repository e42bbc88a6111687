"""One picture of 128 pixels on this machine: every backend of ours beside stock Diffusers, on the same weights, in turns.

    python benchmarks/generate.py [--steps 15] [--rounds 5] [--model FOLDER] [--ort-python PYTHON]

The model has the size of the nearest project's (UNet 192, 384, 576 and Stable Diffusion's decoder, 148 and 84 million parameters) and random weights: what it draws is noise, what it costs is not. --model takes a trained one with
its ONNX folder beside it instead, such as garden/model. --ort-python names the python of an environment with Optimum, whose ORTStableDiffusionPipeline then takes its turns as well, in a process of its own.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from flowerdiff.core.workspace import write_json
from flowerdiff.inference.backends import BACKENDS, onnx_beside, open_backend, reads_onnx, why_unavailable
from flowerdiff.inference.benchmark import network_parts, overhead
from flowerdiff.inference.generator import Generator
from flowerdiff.models.components import TextEncoder
from flowerdiff.models.model_folder import find_model, weights_fingerprint
from flowerdiff.models.saving import save_components, save_pipeline
from flowerdiff.stages import onnx as export

PROMPT = '{} red roses under a blue sky'  # another in every round: a text that was drawn before is remembered
ORT = """import sys, time
from optimum.onnxruntime import ORTStableDiffusionPipeline
pipe = ORTStableDiffusionPipeline.from_pretrained(sys.argv[1]); pipe.set_progress_bar_config(disable=True); size = int(sys.argv[3])
for line in sys.stdin:
    t = time.perf_counter(); pipe(line.strip(), num_inference_steps=int(sys.argv[2]), guidance_scale=4., height=size, width=size); print(time.perf_counter() - t, flush=True)"""


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
    for name, part in export.parts_of(backend).items():
        path = export.export_part(part, out / name)
        export.to_half(path)
        export.to_int8(path)
    export.copy_configs(folder / 'model', out)
    write_json(out / 'parity.json', dict(passed=True, model=weights_fingerprint(folder / 'model')))


def fastest_of(
    f, calls: int = 9
):  # seconds; one after the other, so that each finds the caches as a loop does
    f()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--steps', type=int, default=15)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--model', type=Path)
    parser.add_argument('--ort-python')
    args = parser.parse_args()
    scratch = None
    if not args.model:
        scratch = Path(tempfile.mkdtemp())
        full_size(scratch)
        args.model = scratch / 'model'
    model = find_model(args.model)
    onnx = onnx_beside(model)
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(model)
    stock.set_progress_bar_config(disable=True)
    ours = {
        k: Generator(open_backend(k, onnx if reads_onnx(k) else model))
        for k in BACKENDS
        if (onnx or not reads_onnx(k)) and not why_unavailable(k, onnx)
    }
    size = ours['torch'].backend.size
    calls = {
        k: lambda prompt, g=g: g(prompt, num_inference_steps=args.steps, guidance_scale=4.0)
        for k, g in ours.items()
    }
    calls['StableDiffusionPipeline'] = lambda prompt: stock(
        prompt, num_inference_steps=args.steps, guidance_scale=4.0, height=size, width=size
    )
    seconds = {k: [] for k in calls}
    if args.ort_python:
        other = subprocess.Popen(
            [args.ort_python, '-c', ORT, str(onnx), str(args.steps), str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        seconds['ORTStableDiffusionPipeline'] = []
    for i in range(args.rounds + 1):
        for k, f in calls.items():
            time.sleep(0.3)
            start = time.perf_counter()
            f(PROMPT.format(i))  # threads of the one before may still wait for work, and a core
            if i:
                seconds[k].append(time.perf_counter() - start)
        if args.ort_python:
            print(PROMPT.format(i), file=other.stdin, flush=True)
            took = float(other.stdout.readline())
            if i:
                seconds['ORTStableDiffusionPipeline'].append(took)
    base = statistics.median(seconds['StableDiffusionPipeline'])
    print(
        f'\n{size} pixels, {args.steps} steps with guidance, {torch.get_num_threads()} threads, {args.rounds} rounds in turns\n\n| | a picture, median (range) | of stock Diffusers | one step | decoder | beyond the network, prompt new | prompt known |\n|---|---|---|---|---|---|---|'
    )
    for k, s in sorted(seconds.items(), key=lambda kv: statistics.median(kv[1])):
        m = statistics.median(s)
        line = f'| {k} | {m:.3f} s ({min(s):.3f} to {max(s):.3f}) | {base / m:.2f}x faster |'
        if k in ours:
            g, n = ours[k], [0]

            def new():
                n[0] += 1
                g(f'{n[0]}: {PROMPT}', num_inference_steps=args.steps, guidance_scale=4.0)

            parts = network_parts(g.backend) | dict(
                new=new, known=lambda: g(PROMPT, num_inference_steps=args.steps, guidance_scale=4.0)
            )
            own = {name: 1000 * fastest_of(f) for name, f in parts.items()}
            line += f' {own["unet"]:.1f} ms | {own["decode"]:.1f} ms | {overhead(own["new"], args.steps, own):.1%} | {overhead(own["known"], args.steps, own):.1%} |'
        else:
            line += ' | | | |'
        print(line)
    if args.ort_python:
        other.kill()
    if scratch:
        shutil.rmtree(scratch)


if __name__ == '__main__':
    main()
