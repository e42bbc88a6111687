"The wheel does the main job in an environment without the source tree, in an empty folder."

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from flowerdiff.core.workspace import DEMO

ROOT = Path(__file__).parents[1]


def call(*command, **kwargs) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    assert not done.returncode, f'{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}'
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    "Build the wheel from a copy of the source, so that no old build folder gets into it."
    here = tmp_path_factory.mktemp('wheel')
    files = call('git', 'ls-files', '-co', '--exclude-standard', cwd=ROOT).splitlines()
    for f in files:
        if f.split('/')[0] in ('tests', 'benchmarks', '.github') or not (ROOT / f).is_file():
            continue
        (here / 'source' / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f, here / 'source' / f)
    call(
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '-q',
        '--disable-pip-version-check',
        '--no-deps',
        '--no-build-isolation',
        '-w',
        here / 'dist',
        here / 'source',
    )
    return next((here / 'dist').glob('*.whl'))


@pytest.fixture(scope='module')
def environment(wheel, tmp_path_factory) -> Path:
    "Return the bin folder of a new environment. It sees our dependencies, but not the editable flowerdiff."
    venv = tmp_path_factory.mktemp('environment') / 'venv'
    call(sys.executable, '-m', 'venv', '--without-pip', venv)
    packages = venv / 'lib' / f'python{sys.version_info.major}.{sys.version_info.minor}' / 'site-packages'
    call(
        sys.executable,
        '-m',
        'pip',
        '--python',
        venv / 'bin/python',
        'install',
        '-q',
        '--disable-pip-version-check',
        '--no-deps',
        '--no-index',
        wheel,
    )
    # a plain path: the .pth files in it, of editable installs, are not read
    (packages / 'dependencies.pth').write_text(sysconfig.get_path('purelib') + '\n')
    return venv / 'bin'


def clean_environment() -> dict:
    ours = ('PYTHON', 'FLOWERDIFF', 'VIRTUAL_ENV', 'COV')
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return kept | dict(OMP_NUM_THREADS='1', JUPYTER_PLATFORM_DIRS='1')


def test_wheel_carries_what_a_run_needs(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f'flowerdiff/notebooks/{p.name}' for p in (ROOT / 'nbs/stages').glob('*.ipynb')} | {
        'flowerdiff/notebooks/apps/app.ipynb'
    }
    wanted |= {
        str(p.relative_to(ROOT))
        for sub in ('profiles', 'assets')
        for p in (ROOT / 'flowerdiff' / sub).rglob('*')
        if p.is_file() and '__pycache__' not in p.parts
    }
    wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / 'flowerdiff').rglob('*.py')}
    assert len(wanted) > 40 and not wanted - inside
    assert not [f for f in inside if f.startswith(('tests/', 'nbs/', 'benchmarks/', 'build/'))]
    assert any(f.endswith('licenses/LICENSE') for f in inside)


def test_wheel_runs_from_elsewhere(environment, tmp_path):
    from flowerdiff import __version__

    env = clean_environment()
    assert __version__ in call(environment / 'flowerdiff', '--version', cwd=tmp_path, env=env)
    where = call(
        environment / 'python',
        '-c',
        'import flowerdiff, torch; print(flowerdiff.__file__)',
        cwd=tmp_path,
        env=env,
    )
    assert str(environment.parent) in where, 'the wheel, not the source tree'


def test_wheel_does_the_main_job(environment, tmp_path):
    "The wheel finds its notebooks, profiles, assets and kernel, DVC, and itself as a training process."
    sets = [a for key, value in DEMO.items() for a in ('--set', f'{key}={json.dumps(value)}')]
    out = call(environment / 'flowerdiff', 'run', *sets, cwd=tmp_path, env=clean_environment())
    space = tmp_path / 'garden'
    assert (space / 'model/model_index.json').is_file() and (space / 'report/index.html').is_file(), out
    assert 'report/index.html' in out
    call(
        environment / 'flowerdiff',
        'generate',
        'a red rose',
        '--steps',
        '2',
        '-o',
        'rose.png',
        cwd=tmp_path,
        env=clean_environment(),
    )
    assert (tmp_path / 'rose.png').read_bytes().startswith(b'\x89PNG')
