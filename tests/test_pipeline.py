"What DVC decides, how a run is stopped, and what a killed run leaves. `toy` in conftest makes the stages."

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import STAGES

from flowerdiff.pipeline.dvc_graph import GRAPH

LINE = re.compile(r'^(\w+) +(?:\d+ h )?(?:\d+ min )?[\d.]+ (?:s|min) ', re.M)


def ran(p):
    "Return the stages that a process ran."
    return LINE.findall(p.stdout)


def processes(root):
    "Return all processes that work for a workspace."
    out = []
    for p in psutil.process_iter():
        try:
            if str(root) in ' '.join(p.cmdline()) or p.cwd().startswith(str(root)):
                out.append(p)
        except psutil.Error:
            pass
    return [p for p in out if p.status() != psutil.STATUS_ZOMBIE]


def wait(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'it did not happen'
        time.sleep(0.1)


@pytest.fixture(scope='module')
def done(toy, tmp_path_factory):
    root = tmp_path_factory.mktemp('ws') / 'garden'
    base = root.parent / 'outside' / 'base'
    (base / 'model').mkdir(parents=True)
    (base / 'model' / 'model_index.json').write_text('{}')
    features = root.parent / 'outside' / 'squeeze.safetensors'
    features.write_text('1')
    sets = [
        'train.epochs=2',
        f'train.init={base}',
        'caption.captioner=florence',
        f'caption.model={base}',
        f'evaluate.features={features}',
        f'evaluate.baseline={base}',
        f'encode.vae_features={features}',
    ]
    p = toy('run', root, *[word for setting in sets for word in ('--set', setting)])
    assert p.returncode == 0, p.stdout + p.stderr
    return root, p


@pytest.fixture
def ws(done, tmp_path):
    return shutil.copytree(done[0], tmp_path / 'garden', symlinks=True)


def test_first_run_goes_through_all_stages_and_names_what_to_do_next(done):
    root, p = done
    assert ran(p) == STAGES
    assert 'train is done' in p.stdout and 'report/index.html' not in p.stdout
    assert 'flowerdiff generate' in p.stdout and 'flowerdiff studio' in p.stdout
    assert sorted(n.name for n in (root / 'notebooks').iterdir()) == [
        f'{i:02d}_{s}.ipynb' for i, s in enumerate(STAGES, 1)
    ]
    assert (
        not (root / '.dvc' / 'cache').exists()
        and 'analytics = false' in (root / '.dvc' / 'config').read_text()
    )


def test_second_run_does_nothing_quickly(toy, done):
    p = toy('run', done[0], variables={'PYTHONPROFILEIMPORTTIME': '1'})
    assert p.returncode == 0 and ran(p) == [] and 'fresh' in p.stdout
    imported = {line.rsplit('|')[-1].strip() for line in p.stderr.splitlines()}
    assert 'flowerdiff.pipeline.cli' in imported
    assert not imported & {'torch', 'pandas', 'papermill', 'nbformat', 'mlflow', 'transformers'}


def test_changed_setting_reruns_what_depends_on_it(toy, ws):
    p = toy('run', ws, '--set', 'evaluate.steps=7')
    assert ran(p) == ['evaluate', 'publish'], p.stdout + p.stderr
    assert (
        'steps: 7 ' in (ws / 'params.yaml').read_text()
        and '# Sampling steps' in (ws / 'params.yaml').read_text()
    )


def test_status_hashes_as_dvc_does(done):
    from flowerdiff.core.workspace import read_workspace
    from flowerdiff.pipeline.changes import dvc_hash, read_lock

    ws = read_workspace(done[0])
    outputs = [output for entry in read_lock(ws).values() for output in entry['outs']]
    assert len(outputs) == 12
    for output in outputs:
        assert dvc_hash(ws.root / output['path']) == output['md5'], output['path']


def status_lines(toy, ws):
    return {line.split()[0]: line for line in toy('status', ws).stdout.splitlines()}


def test_status_says_what_is_stale_and_why(toy, ws):
    text = (ws / 'params.yaml').read_text()
    (ws / 'params.yaml').write_text(
        text.replace('lr: 0.0015', 'lr: 0.001', 1)
        if 'lr: 0.0015' in text
        else re.sub(r'  lr: \S+', '  lr: 0.00123', text, count=1)
    )
    out = status_lines(toy, ws)
    assert 'fresh' in out['prepare'] and 'fresh' in out['upload']
    assert re.search(r'stale .*train.lr 0.002 -> 0.00\d+$', out['train']), out['train']
    assert 'stale' in out['promote'] and 'train is stale' in out['promote']
    shutil.copy(ws / 'params.yaml', ws / 'keep')
    (ws / 'params.yaml').write_text(text)
    out = status_lines(toy, ws)
    assert 'skipped' in out['tensorrt'] and 'no GPU' in out['tensorrt']


def snapshot(root):
    "Return names, sizes and times of all files."
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob('*') if p.is_file()}


