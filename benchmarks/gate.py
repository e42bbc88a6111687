"""Measure the promotion gate: train the garden with several seeds and compare the models in pairs.

    python benchmarks/gate.py FOLDER [--seeds 12] [--set train.epochs=3 ...]

Trains one model for each seed, from the same encoded garden. Finished runs are kept and not repeated. Prints:

- how far the validation losses of the seeds differ, and the margin that follows
- how often a candidate that is not better is promoted, with and without that margin, for 1,000 sign-flipped
  comparisons and for pairs of seeds
- the same for the rules "lower mean validation loss" and "lowest training loss"
- the smallest true improvement that the gate promotes in at least nine of ten cases
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
from flowerdiff.evaluation.gate import compare


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
    spread = means.std(ddof=1) / means.mean()
    margin = float(np.quantile(gains, 0.99))
    print(
        f'validation loss of {len(runs)} seeds: mean {means.mean():.4f}, standard deviation {spread:.2%}; '
        f'the gain within a pair is at most {max(gains):.2%}, in 99 % of pairs less than {margin:.2%}'
    )
    margin = round(margin, 4)

    pairs = list(itertools.permutations(losses, 2))
    rng = np.random.default_rng(0)
    null = []
    for _ in range(1000):  # two seeds with their losses exchanged at random, image by image
        a, b = pairs[rng.integers(len(pairs))]
        swap = rng.random(len(a)) < 0.5
        null.append((np.where(swap, b, a), np.where(swap, a, b)))
    lowest = [min(loss for _, loss in r['loss_curve']) for r in runs]
    print(
        '\n| a candidate that is not better is promoted | by chance (sign-flipped) | by another seed |'
        '\n|---|---|---|'
    )
    for m in (0.0, margin):
        by_chance = share(compare(a, b, m).better for a, b in null)
        by_seed = share(compare(a, b, m).better for a, b in pairs)
        print(f'| gate, margin {m:.2%} | {by_chance} | {by_seed} |')
    by_chance = share(b.mean() < a.mean() for a, b in null)
    by_seed = share(b.mean() < a.mean() for a, b in pairs)
    print(f'| the lower mean validation loss wins | {by_chance} | {by_seed} |')
    by_training_loss = share(b < a for a, b in itertools.permutations(lowest, 2))
    print(f'| the lowest training loss wins | | {by_training_loss} |')

    print(f'\n| true improvement of the validation loss | promoted, margin {margin:.2%} |\n|---|---|')
    for better in (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1):
        through = [compare(a, b * (1 - better), margin).better for a, b in pairs]
        print(f'| {better:.1%} | {share(through)} |')
        if np.mean(through) >= 0.995:
            break


if __name__ == '__main__':
    main()
