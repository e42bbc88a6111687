"""Compare training methods on the garden in equal time: the default recipe with one setting changed.

    python benchmarks/methods.py FOLDER [--epochs 2] [--only NAME ...]

FOLDER is a workspace with an encoded garden, which is made if it does not exist. The speed of each method is
measured first, in turns with the default in one process. It then trains for the epochs of the default times
that speed, so that all methods get the same time, whatever else the machine does. Each model generates images
for the prompts of the test split, and the attribute classifier measures their adherence. Finished results are
kept and not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from flowerdiff.core.profiles import load_profile
from flowerdiff.core.workspace import open_workspace
from flowerdiff.data.batches import load_split
from flowerdiff.evaluation.eval_prompts import eval_prompts, generate_images
from flowerdiff.evaluation.measure import attribute_metrics
from flowerdiff.inference.generator import Generator
from flowerdiff.services.processes import MALLOC_ENV
from flowerdiff.stages import train

CHOICES = {
    'default': {},
    'epsilon (Ho 2020)': {'prediction_type': 'epsilon'},
    'rectified flow, logit-normal (Esser 2024)': {
        'prediction_type': 'flow_prediction',
        'min_snr_gamma': 0.0,
        'timestep_sampling': 'logit_normal',
    },
    'zero terminal SNR (Lin 2023)': {'zero_terminal_snr': True},
    'no min-SNR weights': {'min_snr_gamma': 0.0},
    'offset noise 0.05': {'offset_noise': 0.05},
    'timesteps uniform, not stratified': {'timestep_sampling': 'uniform'},
    'timesteps logit-normal': {'timestep_sampling': 'logit_normal'},
    'no caption dropout': {'caption_dropout': 0.0},
    'no mirror images': {'mirror': False},
    'no average (EMA 0)': {'ema_decay': 0.0},
    'EMA 0.99, 0.999, 0.9995: the best': {'ema_decay': 0.99, 'ema_decays': [0.999, 0.9995]},
    'Muon (Jordan 2024)': {'optimizer': 'muon'},
    'AdamW beta2 0.999': {'beta2': 0.999},
    'cosine schedule': {'lr_schedule': 'cosine'},
    'constant with warm-up': {'lr_schedule': 'constant'},
    'bfloat16': {'precision': 'bf16'},
}
SAME = {
    'batch in 2 micro-batches': {'accumulate': 2},
    'gradient checkpointing': {'gradient_checkpointing': True},
    'torch.compile': {'compile': True},
}  # the same updates, another speed
DEFAULTS = {
    k: getattr(load_profile('garden').train, k) for c in (CHOICES | SAME).values() for k in c
}  # what a choice before may have changed


def speeds(folder: Path, choice: dict, rounds: int = 5, steps: int = 4) -> float:  # of the default's
    def make(change):
        ws = open_workspace(folder, overrides={f'train.{k}': v for k, v in (DEFAULTS | change).items()})
        return train.start_run(ws, load_split(ws.encoded, 'train'), train.start_engine(ws.settings.train))[0]

    def timed(run):
        start = time.perf_counter()
        [run.one() for _ in range(steps)]
        return time.perf_counter() - start

    ours, theirs = make({}), make(choice)
    for r in (ours, theirs):
        timed(r)
    seconds = []
    for i in range(rounds):  # who is first changes
        a, b = (timed(r) for r in ((ours, theirs) if i % 2 else (theirs, ours)))
        seconds.append((a, b) if i % 2 else (b, a))
    return statistics.median(a / b for a, b in seconds)


def measure(folder: Path, name: str, choice: dict, epochs: float) -> dict:
    speed = 1.0 if not choice else speeds(folder, choice)
    if name in SAME:
        return dict(speed=speed)
    overrides = {f'train.{k}': v for k, v in (DEFAULTS | choice).items()} | {
        'seed': 0,
        'train.epochs': round(epochs * speed, 3),
        'tracking.enabled': False,
        'train.validate_every': 10**6,
        'train.samples_every': 10**6,
    }
    ws = open_workspace(folder, overrides=overrides)
    subprocess.run(
        [sys.executable, '-m', 'flowerdiff.training.worker', str(folder)],
        check=True,
        env=MALLOC_ENV | os.environ,
    )
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    generator = Generator.from_pretrained(ws.candidate, batch=50)
    prompts = eval_prompts(ws, 200)
    adherence = attribute_metrics(
        generate_images(
            generator,
            prompts,
            50,
            num_inference_steps=ws.settings.evaluate.steps,
            guidance_scale=ws.settings.evaluate.guidance,
        ),
        prompts,
    ).metrics['adherence']
    t = json.loads((ws.root / 'train.json').read_text())
    return dict(
        speed=speed,
        epochs=epochs * speed,
        loss=t['validation']['loss'],
        average=t['validation'].get('ema_decay'),
        **{k: adherence[k].value for k in ('species', 'color', 'background', 'all')},
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', type=Path)
    parser.add_argument('--epochs', type=float, default=2.0)
    parser.add_argument('--only', nargs='*')
    args = parser.parse_args()
    folder = args.folder.absolute()
    if not (folder / 'encoded/manifest.json').exists():
        for stage in ('prepare', 'caption', 'encode'):
            subprocess.run(
                [sys.executable, '-m', 'flowerdiff.pipeline.cli', 'run', str(folder), '--only', stage],
                check=True,
            )
    (folder / 'methods').mkdir(exist_ok=True)
    rows = {}
    for i, (name, choice) in enumerate((CHOICES | SAME).items()):
        if args.only and name not in args.only:
            continue
        kept = folder / f'methods/{i:02d}-{args.epochs:g}.json'
        if not kept.exists():
            kept.write_text(json.dumps(measure(folder, name, choice, args.epochs)))
        rows[name] = json.loads(kept.read_text())
    print(
        '\n| choice | speed | validation loss | all three right | species | color | background |'
        '\n|---|---|---|---|---|---|---|'
    )
    for name, r in rows.items():
        print(
            f'| {name} | {r["speed"]:.2f} | '
            + (
                f'{r["loss"]:.4f} | '
                + ' | '.join(f'{r[k]:.1%}' for k in ('all', 'species', 'color', 'background'))
                if 'loss' in r
                else 'the same | | | |'
            )
            + ' |'
        )


if __name__ == '__main__':
    main()