def test_outside_inputs_are_dependencies_and_status_names_them(toy, ws, done):
    outside = done[0].parent / 'outside'
    kept = shutil.copytree(outside, outside.with_name('kept'))
    base = outside / 'base'
    try:
        (base / 'model' / 'model_index.json').write_text('{"a": 1}')
        (base / 'log').write_text('a workspace may go on; only its model counts')
        (outside / 'squeeze.safetensors').write_text('12')
        before = snapshot(ws)
        out = status_lines(toy, ws)
        assert snapshot(ws) == before  # status writes nothing
        assert 'fresh' in out['prepare']
        assert out['caption'].endswith('caption.model: the folder changed')
        assert out['encode'].endswith('encode.vae_features: the file changed')
        assert out['train'].endswith('train.init: the folder changed')
        measures = 'evaluate.features: the file changed, evaluate.baseline: the folder changed'
        assert out['evaluate'].endswith(measures)
        shutil.rmtree(base)
        assert f'train.init: {base} is gone' in status_lines(toy, ws)['train']
    finally:
        shutil.rmtree(outside)
        kept.rename(outside)


def test_status_of_a_copy_that_may_not_be_written(toy, ws):
    from test_cli import give_up_root_rights

    for path in [ws, *ws.rglob('*')]:  # a copy's files have new times: status has to hash them
        os.utime(path)
        if path.is_dir():
            path.chmod(0o555)
    try:
        p = toy('status', ws, preexec_fn=give_up_root_rights)
    finally:
        for path in [ws, *ws.rglob('*')]:
            if path.is_dir():
                path.chmod(0o755)
    assert p.returncode == 0 and 'stale' not in p.stdout, p.stdout + p.stderr
    (ws / 'pictures' / 'data.txt').write_text('by hand')
    assert 'pictures was changed by hand' in status_lines(toy, ws)['prepare']


def test_refused_commands_change_nothing(toy, ws, tmp_path):
    refused = [
        ['run', ws, '--set', 'train.init=123'],
        ['run', ws, '--set', 'train.lr=0'],
        ['run', ws, '--set', 'train.lr=0.1', '--only', 'train', '--from', 'encode'],
        ['run', ws, '--set', 'train.lr=0.1', '--only', 'train', '--to', 'encode'],
        ['run', ws, '--set', 'train.lr=0.1', '--from', 'train', '--to', 'encode'],
        ['run', ws, '--set', 'prepare.source=garden', '--pictures', tmp_path],
        ['run', ws, '--set', f'prepare.source={tmp_path}/none'],
        ['run', ws, '--set', 'seed=3', '--profile', 'folder'],
        ['init', ws, '--set', 'evaluate.features=x.pt'],
        ['sweep', ws, '--set', 'train.lr=0.1,0.2', '--set', 'seed=-1'],
        ['run', tmp_path / 'new', '--set', 'train.init=123'],
        ['run', tmp_path / 'new', '--set', 'seed=3', '--only', 'train'],
        ['sweep', tmp_path / 'new', '--set', 'train.lr=0.1,-1'],
    ]
    before = snapshot(ws)
    for command in refused:
        p = toy(*command)
        assert p.returncode == 2 and p.stderr.count('\n') == 1, (command, p.stdout, p.stderr)
    assert snapshot(ws) == before
    assert not (tmp_path / 'new').exists()


def test_run_to_a_stage(toy, ws):
    p = toy('run', ws, '--set', 'prepare.count=5', '--to', 'caption')
    assert ran(p) == ['prepare', 'caption'], p.stdout + p.stderr
    out = status_lines(toy, ws)
    assert out['encode'].endswith('pictures has changed')


