"""Measure why training on a CPU uses float32, channels last and its own malloc settings.

    python benchmarks/cpu_choices.py [--rounds 5] [--steps 40] [--batch 32]

Each choice is changed alone, on steps of the garden's UNet. Every measurement is a process of its own,
because `malloc` reads its settings at the start. A round runs all choices in rotating order. A ratio is
the median over the rounds of the choice's samples per second, divided by those of the training's own
choice.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

CHOICES = dict(ours={}, contiguous=dict(LAST='0'), bfloat16=dict(PRECISION='bf16'), malloc={})


def measure(steps: int, batch: int) -> float:  # samples a second of forward, backward and AdamW
    import torch

    from flowerdiff.core.profiles import load_profile
    from flowerdiff.models.components import build_denoiser

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    net = build_denoiser(load_profile('garden'), 4, 128, 16)
    if os.environ.get('LAST') != '0':
        net = net.to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(net.parameters(), 1e-3, fused=True)
    x, t, text = torch.randn(batch, 4, 16, 16), torch.randint(0, 1000, (batch,)), torch.randn(batch, 24, 128)

    def step():
        with torch.autocast('cpu', torch.bfloat16, enabled=os.environ.get('PRECISION') == 'bf16'):
            output = net(x, t, encoder_hidden_states=text).sample
        (output.float() - x).square().mean().backward()
        opt.step()
        opt.zero_grad()

    for _ in range(4):
        step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return steps * batch / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, n in (('rounds', 5), ('steps', 40), ('batch', 32)):
        parser.add_argument(f'--{name}', type=int, default=n)
    a = parser.parse_args()
    if os.environ.get('CHOICE'):
        print(measure(a.steps, a.batch))
        return
    from flowerdiff.services.processes import MALLOC_ENV

    rates = {k: [] for k in CHOICES}
    for i in range(a.rounds):
        for name in list(CHOICES)[i % len(CHOICES) :] + list(CHOICES)[: i % len(CHOICES)]:
            env = (
                {k: v for k, v in os.environ.items() if k not in MALLOC_ENV}
                | dict(CHOICE=name)
                | CHOICES[name]
                | ({} if name == 'malloc' else MALLOC_ENV)
            )
            rates[name].append(
                float(
                    subprocess.run(
                        [sys.executable, *sys.argv], env=env, check=True, capture_output=True, text=True
                    ).stdout
                )
            )
    for name, r in rates.items():
        ratios = [x / o for x, o in zip(r, rates['ours'])]
        spread = f'({min(ratios):.2f} to {max(ratios):.2f})'
        rate = statistics.median(r)
        print(f'{name:12}{rate:8.1f} samples/s   {statistics.median(ratios):.2f} of ours {spread}')


if __name__ == '__main__':
    main()
