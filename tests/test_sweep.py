"A sweep from the command line, through papermill."

import json
import subprocess
import sys
from pathlib import Path

import pytest


def sweep(root, *sets):
    words = [word for setting in sets for word in ('--set', setting)]
    command = [sys.executable, '-m', 'flowerdiff.pipeline.cli', 'sweep', str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_two_points_one_that_fails_and_the_parent_untouched(tmp_path):
    import torch

    from flowerdiff.core.workspace import demo_workspace

    if torch.cuda.is_available():
        pytest.skip('float16 is refused on a CPU only')
    ws = demo_workspace('encode', copy_to=tmp_path / 'demo')
    sets = ('train.precision=fp16,fp32', 'train.epochs=1', 'tracking.enabled=false')
    done = sweep(ws.root, *sets)
    assert done.returncode == 0, done.stdout + done.stderr
    points = json.loads((ws.root / 'sweeps' / 'sweep.json').read_text())['points']
    assert [p['settings']['train.precision'] for p in points] == ['fp32', 'fp16']  # best first
    assert 'fp16 is not for training on a CPU' in points[1]['failed'] and 'Traceback' not in done.stdout
    mine = Path(points[0]['folder'])
    trained = json.loads((mine / 'train.json').read_text())
    assert trained['validation']['loss'] == points[0]['loss']
    assert (mine / 'report' / 'index.html').exists()
    assert (ws.root / 'sweeps' / 'sweep.png').read_bytes()[:4] == b'\x89PNG'
    assert not (ws.root / 'model').exists() and not (ws.root / 'train.json').exists()
    assert all(f.stat().st_nlink > 1 for f in (mine / 'encoded' / 'train').glob('*.bin'))
    assert f'{points[0]["loss"]:.4f}' in done.stdout.split('train.precision  loss')[1]
    before = (mine / 'train.json').stat().st_mtime_ns
    assert sweep(ws.root, *sets).returncode == 0 and (mine / 'train.json').stat().st_mtime_ns == before


@pytest.mark.parametrize(
    'sets, message',
    [
        (['train.lr=1e-4'], 'nothing varies'),
        (['train.lr=1e-4,x'], 'must be a number'),
        (['train.lrr=1,2'], 'did you mean train.lr'),
        (['seed=' + ','.join(map(str, range(65)))], '65 runs are more than 64'),
    ],
)
def test_mistakes_are_one_line(tmp_path, sets, message):
    done = sweep(tmp_path / 'w', *sets)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count('\n') == 1
    assert not (tmp_path / 'w' / 'sweeps').exists()