def test_text_settings_take_what_looks_like_a_number(toy, ws):
    p = toy('run', ws, '--set', 'publish.repo_name=2026-11-29', '--only', 'publish')
    assert ran(p) == ['publish'], p.stdout + p.stderr
    assert "repo_name: '2026-11-29'" in (ws / 'params.yaml').read_text()


def test_no_better_model_leaves_what_follows_fresh(toy, ws):
    before = os.stat(ws / 'model').st_ino
    assert ran(toy('run', ws, '--set', 'promote.margin=1')) == ['promote']
    assert os.stat(ws / 'model').st_ino == before


def test_comments_do_not_rerun_and_code_does(toy, ws):
    helper = toy.package / 'toolbox.py'
    source = helper.read_text()
    try:
        helper.write_text(source.replace('"Doubles."', '"Twice as much."') + '# a comment\n')
        assert ran(toy('run', ws)) == []
        helper.write_text(source.replace('2*x', '3*x'))
        out = status_lines(toy, ws)
        assert 'the code' in out['encode'] and 'the code' in out['train'] and 'fresh' in out['prepare']
    finally:
        helper.write_text(source)


def test_pictures_outside_are_a_dependency(toy, ws, tmp_path):
    folder = tmp_path / 'photos'
    folder.mkdir()
    (folder / 'a.png').write_bytes(b'1')
    p = toy('run', ws, '--pictures', os.path.relpath(folder, tmp_path), '--only', 'prepare', cwd=tmp_path)
    assert ran(p) == ['prepare'] and f'source: {folder}' in (ws / 'params.yaml').read_text(), (
        p.stdout + p.stderr
    )
    assert ran(toy('run', ws, '--only', 'prepare')) == []
    (folder / 'b.png').write_bytes(b'2')
    assert ran(toy('run', ws, '--only', 'prepare')) == ['prepare']


def test_only_force_and_missing_input(toy, ws):
    assert ran(toy('run', ws, '--only', 'onnx', '--force')) == ['onnx']
    shutil.rmtree(ws / 'encoded')
    p = toy('run', ws, '--from', 'train')
    assert (
        p.returncode == 2
        and p.stderr.strip() == f'train needs {ws}/encoded, which is not there; run encode first'
    )


def test_a_mistake_is_one_line_and_a_bug_names_notebook_and_log(toy, ws):
    p = toy('run', ws, '--set', 'prepare.count=13')
    assert (p.returncode, p.stderr.strip()) == (2, 'prepare.count: 13 is unlucky; take another')
    p = toy('run', ws, '--set', 'prepare.count=14')
    assert p.returncode == 1 and p.stderr.count('\n') == 1
    assert (
        'ZeroDivisionError: a bug' in p.stderr
        and 'notebooks/01_prepare.ipynb' in p.stderr
        and 'log' in p.stderr
    )
    assert (ws / 'pictures' / 'data.txt').exists()  # the old ones stay


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_training_leaves_nothing_running_and_goes_on(toy, ws, number):
    p = toy('run', ws, '--set', 'train.epochs=400', popen=True)
    events = ws / 'work' / 'train-toy' / 'events.jsonl'
    wait(lambda: '"step": 9,' in events.read_text())
    start = time.time()
    os.killpg(p.pid, number)
    _out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and time.time() - start < 40
    step = int(re.fullmatch(r'stopped in train at step (\d+); run the same command to continue\n', err)[1])
    assert not processes(ws)
    assert (ws / 'candidate' / 'data.txt').exists()  # the old candidate
    p = toy('run', ws, '--set', f'train.epochs={step + 2}', '--only', 'train')
    assert ran(p) == ['train'] and f'"resumed_from": {step}' in events.read_text()


