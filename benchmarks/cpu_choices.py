"""Measure why training on a CPU uses float32, channels last, and its own settings of malloc and OpenMP.

    python benchmarks/cpu_choices.py [--rounds 5] [--steps 40] [--batch 32] [--busy]

Each choice is changed alone, on steps of the garden's UNet. Every measurement is a process of its own,
because malloc and OpenMP read their settings at the start. A round runs all choices in rotating order. A
ratio is the median over the rounds of the choice's samples per second, divided by those of the training's
own choice. With `--busy`, another program keeps one core busy all the time.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time

CHOICES = dict(
    ours={},
    contiguous=dict(LAST='0'),
    bfloat16=dict(PRECISION='bf16'),
    malloc={},
    spinning={},
    sleeping=dict(GOMP_SPINCOUNT='0'),
)
LEFT_OUT = dict(malloc='MALLOC', spinning='GOMP')  # choice -> start of the variables that it does not set


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


def measure_apart(name: str) -> float:
    "Measure a choice in a process of its own."
    from flowerdiff.services.processes import WORKER_ENV

    ours = {key: value for key, value in WORKER_ENV.items() if not key.startswith(LEFT_OUT.get(name, '-'))}
    env = {key: value for key, value in os.environ.items() if key not in WORKER_ENV}
    env |= dict(CHOICE=name) | ours | CHOICES[name]
    command = [sys.executable, *sys.argv]
    return float(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


@contextlib.contextmanager
def busy_program(wanted: bool):
    "Keep one core busy while other code runs."
    process = subprocess.Popen([sys.executable, '-c', 'while True: pass']) if wanted else None
    try:
        yield
    finally:
        if process:
            process.kill()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, n in (('rounds', 5), ('steps', 40), ('batch', 32)):
        parser.add_argument(f'--{name}', type=int, default=n)
    parser.add_argument('--busy', action='store_true')
    a = parser.parse_args()
    if os.environ.get('CHOICE'):
        print(measure(a.steps, a.batch))
        return
    rates = {name: [] for name in CHOICES}
    names = list(CHOICES)
    with busy_program(a.busy):
        for i in range(a.rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                rates[name].append(measure_apart(name))
    for name, r in rates.items():
        ratios = [x / o for x, o in zip(r, rates['ours'])]
        spread = f'({min(ratios):.2f} to {max(ratios):.2f})'
        rate = statistics.median(r)
        print(f'{name:12}{rate:8.1f} samples/s   {statistics.median(ratios):.2f} of ours {spread}')


if __name__ == '__main__':
    main()
