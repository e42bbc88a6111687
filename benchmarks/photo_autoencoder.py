"""Train the bundled autoencoder for photographs (`assets/photo`) again, from pictures of Debian packages.

    apt-get download gnome-backgrounds plasma-workspace-wallpapers mate-backgrounds \
        lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 ukui-wallpapers
    for p in *.deb; do dpkg-deb -x "$p" "pictures/${p%%_*}"; done
    python benchmarks/photo_autoencoder.py --pictures pictures --out photo --minutes 55

Which pictures are used, their authors and licenses: `flowerdiff/assets/photo/ATTRIBUTION.md`. A training that
was interrupted goes on from the last checkpoint, with the time that is left.
"""

import argparse
import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flowerdiff.models import tiny_autoencoder as ae

SIDE = 64  # of a crop, in pixels
CROPS = 60_000
BATCH = 8
RATE = 1e-3
SAVE_MINUTES = 4
HELD_OUT = ('TwoWings', 'greentock', 'FallenLeaf', 'sunset_by')  # photographs for the curve
PHOTOGRAPHS = [
    'Bridge_by',
    'Dragonfly_by',
    'Picture_0B',
    'Picture_1A',
    'Wine_by',
    'aitzgorri',
    'free_by',
    'friends_by',
    'greentock',
    'life_by',
    'picosdeeuropa',
    'seeding',
    'sunset_by',
    'Kleiber',
    'Aqua',
    'Blinds',
    'Dune',
    'FreshFlower',
    'Garden',
    'GreenMeadow',
    'LadyBird',
    'RainDrops',
    'Storm',
    'TwoWings',
    'Wood',
    'YellowFlower',
    'BytheWater',
    'ColdRipple',
    'ColorfulCups',
    'DarkestHour',
    'EveningGlow',
    'FallenLeaf',
    'Grey',
    'Kite',
    'OneStandsOut',
    'Path',
    'summer_1am',
]
# Painted or computed, with colors and textures that the photographs lack.
OTHERS = [
    'analogpattern',
    'umang_by',
    'Painting-Colors',
    'Elephants_3840',
    'Autumn/',
    'Canopee',
    'Cascade',
    'Cluster',
    'Flow/contents/images/',
    'Honeywave',
    'Opal',
    'Shell',
    'Volna',
    'SafeLanding',
    'Altai',
    'FlyingKonqui',
    'pixels-l',
    'truchet-l',
    'grid-l',
    '2004default',
    'rhythm',
    'string.jpg',
    'calla',
]
SHARE_OF_OTHERS = 0.15


def find(folder: Path, names: list) -> list:
    "Return the largest picture of each name."
    files = [p for p in sorted(folder.rglob('*')) if p.is_file() and not p.is_symlink()]
    files = [p for p in files if p.suffix.lower() in ('.jpg', '.png', '.webp') and 'screenshot' not in p.name]
    return [max((p for p in files if name in str(p)), key=lambda p: p.stat().st_size) for name in names]


def pyramid(file: Path) -> list:
    "Return a picture at full, half, quarter, ... size, down to about two crops."
    picture = Image.open(file).convert('RGB')
    picture.thumbnail((4096, 4096))
    levels = [picture]
    while min(levels[-1].size) >= 4 * SIDE:
        levels.append(levels[-1].reduce(2))
    return levels


def random_crop(levels: list, rng) -> Image.Image:
    "Cut a square of random size and place, and scale it down to one crop."
    short = min(levels[0].size)
    low, high = (0.3, 1.0) if rng.random() < 0.6 else (1.2 * SIDE / short, 0.3)
    side = short * np.exp(rng.uniform(np.log(low), np.log(high)))
    level = max(i for i in range(len(levels)) if side / 2**i >= 1.2 * SIDE or i == 0)
    picture = levels[level]
    side = min(side / 2**level, *picture.size)
    left, top = (rng.uniform(0, size - side) for size in picture.size)
    filters = (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.BOX)
    return picture.resize((SIDE, SIDE), filters[rng.integers(3)], (left, top, left + side, top + side))


def recolored(crop: np.ndarray, rng) -> np.ndarray:
    "Change a crop's colors at random: half of the time its channels' order, always saturation and tone."
    x = crop.astype(np.float32) / 255
    if rng.random() < 0.5:
        x = x[..., rng.permutation(3)]
    gray = x.mean(-1, keepdims=True)
    x = np.clip(gray + (x - gray) * rng.uniform(0.6, 1.6), 0, 1)
    x = x ** np.exp(rng.uniform(-0.4, 0.4))
    low = x.min()
    stretch = (1 - low) * rng.uniform(0, 0.5)  # towards full contrast
    x = (x - low * stretch) * rng.uniform(0.8, 1.25)
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def crops(pictures: list, weights: np.ndarray, count: int, *, rng, recolor: bool = True) -> np.ndarray:
    "Return random crops: [count, SIDE, SIDE, 3] uint8."
    pool = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for i, which in enumerate(rng.choice(len(pictures), count, p=weights / weights.sum())):
        crop = np.asarray(random_crop(pictures[which], rng))
        pool[i] = recolored(crop, rng) if recolor else crop
    return pool


def detailed(pool: np.ndarray) -> np.ndarray:
    "Drop most of the crops that show next to nothing (sky, blur): they are easy, and half of all crops."
    gray = pool.mean(-1)
    detail = np.abs(np.diff(gray, axis=1)).mean((1, 2)) + np.abs(np.diff(gray, axis=2)).mean((1, 2))
    return pool[np.random.default_rng(1).random(len(pool)) < 0.1 + detail / 10]