def test_status_and_refusals_during_a_run(toy, ws):
    p = toy('run', ws, '--set', 'train.epochs=400', popen=True)
    events = ws / 'work' / 'train-toy' / 'events.jsonl'
    try:
        wait(lambda: '"total": 400' in events.read_text())
        before = (ws / 'params.yaml').read_bytes()
        q = toy('status', ws, '--json')
        data = json.loads(q.stdout)
        running = data['running']
        assert running['stage'] == 'train' and running['total'] == 400 and running['rate'] == 100
        assert 0 < running['done'] < 400 and running['seconds_left'] > 0
        states = {stage['stage']: stage['state'] for stage in data['stages']}
        assert (states['encode'], states['train'], states['promote']) == ('fresh', 'running', 'stale')
        for command in (
            ['run', ws, '--set', 'train.lr=0.005'],
            ['init', ws, '--set', 'seed=4'],
            ['rollback', ws],
            ['sweep', ws, '--set', 'train.lr=0.1,0.2'],
        ):
            q = toy(*command)
            assert q.returncode == 2 and 'another flowerdiff run works here' in q.stderr, command
        assert (ws / 'params.yaml').read_bytes() == before
        assert re.search(
            r'^train +running .* step \d+/400, 100 samples/s, .* left$', toy('status', ws).stdout, re.M
        )
    finally:
        os.killpg(p.pid, signal.SIGINT)
        p.communicate(timeout=60)
    assert json.loads(toy('status', ws, '--json').stdout)['running'] is None


@pytest.mark.parametrize('ignored', [True, False])
def test_hangup(toy, ws, ignored):
    "Under nohup a run survives its terminal; else it stops cleanly."
    words = ['run', ws, '--set', 'train.epochs=400', '--only', 'train']
    action = signal.SIG_IGN if ignored else signal.SIG_DFL
    p = toy(*words, popen=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, action))
    events = ws / 'work' / 'train-toy' / 'events.jsonl'
    wait(lambda: '"total": 400' in events.read_text())
    if ignored:
        family = [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]
        lines = [Path(f'/proc/{q.pid}/status').read_text(encoding='utf-8') for q in family]
        masks = [int(re.search(r'SigIgn:\s*(\w+)', text)[1], 16) for text in lines]
        assert len(masks) > 3 and all(mask & 1 for mask in masks), masks
        os.kill(p.pid, signal.SIGHUP)
        time.sleep(1)
        assert p.poll() is None
        os.kill(p.pid, signal.SIGTERM)
    else:
        os.kill(p.pid, signal.SIGHUP)
    err = p.communicate(timeout=60)[1]
    assert p.returncode == 130 and re.fullmatch(r'stopped in train at step \d+; run the same .*\n', err), err
    assert not processes(ws)


def only_line(p):
    "Return the only line of a failure. It has no word of DVC, of Python or of the machinery."
    assert p.stderr.count('\n') == 1, p.stderr
    foreign = 'ERROR|Traceback|dvc repro|reproduce|rwlock|Errno|exited with|DVC stopped'
    assert not re.search(foreign, p.stderr), p.stderr
    return p.stderr.strip()


def ended(p):
    "Wait for a process and return it, with what it printed."
    out, err = p.communicate(timeout=90)
    return subprocess.CompletedProcess(p.args, p.returncode, out, err)


def running_stage(ws):
    "Return the stage that runs."
    file = ws / '.flowerdiff' / 'running.json'
    return json.loads(file.read_text())['stage'] if file.exists() else ''


def test_settings_edited_during_a_run_are_for_the_next_one(toy, ws):
    "Fails if a stage or DVC reads params.yaml while a run is under way."
    params = ws / 'params.yaml'
    p = toy('run', ws, '--set', 'prepare.count=18', '--to', 'encode', popen=True)
    wait(lambda: running_stage(ws) == 'prepare')
    text = re.sub('  per_picture: [^#\n]*', '  per_picture: 7 ', params.read_text(), count=1)
    params.write_text(text.replace('  count: 18', '  count: 19', 1))
    (ws / 'go').touch()
    done = ended(p)
    assert done.returncode == 0 and ran(done) == ['prepare', 'caption', 'encode'], done.stdout + done.stderr
    assert 'params.yaml was changed during this run' in done.stdout
    assert json.loads((ws / 'pictures' / 'data.txt').read_text())['count'] == 18
    assert json.loads((ws / 'captions' / 'data.txt').read_text())['per_picture'] != 7
    out = status_lines(toy, ws)
    assert out['prepare'].endswith('prepare.count 18 -> 19'), out['prepare']
    assert re.search(r'stale .*caption.per_picture \d+ -> 7', out['caption']), out['caption']
    assert ran(toy('run', ws, '--only', 'caption')) == ['caption']


