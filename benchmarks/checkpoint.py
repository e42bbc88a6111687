"""Measure how long saving a checkpoint stops training, and when it is on the disk.

    python benchmarks/checkpoint.py [--millions 148] [--rounds 3] [--folder .]

The checkpoint holds 148 million parameters with AdamW's state and their average. A run that is asked to
stop writes it and waits: this is the time from SIGTERM to the disk, without the step under way. A run
that continues waits only for a copy. A loop of matrix products stands in for training, and its pace
during the write is compared with its pace alone.
"""

import argparse
import statistics
import tempfile
import time

import torch

from flowerdiff.training.checkpoints import Saver


def state(millions: int) -> dict:  # what such a run has: 4 tensors a weight
    torch.manual_seed(0)
    shapes = [(1024, 1024)] * (millions * 10**6 >> 20)
    return dict(
        weights={str(i): torch.randn(s) for i, s in enumerate(shapes)},
        ema={str(i): torch.randn(s) for i, s in enumerate(shapes)},
        optimizer={
            f'{i}.{k}': torch.randn(s) for i, s in enumerate(shapes) for k in ('exp_avg', 'exp_avg_sq')
        },
    )


def pace(busy, least: int = 50) -> float:  # products a second, while `busy()` or for `least` of them
    a, n, start = torch.randn(512, 512), 0, time.perf_counter()
    while n < least or busy():
        a @ a
        n += 1
    return n / (time.perf_counter() - start)


def main():
    ap = argparse.ArgumentParser()
    for name, default in (('millions', 148), ('rounds', 3)):
        ap.add_argument(f'--{name}', type=int, default=default)
    ap.add_argument('--folder', default='.')
    a = ap.parse_args()
    groups, rows = state(a.millions), []
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        saver = Saver(folder, keep=1)
        for i in range(2 * a.rounds):
            going_on = i % 2
            alone = pace(lambda: False)
            start = time.perf_counter()
            saver.start(i, groups, {}, copy=bool(going_on))
            copied = time.perf_counter() - start
            beside = pace(lambda: not saver.writing.done()) if going_on else 0.0
            _, error = saver.finish(wait=True)
            durable = time.perf_counter() - start
            if error:
                raise error
            rows.append((going_on, copied, durable, beside / alone))
    for going_on, name in ((0, 'asked to stop'), (1, 'training goes on')):
        copied, durable, share = (
            statistics.median(r[k] for r in rows if r[0] == going_on) for k in (1, 2, 3)
        )
        text = f'{name}: on the disk after {durable:.1f} s'
        if going_on:
            text += f', training waited for {copied:.2f} s and then ran at {share:.0%} of its pace'
        print(text)
    size = sum(tensor.nbytes for group in groups.values() for tensor in group.values())
    print(f'{size / 1e9:.1f} GB, {torch.get_num_threads()} threads')


if __name__ == '__main__':
    main()
