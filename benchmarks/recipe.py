"""Compare training recipes in equal time: the default with some settings changed.

    python benchmarks/recipe.py FOLDER --features SQUEEZENET [--pictures DIR] [--epochs 8] [--only NAME ...]

FOLDER is an encoded workspace. It is made if it does not exist: a garden, or DIR with the profile
`folder`. The speed of each recipe is measured first, in turns with the default in one process. The recipe
then trains with one thread for the epochs of the default times that speed, so that all get the same time,
whatever else the machine does. Each model draws held-out captions. SqueezeNet's features, on which
nothing here was trained, compare the images with held-out pictures. The bundled classifier counts which
images of a garden show what was asked for. For photographs with classes, the images of each class's name
are recognized by the nearest mean of the training pictures' features. Finished runs are kept and not
repeated.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from flowerdiff.core.profiles import load_profile
from flowerdiff.core.workspace import Workspace, open_workspace, read_jsonl
from flowerdiff.data.batches import load_split
from flowerdiff.evaluation.class_recognition import class_prompt
from flowerdiff.evaluation.eval_prompts import eval_prompts, generate_images
from flowerdiff.evaluation.feature_extractors import SqueezeNetFeatures
from flowerdiff.evaluation.image_rows import open_pictures
from flowerdiff.evaluation.measure import attribute_metrics
from flowerdiff.evaluation.metrics import fid, kid, neighborhood_share
from flowerdiff.inference.generator import Generator
from flowerdiff.services.processes import WORKER_ENV
from flowerdiff.training.deepspeed import start_engine
from flowerdiff.training.worker import start_run

FLOW = {'prediction_type': 'flow_prediction', 'min_snr_gamma': 0.0, 'timestep_sampling': 'logit_normal'}
RECIPES = {
    'default': {},
    'epsilon (Ho 2020)': {'prediction_type': 'epsilon'},
    'rectified flow, logit-normal (Esser 2024)': FLOW,
    'rectified flow, logit-normal, shift 2': FLOW | {'flow_shift': 2.0},
    'zero terminal SNR (Lin 2023)': {'zero_terminal_snr': True},
    'no min-SNR weights': {'min_snr_gamma': 0.0},
    'offset noise 0.05': {'offset_noise': 0.05},
    'timesteps uniform, not stratified': {'timestep_sampling': 'uniform'},
    'timesteps logit-normal': {'timestep_sampling': 'logit_normal'},
    'no caption dropout': {'caption_dropout': 0.0},
    'no mirror images': {'mirror': False},
    'no average (EMA 0)': {'ema_decay': 0.0},
    'EMA 0.99, 0.999, 0.9995: the best': {'ema_decay': 0.99, 'ema_decays': [0.999, 0.9995]},
    'Muon (Jordan 2024), rate 0.002': {'optimizer': 'muon'},
    'Muon, rate 0.01': {'optimizer': 'muon', 'lr': 0.01},
    'AdamW, rate 0.001': {'lr': 0.001},
    'AdamW, rate 0.004': {'lr': 0.004},
    'AdamW beta2 0.999': {'beta2': 0.999},
    'batch 16': {'batch_size': 16},
    'cosine schedule': {'lr_schedule': 'cosine'},
    'constant with warm-up': {'lr_schedule': 'constant'},
    'channels 96, 96, 128': {'channels': [96, 96, 128]},
    'channels 64, 96, 160': {'channels': [64, 96, 160]},
    'two blocks a level': {'layers': 2},
    'cross-attention at the lowest level only': {'attention': [False, False, True]},
    'attention heads of 32': {'attention_head_dim': 32},
    'pooled text': {'pooled_text': True},
    'no pooled text': {'pooled_text': False},
    'bfloat16': {'precision': 'bf16'},
}
SAME = {
    'batch in 2 micro-batches': {'accumulate': 2},
    'gradient checkpointing': {'gradient_checkpointing': True},
    'torch.compile': {'compile': True},
}  # the same updates, another speed
QUIET = {'tracking.enabled': False, 'train.validate_every': 10**6, 'train.samples_every': 10**6}
OF_EACH_CLASS = 3  # images


def open_run(folder: Path, run: Path, recipe: dict, **more) -> Workspace:
    "Make a workspace that shares the encoded data of another."
    run.mkdir(parents=True, exist_ok=True)
    if not (run / 'params.yaml').exists():
        shutil.copy(folder / 'params.yaml', run)
    for part in ('pictures', 'captions', 'encoded'):
        if not (run / part).exists():
            shutil.copytree(folder / part, run / part, copy_function=os.link)
    settings = {f'train.{k}': v for k, v in recipe.items()}
    return open_workspace(run, overrides=settings | {'train.threads': 1} | QUIET | more)


def speed_of(folder: Path, recipe: dict, rounds: int = 5, steps: int = 4) -> float:  # of the default's
    def make(change):
        shown = folder / 'recipe/speed'
        shutil.rmtree(shown, ignore_errors=True)
        ws = open_run(folder, shown, change)
        return start_run(ws, load_split(ws.encoded, 'train'), start_engine(ws.settings.train))[0]

    def seconds_per_sample(run, batch):
        start = time.perf_counter()
        [run.train_step() for _ in range(steps)]
        return (time.perf_counter() - start) / batch

    runs = [
        (make(change), change.get('batch_size', load_profile('garden').train.batch_size))
        for change in ({}, recipe)
    ]
    for run in runs:
        seconds_per_sample(*run)
    shares = []
    for i in range(rounds):  # who is first changes
        order = runs if i % 2 else runs[::-1]
        seconds = [seconds_per_sample(*run) for run in order]
        ours, other = seconds if i % 2 else seconds[::-1]
        shares.append(ours / other)
    return statistics.median(shares)


class ClassMeans:
    "Recognize classes by the nearest mean of the features of training pictures."

    def __init__(self, ws: Workspace, extractor):
        self.extractor = extractor
        rows = read_jsonl(ws.pictures / 'train/metadata.jsonl')
        labels = np.array([row.get('label') or '' for row in rows])
        features = extractor(open_pictures(ws.pictures / 'train', names=[row['file_name'] for row in rows]))
        self.names = sorted({*labels} - {''})
        self.means = np.stack([features[labels == name].mean(0) for name in self.names])

    def ranks(self, images: list, labels: list[str]) -> np.ndarray:  # 0: recognized at once
        "Return how many classes are nearer than the right one."
        away = ((self.extractor(images)[:, None] - self.means) ** 2).sum(-1)
        right = away[np.arange(len(labels)), [self.names.index(name) for name in labels]]
        return (away < right[:, None]).sum(1)


def shares_of(ranks: np.ndarray) -> dict:
    return dict(top1=float((ranks < 1).mean()), top5=float((ranks < 5).mean()))


def measure(ws: Workspace, features: Path, n: int, **sampling) -> dict:
    "Draw n held-out captions, and each class, and compare them with held-out pictures."
    generator = Generator.from_pretrained(ws.candidate, batch=50)
    extractor = SqueezeNetFeatures(features)
    prompts = eval_prompts(ws, n)
    images = generate_images(generator, prompts, 50, **sampling)
    test = extractor(open_pictures(ws.pictures / 'test', n))
    drawn = extractor(images)
    found = dict(
        kid=1000 * kid(drawn, test).value,
        fid=fid(drawn, test).value,
        precision=neighborhood_share(drawn, test).value,
        recall=neighborhood_share(test, drawn).value,
    )
    if prompts[0].attributes:
        adherence = attribute_metrics(images, prompts).metrics['adherence']
        return found | {name: share.value for name, share in adherence.items()}
    means = ClassMeans(ws, extractor)
    if len(means.names) < 2:
        return found
    rows = read_jsonl(ws.pictures / 'test/metadata.jsonl')
    held_out = [row for row in rows if row.get('label') in means.names]
    real = open_pictures(ws.pictures / 'test', names=[row['file_name'] for row in held_out])
    found['real'] = shares_of(means.ranks(real, [row['label'] for row in held_out]))
    asked = [name for name in means.names for _ in range(OF_EACH_CLASS)]
    images = []
    for i in range(0, len(asked), 50):
        images += generator([class_prompt(name) for name in asked[i : i + 50]], seed=i, **sampling)
    return found | shares_of(means.ranks(images, asked))


def compare(folder: Path, name: str, seed: int, args) -> dict:
    "Train a recipe for its share of the time, and measure its model."
    recipe = (RECIPES | SAME)[name]
    speed = speed_of(folder, recipe) if recipe else 1.0
    if name in SAME:
        return dict(speed=speed)
    run = folder / f'recipe/{list(RECIPES).index(name):02d}-seed{seed}-{args.epochs:g}'
    ws = open_run(folder, run, recipe, **{'train.epochs': round(args.epochs * speed, 3), 'seed': seed})
    command = [sys.executable, '-m', 'flowerdiff.training.worker', str(run)]
    subprocess.run(command, check=True, env=WORKER_ENV | os.environ)
    ws = open_workspace(run, overrides={'seed': 0})  # the prompts of all seeds
    trained = json.loads((ws.root / 'train.json').read_text())
    found = dict(speed=speed, epochs=args.epochs * speed, loss=trained['validation']['loss'])
    for guidance in args.guidance:
        found[f'guidance {guidance:g}'] = measure(
            ws, args.features, args.images, num_inference_steps=20, guidance_scale=guidance
        )
    return found


def encode(folder: Path, pictures: Path | None):
    "Make the encoded workspace."
    chosen = ['--profile', 'folder', '--pictures', str(pictures)] if pictures else []
    for stage in ('prepare', 'caption', 'encode'):
        command = [sys.executable, '-m', 'flowerdiff.pipeline.cli', 'run', str(folder), '--only', stage]
        subprocess.run(command + (chosen if stage == 'prepare' else []), check=True)


def row_of(name: str, seeds: list[dict]) -> str:
    "Return a row of the table: the means of the seeds, for each guidance."
    speed = statistics.mean(found['speed'] for found in seeds)
    if 'loss' not in seeds[0]:
        return f'| {name} | {speed:.2f} | the same updates |'
    guidances = [key for key in seeds[0] if key.startswith('guidance')]

    def mean(guidance, key):
        return statistics.mean(found[guidance][key] for found in seeds)

    cells = [name, f'{len(seeds)}', f'{speed:.2f}', f'{statistics.mean(f["loss"] for f in seeds):.4f}']
    for guidance in guidances:
        values = seeds[0][guidance]
        shown = [f'KID {mean(guidance, "kid"):.0f}', f'FID {mean(guidance, "fid"):.0f}']
        shares = [key for key in values if key not in ('kid', 'fid', 'real')]
        shown += [f'{key} {mean(guidance, key):.1%}' for key in shares]
        cells.append(f'{guidance}: ' + ', '.join(shown))
    return '| ' + ' | '.join(cells) + ' |'


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', type=Path)
    parser.add_argument('--features', type=Path, required=True)
    parser.add_argument('--pictures', type=Path)
    parser.add_argument('--epochs', type=float, default=8.0)
    parser.add_argument('--images', type=int, default=300)
    parser.add_argument('--guidance', type=float, nargs='+', default=[2.0, 4.0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--only', nargs='*')
    args = parser.parse_args()
    folder = args.folder.absolute()
    torch.set_num_threads(1)
    if not (folder / 'encoded/manifest.json').exists():
        encode(folder, args.pictures)
    (folder / 'recipe').mkdir(exist_ok=True)
    rows = []
    for name in args.only or [*RECIPES, *SAME]:
        found = []
        for seed in args.seeds:
            kept = folder / f'recipe/{name.replace(" ", "_").replace(",", "")}-{seed}-{args.epochs:g}.json'
            if not kept.exists():
                kept.write_text(json.dumps(compare(folder, name, seed, args)))
            found.append(json.loads(kept.read_text()))
        rows.append(row_of(name, found))
        print(rows[-1], flush=True)
    print('\n| recipe | seeds | speed | validation loss | |\n|---|---|---|---|---|')
    print(*rows, sep='\n')


if __name__ == '__main__':
    main()