def test_a_broken_params_file_stops_no_run_that_is_under_way(toy, ws):
    p = toy('run', ws, '--set', 'prepare.count=18', '--to', 'caption', popen=True)
    wait(lambda: running_stage(ws) == 'prepare')
    (ws / 'params.yaml').write_text('prepare: [')
    (ws / 'go').touch()
    done = ended(p)
    assert ran(done) == ['prepare', 'caption'], done.stdout + done.stderr
    assert 'params.yaml' in only_line(done)


@pytest.fixture
def small_disk(tmp_path):
    "A disk of eight megabytes, and a function that fills it."
    place = tmp_path / 'disk'
    place.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', str(place)]
    if not shutil.which('mount') or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('needs the right to mount a disk')

    def fill():
        with suppress(OSError), open(place / 'ballast', 'wb', buffering=0) as file:
            while True:
                file.write(b'0' * 4096)

    yield place, fill
    subprocess.run(['umount', '-l', str(place)], check=True)


def test_a_full_disk_ends_a_run_with_one_line(toy, done, small_disk):
    "Fails if a thread, a stage, DVC or the log of a run waits or speaks on its own when the disk is full."
    place, fill = small_disk
    ws = shutil.copytree(done[0], place / 'garden', symlinks=True)
    p = toy('run', ws, '--set', 'prepare.count=18', '--only', 'prepare', popen=True)
    wait(lambda: running_stage(ws) == 'prepare')
    fill()
    (ws / 'go').touch()
    end = ended(p)
    assert end.returncode == 2 and 'the disk is full' in only_line(end)
    assert toy('status', ws).returncode == 0
    again = toy('run', ws, '--only', 'prepare')  # full from the start
    assert again.returncode == 2 and 'the disk is full' in only_line(again)
    (place / 'ballast').unlink()
    assert ran(toy('run', ws, '--only', 'prepare')) == ['prepare']


def test_a_log_that_cannot_be_written_stops_no_run(toy, ws):
    "Fails if the thread that reads what DVC prints dies with its log: the run would wait for ever."
    (ws / 'work' / 'run.log').unlink()
    (ws / 'work' / 'run.log').mkdir()
    assert ran(toy('run', ws, '--only', 'onnx', '--force', timeout=120)) == ['onnx']


def test_what_dvc_finds_is_said_in_our_words(toy, ws):
    import fcntl

    (ws / '.dvc' / 'tmp' / 'rwlock').write_text('{')  # a full disk may cut it
    with open(ws / '.dvc' / 'tmp' / 'lock', 'a', encoding='utf-8') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        p = toy('run', ws, '--only', 'onnx', '--force')
    assert p.returncode == 2 and 'DVC works here, started by hand' in only_line(p)
    (ws / 'dvc.lock').write_text('stages: {prepare: 3}')
    for command in ('run', 'status'):
        p = toy(command, ws)
        assert p.returncode == 2 and 'dvc.lock: is damaged; delete it' in only_line(p)


def test_a_killed_kernel_says_memory(toy, ws):
    p = toy('run', ws, '--set', 'prepare.count=17', '--only', 'prepare')
    line = only_line(p)
    assert p.returncode == 2 and 'memory' in line and 'lower prepare.resolution' in line, line


def training(toy, ws):
    "Start a long training, and wait until it makes steps."
    p = toy('run', ws, '--set', 'train.epochs=400', '--only', 'train', popen=True)
    events = ws / 'work' / 'train-toy' / 'events.jsonl'
    wait(lambda: '"total": 400' in events.read_text())
    return p, events


def test_killed_dvc_ends_the_run(toy, ws):
    "Fails if the run waits for ever, or tells what DVC told."
    p, events = training(toy, ws)
    psutil.Process(p.pid).children()[0].kill()
    end = ended(p)
    assert end.returncode == 1 and 'was killed (signal 9); run the same command' in only_line(end)
    assert not processes(ws) and '"stopped"' in events.read_text()  # training could save


def test_a_killed_run_takes_its_processes_along(toy, ws):
    p, events = training(toy, ws)
    p.kill()
    p.communicate()
    wait(lambda: not processes(ws))
    stopped = [json.loads(line) for line in events.read_text().splitlines()][-1]
    assert stopped['event'] == 'stopped'
    steps = stopped['step'] + 2
    again = toy('run', ws, '--set', f'train.epochs={steps}', '--only', 'train')
    assert ran(again) == ['train'] and f'"resumed_from": {stopped["step"]}' in events.read_text()


