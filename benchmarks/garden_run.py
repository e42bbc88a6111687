"""Measure the main job: `flowerdiff run` on the garden, from the command to the report.

    python benchmarks/garden_run.py [FOLDER] [--set train.epochs=3 ...]

Prints one line per stage (seconds), the total time, the peak memory of the command and all its processes,
and the adherence of 200 held-out prompts, as the attribute classifier measures it. Run it on an idle
machine: the claim is at most 10 minutes on 2 cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def peak_memory(process: psutil.Process, every: float = 2.0) -> float:
    "Most memory (GB) held at once by the process and its descendants; shared pages are counted once (PSS)."
    peak = 0
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        held = 0
        for p in [process, *process.children(recursive=True)]:
            try:
                held += p.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        peak = max(peak, held)
        time.sleep(every)
    return peak / 1e9


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', nargs='?', help='where the workspace is made (default: a temporary folder)')
    parser.add_argument('--set', action='append', default=[], dest='overrides')
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix='garden-'))
    command = [
        sys.executable,
        '-m',
        'flowerdiff.pipeline.cli',
        'run',
        str(folder),
        *(x for o in args.overrides for x in ('--set', o)),
    ]
    started = time.monotonic()
    process = subprocess.Popen(command)
    peak = peak_memory(psutil.Process(process.pid))
    seconds, code = time.monotonic() - started, process.wait()
    if code:
        sys.exit(code)
    records = [json.loads(f.read_text()) for f in (folder / 'work/records').glob('*.json')]
    print('\n| stage | seconds | what came out |\n|---|---|---|')
    for r in sorted(records, key=lambda r: r['finished']):
        print(f'| {r["stage"]} | {r["seconds"]:.0f} | {r.get("reason") or r["summary"]} |')
    print(f'\nwhole run {seconds / 60:.1f} min, most memory {peak:.1f} GB, {psutil.cpu_count()} cores\n')
    print(json.dumps(json.loads((folder / 'report/metrics.json').read_text()).get('adherence'), indent=1))


if __name__ == '__main__':
    main()
