"Fixtures: a miniature garden that went through all ten stages once, and a toy flowerdiff whose stages take no time."

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    "What a page (of `browser.open_page`) showed and said when its test failed."
    report = yield
    if report.failed and call.when == 'call':
        for name, value in item.funcargs.items():
            for page in value if isinstance(value, (list, tuple)) else [value]:
                if not hasattr(page, 'said'):
                    continue
                report.sections.append((f'{name}: console', '\n'.join(page.said[-30:])))
                with suppress(Exception):
                    report.sections.append(
                        (f'{name}: page', page.evaluate('document.body.innerText')[:3000])
                    )  # it may be gone
    return report


@pytest.fixture(scope='session')
def cli():
    return flowerdiff


@pytest.fixture(scope='session')
def tiny_workspace(tmp_path_factory) -> Path:
    "48 pictures, a model that trains for twenty steps, all ten stages. Read only: copy it to change it."
    from flowerdiff.core.workspace import DEMO

    root = tmp_path_factory.mktemp('tiny') / 'garden'
    p = flowerdiff(
        'run', root, *[a for k, v in DEMO.items() for a in ('--set', f'{k}={json.dumps(v)}')], timeout=1200
    )
    assert p.returncode == 0, p.stdout + p.stderr
    (root.parent / 'run.txt').write_text(p.stdout)
    return root


TOY = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from flowerdiff.core.workspace import *
from flowerdiff.core.workspace import UserError
from flowerdiff.pipeline.dvc_graph import GRAPH
from flowerdiff.toolbox import helper

def put(ws, name, text):
    if name.endswith('.json'): atomic_write(ws.root/name, text); return
    with atomic_dir(ws.root/name) as new: (new/'data.txt').write_text(text)

@stage(NAME)
def run(ws):
    "A toy stage: writes what its settings say."
    section = ws.settings.model_dump()[NAME]
    if NAME == 'prepare' and ws.settings.prepare.count == 13: raise UserError('prepare.count: 13 is unlucky; take another')
    if NAME == 'prepare' and ws.settings.prepare.count == 14: raise ZeroDivisionError('a bug')
    if NAME == 'prepare' and ws.settings.prepare.count == 15:
        with atomic_dir(ws.pictures) as new: (new/'half').write_text('half'); time.sleep(600)
    if NAME == 'train': train(ws, section['epochs'])
    for name in GRAPH[NAME][2]:
        if name != 'model' or section.get('margin') != 1.: put(ws, name, json.dumps(section if name != 'model' else 'the model'))
    return SimpleNamespace(summary=f'{NAME} is done', skipped='no GPU here' if NAME == 'tensorrt' else '')

def train(ws, epochs):
    subprocess.run([sys.executable, '-m', 'flowerdiff.training.worker', str(ws.root), str(int(epochs))], check=True)

def child(root, steps):
    folder = Path(root)/'work'/'train-toy'; folder.mkdir(parents=True, exist_ok=True)
    state = folder/'step'
    step = int(state.read_text()) if state.exists() else 0
    def stop(*_):
        state.write_text(str(step)); print(json.dumps(dict(event='stopped', step=step)), file=f, flush=True); sys.exit(3)
    with open(folder/'events.jsonl', 'a') as f:
        signal.signal(signal.SIGTERM, stop)
        print(json.dumps(dict(kind='start', resumed_from=step)), file=f, flush=True)
        while step < steps: step += 1; time.sleep(.05); print(json.dumps(dict(step=step, total=steps, samples_per_second=100.)), file=f, flush=True)

if __name__ == '__main__' and '__file__' in globals(): child(sys.argv[1], int(sys.argv[2]))
"""


@pytest.fixture(scope='session')
def toy(tmp_path_factory):
    "A copy of the package with stages that take no time: a function that runs its command line."
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    site = tmp_path_factory.mktemp('toy')
    package = site / 'flowerdiff'
    (package / 'notebooks').mkdir(parents=True)
    (package / 'stages').mkdir()
    for name in (
        '__init__',
        'section',
        'recipe',
        'settings',
        'wording',
        'config',
        'fingerprints',
        'workspace',
        'pictures',
        'collection',
        'machine',
        'tracking',
        'suggest',
        'execute',
        'graph',
        'pipeline',
        'options',
        'cli',
    ):
        shutil.copy(ROOT / 'flowerdiff' / f'{name}.py', package)
    shutil.copytree(ROOT / 'flowerdiff' / 'profiles', package / 'profiles')
    (package / 'toolbox.py').write_text('def helper(x):\n    "Doubles."\n    return 2*x\n')
    (package / 'stages' / '__init__.py').write_text('')
    for i, s in enumerate(STAGES, 1):
        uses = TOY if s in ('encode', 'train') else TOY.replace('from flowerdiff.toolbox import helper\n', '')
        (package / 'stages' / f'{s}.py').write_text(f'NAME = {s!r}\n' + uses)
        cells = [
            new_code_cell(
                "workspace = '.'\nprofile = 'garden'\noverrides = []", metadata=dict(tags=['parameters'])
            ),
            new_code_cell(
                f'#| eval: false\nfrom flowerdiff.stages.{s} import run\nresult = run(workspace, profile=profile, overrides=overrides)'
            ),
        ]
        nbformat.write(
            new_notebook(
                cells=cells,
                metadata=dict(kernelspec=dict(display_name='python3', language='python', name='python3')),
            ),
            package / 'notebooks' / f'{i:02d}_{s}.ipynb',
        )

    (package / 'training').mkdir()
    (package / 'training' / '__init__.py').write_text('')
    (package / 'training' / 'worker.py').write_text(
        'import sys\nfrom flowerdiff.stages.train import child\nchild(sys.argv[1], int(sys.argv[2]))\n'
    )

    def call(*args, popen=False, **kwargs):
        env = {**os.environ, 'PYTHONPATH': str(site), 'PYTHONDONTWRITEBYTECODE': '1'}
        if popen:
            return subprocess.Popen(
                [sys.executable, '-P', '-m', 'flowerdiff.pipeline.cli', *map(str, args)],
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                **kwargs,
            )
        return flowerdiff(*args, env=env, **kwargs)

    call.package = package
    return call