def test_the_next_run_ends_what_a_killed_one_left(toy, ws):
    p, events = training(toy, ws)
    worker = 'flowerdiff.training.worker'
    for q in [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]:
        if worker not in q.cmdline():
            q.kill()
    p.communicate()
    assert any(worker in q.cmdline() for q in processes(ws))
    again = toy('run', ws, '--set', 'train.epochs=1', '--only', 'train')
    assert again.stdout.startswith('an earlier run was killed; ended 1 process'), again.stdout + again.stderr
    assert ran(again) == ['train'] and '"stopped"' in events.read_text() and not processes(ws)


def test_moved_workspace_is_fresh(toy, ws, tmp_path):
    moved = ws.rename(tmp_path / 'elsewhere')
    p = toy('run', moved)
    assert p.returncode == 0 and ran(p) == [] and not ws.exists(), p.stdout + p.stderr


def test_killed_outright_leaves_the_old_folder_whole(toy, ws):
    p = toy('run', ws, '--set', 'prepare.count=15', popen=True)
    wait(lambda: list(ws.glob('.pictures.tmp-*/half')))
    for q in [*psutil.Process(p.pid).children(recursive=True), psutil.Process(p.pid)]:
        q.kill()
    p.communicate()
    wait(lambda: not processes(ws), 20)
    assert json.loads((ws / 'pictures' / 'data.txt').read_text())['count'] == 6000
    p = toy('run', ws, '--set', 'prepare.count=16', '--only', 'prepare')
    assert ran(p) == ['prepare'], p.stdout + p.stderr
    assert not list(ws.glob('.pictures.*'))


def test_two_runs_in_one_workspace(toy, ws):
    import fcntl

    with open(ws / '.flowerdiff' / 'lock', 'a', encoding='utf-8') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        p = toy('run', ws)
    assert p.returncode == 2 and 'another flowerdiff run' in p.stderr


def test_dvc_by_hand(toy, ws):
    env = {
        **os.environ,
        'PYTHONPATH': str(toy.package.parent),
        'DVC_NO_ANALYTICS': '1',
        'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
    }
    p = subprocess.run(
        [sys.executable, '-m', 'dvc', 'status'], cwd=ws, env=env, capture_output=True, text=True
    )
    assert 'up to date' in p.stdout, p.stdout + p.stderr


def test_the_real_thing(tiny_workspace, cli):
    assert LINE.findall((tiny_workspace.parent / 'run.txt').read_text()) == STAGES
    assert (tiny_workspace / 'report' / 'index.html').exists() and (
        tiny_workspace / 'model' / 'model_index.json'
    ).exists()
    p = cli('run', tiny_workspace)
    assert p.returncode == 0 and ran(p) == []


