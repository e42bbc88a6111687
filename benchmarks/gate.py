"""The gate measured: runs of the garden that differ only by their seed, compared in pairs, and what it takes to be let through.

    python benchmarks/gate.py FOLDER [--seeds 12] [--set train.epochs=3 ...]

Trains the seeds one after the other (a run that is there is not made again), each from the same encoded garden. Prints: how far the losses of the seeds lie apart, and the margin
that follows; how often a candidate that is no better is promoted, by the gate with and without that margin, under 1,000 sign-flipped comparisons, and by the rule "the lowest training loss
seen so far wins"; and the smallest true improvement that the gate lets through at least nine times in ten.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from flowerdiff.core.workspace import open_workspace
from flowerdiff.stages import promote


def trained(folder: Path, seed: int, overrides: list) -> dict:  # train.json of a run with this seed
    kept = folder / f'runs/seed-{seed}.json'
    if not kept.exists():
        if not (folder / 'encoded/manifest.json').exists():
            sets = [w for o in ('seed=0', *overrides) for w in ('--set', o)]
            for stage in ('prepare', 'caption', 'encode'):
                subprocess.run(
                    [
                        sys.executable,
                        '-m',
                        'flowerdiff.pipeline.cli',
                        'run',
                        str(folder),
                        '--only',
                        stage,
                        *sets,
                    ],
                    check=True,
                )
        ws = open_workspace(folder, overrides=[*overrides, f'seed={seed}'])
        subprocess.run([sys.executable, '-m', 'flowerdiff.training.worker', str(folder)], check=True)
        kept.parent.mkdir(exist_ok=True)
        shutil.copy(ws.root / 'train.json', kept)
    return json.loads(kept.read_text())


def share(outcomes) -> str:
    outcomes = list(outcomes)
    return f'{sum(outcomes)} of {len(outcomes)} ({np.mean(outcomes):.1%})'


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', type=Path)
    parser.add_argument('--seeds', type=int, default=12)
    parser.add_argument('--set', action='append', default=[], dest='overrides')
    args = parser.parse_args()
    runs = [trained(args.folder.absolute(), s, args.overrides) for s in range(args.seeds)]
    losses = np.array([r['validation']['by_picture'] for r in runs])  # [seeds, pictures]
    means = losses.mean(1)
    gains = [(a - b) / a for a, b in itertools.permutations(means, 2)]
    spread, margin = means.std(ddof=1) / means.mean(), float(np.quantile(gains, 0.99))
    print(
        f'validation loss of {len(runs)} seeds: {means.mean():.4f}, {spread:.2%} apart (standard deviation); of two of them, one is better by up to {max(gains):.2%}, 99 % of the time less than {margin:.2%}'
    )
    margin = round(margin, 4)

    pairs = list(itertools.permutations(losses, 2))
    rng, null = np.random.default_rng(0), []
    for _ in range(1000):  # two seeds with their names exchanged, picture by picture, at random
        a, b = pairs[rng.integers(len(pairs))]
        swap = rng.random(len(a)) < 0.5
        null.append((np.where(swap, b, a), np.where(swap, a, b)))
    lowest = [min(loss for _, loss in r['loss_curve']) for r in runs]
    print(
        '\n| a candidate that is no better is promoted | by chance alone (sign-flipped) | by another seed |\n|---|---|---|'
    )
    for m in (0.0, margin):
        print(
            f'| gate, margin {m:.2%} | {share(promote.compare(a, b, m).better for a, b in null)} | {share(promote.compare(a, b, m).better for a, b in pairs)} |'
        )
    print(
        f'| the lower mean validation loss wins | {share(b.mean() < a.mean() for a, b in null)} | {share(b.mean() < a.mean() for a, b in pairs)} |'
    )
    print(
        f'| the lowest training loss seen wins | | {share(b < a for a, b in itertools.permutations(lowest, 2))} |'
    )

    print(f'\n| true improvement of the validation loss | promoted, margin {margin:.2%} |\n|---|---|')
    for better in (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1):
        through = [promote.compare(a, b * (1 - better), margin).better for a, b in pairs]
        print(f'| {better:.1%} | {share(through)} |')
        if np.mean(through) >= 0.995:
            break


if __name__ == '__main__':
    main()
