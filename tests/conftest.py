"Fixtures: a miniature garden after all ten stages, and a toy package whose stages take no time."

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ.setdefault('HF_ENDPOINT', 'http://127.0.0.1:9')  # nothing listens there: no test downloads a model
STAGES = [
    'prepare',
    'caption',
    'encode',
    'upload',
    'train',
    'promote',
    'evaluate',
    'onnx',
    'tensorrt',
    'publish',
]


def flowerdiff(*args, cwd=None, env=None, timeout=600, **kwargs):
    "Run the command line in a process of its own."
    return subprocess.run(
        [
            sys.executable,
            '-P',
            '-c',
            'import sys; from flowerdiff.pipeline.cli import main; sys.exit(main())',
            *map(str, args),
        ],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        **kwargs,
    )


SLOW = (
    'train',
    'faults',
    'pipeline',
    'continue',
    'profiles',
    'export',
    'docs',
    'repo',
    'engines',
    'security',
)


def pytest_collection_modifyitems(items):
    "Start with the files that take longest, so that no process is left with one of them at the end."
    order = {f'test_{name}': i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    "Add to a failed test what its pages (of `browser.open_page`) showed and logged."
    report = yield
    if report.failed and call.when == 'call':
        for name, value in item.funcargs.items():
            for page in value if isinstance(value, (list, tuple)) else [value]:
                if not hasattr(page, 'said'):
                    continue
                report.sections.append((f'{name}: console', '\n'.join(page.said[-30:])))
                with suppress(Exception):  # the page may be gone
                    text = page.evaluate('document.body.innerText')[:3000]
                    report.sections.append((f'{name}: page', text))
    return report


@pytest.fixture(scope='session')
def cli():
    return flowerdiff


@pytest.fixture(scope='session')
def tiny_workspace(tmp_path_factory) -> Path:
    """All ten stages with 48 pictures and twenty training steps. Read only: copy it to change it.

    The processes of pytest-xdist share one."""
    from filelock import FileLock

    from flowerdiff.core.workspace import DEMO

    folder = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        folder = folder.parent
    root = folder / 'tiny' / 'garden'
    printed = root.parent / 'run.txt'
    sets = [word for key, value in DEMO.items() for word in ('--set', f'{key}={json.dumps(value)}')]
    with FileLock(folder / 'tiny.lock'):
        if not printed.exists():
            p = flowerdiff('run', root, *sets, timeout=1200)
            assert p.returncode == 0, p.stdout + p.stderr
            printed.write_text(p.stdout)
    return root


TOY = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

from flowerdiff.core.errors import UserError
from flowerdiff.core.files import atomic_dir, atomic_write
from flowerdiff.core.workspace import stage
from flowerdiff.pipeline.dvc_graph import GRAPH
from flowerdiff.toolbox import helper


def write(ws, name, text):
    if name.endswith('.json'):
        atomic_write(ws.root / name, text)
        return
    with atomic_dir(ws.root / name) as new:
        (new / 'data.txt').write_text(text)


def fail_or_hang(ws):
    count = ws.settings.prepare.count
    if count == 13:
        raise UserError('prepare.count: 13 is unlucky; take another')
    if count == 14:
        raise ZeroDivisionError('a bug')
    if count == 15:
        with atomic_dir(ws.pictures) as new:
            (new / 'half').write_text('half')
            time.sleep(600)
    if count == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    while count == 18 and not (ws.root / 'go').exists():
        time.sleep(0.05)


@stage(NAME)
def run(ws):
    "A toy stage: writes what its settings say."
    section = ws.settings.model_dump()[NAME]
    if NAME == 'prepare':
        fail_or_hang(ws)
    if NAME == 'train':
        worker = [sys.executable, '-m', 'flowerdiff.training.worker']
        subprocess.run([*worker, str(ws.root), str(int(section['epochs']))], check=True)
    for name in GRAPH[NAME].writes:
        if name == 'model' and section['margin'] == 1:  # not better
            continue
        write(ws, name, 'the model' if name == 'model' else json.dumps(section))
    return SimpleNamespace(summary=f'{NAME} is done', skipped='no GPU here' if NAME == 'tensorrt' else '')


def child(root, steps):
    "A toy training process. SIGTERM saves the step."
    folder = Path(root) / 'work' / 'train-toy'
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / 'step'
    step = int(state.read_text()) if state.exists() else 0

    with open(folder / 'events.jsonl', 'a') as events:

        def log(**event):
            print(json.dumps(event), file=events, flush=True)

        def stop(*_):
            state.write_text(str(step))
            log(event='stopped', step=step)
            sys.exit(3)

        signal.signal(signal.SIGTERM, stop)
        log(event='start', resumed_from=step)
        while step < steps:
            step += 1
            time.sleep(0.05)
            log(event='step', step=step, total=steps, samples_per_second=100.0)
"""
WORKER = """
import sys
from flowerdiff.stages.train import child
child(sys.argv[1], int(sys.argv[2]))
"""
NEEDED = dict(prepare='other_columns', caption='caption')  # what the survey of a folder calls
REAL = """
def {name}(*args):
    from flowerdiff.real_stages.{stage} import {name} as real
    return real(*args)
"""
RUN_CELL = """#| eval: false
from flowerdiff.stages.{stage} import run
result = run(workspace, profile=profile, overrides=overrides)"""
PARAMETERS_CELL = """workspace = '.'
profile = 'garden'
overrides = []"""


def write_toy_stage(package: Path, number: int, stage: str):
    "Write the module of a toy stage and its notebook."
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    source = TOY
    if stage not in ('encode', 'train'):  # only these two depend on the helper
        source = source.replace('from flowerdiff.toolbox import helper\n', '')
    if stage in NEEDED:
        source += REAL.format(name=NEEDED[stage], stage=stage)
    (package / 'stages' / f'{stage}.py').write_text(f'NAME = {stage!r}\n{source}')
    cells = [
        new_code_cell(PARAMETERS_CELL, metadata=dict(tags=['parameters'])),
        new_code_cell(RUN_CELL.format(stage=stage)),
    ]
    kernel = dict(display_name='python3', language='python', name='python3')
    notebook = new_notebook(cells=cells, metadata=dict(kernelspec=kernel))
    nbformat.write(notebook, package / 'notebooks' / f'{number:02d}_{stage}.ipynb')


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    "A copy of the package with stages that take no time: a function that runs its command line."
    site = tmp_path_factory.mktemp('toy')
    package = site / 'flowerdiff'
    without = shutil.ignore_patterns('stages', 'notebooks', 'assets', '__pycache__')
    shutil.copytree(ROOT / 'flowerdiff', package, ignore=without)
    (package / 'toolbox.py').write_text('def helper(x):\n    "Doubles."\n    return 2*x\n')
    (package / 'training' / 'worker.py').write_text(WORKER)
    (package / 'notebooks').mkdir()
    (package / 'stages').mkdir()
    (package / 'stages' / '__init__.py').write_text('')
    shutil.copytree(ROOT / 'flowerdiff' / 'stages', package / 'real_stages', ignore=without)
    for i, stage in enumerate(STAGES, 1):
        write_toy_stage(package, i, stage)

    def call(*args, popen=False, variables=None, **kwargs):
        env = {**os.environ, 'PYTHONPATH': str(site), 'PYTHONDONTWRITEBYTECODE': '1', **(variables or {})}
        if not popen:
            return flowerdiff(*args, env=env, **kwargs)
        return subprocess.Popen(
            [sys.executable, '-P', '-m', 'flowerdiff.pipeline.cli', *map(str, args)],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            **kwargs,
        )

    call.package = package
    return call