def test_real_training_stops_at_ctrl_c_and_goes_on(tiny_workspace, cli, tmp_path):
    root = shutil.copytree(tiny_workspace, tmp_path / 'garden', symlinks=True)
    command = [
        'run',
        str(root),
        '--only',
        'train',
        '--set',
        'train.epochs=60',
        '--set',
        'tracking.enabled=false',
    ]
    p = subprocess.Popen(
        [sys.executable, '-P', '-m', 'flowerdiff.pipeline.cli', *command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )

    def step():
        files = [f for f in root.glob('work/train-*/events.jsonl') if f.stat().st_mtime > begun]
        lines = [line for f in files for line in f.read_text().splitlines() if line.endswith('}')]
        return max((json.loads(line).get('step', 0) for line in lines), default=0)

    begun = time.time()
    wait(lambda: step() > 20, 300)
    os.killpg(p.pid, signal.SIGINT)
    err = p.communicate(timeout=90)[1]
    message = r'^stopped in train at step ([\d,]+); run the same command to continue$'
    stopped = int(re.search(message, err, re.M)[1].replace(',', ''))
    assert p.returncode == 130 and stopped >= 20 and not processes(root)
    p = cli(*command)
    assert ran(p) == ['train'], p.stdout + p.stderr
    train = json.loads((root / 'train.json').read_text())
    assert train['resumed_from'] == stopped and train['steps'] == 240


OF_A_RUN = {'time', 'seconds', 'latency', 'samples_per_second', 'milliseconds', 'created', 'git'}
OF_A_RUN |= {'sent', 'sent_bytes', 'resumed_from', 'pictures_per_second', 'decision'}
MADE_BESIDE = dict(promote=['work/decisions.jsonl'], publish=['published'])  # what the graph does not name
HOLD_TIMES = ('checksums.json', 'index.html', 'README.md', 'published.json')  # and hashes of such files


def comparable(value, root):
    "Leave out of a record what differs between two undisturbed runs."
    if isinstance(value, dict):
        return {key: comparable(item, root) for key, item in value.items() if key not in OF_A_RUN}
    if isinstance(value, list):
        return [comparable(item, root) for item in value]
    if isinstance(value, str) and re.match(r'\d{4}-\d\d-\d\d', value):
        return 'a time'
    return value.replace(str(root), 'ROOT') if isinstance(value, str) else value


def results(root, stage):
    "Return what a stage has made: file -> content, or its hash."
    from flowerdiff.core.fingerprints import file_sha256

    found = {}
    names = [*GRAPH[stage].writes, *MADE_BESIDE.get(stage, [])]
    for name in names:
        for path in sorted([root / name, *(root / name).rglob('*')]):
            if path.name in HOLD_TIMES:
                continue
            if path.suffix in ('.json', '.jsonl'):
                lines = [path.read_text()] if path.suffix == '.json' else path.read_text().splitlines()
                found[str(path.relative_to(root))] = [comparable(json.loads(line), root) for line in lines]
            elif path.is_file():
                found[str(path.relative_to(root))] = file_sha256(path)
    assert found
    return found


def differences(one, other):
    "Name the results that differ, and for records the keys."
    return [
        f'{name} {differing_keys(one.get(name), other.get(name))}'
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name)
    ]


def differing_keys(a, b):
    rows = zip(a, b) if isinstance(a, list) and isinstance(b, list) else []
    return [key for x, y in rows if isinstance(x, dict) for key in {*x, *y} if x.get(key) != y.get(key)]


def interrupted(root, stage, seconds, number):
    "Run a workspace up to a stage, send a signal while this stage runs, and return the exit code."
    words = [sys.executable, '-P', '-m', 'flowerdiff.pipeline.cli', 'run', str(root), '--to', stage]
    begun = time.time()
    state = root / '.flowerdiff' / 'running.json'
    p = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def is_there():
        new = state.exists() and state.stat().st_mtime > begun
        return p.poll() is not None or (new and running_stage(root) == stage)

    wait(is_there, 120)
    time.sleep(seconds)
    p.send_signal(number)
    end = ended(p)
    assert end.returncode in (-number, 130, 0), end.stdout + end.stderr
    if end.returncode == 130:
        assert re.fullmatch(r'stopped( in \w+)?( at step \d+)?; run the same command .*', only_line(end))
    wait(lambda: not processes(root))
    return end.returncode


@pytest.mark.skipif('FLOWERDIFF_INTERRUPTS' not in os.environ, reason='takes minutes')
def test_an_interrupted_stage_ends_like_an_undisturbed_one(tiny_workspace, cli, tmp_path):
    """Interrupt each stage at random moments, again and again, and compare what it has made in the end.

    FLOWERDIFF_INTERRUPTS: how many times, each stage. Without it, the test is skipped.
    """
    root = tmp_path / 'garden'
    root.mkdir()
    shutil.copy(tiny_workspace / 'params.yaml', root)
    rng = random.Random(0)
    for stage in GRAPH:
        whole = results(tiny_workspace, stage)
        record = json.loads((tiny_workspace / 'work' / 'records' / f'{stage}.json').read_text())
        before = shutil.copytree(root, tmp_path / stage, symlinks=True)
        codes = []
        for _ in range(int(os.environ['FLOWERDIFF_INTERRUPTS'])):
            number = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            codes.append(interrupted(root, stage, rng.uniform(0, 1.2 * record['seconds']), number))
            if codes[-1] == 0:  # it was too late: begin anew
                assert not differences(results(root, stage), whole)
                shutil.rmtree(root)
                shutil.copytree(before, root, symlinks=True)
        p = cli('run', str(root), '--to', stage)
        assert p.returncode == 0, p.stdout + p.stderr
        assert not differences(results(root, stage), whole)
        print(f'{stage}: {len(codes)} signals, {sum(code != 0 for code in codes)} stopped the run')