def make_pool(folder: Path, cache: Path) -> dict:
    "Return the crops for training and for validation, from the cache if it has them."
    if not cache.exists():
        rng = np.random.default_rng(0)
        files = find(folder, PHOTOGRAPHS) + find(folder, OTHERS)
        is_held_out = np.array([any(name in str(f) for name in HELD_OUT) for f in files])
        is_photograph = np.arange(len(files)) < len(PHOTOGRAPHS)
        with ThreadPoolExecutor(2) as workers:
            pictures = list(workers.map(pyramid, files))
        share = SHARE_OF_OTHERS * len(PHOTOGRAPHS) / len(OTHERS)
        weights = np.where(is_photograph, 1.0, share)
        train = crops(pictures, weights * ~is_held_out, CROPS, rng=rng)
        held_out = crops(pictures, 1.0 * is_held_out, 256, rng=rng, recolor=False)
        np.savez(cache, train=train, held_out=held_out)
    with np.load(cache) as arrays:
        return {name: detailed(crops) for name, crops in arrays.items()}


def sample(pool: np.ndarray, rng) -> torch.Tensor:
    "Return a batch of crops, each batch turned and mirrored at random: [BATCH, 3, SIDE, SIDE]."
    x = ae.to_tensor(pool[rng.integers(len(pool), size=BATCH)]).rot90(int(rng.integers(4)), (2, 3))
    return (x.flip(-1) if rng.random() < 0.5 else x).contiguous(memory_format=torch.channels_last)


class Training:
    "The networks, the optimizer and what a checkpoint holds."

    def __init__(self, args, pool: dict):
        self.args = args
        self.pool = pool
        self.rng = np.random.default_rng(int(time.time()))
        self.model = ae.small_autoencoder(args.width, args.channels, args.encoder, args.decoder)
        self.model = self.model.to(memory_format=torch.channels_last).train()
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
        )
        self.step = 0
        self.spent = 0.0
        self.frozen = False
        self.file = args.out / 'checkpoint.pt'
        if self.file.exists():
            self.restore()

    def restore(self):
        "Go on from the last checkpoint."
        state = torch.load(self.file, weights_only=True)
        self.model.load_state_dict(state['model'])
        self.ema.load_state_dict(state['ema'])
        self.step, self.spent, self.frozen = state['step'], state['spent'], state['frozen']
        if self.frozen:
            self.model.encoder.requires_grad_(False)
        self.optimizer.load_state_dict(state['optimizer'])

    def save(self, spent: float) -> float:
        "Save a checkpoint and a standardized average; return its dB on the held-out photographs."
        kept = copy.deepcopy(self.ema)
        if not self.frozen:
            ae.standardize(kept, self.pool['train'][:1024])
        ae.save_autoencoder(kept, self.args.out / 'autoencoder')
        parts = dict(model=self.model, ema=self.ema, optimizer=self.optimizer)
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(
            state | dict(step=self.step, spent=spent, frozen=self.frozen), self.file.with_suffix('.new')
        )
        self.file.with_suffix('.new').replace(self.file)
        return ae.reconstruction_psnr(kept, self.pool['held_out'])

    def batch(self) -> list:
        "Return the micro-batch of a step; once the encoder is frozen, with its latents."
        x = sample(self.pool['train'], self.rng)
        if not self.frozen:
            return [ae.MicroBatch(x)]
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
            return [ae.MicroBatch(x, self.ema.encode(x).latents.float())]

    def log(self, spent: float):
        "Save, and note the quality on the held-out photographs."
        row = dict(step=self.step, minutes=round(spent, 1), db=self.save(spent))
        with open(self.args.out / 'log.jsonl', 'a', encoding='utf-8') as file:
            print(json.dumps(row), file=file)

    def train_step(self, done: float, workers: ThreadPoolExecutor):
        "Run one step; the learning rate falls with the time."
        if done > 1 - ae.FROZEN and not self.frozen:
            self.frozen = True
            ae.freeze_encoder(self.model, self.ema, self.pool['train'][:2048])
        rate = RATE * min(1, (self.step + 1) / 300) * max(1 - done, 0.01)
        ae.set_learning_rate(self.optimizer, rate)
        ae.train_step(self.model, self.optimizer, workers, self.batch(), bf16=True)
        ae.update_average(self.ema, self.model, self.step)
        self.step += 1

    def run(self):
        "Train until the time is over."
        started = saved = time.time()
        minutes = self.args.minutes
        spent = self.spent
        with ThreadPoolExecutor(1) as workers:
            while spent < minutes:
                self.train_step(spent / minutes, workers)
                spent = self.spent + (time.time() - started) / 60
                if time.time() - saved > 60 * SAVE_MINUTES:
                    saved = time.time()
                    self.log(spent)
        self.log(minutes)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--pictures', type=Path, required=True, help='folder of the unpacked packages')
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--minutes', type=float, default=55.0)
    parser.add_argument('--width', type=int, default=64)
    parser.add_argument('--channels', type=int, default=8)
    parser.add_argument('--encoder', type=int, nargs=3, default=(0, 1, 3))
    parser.add_argument('--decoder', type=int, nargs=3, default=(5, 2, 0))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    Training(args, make_pool(args.pictures, args.out / 'pool.npz')).run()


if __name__ == '__main__':
    main()
