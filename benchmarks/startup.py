"""Start-up: one picture of the command `generate`, as a whole process, with each backend.

    python benchmarks/startup.py WORKSPACE [--rounds 3] [--backends onnx openvino torch]

Beside it runs `python -c "import torch"`. The rounds take turns, and the fastest of each counts. Printed are
seconds of the clock, seconds of CPU (they do not depend on what else the machine does), and the peak of the
resident memory. WORKSPACE needs a model and its ONNX export.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time


def run(command: list[str]) -> tuple[float, float, float]:  # seconds, seconds of CPU, MB
    "Run a process."
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f'{" ".join(command)}: failed')
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('workspace')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--backends', nargs='+', default=['onnx', 'openvino', 'torch'])
    args = parser.parse_args()
    python = [sys.executable, '-c']
    commands = {'import torch': [*python, 'import torch'], 'import numpy': [*python, 'import numpy']}
    with tempfile.TemporaryDirectory() as folder:
        line = ['generate', 'a red rose', '-w', args.workspace, '-o', f'{folder}/rose.png', '--overwrite']
        for name in args.backends:
            module = [sys.executable, '-m', 'flowerdiff.pipeline.cli']
            commands[f'generate, {name}'] = [*module, *line, '--backend', name]
        rounds = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                rounds[name].append(run(command))
    print(f'{"":20}{"clock":>8}{"CPU":>8}{"memory":>9}')
    for name, results in rounds.items():
        seconds, cpu, memory = (min(column) for column in zip(*results, strict=True))
        print(f'{name:20}{seconds:6.2f} s{cpu:6.2f} s{memory:6.0f} MB')


if __name__ == '__main__':
    main()
