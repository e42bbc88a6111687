"""Compare the training throughput with a bare loop of the same UNet.

    python benchmarks/train_throughput.py [--channels 64,64,96] [--size 16] [--text 24,128]
        [--batch 32] [--steps 4] [--rounds 5] [--threads 0]

The bare loop runs forward, backward and AdamW on one batch in memory. Ours also makes its batch (order,
captions, dropout, mirror images, noise, timesteps), weighs the loss, clips, averages the weights and logs
its events. Both run in one process. Each round runs both for some steps, in alternating order. The ratio
is the median over the rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--channels', default='64,64,96')
    ap.add_argument('--size', type=int, default=16)
    ap.add_argument('--text', default='24,128')
    for name, n in (('batch', 32), ('steps', 4), ('rounds', 5), ('threads', 0)):
        ap.add_argument(f'--{name}', type=int, default=n)
    a = ap.parse_args()
    from flowerdiff.core.profiles import load_profile
    from flowerdiff.data.batches import toy_split
    from flowerdiff.models.components import build_denoiser
    from flowerdiff.services.tracking import log_event
    from flowerdiff.training.accelerator import Engine
    from flowerdiff.training.trainer import Trainer

    torch.set_num_threads(a.threads or len(os.sched_getaffinity(0)))
    channels = [int(c) for c in a.channels.split(',')]
    length, width = (int(x) for x in a.text.split(','))
    s = load_profile(
        'garden',
        {
            'train.channels': channels,
            'train.attention': [False] + [True] * (len(channels) - 1),
            'train.batch_size': a.batch,
            'train.epochs': 1000.0,
        },
    )
    split = toy_split(512, kinds=64, size=a.size, width=width)
    split.texts = split.texts[:, :1].expand(-1, length, -1).contiguous()

    def make():
        return build_denoiser(s, 4, width, a.size)

    run = Trainer(s.train, 0, split, make, engine=Engine('fp32'))
    folder = Path(tempfile.mkdtemp())

    def ours():
        start = time.perf_counter()
        for _ in range(a.steps):
            log_event(
                folder / 'events.jsonl',
                'step',
                step=run.step,
                **run.pop_losses(force=True),
                **run.train_step(),
            )
        return (time.perf_counter() - start) / a.steps

    torch.manual_seed(0)
    net = make()
    opt = torch.optim.AdamW(net.parameters(), 1e-3, fused=True)
    x, t, text = (
        torch.randn(a.batch, 4, a.size, a.size),
        torch.randint(0, 1000, (a.batch,)),
        torch.randn(a.batch, length, width),
    )

    def bare():
        start = time.perf_counter()
        for _ in range(a.steps):
            (net(x, t, encoder_hidden_states=text).sample - x).square().mean().backward()
            opt.step()
            opt.zero_grad()
        return (time.perf_counter() - start) / a.steps

    ours()
    bare()
    ratios, work, seen = [], [], dict(ours=[], bare=[])
    for i in range(a.rounds):
        took, cpu = {}, {}
        for f in (ours, bare) if i % 2 else (bare, ours):
            start = time.process_time()
            took[f.__name__] = f()
            cpu[f.__name__] = time.process_time() - start
        ratios.append(took['bare'] / took['ours'])
        work.append(cpu['bare'] / cpu['ours'])
        for k, v in took.items():
            seen[k].append(a.batch / v)
    weights = sum(p.numel() for p in net.parameters()) / 1e6
    print(
        f'{"":6s}{"samples/s":>10s}   ({weights:.1f}M weights, channels {a.channels}, '
        f'{a.size}x{a.size} latents, batch {a.batch}, {torch.get_num_threads()} threads, fp32)'
    )
    for k, v in seen.items():
        print(f'{k:6s}{statistics.median(v):10.1f}')
    print(
        f'ours/bare {statistics.median(ratios):.3f} (median of {a.rounds}; '
        f'{min(ratios):.3f} to {max(ratios):.3f}); CPU time {statistics.median(work):.3f}'
    )


if __name__ == '__main__':
    main()
